"""Positions of the features of any network: placements, followed from the input layer by layer.

The network runs once, and every call of PyTorch is observed. Convolutions, pooling, interpolation,
padding and slicing change a placement. Operations on single cells, or within channels, keep it.
Cells may lie along any axes (`permute`) or be tokens of a sequence (`flatten`, and back by
`reshape`).

Features of different placements may be combined, such as those of a decoder and of a skip, which
many networks shift by half a voxel. The result has the placement of the features that passed fewer
layers, as in segkit's own U-Nets; if both passed as many, it is the mean of the two placements.
Features that cannot be followed, such as windows of Swin transformers, have no placement until they
are added to features that have one.
"""

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from segkit.geometry.grid import Placement

FUSED_ATTENTION = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Followed:
    """Positions of the cells of a tensor."""

    placement: Placement
    cells: tuple[int, ...]
    """Number of cells along each axis of space."""
    axes: tuple[int, ...]
    """The tensor's axis along each axis of space; a single one if the cells are tokens."""
    depth: int
    """Number of layers, such as convolutions, between it and the input."""

    @property
    def tokens(self) -> bool:
        """Whether all cells lie along one axis of the tensor, in the order of a flattened grid."""
        return len(self.axes) < len(self.cells)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has these cells along these axes."""
        if max(self.axes) >= tensor.ndim:
            return False
        sizes = [math.prod(self.cells)] if self.tokens else list(self.cells)
        return [tensor.shape[axis] for axis in self.axes] == sizes


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
        given = [(self.of(part), part) for part in _tensors([*args, *named.values()])]
        known = [(followed, part) for followed, part in given if followed is not None]
        result = func(*args, **named)
        if known:
            rule = RULES.get(name, _kept)
            for part in _tensors([result]):
                followed = rule(known, part, args, named)
                if followed is not None and followed.fits(part):
                    self._keep(part, followed)
        return result


Known = Sequence[tuple[Followed, Tensor]]
Rule = Callable[[Known, Tensor, Sequence[Any], Mapping[str, Any]], Followed | None]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _kept(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a call that moves no cells: that of the operand that passed fewest layers."""
    fitting = [one for one, _ in known if one.fits(result)]
    if not fitting:
        return None
    depth = min(one.depth for one in fitting)
    first = [one for one in fitting if one.depth == depth]
    if any(one.placement.stride != first[0].placement.stride for one in first):
        return None
    offsets = zip(*(one.placement.offset for one in first), strict=True)
    mean = tuple(sum(each) / len(first) for each in offsets)
    return replace(first[0], placement=Placement(first[0].placement.stride, mean))


def _argument(
    args: Sequence[Any], named: Mapping[str, Any], place: int, name: str, default: Any
) -> Any:
    """An argument of a call, by its position or its name; the default if it is not given."""
    value = named.get(name, args[place] if place < len(args) else default)
    return default if value is None else value


def _each(value: Any, count: int) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple) else (value,) * count


def _onto(one: Followed, result: Tensor, placement: Placement) -> Followed:
    cells = tuple(result.shape[axis] for axis in one.axes)
    return replace(one, placement=placement, cells=cells, depth=one.depth + 1)


def _on_grid(
    rule: Callable[[Followed, Tensor, Sequence[Any], Mapping[str, Any]], Followed],
) -> Rule:
    """The rule of a call that takes (batch, channel, *space); other tensors are not followed."""

    def followed(
        known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
    ) -> Followed | None:
        one, tensor = known[0]
        space = tuple(range(tensor.ndim - len(one.cells), tensor.ndim))
        return rule(one, result, args, named) if one.axes == space else None

    return followed


@_on_grid
def _convolved(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    count = len(one.cells)
    kernel = tuple(_argument(args, named, 1, "weight", None).shape[2:])
    stride = _each(_argument(args, named, 3, "stride", 1), count)
    dilation = _each(_argument(args, named, 5, "dilation", 1), count)
    padding = _argument(args, named, 4, "padding", 0)
    reach = [step * (size - 1) for step, size in zip(dilation, kernel, strict=True)]
    if padding == "same":
        before: tuple[Any, ...] = tuple(size // 2 for size in reach)
    else:
        before = _each(0 if padding == "valid" else padding, count)
    wide = tuple(size + 1 for size in reach)
    return _onto(one, result, one.placement.through(wide, stride, before))


@_on_grid
def _transposed(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    count = len(one.cells)
    kernel = tuple(_argument(args, named, 1, "weight", None).shape[2:])
    stride = _each(_argument(args, named, 3, "stride", 1), count)
    padding = _each(_argument(args, named, 4, "padding", 0), count)
    dilation = _each(_argument(args, named, 7, "dilation", 1), count)
    # The middle of what a cell j writes is output cell s j + d (k - 1) / 2 - p.
    steps, offsets = [], []
    for axis in range(count):
        middle = dilation[axis] * (kernel[axis] - 1) / 2 - padding[axis]
        step = one.placement.stride[axis] / stride[axis]
        steps.append(step)
        offsets.append(one.placement.offset[axis] - step * middle)
    return _onto(one, result, Placement(tuple(steps), tuple(offsets)))


@_on_grid
def _pooled(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    count = len(one.cells)
    kernel = _each(_argument(args, named, 1, "kernel_size", None), count)
    stride = _each(_argument(args, named, 2, "stride", None) or kernel, count)
    padding = _each(_argument(args, named, 3, "padding", 0), count)
    return _onto(one, result, one.placement.through(kernel, stride, padding))


@_on_grid
def _interpolated(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    corners = bool(_argument(args, named, 4, "align_corners", False))
    steps, offsets = [], []
    for axis, (old, new) in enumerate(zip(one.cells, result.shape[2:], strict=True)):
        stride, offset = one.placement.stride[axis], one.placement.offset[axis]
        if corners:
            ratio = (old - 1) / (new - 1) if new > 1 else 1.0
        else:
            ratio = old / new
            offset += stride * (ratio - 1) / 2
        steps.append(stride * ratio)
        offsets.append(offset)
    return _onto(one, result, Placement(tuple(steps), tuple(offsets)))


def _padded(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    one, tensor = known[0]
    if one.tokens:
        return None
    sides = list(_argument(args, named, 1, "pad", ()))
    offsets = list(one.placement.offset)
    for number, before in enumerate(sides[::2]):
        axis = tensor.ndim - 1 - number
        if axis in one.axes:
            place = one.axes.index(axis)
            offsets[place] -= one.placement.stride[place] * before
    return _onto(one, result, Placement(one.placement.stride, tuple(offsets)))


def _sliced(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    one, tensor = known[0]
    wanted = args[1] if isinstance(args[1], tuple) else (args[1],)
    if one.tokens or not all(part is Ellipsis or isinstance(part, slice) for part in wanted):
        return None
    if Ellipsis in wanted:
        place = wanted.index(Ellipsis)
        missing = tensor.ndim - len(wanted) + 1
        wanted = (*wanted[:place], *[slice(None)] * missing, *wanted[place + 1 :])
    steps, offsets = list(one.placement.stride), list(one.placement.offset)
    for axis, part in enumerate(wanted):
        if axis in one.axes:
            place = one.axes.index(axis)
            start, _, step = part.indices(tensor.shape[axis])
            offsets[place] += steps[place] * start
            steps[place] *= step
    return _onto(one, result, Placement(tuple(steps), tuple(offsets)))


def _turned(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    one, tensor = known[0]
    order = named.get("dims", args[1:])
    order = order[0] if len(order) == 1 and isinstance(order[0], list | tuple) else order
    order = [axis % tensor.ndim for axis in order]
    return replace(one, axes=tuple(order.index(axis) for axis in one.axes))


def _exchanged(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    one, tensor = known[0]
    first = _argument(args, named, 1, "dim0", 0) % tensor.ndim
    second = _argument(args, named, 2, "dim1", 0) % tensor.ndim
    order = {first: second, second: first}
    return replace(one, axes=tuple(order.get(axis, axis) for axis in one.axes))


def _reshaped(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a reshape: cells are found as one axis, or as the axes of their grid."""
    one, tensor = known[0]
    if one.axes != tuple(range(one.axes[0], one.axes[0] + len(one.axes))):
        return None  # axes of cells that are not consecutive: a reshape would mix the cells
    before = math.prod(tensor.shape[: one.axes[0]])
    count = math.prod(one.cells)
    passed = 1
    for axis in range(result.ndim):
        if passed == before:
            if result.shape[axis] == count:
                return replace(one, axes=(axis,))
            if tuple(result.shape[axis : axis + len(one.cells)]) == one.cells:
                return replace(one, axes=tuple(range(axis, axis + len(one.cells))))
        passed *= result.shape[axis]
    return None


def _lost(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    return None


RULES: dict[str, Rule] = {
    **{f"conv{n}d": _convolved for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transposed for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _pooled for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _pooled for n in (1, 2, 3)},
    "interpolate": _interpolated,
    "upsample": _interpolated,
    "pad": _padded,
    "getitem": _sliced,
    "permute": _turned,
    "transpose": _exchanged,
    "swapaxes": _exchanged,
    **dict.fromkeys(("flatten", "reshape", "view", "unflatten", "reshape_as"), _reshaped),
    # These may return as many cells as their operand has, but other ones.
    **dict.fromkeys(("roll", "flip", "sort", "gather", "movedim", "unfold", "fold"), _lost),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "grid_sample", "squeeze"), _lost),
    **dict.fromkeys(("unsqueeze", "expand", "repeat", "get", "unbind", "chunk"), _lost),
}


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
    handles = []
    for name, module in network.named_modules():

        def enter(_: nn.Module, __: Any, name: str = name) -> None:
            follower.inside.append(name)

        def leave(
            _: nn.Module,
            args: tuple[Any, ...],
            named: dict[str, Any],
            output: Any,
            name: str = name,
        ) -> None:
            follower.inside.pop()
            if name in modules:
                watch(name, args, named, output, follower)

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with torch.no_grad(), follower:
            network(image)
    finally:
        for handle in handles:
            handle.remove()
    return follower


Watch = Callable[[str, tuple[Any, ...], dict[str, Any], Any, Follower], None]
