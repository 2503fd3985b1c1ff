"""MedNeXt's blocks: against formulas, and in a network of them."""

import jaxtyping
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.blocks import CONV_FUNCTION
from segkit.nn.map_tap import recording
from segkit.nn.mednext import MedNeXtBlock, MedNeXtLevel, ResponseNormalisation
from segkit.nn.normalisation import fuse_normalisation
from tests.networks import SPACE, image_of, network_of, settings

MEDNEXT = {"kind": "mednext", "expansion": 3}


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_response_normalisation_gives_the_values_worked_out_by_hand() -> None:
    layer = ResponseNormalisation(2)
    features = torch.tensor([[[[3.0, -4.0]], [[0.0, 1.0]]]])
    assert torch.equal(layer(features), features)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, -2.0]))
        layer.bias.copy_(torch.tensor([0.0, 0.5]))
    # Norms 5 and 1, of mean 3: factors 1 + 5/3 = 8/3 and 1 - 2 * 1/3 = 1/3.
    expected = torch.tensor([[[[8.0, -32 / 3]], [[0.5, 1 / 3 + 0.5]]]])
    assert_close(layer(features), expected)


def test_responses_to_nothing_are_nothing() -> None:
    layer = ResponseNormalisation(2)
    nn.init.ones_(layer.weight)
    assert not layer(torch.zeros(1, 2, 3, 3)).any()


@pytest.mark.parametrize("space", [(6, 8), (4, 6, 2)])
@pytest.mark.parametrize(("out_channels", "strided"), [(4, False), (6, False), (4, True)])
def test_a_block_is_its_formula(space: tuple[int, ...], out_channels: int, strided: bool) -> None:
    dims, convolve = len(space), CONV_FUNCTION[len(space)]
    stride = [2, *[1] * (dims - 1)] if strided else None
    torch.manual_seed(0)
    block = MedNeXtBlock(
        dims, 4, out_channels, kernel=[5, *[3] * (dims - 1)], stride=stride, expansion=3
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    features = features_of(2, 4, *space)

    step, padding = stride or 1, [2, *[1] * (dims - 1)]
    depthwise, ones = block.depthwise, [1] * dims
    seen = convolve(features, depthwise.weight, depthwise.bias, step, padding, 1, 4)
    assert isinstance(block.norm, nn.GroupNorm)
    mean = seen.flatten(2).mean(dim=2).view(2, 4, *ones)
    deviation = seen.flatten(2).var(dim=2, unbiased=False).add(1e-5).sqrt().view(2, 4, *ones)
    seen = (seen - mean) / deviation * block.norm.weight.view(4, *ones)
    seen = seen + block.norm.bias.view(4, *ones)
    hidden = F.gelu(convolve(seen, block.expand.weight, block.expand.bias))
    norms = hidden.flatten(2).norm(dim=2).view(2, 12, *ones)
    assert isinstance(block.response, ResponseNormalisation)
    weight, bias = (value.view(12, *ones) for value in (block.response.weight, block.response.bias))
    hidden = weight * hidden * norms / norms.mean(dim=1, keepdim=True) + bias + hidden
    expected = convolve(hidden, block.compress.weight, block.compress.bias)
    shortcut = features
    if isinstance(block.shortcut, nn.Conv2d | nn.Conv3d):
        shortcut = convolve(features, block.shortcut.weight, block.shortcut.bias, step)
    else:
        assert out_channels == 4 and not strided
    assert_close(block(features), shortcut + expected, rtol=1e-4, atol=1e-4)


def test_an_image_is_widened_before_its_first_block_and_a_join_is_not() -> None:
    stem, first, second = MedNeXtLevel(2, 1, widths=(8, 8), kernel=(3, 3))
    assert isinstance(stem, nn.Conv2d) and (stem.in_channels, stem.out_channels) == (1, 8)
    assert isinstance(first, MedNeXtBlock) and isinstance(first.shortcut, nn.Identity)
    assert isinstance(second, MedNeXtBlock)
    join = MedNeXtLevel(2, 16, widths=(8, 8), kernel=(3, 3))
    down = MedNeXtLevel(2, 8, widths=(16, 16), kernel=(3, 3), stride=(2, 2))
    assert [type(layer) for layer in join] == [type(layer) for layer in down] == [MedNeXtBlock] * 2


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_network_of_them_keeps_the_laws_of_networks(spatial_dims: int, downsampling: str) -> None:
    network = network_of({}, spatial_dims, block=MEDNEXT, downsampling=downsampling)
    images = image_of(spatial_dims)
    logits = network(images)
    assert logits.shape == (2, 3, *SPACE[spatial_dims])
    assert_close(network(images[:1]), logits[:1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = network(images)
    assert (rough.float() - logits).abs().mean() < 0.05 * logits.std()
    (logits * logits.detach().roll(1)).mean().backward()
    for name, parameter in network.named_parameters():
        if not name.startswith("heads.1"):
            assert parameter.grad is not None and parameter.grad.any(), name


def test_mednext_has_the_same_attention_maps_as_convolutions() -> None:
    networks = [network_of({"skip": "additive_grid"}, 3, block=one) for one in ("mednext", MEDNEXT)]
    plain = network_of({"skip": "additive_grid"}, 3)
    for network in networks:
        assert network.maps() == plain.maps()
        with recording(network) as maps:
            network(image_of(3))
        assert set(maps) == set(plain.maps())


def test_its_normalisation_can_be_fused_and_is_that_of_the_network() -> None:
    network = network_of({}, 2, block=MEDNEXT)
    before = network(image_of(2))
    fuse_normalisation(network)
    assert torch.equal(network(image_of(2)), before)
    batch = network_of({}, 2, block=MEDNEXT, normalisation="batch")
    assert any(isinstance(module, nn.BatchNorm2d) for module in batch.modules())
    assert not any(isinstance(module, nn.GroupNorm) for module in batch.modules())


def test_a_mednext_network_can_be_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    network = network_of({}, 3, block=MEDNEXT)
    exported = torch.export.export(network, (image_of(3),))
    assert_close(exported.module()(image_of(3)), network(image_of(3)))


def test_a_block_is_a_word_or_its_settings() -> None:
    assert (
        settings({}, 2, block="mednext").block == settings({}, 2, block={"kind": "mednext"}).block
    )
    assert settings({}, 2).block.kind == "convolution"
