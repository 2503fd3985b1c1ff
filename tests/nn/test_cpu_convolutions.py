"""Convolutions have the gradient of single precision, in bfloat16 on a CPU too, at every size."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from segkit.nn.cpu_convolutions import RightConvolutions, right_convolutions
from segkit.nn.unet import UNet
from tests.networks import network_of

CONVOLUTION: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
UNWRITTEN = (64, 1_000, 5_000, 20_000, 100_000, 500_000)


def fill_free_memory() -> None:
    """Free memory that holds NaN, so that what is read without being written is NaN."""
    held = [torch.full((size,), torch.nan, dtype=torch.bfloat16) for size in UNWRITTEN]
    held += [torch.full((size,), torch.nan) for size in UNWRITTEN]
    del held


def gradients(module: nn.Module, image: Tensor, *, half: bool) -> list[Tensor]:
    module.zero_grad()
    fill_free_memory()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half), RightConvolutions():
        output = module(image)
    assert output.dtype == (torch.bfloat16 if half else image.dtype)
    weights = torch.linspace(-1, 1, output.numel()).view(output.shape)
    (output * weights.to(image.dtype)).sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((2, 2, 2), {"kernel_size": 3, "padding": 1}),
        ((2, 6, 6), {"kernel_size": 3, "padding": 1}),
        ((2, 6, 6), {"kernel_size": 3, "padding": "same"}),
        ((6, 7, 8), {"kernel_size": 7, "padding": 3}),
        ((5, 9, 9), {"kernel_size": 3, "padding": 3, "dilation": 3}),
        ((7, 9, 9), {"kernel_size": 7, "padding": 3, "stride": 2}),
        ((2, 5, 5), {"kernel_size": (3, 1, 1), "padding": (1, 0, 0)}),
        ((3, 1), {"kernel_size": 3, "padding": 1, "stride": 2}),
        ((2, 1), {"kernel_size": (5,), "padding": (2,), "stride": (2,)}),
        ((8, 8, 8), {"kernel_size": 3, "padding": 1}),
        ((19, 40), {"kernel_size": 3, "padding": 3, "dilation": 3, "groups": 8}),
        ((64, 48), {"kernel_size": 7, "padding": 9, "dilation": 3, "groups": 8}),
        ((8, 6, 40), {"kernel_size": 3, "padding": 2, "dilation": 2, "groups": 8}),
    ],
)
@pytest.mark.parametrize("last", [False, True])
def test_the_gradient_of_a_convolution_is_that_of_single_precision(
    size: tuple[int, ...], options: dict[str, Any], last: bool
) -> None:
    if "kernel_size" in options and len(size) == 2 and isinstance(options["kernel_size"], tuple):
        options = {key: value * 2 for key, value in options.items()}
    torch.manual_seed(0)
    module = CONVOLUTION[len(size)](16, 24, **options)
    image = torch.randn(2, 16, *size)
    if last:
        order = torch.channels_last_3d if len(size) == 3 else torch.channels_last
        module, image = module.to(memory_format=order), image.contiguous(memory_format=order)
    # PyTorch's own convolution in double precision, which oneDNN does not compute.
    expected = [each.float() for each in gradients(module.double(), image.double(), half=False)]
    module = module.float()
    for half in (True, True, True, False):
        for found, right in zip(gradients(module, image, half=half), expected, strict=True):
            assert (found - right).abs().max() < (0.03 if half else 1e-4) * right.abs().max()


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=3),
    st.integers(1, 5),
    st.integers(1, 2),
    st.integers(1, 2),
    st.sampled_from([1, 8]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_it_changes_no_output(
    size: list[int], kernel: int, stride: int, dilation: int, groups: int, half: bool
) -> None:
    torch.manual_seed(0)
    kind, padding = CONVOLUTION[len(size)], dilation * kernel // 2
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    module, image = kind(8, 8, kernel, **options), torch.randn(1, 8, *size)
    as_function = getattr(F, f"conv{len(size)}d")
    with torch.no_grad():
        expected = module(image)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), RightConvolutions():
            found = module(image)
            called = as_function(input=image, weight=module.weight, bias=module.bias, **options)
            same = kind(8, 8, 3, padding="same")(image)
    assert found.shape == called.shape == expected.shape and same.shape == image.shape
    assert found.dtype == (torch.bfloat16 if half else torch.float32)
    tolerance = 0.05 if half else 1e-4
    for each in (found, called):
        torch.testing.assert_close(each.float(), expected, atol=tolerance, rtol=tolerance)


def test_an_image_in_which_a_kernel_lies_is_not_padded(monkeypatch: pytest.MonkeyPatch) -> None:
    padded: list[tuple[int, ...]] = []
    pad = F.pad

    def watched(image: Tensor, *rest: Any) -> Tensor:
        padded.append(tuple(image.shape))
        return pad(image, *rest)

    monkeypatch.setattr(F, "pad", watched)
    with right_convolutions(torch.device("cpu")):
        for size in ((3, 3, 3), (2, 3, 3), (8, 2, 8)):
            nn.Conv3d(1, 1, 3, padding=1)(torch.randn(1, 1, *size))
        nn.Conv3d(1, 1, 1)(torch.randn(1, 1, 1, 1, 1))
        nn.Conv2d(1, 1, 3, padding=1, stride=2)(torch.randn(1, 1, 1, 8))
        nn.Conv2d(1, 1, 3, padding=1, stride=2)(torch.randn(1, 1, 4, 8))
    assert padded == [(1, 1, 2, 3, 3), (1, 1, 8, 2, 8), (1, 1, 1, 8)]
    assert not isinstance(right_convolutions(torch.device("cuda")), RightConvolutions)


@pytest.mark.parametrize(
    ("attention", "size"),
    [
        ({}, (8, 8, 8)),  # the coarsest level has two voxels along each axis
        ({"skip": {"kind": "additive_grid"}}, (8, 8, 8)),
        ({"encoder": {"kind": "cbam"}}, (16, 16, 16)),  # with kernels of 7
        ({"encoder": {"kind": "lka"}}, (24, 16, 40)),  # with groups and dilation
    ],
)
def test_a_network_has_the_gradient_of_single_precision(
    attention: dict[str, Any], size: tuple[int, int, int]
) -> None:
    network: UNet = network_of(attention, 3).train()
    image = torch.randn(2, 2, *size)
    expected = gradients(network, image, half=False)
    largest = max(right.abs().max() for right in expected)
    for _ in range(3):
        for found, right in zip(gradients(network, image, half=True), expected, strict=True):
            assert found.isfinite().all()
            assert (found - right).abs().max() < 0.2 * largest
