"""Convolutions whose gradient oneDNN computes wrongly on a CPU, computed in a way that is right.

In two cases, PyTorch (2.13) with oneDNN computes the gradient of a convolution's weights from
memory that nobody wrote. Then it is random, up to NaN, or the process crashes. Measured on an AMD
EPYC (Zen 5) with AVX512-BF16:

- Along an axis, the kernel never lies wholly inside the image. Examples are a kernel of 3 with
  padding 1 on an axis of 2 voxels, and a kernel of 7 on one of 6. This is so in bfloat16, and in
  single precision for kernels of 7 with stride 2. If the image is padded before, the same kernel
  lies inside, and the gradient is right.
- In bfloat16, the convolution is dilated and has groups, and rows are long, such as 32 voxels. In
  single precision the gradient is right.
"""

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

AXES: Mapping[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
"""PyTorch's convolutions, and the number of their axes."""
OfAxes = int | Sequence[int]


def _arguments(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: OfAxes = 1,
    padding: OfAxes | str = 0,
    dilation: OfAxes = 1,
    groups: int = 1,
) -> None:
    """The arguments of PyTorch's convolutions, which have no signature that Python can read."""


SIGNATURE = inspect.signature(_arguments)


class RightConvolutions(TorchFunctionMode):
    """A context in which convolutions on a CPU get the right gradient.

    Their outputs are the same but for rounding. The backward pass may take place outside, unless it
    computes features again (`torch.utils.checkpoint`).

    Example:
        with torch.autocast("cpu", dtype=torch.bfloat16), RightConvolutions():
            loss = network(image).square().mean()
        loss.backward()
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The result of a function of PyTorch's."""
        kwargs = kwargs or {}
        axes = AXES.get(func)
        if axes is None:
            return func(*args, **kwargs)
        given = SIGNATURE.bind(*args, **kwargs)
        given.apply_defaults()
        image, weight, bias, stride, padding, dilation, groups = given.arguments.values()
        if image.device.type != "cpu":
            return func(*args, **kwargs)
        sizes, kernel = image.shape[-axes:], weight.shape[-axes:]
        spread = [step * (n - 1) for step, n in zip(_each(dilation, axes), kernel, strict=True)]
        before, after = _padding(padding, spread)
        if groups > 1 and max(_each(dilation, axes)) > 1 and _in_bfloat16(image):
            single = [None if each is None else each.float() for each in (image, weight, bias)]
            with torch.autocast("cpu", enabled=False):
                return func(*single, stride, padding, dilation, groups).bfloat16()
        if _inside(sizes, spread, _each(stride, axes), before):
            return func(*args, **kwargs)
        pairs = list(zip(before, after, strict=True))
        padded = F.pad(image, [amount for pair in reversed(pairs) for amount in pair])
        return func(padded, weight, bias, stride, 0, dilation, groups)


def right_convolutions(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """`RightConvolutions` if the device is a CPU, and otherwise a context without effect."""
    return RightConvolutions() if device.type == "cpu" else contextlib.nullcontext()


def _in_bfloat16(image: Tensor) -> bool:
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return image.dtype == torch.bfloat16


def _each(value: OfAxes, axes: int) -> list[int]:
    """A number for each axis."""
    values = [value] if isinstance(value, int) else list(value)
    return values * axes if len(values) == 1 else values


def _padding(padding: OfAxes | str, spread: Sequence[int]) -> tuple[list[int], list[int]]:
    """The padding before and after the image along each axis, as PyTorch sets it.

    Args:
        padding: `valid`, `same`, or numbers.
        spread: the distance between the kernel's first and last voxel along each axis.
    """
    if padding == "same":
        before = [distance // 2 for distance in spread]
        return before, [distance - first for distance, first in zip(spread, before, strict=True)]
    amounts = [0] if isinstance(padding, str) else padding
    both = _each(amounts, len(spread))
    return both, both


def _inside(
    sizes: Sequence[int], spread: Sequence[int], stride: Sequence[int], before: Sequence[int]
) -> bool:
    """Whether along each axis the kernel lies wholly inside the image at least once."""
    # Its first place inside begins so many voxels after the image's first one.
    return all(
        -pad % step + distance < size
        for size, distance, step, pad in zip(sizes, spread, stride, before, strict=True)
    )
