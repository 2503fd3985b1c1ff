import contextlib
import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from segkit.nn import normalisation
from segkit.nn.blocks import ConvolutionBlock
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.normalisation import (
    CHANNELS_LAST,
    GroupNormalisation,
    InstanceNormalisation,
    channels_last,
    fuse_normalisation,
)
from segkit.nn.unet import UNet

SHAPES = st.one_of(
    st.tuples(*[st.integers(1, 3)], *[st.integers(1, 6)] * 2),
    st.tuples(*[st.integers(1, 3)], *[st.integers(1, 5)] * 3),
).filter(lambda shape: math.prod(shape[1:]) > 1)


def randomised(layer: GroupNormalisation) -> GroupNormalisation:
    nn.init.normal_(layer.weight, 1.0, 0.3)
    nn.init.normal_(layer.bias)
    return layer


def in_order(features: Tensor) -> Tensor:
    return features.contiguous(memory_format=CHANNELS_LAST[features.ndim])


def forward_and_backward(
    layer: nn.Module, features: Tensor, gradient: Tensor
) -> tuple[Tensor, ...]:
    layer.zero_grad()
    features = features.clone().requires_grad_()
    output = layer(features)
    output.backward(gradient)
    weight, bias = layer.parameters()
    assert features.grad is not None and weight.grad is not None and bias.grad is not None
    return output.detach(), features.grad, weight.grad.clone(), bias.grad.clone()


@given(shape=SHAPES, groups=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 99))
def test_channels_last_is_pytorch_s_group_normalisation_forward_and_backward(
    shape: tuple[int, ...], groups: int, seed: int
) -> None:
    torch.manual_seed(seed)
    batch, *space = shape
    layer = randomised(GroupNormalisation(groups, 6)).double()
    features = 2 + 3 * torch.randn(batch, 6, *space, dtype=torch.float64)
    gradient = torch.randn_like(features)
    reference = nn.GroupNorm(groups, 6, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())

    found = forward_and_backward(layer, in_order(features), in_order(gradient))
    expected = forward_and_backward(reference, features, gradient)

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@given(shape=SHAPES, seed=st.integers(0, 99))
def test_channels_last_is_pytorch_s_instance_normalisation_forward_and_backward(
    shape: tuple[int, ...], seed: int
) -> None:
    torch.manual_seed(seed)
    batch, *space = shape
    layer = randomised(InstanceNormalisation(5)).double()
    features = 2 + 3 * torch.randn(batch, 5, *space, dtype=torch.float64)
    gradient = torch.randn_like(features)
    by_axes = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
    reference = by_axes[len(space)](5, affine=True, dtype=torch.float64)
    reference.load_state_dict(layer.state_dict())

    found = forward_and_backward(layer, in_order(features), in_order(gradient))
    expected = forward_and_backward(reference, features, gradient)

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_its_gradient_is_the_slope_of_its_output(groups: int) -> None:
    layer = randomised(GroupNormalisation(groups, 4)).double()
    features = in_order(torch.randn(2, 4, 2, 3, 2, dtype=torch.float64)).requires_grad_()

    def normalised(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        settings = {"weight": weight, "bias": bias}
        output: Tensor = torch.func.functional_call(layer, settings, (features,))
        return output

    inputs = (features, *(value.detach().requires_grad_() for value in layer.parameters()))
    assert torch.autograd.gradcheck(normalised, inputs)


def test_a_gradient_of_its_gradient_is_refused_rather_than_wrong() -> None:
    features = in_order(torch.randn(2, 4, 3, 3, 3)).requires_grad_()
    output = InstanceNormalisation(4)(features)
    (gradient,) = torch.autograd.grad(output.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("space", [(6, 10), (4, 6, 10)])
def test_the_order_is_kept_forward_and_backward(space: tuple[int, ...]) -> None:
    layer = InstanceNormalisation(8)
    features = in_order(torch.randn(2, 8, *space))
    features.requires_grad_()
    output = layer(features)
    (gradient,) = torch.autograd.grad(output.square().sum(), features)
    for tensor in (output, gradient):
        assert tensor.is_contiguous(memory_format=CHANNELS_LAST[tensor.ndim])
        assert not tensor.is_contiguous()


def test_an_image_alone_may_have_any_stride_along_the_batch() -> None:
    layer = randomised(InstanceNormalisation(3))
    tokens = torch.randn(1, 60, 3)
    features = (
        tokens.transpose(1, 2)
        .unflatten(2, (3, 4, 5))
        .as_strided((1, 3, 3, 4, 5), (1, 1, 60, 15, 3))
    )
    torch.testing.assert_close(layer(features), layer(features.clone().contiguous()))


def test_gradients_in_another_order_are_the_same() -> None:
    layer = randomised(InstanceNormalisation(4))
    features, gradient = in_order(torch.randn(2, 4, 5, 6, 7)), torch.randn(2, 4, 5, 6, 7)
    found = forward_and_backward(layer, features, gradient)
    for ours, theirs in zip(
        found, forward_and_backward(layer, features, in_order(gradient)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_in_bfloat16_it_is_as_near_to_the_truth_as_pytorch_s_own() -> None:
    torch.manual_seed(0)
    layer = randomised(InstanceNormalisation(16))
    features = (1 + 2 * torch.randn(2, 16, 12, 12, 12)).bfloat16()
    gradient = torch.randn(2, 16, 12, 12, 12).bfloat16()
    truth = forward_and_backward(layer, features.float(), gradient.float())
    ours = forward_and_backward(layer, in_order(features), in_order(gradient))
    theirs = forward_and_backward(layer, features, gradient)

    def error(found: Tensor, true: Tensor) -> float:
        return float((found.float() - true).norm() / true.norm())

    assert ours[0].dtype == ours[1].dtype == torch.bfloat16
    for near, other, true in zip(ours, theirs, truth, strict=True):
        # Sums along two axes are rounded before they are added along the third.
        assert error(near, true) < max(2 * error(other, true), 2**-7)


def test_a_channel_without_contrast_is_its_bias_and_has_a_finite_gradient() -> None:
    layer = randomised(InstanceNormalisation(2))
    output, gradient, *_ = forward_and_backward(
        layer, in_order(torch.full((1, 2, 4, 4, 4), 7.0)), in_order(torch.randn(1, 2, 4, 4, 4))
    )
    torch.testing.assert_close(
        output, layer.bias.view(1, 2, 1, 1, 1).expand_as(output), atol=1e-4, rtol=0
    )
    assert gradient.isfinite().all()


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("norm", ["instance", "group", "batch"])
def test_a_step_of_training_is_the_same_in_either_order(spatial_dims: int, norm: str) -> None:
    torch.manual_seed(0)
    plain = UNet(
        spatial_dims,
        2,
        out_channels=3,
        channels=(8, 16),
        strides=((2,) * spatial_dims,),
        norm=norm,
        deep_supervision=True,
    ).double()
    ordered = copy.deepcopy(plain)
    channels_last(ordered)
    image = torch.randn(2, 2, *(8,) * spatial_dims, dtype=torch.float64)
    label = torch.randint(0, 3, (2, *(8,) * spatial_dims))
    losses = []
    for network in (plain, ordered):
        loss = deep_dice_cross_entropy(
            network.train().supervised(image).levels, label, pool_batch=False
        )
        loss.backward()
        losses.append(loss)

    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for ours, theirs in zip(ordered.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.grad is not None and theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kind", [InstanceNormalisation(4), GroupNormalisation(2, 4)])
def test_the_exported_layer_is_pytorchs_normalisation(kind: GroupNormalisation) -> None:
    features = in_order(torch.randn(2, 4, 3, 4, 5))
    exported = torch.export.export(kind.eval(), (features,))
    called = {str(node.target) for node in exported.graph.nodes if node.op == "call_function"}
    name = "instance_norm" if isinstance(kind, InstanceNormalisation) else "group_norm"
    assert called == {f"aten.{name}.default"}
    torch.testing.assert_close(exported.module()(features), kind(features))


def test_a_single_cell_has_no_deviation_and_is_refused_like_by_pytorch() -> None:
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        F.instance_norm(torch.ones(2, 4, 1, 1, 1))
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        InstanceNormalisation(4)(in_order(torch.ones(2, 4, 1, 1, 1)))


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("norm", ["instance", "group", "batch", "none"])
def test_on_a_cpu_a_fused_network_computes_what_its_layers_do_bit_for_bit(
    norm: str, order: torch.memory_format
) -> None:
    torch.manual_seed(0)
    block = ConvolutionBlock(3, 2, widths=(8, 4), kernel=(3, 3, 3), norm=norm)
    layers = copy.deepcopy(block.layers)
    fuse_normalisation(block)
    image = torch.randn(2, 2, 6, 5, 4).contiguous(memory_format=order)
    outputs = [block(image), layers(image)]
    assert torch.equal(*outputs)
    for output in outputs:
        output.square().sum().backward()
    for ours, theirs in zip(block.parameters(), layers.parameters(), strict=True):
        assert ours.grad is not None and theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)


def test_fused_weights_keep_their_names() -> None:
    block = ConvolutionBlock(2, 1, widths=(4, 4), kernel=(3, 3))
    names = [f"layers.{at}.{kind}" for at in (0, 1, 3, 4) for kind in ("weight", "bias")]
    assert list(block.state_dict()) == names
    fuse_normalisation(block)
    assert list(block.state_dict()) == names


def test_a_bias_that_a_fused_normalisation_cancels_is_left_out_and_its_gradient_is_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def planted(
        features: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float
    ) -> Tensor:
        return F.leaky_relu(F.instance_norm(features, weight=weight, bias=bias, eps=eps), slope)

    monkeypatch.setattr(normalisation, "_normalise_and_leak", lambda _: planted)
    monkeypatch.setattr(normalisation, "FUSED_DEVICE", "cpu")
    torch.manual_seed(0)
    block = ConvolutionBlock(3, 2, widths=(8, 4), kernel=(3, 3, 3)).double()
    for at in (0, 3):
        torch.nn.init.normal_(block.layers[at].bias, std=3)
    image = torch.randn(2, 2, 6, 5, 4)
    plain = copy.deepcopy(block)
    block.float(), fuse_normalisation(block)
    with torch.no_grad():
        added = []
        monkeypatch.setattr(F, "instance_norm", _noted(F.instance_norm, added))
        found = block(image)
        with_bias = plain.layers[0](image.double())
        expected = float(with_bias.mean() - plain.layers[0].bias.mean())
    assert float(added[0].mean()) == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(found.double(), plain(image.double()), rtol=1e-4, atol=1e-5)
    block(image).square().sum().backward()
    plain(image.double()).square().sum().backward()
    for name, ours in block.named_parameters():
        theirs = plain.get_parameter(name).grad
        assert ours.grad is not None and theirs is not None
        if name in ("layers.0.bias", "layers.3.bias"):
            assert ours.grad.count_nonzero() == 0 and theirs.abs().max() < 1e-9
        else:
            torch.testing.assert_close(ours.grad.double(), theirs, rtol=1e-3, atol=1e-4)
    told = []
    block.layers[0].register_forward_hook(lambda *_: told.append(1))
    block.layers[3].register_full_backward_hook(lambda *_: told.append(2))
    block(image).sum().backward()
    assert told == [1, 2]


class Doubled(nn.Conv3d):
    """A convolution that computes something of its own."""

    def forward(self, features: Tensor) -> Tensor:
        return 2 * super().forward(features) ** 2


@pytest.mark.parametrize("own", ["padding", "subclass", "wrapper"])
def test_a_convolution_of_another_kind_computes_what_it_says_also_if_fused(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(
        features: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float
    ) -> Tensor:
        return F.leaky_relu(F.instance_norm(features, weight=weight, bias=bias, eps=eps), slope)

    torch.manual_seed(0)
    block = ConvolutionBlock(3, 2, widths=(4,), kernel=(3, 3, 3))
    given = {"padding_mode": "replicate"} if own == "padding" else {}
    kind = Doubled if own == "subclass" else nn.Conv3d
    layer: nn.Module = kind(2, 4, 3, padding=1, **given)
    block.layers[0] = nn.Sequential(layer) if own == "wrapper" else layer
    image = torch.randn(2, 2, 6, 5, 4)
    expected = block(image)
    monkeypatch.setattr(normalisation, "_normalise_and_leak", lambda _: planted)
    monkeypatch.setattr(normalisation, "FUSED_DEVICE", "cpu")
    fuse_normalisation(block)
    torch.testing.assert_close(block(image), expected, rtol=1e-4, atol=1e-5)


def _noted(function: Callable[..., Tensor], inputs: list[Tensor]) -> Callable[..., Tensor]:
    """The function, which also keeps its first argument."""

    def noted(features: Tensor, **settings: Any) -> Tensor:
        inputs.append(features)
        return function(features, **settings)

    return noted


@pytest.mark.parametrize("triton", [True, False])
def test_on_a_gpu_normalisation_and_activation_are_one_if_fused_and_if_triton_is_there(
    triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    slopes = []

    def planted(
        features: Tensor, weight: Tensor, bias: Tensor, *, eps: float, slope: float
    ) -> Tensor:
        slopes.append(slope)
        return features

    monkeypatch.setattr(normalisation, "_normalise_and_leak", lambda _: planted if triton else None)
    monkeypatch.setattr(normalisation, "FUSED_DEVICE", "cpu")
    image = torch.randn(1, 2, 6, 5, 4)
    block = ConvolutionBlock(3, 2, widths=(8, 4), kernel=(3, 3, 3))
    alone = InstanceNormalisation(2)
    block(image), alone(image)
    assert slopes == []
    fuse_normalisation(block)
    fuse_normalisation(alone)
    block(image), alone(image), copy.deepcopy(alone).double()(image.double())
    assert slopes == ([0.01, 0.01, 1.0] if triton else [])
    del slopes[:]
    torch.export.export(alone.eval(), (image,))
    assert slopes == []


@pytest.mark.parametrize("error", [None, RuntimeError("Failed to find C compiler.\nSet CC")])
def test_without_a_c_compiler_normalisation_is_pytorchs_own_and_a_warning_tells_of_it(
    error: Exception | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "ones", lambda *size, device: torch.zeros(size) + 1)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    launched = []

    def launch(*arguments: Tensor, eps: float, slope: float) -> Tensor:
        launched.append(arguments)
        if error is not None:
            raise error
        return arguments[0]

    assert normalisation._compiles(launch, torch.device("cpu")) and not launched
    assert normalisation._compiles(launch, torch.device("cuda", 1)) == (error is None)
    assert len(launched) == 1
    told = "triton cannot compile (Failed to find C compiler.); install a C compiler"
    assert (told in caplog.text) == (error is not None)


def test_a_gpu_before_ampere_normalises_bfloat16_in_pytorchs_own_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    for number, capability in enumerate([(7, 5), (8, 0), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, is_=capability: is_)
        device = torch.device("cuda", 100 + number)  # each answer is kept
        assert normalisation._has_bfloat16(device) == (capability >= (8, 0))
    assert normalisation._has_bfloat16(torch.device("cpu"))
