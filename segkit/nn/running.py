"""Running any network once: in evaluation mode, with each call of its modules observed."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

Given = tuple[object, ...]
Named = Mapping[str, object]
Enter = Callable[[str, Given, Named], None]
"""Takes the name of a module and the arguments of its call."""
Leave = Callable[[str, Given, Named, object], None]
"""Takes the name of a module, the arguments of its call and its output."""


@contextmanager
def in_prediction(network: nn.Module) -> Iterator[None]:
    """Inside `with`, a network is in evaluation mode without gradients; then it is restored."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: a module may keep tensors that it computes
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextmanager
def observing(network: nn.Module, *, enter: Enter, leave: Leave) -> Iterator[None]:
    """Inside `with`, each call of a module of a network is reported before and after it.

    Args:
        network: any network.
        enter: called before each call.
        leave: called after each call.
    """
    handles = []
    for name, module in network.named_modules():
        before, after = partial(_before, enter, name), partial(_after, leave, name)
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _before(enter: Enter, name: str, _: nn.Module, given: Given, named: Named) -> None:
    enter(name, given, named)


def _after(
    leave: Leave, name: str, _: nn.Module, given: Given, named: Named, output: object
) -> None:
    leave(name, given, named, output)
