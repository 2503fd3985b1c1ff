"""How each call of PyTorch changes the positions of the cells of its arguments.

Convolutions, pooling, interpolation, padding and slicing change a placement. Operations on single
cells, or within channels, keep it. Cells may lie along any axes (`permute`) or be tokens of a
sequence (`flatten`, and back by `reshape`). A product of queries and keys has the cells of both.
After any other operation the placement is not known, because the operation may move cells.

Features of different placements may be combined, such as those of a decoder and of a skip, which
many networks shift by half a voxel. The result has the placement of the features that passed fewer
layers, as in segkit's own U-Nets; if both passed as many, it is the mean of the two placements.
Features that cannot be followed, such as windows of Swin transformers, have no placement until they
are added to features that have one.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from torch import Tensor

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
    keys: "Followed | None" = None
    """Positions of the keys, along another axis; only of a product of queries and keys."""

    @property
    def tokens(self) -> bool:
        """Whether all cells lie along one axis of the tensor, in the order of a flattened grid."""
        return len(self.axes) < len(self.cells)

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor has these cells along these axes."""
        if min(self.axes) < 0 or max(self.axes) >= tensor.ndim:
            return False
        sizes = [math.prod(self.cells)] if self.tokens else list(self.cells)
        return [tensor.shape[axis] for axis in self.axes] == sizes


Known = Sequence[tuple[Followed, Tensor]]
Rule = Callable[[Known, Tensor, Sequence[Any], Mapping[str, Any]], Followed | None]


def tensors_in(values: Sequence[Any]) -> list[Tensor]:
    """All tensors among some values, also in lists and tuples."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors_in(value)
    return found


def followed_by_rule(
    name: str, known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Positions of the cells of a result, and of its keys; None if the call has no rule."""
    rule = RULES.get(name)
    followed = rule(known, result, args, named) if rule is not None else None
    if rule is None or followed is None or not followed.fits(result):
        return None
    keys = followed.keys
    if of_keys := [(one.keys, tensor) for one, tensor in known if one.keys is not None]:
        keys = rule(of_keys, result, args, named)
    return replace(followed, keys=keys if keys is not None and keys.fits(result) else None)


def _kept(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a call on single cells: that of the operand that passed fewest layers."""
    # Operands with fewer axes are broadcast along the first axes.
    moved = [_shifted(one, result.ndim - tensor.ndim) for one, tensor in known]
    fitting = [one for one in moved if one.fits(result)]
    if not fitting:
        return None
    depth = min(one.depth for one in fitting)
    first = [one for one in fitting if one.depth == depth]
    grids = {(one.placement.stride, one.cells, one.axes) for one in first}
    if len(grids) > 1:
        return None
    offsets = zip(*(one.placement.offset for one in first), strict=True)
    mean = tuple(sum(each) / len(first) for each in offsets)
    return replace(first[0], placement=Placement(first[0].placement.stride, mean))


def _shifted(one: Followed, count: int) -> Followed:
    return replace(one, axes=tuple(axis + count for axis in one.axes))


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


OfFirst = Callable[[Followed, Tensor, Tensor, Sequence[Any], Mapping[str, Any]], Followed | None]
"""Takes the positions of the first argument, that argument, the result, and all arguments."""


def _of_first(rule: OfFirst) -> Rule:
    """The rule of a call whose result has the cells of its first argument only."""

    def followed(
        known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
    ) -> Followed | None:
        given = args[0] if args else named.get("input", named.get("query"))
        one, tensor = known[0]
        return rule(one, tensor, result, args, named) if tensor is given else None

    return followed


def _on_grid(
    rule: Callable[[Followed, Tensor, Sequence[Any], Mapping[str, Any]], Followed | None],
) -> Rule:
    """The rule of a call that takes (batch, channel, *space); other tensors are not followed."""

    @_of_first
    def followed(
        one: Followed,
        tensor: Tensor,
        result: Tensor,
        args: Sequence[Any],
        named: Mapping[str, Any],
    ) -> Followed | None:
        space = tuple(range(tensor.ndim - len(one.cells), tensor.ndim))
        return rule(one, result, args, named) if one.axes == space else None

    return followed


@_of_first
def _same(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    """Placement after a call that changes single cells of its first argument, or only copies it."""
    return _shifted(one, result.ndim - tensor.ndim)


@_of_first
def _split(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    """Placement of a part: it has all cells, or does not fit."""
    return one


@_of_first
def _mixed_in_last_axis(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a linear layer, or of queries after attention."""
    return one if tensor.ndim == result.ndim and tensor.ndim - 1 not in one.axes else None


@_of_first
def _reduced(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a mean or maximum along axes, which are not those of the cells."""
    given = named.get("dim", args[1] if len(args) > 1 else None)
    gone = _each(given, 1)
    if any(isinstance(axis, bool) or not isinstance(axis, int) for axis in gone):
        return None
    return _without(one, tensor, result, [axis % tensor.ndim for axis in gone])


@_of_first
def _selected(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    return _without(one, tensor, result, [_argument(args, named, 1, "dim", 0) % tensor.ndim])


def _without(one: Followed, tensor: Tensor, result: Tensor, gone: Sequence[int]) -> Followed | None:
    """Positions after some axes are reduced to size 1, or removed; None if they have cells."""
    if set(gone) & set(one.axes):
        return None
    if result.ndim == tensor.ndim:
        return one
    axes = tuple(axis - sum(other < axis for other in gone) for axis in one.axes)
    return replace(one, axes=axes)


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
def _pooled_to_size(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    sizes = list(zip(one.cells, result.shape[2:], strict=True))
    if any(old % new for old, new in sizes) or all(new == 1 for _, new in sizes):
        return None  # cells of several sizes, or a mean of the whole grid
    step = tuple(old // new for old, new in sizes)
    return _onto(one, result, one.placement.through(step, step, (0,) * len(step)))


@_on_grid
def _interpolated(
    one: Followed, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed:
    mode = _argument(args, named, 3, "mode", "nearest")
    corners = bool(_argument(args, named, 4, "align_corners", False))
    again = bool(_argument(args, named, 5, "recompute_scale_factor", False))
    factors = None if again else _argument(args, named, 2, "scale_factor", None)
    scales = _each(factors, len(one.cells))
    steps, offsets = [], []
    for axis, (old, new) in enumerate(zip(one.cells, result.shape[2:], strict=True)):
        stride, offset = one.placement.stride[axis], one.placement.offset[axis]
        # The step is 1 / factor, although the sizes may have another quotient: 9 x 0.5 gives 4.
        ratio = Fraction(old, new)
        if scales[axis] is not None:
            ratio = 1 / Fraction(scales[axis]).limit_denominator(1000)
        if corners:
            ratio = Fraction(old - 1, new - 1) if new > 1 else Fraction(1)
        elif mode == "nearest":  # cell i comes from floor(ratio i), this much less on average
            offset -= stride * (ratio.denominator - 1) / (2 * ratio.denominator)
        else:
            offset += stride * (float(ratio) - 1) / 2
            if mode == "nearest-exact" and ratio.numerator % 2 == 0:
                # Cell i comes from floor(ratio (i + 1/2)). The floor takes off 1/2 on average, but
                # less from even numerators: nothing from ratio 2, whose cells are 1, 3, 5, ...
                offset += stride / (2 * ratio.denominator)
        steps.append(stride * float(ratio))
        offsets.append(offset)
    return _onto(one, result, Placement(tuple(steps), tuple(offsets)))


@_of_first
def _padded(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
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


@_of_first
def _sliced(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    wanted = args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(
        not (part is None or part is Ellipsis or isinstance(part, slice | int))
        or isinstance(part, bool)
        for part in wanted
    ):
        return None
    missing = tensor.ndim - sum(part is not None and part is not Ellipsis for part in wanted)
    if Ellipsis not in wanted:
        wanted = (*wanted, Ellipsis)
    place = wanted.index(Ellipsis)
    wanted = (*wanted[:place], *[slice(None)] * missing, *wanted[place + 1 :])
    steps, offsets = list(one.placement.stride), list(one.placement.offset)
    axes: dict[int, int] = {}
    axis = new = 0
    for part in wanted:
        if axis in one.axes and part is not None:
            if isinstance(part, int):
                return None
            place = one.axes.index(axis)
            start, stop, step = part.indices(tensor.shape[axis])
            if one.tokens and (start, stop, step) != (0, tensor.shape[axis], 1):
                return None
            offsets[place] += steps[place] * start
            steps[place] *= step
            axes[axis] = new
        axis += part is not None
        new += not isinstance(part, int)
    moved = replace(one, axes=tuple(axes[each] for each in one.axes))
    if one.tokens:
        return moved
    return _onto(moved, result, Placement(tuple(steps), tuple(offsets)))


@_of_first
def _turned(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    order = named.get("dims", args[1:])
    order = order[0] if len(order) == 1 and isinstance(order[0], list | tuple) else order
    order = [axis % tensor.ndim for axis in order]
    return replace(one, axes=tuple(order.index(axis) for axis in one.axes))


@_of_first
def _exchanged(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    first = _argument(args, named, 1, "dim0", 0) % tensor.ndim
    second = _argument(args, named, 2, "dim1", 0) % tensor.ndim
    order = {first: second, second: first}
    return replace(one, axes=tuple(order.get(axis, axis) for axis in one.axes))


@_of_first
def _moved(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    old = [axis % tensor.ndim for axis in _each(_argument(args, named, 1, "source", None), 1)]
    new = [axis % tensor.ndim for axis in _each(_argument(args, named, 2, "destination", None), 1)]
    order = [axis for axis in range(tensor.ndim) if axis not in old]
    for place, axis in sorted(zip(new, old, strict=True)):
        order.insert(place, axis)
    return replace(one, axes=tuple(order.index(axis) for axis in one.axes))


@_of_first
def _reshaped(
    one: Followed, tensor: Tensor, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Placement after a reshape: cells are found as one axis, or as the axes of their grid."""
    between = range(one.axes[0], one.axes[-1])
    if list(one.axes) != sorted(one.axes) or any(
        tensor.shape[axis] > 1 for axis in between if axis not in one.axes
    ):
        return None  # other axes lie between those of the cells: a reshape would mix the cells
    before = math.prod(tensor.shape[: one.axes[0]])
    starts = [axis for axis in range(result.ndim) if math.prod(result.shape[:axis]) == before]
    for axis in starts:
        if result.shape[axis] == math.prod(one.cells):
            return replace(one, axes=(axis,))
        if tuple(result.shape[axis : axis + len(one.cells)]) == one.cells:
            return replace(one, axes=tuple(range(axis, axis + len(one.cells))))
    for axis in starts:  # the grid with axes of size 1 in between, such as those of one window
        axes: list[int] = []
        for place in range(axis, result.ndim):
            if len(axes) < len(one.cells) and result.shape[place] == one.cells[len(axes)]:
                axes.append(place)
            elif result.shape[place] > 1:
                break
        if len(axes) == len(one.cells):
            return replace(one, axes=tuple(axes))
    return None


def _product(
    known: Known, result: Tensor, kept: Mapping[int, Mapping[int, int]]
) -> Followed | None:
    """Positions in a product of queries and keys, or of attention and values.

    Args:
        known: the operands that have positions.
        result: the product.
        kept: the axis of the result for each axis of an operand that is not summed over, by the
            operand's id.
    """
    moved = [
        replace(one, axes=tuple(kept[id(tensor)][axis] for axis in one.axes), keys=None)
        for one, tensor in known
        if id(tensor) in kept and all(axis in kept[id(tensor)] for axis in one.axes)
    ]
    last = (result.ndim - 1,)
    keys = [one for one in moved if one.axes == last]
    others = [one for one in moved if one.axes != last]
    if not others:
        return keys[0] if keys else None
    return replace(others[0], keys=keys[0] if keys else None)


def _multiplied(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Rows of the first operand, columns of the second."""
    if len(args) < 2 or args[-2].ndim < 2 or args[-1].ndim < 2:
        return None
    kept: dict[int, dict[int, int]] = {}
    for operand, summed in zip(args[-2:], (-1, -2), strict=True):
        shift = result.ndim - operand.ndim
        axes = {axis: axis + shift for axis in range(operand.ndim)}
        del axes[operand.ndim + summed]
        kept[id(operand)] = axes
    return _product(known, result, kept)


def _contracted(
    known: Known, result: Tensor, args: Sequence[Any], named: Mapping[str, Any]
) -> Followed | None:
    """Axes by the letters of `einsum`."""
    equation = args[0].replace(" ", "") if isinstance(args[0], str) else ""
    given, arrow, wanted = equation.partition("->")
    if not arrow or "." in equation:
        return None
    operands = args[1] if isinstance(args[1], list | tuple) else args[1:]
    return _product(
        known,
        result,
        {
            id(operand): {
                axis: wanted.index(letter)
                for axis, letter in enumerate(letters)
                if letter in wanted
            }
            for operand, letters in zip(operands, given.split(","), strict=True)
        },
    )


SINGLE_CELLS = (
    *("add", "radd", "iadd", "sub", "rsub", "isub", "subtract", "mul", "rmul", "imul", "multiply"),
    *("div", "rdiv", "idiv", "truediv", "rtruediv", "itruediv", "divide", "true_divide"),
    *("pow", "rpow", "ipow", "maximum", "minimum", "where", "lerp", "addcmul", "addcdiv"),
    *("cat", "concat", "concatenate", "masked_fill", "clamp", "clip"),
)
"""Calls that combine cells of several operands, each with those at its own position."""
ONE_OPERAND = (
    *("relu", "relu6", "leaky_relu", "rrelu", "prelu", "elu", "selu", "celu", "gelu", "glu"),
    *("silu", "mish", "sigmoid", "logsigmoid", "log_sigmoid", "tanh", "hardtanh", "hardswish"),
    *("hardsigmoid", "hardshrink", "softshrink", "tanhshrink", "softplus", "softsign"),
    *("threshold", "softmax", "softmin", "log_softmax", "gumbel_softmax"),
    *("neg", "negative", "abs", "absolute", "exp", "expm1", "log", "log1p", "log2", "sqrt"),
    *("rsqrt", "square", "reciprocal", "sin", "cos", "erf", "sign", "round", "floor", "ceil"),
    *("nan_to_num", "batch_norm", "instance_norm", "layer_norm", "group_norm", "rms_norm"),
    *("local_response_norm", "normalize", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "feature_dropout", "feature_alpha_dropout"),
    *("contiguous", "clone", "detach", "requires_grad", "to", "type", "type_as", "float", "double"),
    *("half", "bfloat16", "cpu", "cuda", "expand", "expand_as"),
)
"""Calls that keep each cell of their first argument at its place, and move none."""
INTERPOLATIONS = ("interpolate", "upsample")
RULES: dict[str, Rule] = {
    **dict.fromkeys(SINGLE_CELLS, _kept),
    **dict.fromkeys(ONE_OPERAND, _same),
    **{f"conv{n}d": _convolved for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": _transposed for n in (1, 2, 3)},
    **{f"{kind}_pool{n}d": _pooled for kind in ("max", "avg") for n in (1, 2, 3)},
    **{f"max_pool{n}d_with_indices": _pooled for n in (1, 2, 3)},
    **{f"adaptive_{kind}_pool{n}d": _pooled_to_size for kind in ("max", "avg") for n in (1, 2, 3)},
    **dict.fromkeys(INTERPOLATIONS, _interpolated),
    "pad": _padded,
    "getitem": _sliced,
    "permute": _turned,
    "transpose": _exchanged,
    "swapaxes": _exchanged,
    "swapdims": _exchanged,
    "movedim": _moved,
    "moveaxis": _moved,
    **dict.fromkeys(
        ("flatten", "unflatten", "reshape", "reshape_as", "view", "view_as"), _reshaped
    ),
    **dict.fromkeys(("squeeze", "unsqueeze"), _reshaped),
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split"), _split),
    **dict.fromkeys(("unbind", "select"), _selected),
    **dict.fromkeys(("mean", "sum", "amax", "amin", "max", "min", "std", "var"), _reduced),
    **dict.fromkeys(
        ("linear", "multi_head_attention_forward", FUSED_ATTENTION), _mixed_in_last_axis
    ),
    **dict.fromkeys(("matmul", "bmm", "baddbmm"), _multiplied),
    "einsum": _contracted,
}
"""How calls change positions, by name. A result of any other call has no position."""
