"""The kernels, on a GPU; most tests also run on a CPU, slowly, with triton and numpy under 2.4:

TRITON_INTERPRET=1 pytest -m gpu tests/nn/test_fused_normalisation.py
"""

import copy
import os
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.normalisation import (
    CHANNELS_LAST,
    InstanceNormalisation,
    channels_last,
    fuse_normalisation,
)
from segkit.nn.unet import UNet

pytest.importorskip("triton", reason="triton comes with PyTorch for CUDA")
from segkit.nn import fused_normalisation
from segkit.nn.fused_normalisation import launch, normalise_and_leak

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
EPS = 1e-5

pytestmark = [
    pytest.mark.gpu,
    # triton 3.6, of its own interpreter.
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]
on_gpu_only = pytest.mark.skipif(INTERPRETED, reason="the interpreter takes too long")


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small features make several blocks of several tiles, which an interpreter gets through."""
    if INTERPRETED:
        monkeypatch.setattr(fused_normalisation, "TILE", 256)
        monkeypatch.setattr(fused_normalisation, "_processors", lambda device: 2)
    launch.cache_clear()
    yield
    launch.cache_clear()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def ordered(features: Tensor, last: bool) -> Tensor:
    if not last:
        return features.contiguous()
    return features.contiguous(memory_format=CHANNELS_LAST[features.ndim])


def parameters(channels: int) -> tuple[Tensor, Tensor]:
    weight = 1 + 0.3 * torch.randn(channels, device=DEVICE)
    return weight, torch.randn(channels, device=DEVICE)


def forward_and_backward(
    features: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, slope: float
) -> tuple[Tensor, ...]:
    inputs = [value.detach().clone().requires_grad_() for value in (features, weight, bias)]
    output = normalise_and_leak(inputs[0], inputs[1], inputs[2], eps=EPS, slope=slope)
    output.backward(gradient)
    return output.detach(), *(value.grad for value in inputs if value.grad is not None)


def truth(
    features: Tensor, weight: Tensor, bias: Tensor, gradient: Tensor, slope: float
) -> tuple[Tensor, ...]:
    """By PyTorch in float64, on the CPU."""
    inputs = [
        value.detach().cpu().double().contiguous().requires_grad_()
        for value in (features, weight, bias)
    ]
    normalised = F.instance_norm(inputs[0], weight=inputs[1], bias=inputs[2], eps=EPS)
    output = F.leaky_relu(normalised, slope)
    output.backward(gradient.cpu().double())
    return output.detach(), *(value.grad for value in inputs if value.grad is not None)


def away_from_zero(
    gradient: Tensor, features: Tensor, weight: Tensor, bias: Tensor, margin: float
) -> Tensor:
    """The gradient without the cells whose side of the leaky ReLU rounding could change."""
    before = F.instance_norm(features.cpu().double(), weight=weight.cpu().double(),
                             bias=bias.cpu().double(), eps=EPS)  # fmt: skip
    return torch.where(before.abs().to(gradient.device) < margin, 0, gradient)


def error(found: Tensor, true: Tensor) -> float:
    assert found.isfinite().all()
    return float((found.cpu().double() - true).norm() / true.norm())


SMALL = [(2, 3, 7, 9, 5), (1, 2, 33, 21), (2, 32, 5, 9, 5), (1, 80, 5, 7), (2, 5, 13, 11)]
LARGE = [
    (2, 32, 33, 40, 50),
    (7, 256, 5, 7, 5),
    (2, 320, 4, 4, 4),
    (1, 48, 300, 211),
    (1, 8, 90, 91, 92),
]
CASES = [
    *((shape, torch.float32) for shape in SMALL),
    (SMALL[0], torch.bfloat16),
    (SMALL[2], torch.bfloat16),
    (SMALL[4], torch.float16),
    *(pytest.param(shape, torch.bfloat16, marks=on_gpu_only) for shape in LARGE),
    pytest.param(LARGE[0], torch.float32, marks=on_gpu_only),
    pytest.param(LARGE[0], torch.float16, marks=on_gpu_only),
]
"""Few, for each kind of shape and type is compiled anew."""
ROUNDING = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}
"""Of the result to its data type, at most; all before is float32."""


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(("shape", "dtype"), CASES)
def test_forward_and_backward_are_pytorch_s_in_float64(
    shape: tuple[int, ...], last: bool, dtype: torch.dtype
) -> None:
    features = ordered((3 + 2 * torch.randn(shape, device=DEVICE)).to(dtype), last)
    weight, bias = parameters(shape[1])
    gradient = ordered(torch.randn(shape, device=DEVICE).to(dtype), last)
    gradient = away_from_zero(gradient, features, weight, bias, 1e-4)
    found = forward_and_backward(features, weight, bias, gradient, 0.01)
    true = truth(features, weight, bias, gradient, 0.01)
    # The interpreter cuts bfloat16 off, which is twice as far as to the nearest.
    near = ROUNDING[dtype] * (2 if INTERPRETED else 1)
    assert found[0].dtype == found[1].dtype == dtype
    assert found[2].dtype == found[3].dtype == torch.float32
    assert error(found[0], true[0]) < near
    assert error(found[1], true[1]) < near
    assert error(found[2], true[2]) < 5e-6
    assert error(found[3], true[3]) < 5e-6
    for tensor in found[:2]:
        assert tensor.stride() == features.stride()


@pytest.mark.parametrize("last", [False, True])
def test_with_slope_one_it_is_the_normalisation_only(last: bool) -> None:
    features = ordered(torch.randn(2, 4, 9, 8, 7, device=DEVICE), last)
    weight, bias = parameters(4)
    gradient = torch.randn_like(features)
    found = forward_and_backward(features, weight, bias, gradient, 1.0)
    for ours, true in zip(found, truth(features, weight, bias, gradient, 1.0), strict=True):
        assert error(ours, true) < 5e-6


@pytest.mark.parametrize("last", [False, True])
def test_a_large_mean_leaves_a_small_deviation_its_digits(last: bool) -> None:
    """A sum of squares would be wrong by several times the variance."""
    features = ordered(1000 + 0.1 * torch.randn(2, 4, 17, 12, 11, device=DEVICE), last)
    weight, bias = parameters(4)
    gradient = away_from_zero(torch.randn_like(features), features, weight, bias, 0.01)
    found = forward_and_backward(features, weight, bias, gradient, 0.01)
    true = truth(features, weight, bias, gradient, 0.01)
    # A float32 beside 1000 is rounded by 3e-5, which here is 3e-4 deviations.
    for ours, theirs in zip(found, true, strict=True):
        assert error(ours, theirs) < 1e-3


@pytest.mark.parametrize("last", [False, True])
def test_a_beginning_unlike_the_rest_costs_no_digits(last: bool) -> None:
    features = 1000 + torch.randn(1, 4, 24, 12, 11, device=DEVICE)
    features[:, :, :2] = 0
    features = ordered(features, last)
    weight, bias = parameters(4)
    gradient = away_from_zero(torch.randn_like(features), features, weight, bias, 1e-4)
    found = forward_and_backward(features, weight, bias, gradient, 0.01)
    for ours, theirs in zip(found, truth(features, weight, bias, gradient, 0.01), strict=True):
        assert error(ours, theirs) < 1e-5


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize(
    "shape", [(2, 4, 12, 11, 10), pytest.param((2, 32, 64, 64, 64), marks=on_gpu_only)]
)
def test_the_same_input_gives_the_same_output_bit_for_bit(
    shape: tuple[int, ...], last: bool
) -> None:
    features = ordered(torch.randn(shape, device=DEVICE), last)
    weight, bias = parameters(shape[1])
    gradient = torch.randn_like(features)
    first = forward_and_backward(features, weight, bias, gradient, 0.01)
    for _ in range(1 if INTERPRETED else 5):
        again = forward_and_backward(features, weight, bias, gradient, 0.01)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("last", [False, True])
def test_an_image_is_normalised_the_same_alone_and_in_a_batch(last: bool) -> None:
    features = torch.randn(3, 4, 9, 8, 7, device=DEVICE)
    weight, bias = parameters(4)
    together = normalise_and_leak(ordered(features, last), weight, bias, eps=EPS, slope=0.01)
    for image, expected in zip(features, together, strict=True):
        alone = normalise_and_leak(ordered(image[None], last), weight, bias, eps=EPS, slope=0.01)
        torch.testing.assert_close(alone[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("last", [False, True])
def test_a_gradient_in_any_order_is_the_same(last: bool) -> None:
    features = ordered(torch.randn(2, 4, 5, 6, 7, device=DEVICE), last)
    weight, bias = parameters(4)
    wide = torch.randn(2, 10, 5, 6, 7, device=DEVICE)
    gradients = [ordered(wide, True)[:, 3:7], ordered(wide, False)[:, 3:7]]
    one, other = (forward_and_backward(features, weight, bias, g, 0.01) for g in gradients)
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_features_in_another_memory_order_are_also_normalised() -> None:
    features = torch.randn(2, 6, 7, 4, 5, device=DEVICE).permute(0, 3, 1, 4, 2)
    weight, bias = parameters(4)
    gradient = torch.randn(2, 4, 6, 5, 7, device=DEVICE)
    found = forward_and_backward(features, weight, bias, gradient, 0.01)
    for ours, true in zip(found, truth(features, weight, bias, gradient, 0.01), strict=True):
        assert error(ours, true) < 5e-6


@pytest.mark.parametrize("last", [False, True])
def test_a_channel_without_contrast_is_its_bias_and_has_a_finite_gradient(last: bool) -> None:
    features = ordered(torch.full((1, 2, 9, 8, 7), 0.1, device=DEVICE), last)
    weight, bias = parameters(2)
    gradient = torch.randn_like(features)
    output, for_features, *_ = forward_and_backward(features, weight, bias, gradient, 1.0)
    expected = bias.view(1, 2, 1, 1, 1).expand_as(output)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=0)
    assert for_features.isfinite().all()


def test_nan_stays_in_its_channel() -> None:
    features = torch.randn(1, 3, 9, 8, 7, device=DEVICE)
    features[0, 1, 4, 4, 4] = torch.nan
    output = normalise_and_leak(features, *parameters(3), eps=EPS, slope=0.01)
    assert output[0, 1].isnan().all()
    assert output[0, [0, 2]].isfinite().all()


def test_a_gradient_of_its_gradient_is_refused_rather_than_wrong() -> None:
    features = torch.randn(1, 2, 3, 3, 3, device=DEVICE, requires_grad=True)
    output = normalise_and_leak(features, *parameters(2), eps=EPS, slope=0.01)
    (gradient,) = torch.autograd.grad(output.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_a_large_image_is_cut_so_that_a_gpu_is_full_and_few_blocks_are_merged() -> None:
    launch.cache_clear()
    for last in (False, True):
        for shape in [(2, 32, 128, 128, 128), (2, 64, 64, 64, 64), (7, 32, 40, 56, 40)]:
            grid = launch(shape, last, 132).grid
            assert 0.6 * 528 <= grid[0] * grid[1] * grid[2] <= 528
    assert launch((7, 256, 5, 7, 5), False, 132).grid == (1, 256, 7)


@on_gpu_only
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_step_of_training_is_the_same_fused(
    spatial_dims: int, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    strides = ((2,) * spatial_dims,)
    plain = UNet(
        spatial_dims, 2, out_channels=3, channels=(8, 16), strides=strides, deep_supervision=True
    ).to(DEVICE)
    fused = copy.deepcopy(plain)
    if last:
        channels_last(fused)
    fuse_normalisation(fused)
    image = torch.randn(2, 2, *(16,) * spatial_dims, device=DEVICE)
    label = torch.randint(0, 3, (2, *(16,) * spatial_dims), device=DEVICE)
    losses = []
    for network in (plain, fused):
        levels = network.train().supervised(image).levels
        loss = deep_dice_cross_entropy(levels, label, pool_batch=False)
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        # A bias before a normalisation has no gradient but rounding.
        assert (ours.grad - theirs.grad).norm() < 1e-3 * theirs.grad.norm() + 1e-5


@on_gpu_only
def test_under_autocast_the_features_stay_in_half_precision_and_in_order() -> None:
    network = UNet(3, 1, out_channels=2, channels=(8, 16)).to(DEVICE)
    channels_last(network)
    block = network.encoder[1]
    features = ordered(torch.randn(2, 8, 12, 10, 8, device=DEVICE), True).bfloat16()
    features.requires_grad_()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        expected = block(features)
        fuse_normalisation(network)
        found = block(features)
    assert found.dtype == torch.bfloat16
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    (gradient,) = torch.autograd.grad(found.float().square().mean(), features)
    assert gradient.dtype == torch.bfloat16 and gradient.isfinite().all()


@on_gpu_only
def test_a_single_cell_is_refused_like_by_pytorch() -> None:
    layer = InstanceNormalisation(4).to(DEVICE)
    fuse_normalisation(layer)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        layer(torch.ones(2, 4, 1, 1, 1, device=DEVICE))


@on_gpu_only
def test_a_compiled_network_uses_pytorchs_normalisation() -> None:
    layer = InstanceNormalisation(4).to(DEVICE)
    fuse_normalisation(layer)
    exported = torch.export.export(layer.eval(), (torch.randn(2, 4, 3, 4, 5, device=DEVICE),))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    assert called == {"aten.instance_norm.default"}
