"""Positions of the features of any network: placements, followed from the input layer by layer.

The network runs once, and every call of PyTorch is observed. `segkit.nn.placement_rules` says what
each call does to the positions of cells.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segkit.geometry.grid import Placement
from segkit.nn.placement_rules import (
    FUSED_ATTENTION,
    INTERPOLATIONS,
    Followed,
    followed_by_rule,
    tensors_in,
)
from segkit.nn.running import Given, Named, observing


class Follower(TorchFunctionMode):
    """A context in which `of(tensor)` gives the positions of a tensor's cells.

    Args:
        image: the network's input (batch, channel, *space).
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()
        self.found: dict[int, tuple[weakref.ref[Tensor], Followed]] = {}
        self.fused: set[str] = set()
        """Names of the modules in which fused attention was computed."""
        self.interpolated: list[tuple[Tensor, Tensor]] = []
        """Features before and after each interpolation."""
        self.inside: list[str] = []
        """Names of the modules that are running, the outermost first."""
        space = tuple(image.shape[2:])
        axes = tuple(range(2, image.ndim))
        self._keep(image, Followed(Placement.identity(len(space)), space, axes, 0))

    def of(self, tensor: object) -> Followed | None:
        """Positions of a tensor's cells; None if they are not known."""
        if not isinstance(tensor, Tensor):
            return None
        reference, followed = self.found.get(id(tensor), (None, None))
        return followed if reference is not None and reference() is tensor else None

    def keys_of(self, attention: Tensor) -> Followed | None:
        """Positions of the keys along the last axis of attention; None if they are not known."""
        followed = self.of(attention)
        for one in (followed, followed.keys if followed is not None else None):
            if one is not None and one.axes == (attention.ndim - 1,):
                return one
        return None

    def _keep(self, tensor: Tensor, followed: Followed) -> None:
        self.found[id(tensor)] = (weakref.ref(tensor), followed)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The result of a call. Its placement is recorded if the call can be followed."""
        named = dict(kwargs or {})
        name = getattr(func, "__name__", "").strip("_")
        if name == FUSED_ATTENTION:
            self.fused.update(self.inside)
        # Looked up before the call, because a call in place changes its argument.
        given = [(self.of(part), part) for part in tensors_in([*args, *named.values()])]
        known = [(followed, part) for followed, part in given if followed is not None]
        result = func(*args, **named)
        if name in INTERPOLATIONS:
            self.interpolated.append((args[0] if args else named["input"], result))
        if known:
            for part in tensors_in([result]):
                followed = followed_by_rule(name, known, part, args, named)
                if followed is not None:
                    self._keep(part, followed)
                else:  # a call in place may have moved the cells of its argument
                    self.found.pop(id(part), None)
        if name == "setitem" and isinstance(args[2], Tensor) and args[2].ndim:
            self.found.pop(id(args[0]), None)
        return result


def followed_calls(
    network: nn.Module, image: Tensor, modules: Mapping[str, nn.Module], watch: "Watch"
) -> Follower:
    """Run a network once, and call `watch` after each call of some modules.

    Args:
        network: any network, in evaluation mode.
        image: an input (batch, channel, *space).
        modules: the modules to watch, by name.
        watch: receives the name, the arguments, the named arguments, the output and the follower.

    Returns:
        The follower, which knows the modules that computed fused attention.
    """
    follower = Follower(image)

    def enter(name: str, _: Given, __: Named) -> None:
        follower.inside.append(name)

    def leave(name: str, given: Given, named: Named, output: object) -> None:
        follower.inside.pop()
        if name in modules:
            watch(name, given, named, output, follower)

    with observing(network, enter=enter, leave=leave), torch.no_grad(), follower:
        network(image)
    return follower


Watch = Callable[[str, Given, Named, Any, Follower], None]
