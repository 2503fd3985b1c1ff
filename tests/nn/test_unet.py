import ast
import itertools
import re
from collections.abc import Sequence
from typing import Literal

import jaxtyping
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.blocks import Modulated, NormalisationKind
from segkit.nn.channel_attention import SqueezeExcitation
from segkit.nn.gates import AdditiveGridGate, AdditiveSameLevelGate, Coefficients
from segkit.nn.map_tap import editing, recording
from segkit.nn.spatial_attention import convolutional_block_attention
from segkit.nn.unet import GateFactory, UNet

GateKind = Literal["grid", "same_level"]
GATE_KINDS: tuple[GateKind, ...] = ("grid", "same_level")


def gates(
    spatial_dims: int, kind: GateKind, *, norm: NormalisationKind = "instance"
) -> GateFactory:
    """A gate of one kind at every level, without an output transform."""

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module:
        if kind == "grid":
            return AdditiveGridGate(
                spatial_dims,
                skip_channels=skip_channels,
                signal_channels=coarse_channels,
                stride=stride,
                deepest=deepest,
                norm=norm,
            )
        return AdditiveSameLevelGate(
            spatial_dims, skip_channels=skip_channels, signal_channels=upsampled_channels, norm=norm
        )

    return make


def gated_unet(kind: GateKind, *, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    return UNet(2, 1, out_channels=3, channels=(4, 6, 8), skip_gate=gates(2, kind)).eval()


def image_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def num_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_the_2d_unet_has_the_parameters_of_the_paper() -> None:
    # Ronneberger et al. (2015, Fig. 1), counted by hand per level with widths 64 to 1024: two 3x3
    # convolutions down and up, a 2x2 up-convolution, a bias everywhere, and 64 to 2 at the end.
    with torch.device("meta"):
        network = UNet(
            2,
            1,
            out_channels=2,
            channels=(64, 128, 256, 512, 1024),
            norm="none",
            downsampling="pool",
        )
    assert num_parameters(network) == 31_030_658


def test_the_3d_unet_has_the_parameters_of_the_paper() -> None:
    # Çiçek et al. (2016) print 19069955, which leaves out their batch normalisations.
    with torch.device("meta"):
        network = UNet(
            3,
            3,
            out_channels=3,
            channels=((32, 64), (64, 128), (128, 256), (256, 512)),
            norm="none",
            downsampling="pool",
            upsampled_channels="keep",
            upsampling_bias=False,
        )
    assert num_parameters(network) == 19_069_955


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_the_first_supervised_logits_are_those_of_forward(deep_supervision: bool) -> None:
    torch.manual_seed(0)
    network = UNet(
        2,
        1,
        out_channels=2,
        channels=(4, 4, 6, 8),
        deep_supervision=deep_supervision,
        skip_gate=gates(2, "grid"),
    )
    image = image_of(2, 1, 16, 24)
    levels = network.supervised(image).levels
    assert torch.equal(levels[0], network(image))
    # Four levels make three decoder levels, the coarsest of which has no logits of its own.
    expected = [(2, 2, 16, 24), (2, 2, 8, 12)] if deep_supervision else [(2, 2, 16, 24)]
    assert [tuple(level.shape) for level in levels] == expected


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gates_held_open_give_the_plain_unet_bit_for_bit(
    spatial_dims: int, kind: GateKind, downsampling: Literal["stride", "pool"]
) -> None:
    torch.manual_seed(0)
    channels = (4, 5, 6)
    gated = UNet(
        spatial_dims,
        2,
        out_channels=3,
        channels=channels,
        downsampling=downsampling,
        skip_gate=gates(spatial_dims, kind),
    )
    plain = UNet(spatial_dims, 2, out_channels=3, channels=channels, downsampling=downsampling)
    left_over = plain.load_state_dict(gated.state_dict(), strict=False)
    assert not left_over.missing_keys
    assert all(".gate." in name for name in left_over.unexpected_keys)

    image = image_of(2, 2, *[8, 16, 8][:spatial_dims])
    assert not torch.equal(gated(image), plain(image))
    with editing(gated, dict.fromkeys(gated.maps(), torch.ones_like)):
        assert torch.equal(gated(image), plain(image))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_closed_gates_equal_skips_of_zeros(kind: GateKind) -> None:
    gated = gated_unet(kind)
    plain = UNet(2, 1, out_channels=3, channels=(4, 6, 8)).eval()
    plain.load_state_dict(gated.state_dict(), strict=False)
    # A decoder's block reads [upsampled; skip]: without weights for the skip, it reads zeros.
    with torch.no_grad():
        for join, upsampled in zip(plain.decoder, (4, 6), strict=True):
            join.block.layers[0].weight[:, upsampled:] = 0
    image = image_of(2, 1, 12, 8)
    assert not torch.equal(gated(image), plain(image))
    with editing(gated, dict.fromkeys(gated.maps(), torch.zeros_like)):
        assert torch.equal(gated(image), plain(image))


def flattened(across: int, numbers: Sequence[int]) -> tuple[int, ...]:
    """In-plane numbers with a 1 for the axis across the planes."""
    return (*numbers[:across], 1, *numbers[across:])


@pytest.mark.parametrize("kind", GATE_KINDS)
@pytest.mark.parametrize("across", [0, 1, 2])
def test_a_flat_3d_network_is_the_2d_network_on_a_volume_one_voxel_deep(
    across: int, kind: GateKind
) -> None:
    torch.manual_seed(0)
    strides, kernels = [(2, 2), (1, 2)], [(3, 5), (3, 3), (1, 3)]
    plane = UNet(
        2,
        1,
        out_channels=3,
        channels=(4, 5, 6),
        strides=strides,
        kernels=kernels,
        skip_gate=gates(2, kind),
        encoder_attention=lambda channels, level: Modulated(SqueezeExcitation(channels)),
    )
    volume = UNet(
        3,
        1,
        out_channels=3,
        channels=(4, 5, 6),
        strides=[flattened(across, stride) for stride in strides],
        kernels=[flattened(across, kernel) for kernel in kernels],
        skip_gate=gates(3, kind),
        encoder_attention=lambda channels, level: Modulated(SqueezeExcitation(channels)),
    )
    names = volume.state_dict()
    weights = {
        name: weight if weight.ndim == names[name].ndim else weight.unsqueeze(across + 2)
        for name, weight in plane.state_dict().items()
    }
    volume.load_state_dict(weights)
    assert volume.total_stride == flattened(across, plane.total_stride)

    image = image_of(2, 1, 8, 12)
    with recording(plane) as plane_maps:
        expected = plane(image)
    with recording(volume) as volume_maps:
        logits = volume(image.unsqueeze(across + 2))
    assert_close(logits.squeeze(across + 2), expected)
    assert plane_maps.keys() == volume_maps.keys() != set()
    for key, expected_map in plane_maps.items():
        assert_close(volume_maps[key].squeeze(across + 2), expected_map)


def test_planes_that_no_kernel_or_stride_crosses_do_not_see_each_other() -> None:
    torch.manual_seed(0)
    network = UNet(
        3,
        1,
        out_channels=2,
        channels=(3, 4, 5),
        strides=[(1, 2, 2), (1, 2, 2)],
        kernels=[(1, 3, 3)] * 3,
        norm="none",
        skip_gate=gates(3, "grid", norm="none"),
    )
    image = image_of(1, 1, 5, 8, 8)
    alone = torch.cat([network(image[:, :, [plane]]) for plane in range(5)], dim=2)
    assert_close(network(image), alone)


@pytest.mark.parametrize("downsampling", ["stride", "pool"])
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_shift_by_the_total_stride_shifts_the_logits(
    kind: GateKind, downsampling: Literal["stride", "pool"]
) -> None:
    torch.manual_seed(0)
    network = UNet(
        3,
        1,
        out_channels=2,
        channels=(3, 4, 5),
        strides=[(1, 2, 3), (2, 2, 1)],
        kernels=[(1, 3, 3), (3, 3, 3), (3, 1, 1)],
        norm="none",
        downsampling=downsampling,
        upsampling_bias=False,  # with biases of 0, an empty neighbourhood has features of 0
        skip_gate=gates(3, kind, norm="none"),
    )
    assert network.total_stride == (2, 4, 3)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "coefficients" not in name and name.endswith("bias"):
                parameter.zero_()
    # The blob reaches less far than to the image's ends: along the last axis four convolutions at
    # level 0 and four at level 1, of a voxel and of three, and the gates a cell each, so 22 voxels.
    image = torch.zeros(1, 1, 30, 48, 54)
    image[:, :, 13:16, 20:23, 24:27] = image_of(3, 3, 3)
    shifted = image.roll((2, 4, 3), dims=(2, 3, 4))
    assert_close(network(shifted), network(image).roll((2, 4, 3), dims=(2, 3, 4)))


@pytest.mark.parametrize(
    ("space", "stride", "padded"),
    [((10, 8), (4, 4), (12, 8)), ((7, 9), (4, 4), (8, 12)), ((16, 1), (4, 4), (16, 4))],
)
def test_an_image_of_another_size_is_refused_with_the_size_to_pad_to(
    space: tuple[int, ...], stride: tuple[int, ...], padded: tuple[int, ...]
) -> None:
    network = UNet(2, 1, out_channels=2, channels=(3, 4, 5))
    sentence = f"image space {space} must be multiples of {stride}; pad to {padded} or use slide()"
    with pytest.raises(ValueError, match=f"^{re.escape(sentence)}$"):
        network(torch.zeros(1, 1, *space))


@pytest.mark.parametrize("space", [(1, 1, 1), (5, 6, 7), (4, 13, 6), (9, 8, 12)])
def test_the_size_that_the_refusal_suggests_is_taken(space: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    network = UNet(
        3,
        1,
        out_channels=2,
        channels=(3, 4, 5),
        strides=[(1, 2, 2), (2, 2, 3)],
        norm="none",
        skip_gate=gates(3, "grid", norm="none"),
    )
    with pytest.raises(ValueError, match="pad to") as refusal:
        network(torch.zeros(1, 1, *space))
    suggestion = re.search(r"pad to (\(.*?\))", str(refusal.value))
    assert suggestion
    padded = ast.literal_eval(suggestion[1])
    assert all(
        0 <= new - old < stride for new, old, stride in zip(padded, space, (2, 4, 6), strict=True)
    )
    image = torch.zeros(1, 1, *padded)
    image[:, :, : space[0], : space[1], : space[2]] = image_of(*space)
    logits = network(image)
    assert logits.shape == (1, 2, *padded)
    assert logits.isfinite().all() and logits.std() > 0


def normalises_each_channel(layer: nn.Module) -> bool:
    if isinstance(layer, nn.GroupNorm):
        return layer.num_groups == layer.num_channels
    return isinstance(layer, nn.BatchNorm2d)


@pytest.mark.parametrize("norm", ["none", "instance", "batch", "group"])
@pytest.mark.parametrize("kind", GATE_KINDS)
def test_every_parameter_learns_from_the_supervised_logits(
    kind: GateKind, norm: NormalisationKind
) -> None:
    torch.manual_seed(0)
    network = UNet(
        2,
        2,
        out_channels=3,
        channels=(16, 16, 16, 16),
        norm=norm,
        deep_supervision=True,
        skip_gate=gates(2, kind, norm=norm),
        encoder_attention=lambda channels, level: Modulated(SqueezeExcitation(channels)),
        decoder_attention=lambda channels, level: convolutional_block_attention(
            2, channels, reduction=4, kernel_size=3
        ),
    )
    for module in network.modules():
        if isinstance(module, Coefficients):
            # Gates start nearly flat and open, and would let little gradient through.
            nn.init.normal_(module.weight)
            nn.init.zeros_(module.bias)
    levels = network.supervised(image_of(2, 2, 16, 16)).levels
    torch.stack([(level * image_of(*level.shape)).sum() for level in levels]).sum().backward()

    # A normalisation of each channel by itself takes its mean away, and with it the bias of the
    # convolution before it: the gradient that is left there is rounding.
    cancelled = {
        f"{name}.{index}.bias"
        for name, layers in network.named_modules()
        if isinstance(layers, nn.Sequential)
        for index, (layer, following) in enumerate(itertools.pairwise(layers))
        if isinstance(layer, nn.Conv2d) and normalises_each_channel(following)
    }
    assert bool(cancelled) == (norm in ("instance", "batch"))
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        if name not in cancelled:
            assert parameter.grad.abs().max() > 1e-7, name


def test_a_state_dict_carries_the_whole_network() -> None:
    def fresh(seed: int) -> UNet:
        torch.manual_seed(seed)
        return UNet(
            2,
            1,
            out_channels=2,
            channels=(4, 6, 8),
            norm="batch",
            skip_gate=gates(2, "grid"),
            encoder_attention=lambda channels, level: convolutional_block_attention(2, channels),
        )

    trained, other = fresh(0), fresh(1)
    trained(image_of(3, 1, 8, 8, seed=7))  # moves the running statistics
    trained.eval()
    other.eval()
    image = image_of(2, 1, 8, 8)
    assert not torch.equal(other(image), trained(image))
    other.load_state_dict(trained.state_dict())
    assert torch.equal(other(image), trained(image))
    with recording(other) as maps:
        other(image)
    assert not any("tap" in name for name in trained.state_dict())
    assert maps.keys() == trained.maps().keys()


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_a_sample_gives_the_same_output_in_a_batch_of_one_and_in_a_larger_batch(
    kind: GateKind,
) -> None:
    network = gated_unet(kind).train()
    image = image_of(3, 1, 8, 16)
    together = network(image)
    alone = torch.cat([network(image[[sample]]) for sample in range(3)])
    assert_close(alone, together)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_bfloat16_autocast_stays_near_float32_and_keeps_the_maps_in_float32(
    kind: GateKind,
) -> None:
    network = gated_unet(kind)
    image = image_of(1, 1, 16, 16)
    with recording(network) as expected_maps:
        expected = network(image)
    with recording(network) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(image)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    # bfloat16 keeps 8 bits: each of a dozen layers may err by 1/256 of what it holds.
    assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    for key, attention_map in maps.items():
        assert attention_map.dtype == torch.float32
        # Not even the logits were rounded to bfloat16, whose neighbours near 3 are 1/64 apart.
        logits_of_map = attention_map.double().logit()
        assert (logits_of_map - logits_of_map.bfloat16()).abs().max() > 1e-3
        assert_close(attention_map, expected_maps[key], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_taps_work_in_a_compiled_network_and_change_nothing_if_unset(
    kind: GateKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dynamo cannot trace through the checks of shapes, which are here only in tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    network = gated_unet(kind)
    image = image_of(1, 1, 8, 8)
    compiled = torch.compile(network, fullgraph=True, backend="eager")
    with torch.no_grad():
        with recording(network) as expected_maps:
            expected = network(image)
        assert_close(compiled(image), expected, rtol=0, atol=0)
        with recording(network) as maps:
            assert_close(compiled(image), expected, rtol=0, atol=0)
        assert maps.keys() == expected_maps.keys() == network.maps().keys()
        for key, attention_map in maps.items():
            assert_close(attention_map, expected_maps[key], rtol=0, atol=0)
        maps.clear()
        assert_close(compiled(image), expected, rtol=0, atol=0)
        assert not maps


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_an_exported_network_gives_the_same_logits(kind: GateKind) -> None:
    network = gated_unet(kind)
    image = image_of(1, 1, 8, 8)
    exported = torch.export.export(network, (image,))
    other = image_of(1, 1, 8, 8, seed=9)
    assert_close(exported.module()(other), network(other))
