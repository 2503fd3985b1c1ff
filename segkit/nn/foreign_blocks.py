"""Attention blocks of networks that segkit did not build, found by type and shape.

A network runs once. A module counts as an attention block if its class has such a name
(`TransformerBlock`, `SwinTransformerBlock`, `AttentionBlock`, `ChannelSELayer` and so on). Its
output must also have the shape of its features, so that the identity can replace it. If blocks are
nested, only the outermost counts.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from segkit.nn.gates import Gate
from segkit.nn.map_tap import features_argument

WHOLE_BLOCK = re.compile(r".*transformer(encoder)?(block|layer)")
"""Classes of whole blocks: attention, perceptron and their shortcuts."""
ATTENTION = re.compile(
    r".*(attention|attn)(block|gate|module)?([23]d)?"
    r"|(channel|spatial|residual|concurrent)*s?c?se(block|layer|module)?([23]d)?"
    r"|c?bam(block)?|sablock|e?ca(block|layer|module)|epa|gcblock|lka([23]d)?"
    r"|squeeze(and)?excit(e|ation)(block|layer)?"
)
"""Classes of attention, which may be a part of a block."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_attention(module: nn.Module) -> bool:
    """Whether the name of a module's class is one of attention, or of a gate."""
    kind = type(module).__name__.lower().replace("_", "")
    return ATTENTION.fullmatch(kind) is not None or isinstance(module, Gate)


@dataclass(frozen=True)
class Call:
    """The shapes of one call of a module."""

    features: tuple[int, ...] | None
    """Shape of the argument that the identity would return; None if it is not a tensor."""
    output: tuple[int, ...] | None
    """Shape of the output; None if it is not a tensor."""

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the features."""
        return self.output is not None and self.features == self.output


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


def calls_of(network: nn.Module, run: Callable[[], object]) -> dict[str, Call]:
    """Runs a network by `run`, and returns the last call of each module by the module's name."""
    found: dict[str, Call] = {}
    handles = []
    for name, module in network.named_modules():

        def keep(
            module: nn.Module,
            given: tuple[object, ...],
            named: Mapping[str, object],
            output: object,
            name: str = name,
        ) -> None:
            place, argument = features_argument(module)
            features = named.get(argument, given[place] if place < len(given) else None)
            found[name] = Call(_shape(features), _shape(output))

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    try:
        with in_prediction(network):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def foreign_blocks(
    network: nn.Module, run: Callable[[], object], *, but: tuple[type[nn.Module], ...] = ()
) -> list[str]:
    """The names of a network's attention blocks.

    Args:
        network: any network.
        run: runs the network once.
        but: types of modules that are left out, together with the modules in them.
    """
    calls = calls_of(network, run)
    modules = dict(network.named_modules())
    left_out = [name for name, module in modules.items() if isinstance(module, but)]
    found: list[str] = []
    for name, module in modules.items():
        if not name or name not in calls or _within(name, [*left_out, *found]):
            continue
        kind = type(module).__name__.lower().replace("_", "")
        whole = WHOLE_BLOCK.fullmatch(kind) is not None
        # Some libraries use a wrapper for a choice of attention, which may be empty.
        if not (whole or ATTENTION.fullmatch(kind)) or not any(True for _ in module.parameters()):
            continue
        block = name if whole else _around(name, modules, calls)
        if calls[block].keeps_shape:
            found.append(block)
    return found


def _around(name: str, modules: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> str:
    """The block to which a module of attention belongs, with its shortcuts and its perceptron.

    It is the outermost module that keeps the shape and contains neither other attention nor a
    convolution over more than one voxel.

    Args:
        name: name of the module of attention.
        modules: all modules of the network, by name.
        calls: the call of each module that ran.
    """
    block = name
    while (parent := block.rpartition(".")[0]) and not isinstance(
        modules[parent], nn.ModuleList | nn.ModuleDict | nn.Sequential
    ):
        kinds = [
            part
            for place, part in modules[parent].named_modules()
            if place
            and not _within(f"{parent}.{place}", [name])
            and ATTENTION.fullmatch(type(part).__name__.lower().replace("_", ""))
        ]
        convolves = any(
            isinstance(part, CONVOLUTIONS) and max(part.kernel_size) > 1
            for part in modules[parent].modules()
        )
        if parent not in calls or not calls[parent].keeps_shape or kinds or convolves:
            break
        block = parent
    return block


def _within(name: str, others: list[str]) -> bool:
    return any(not other or name == other or name.startswith(f"{other}.") for other in others)


def _shape(value: object) -> tuple[int, ...] | None:
    return tuple(value.shape) if isinstance(value, Tensor) else None
