from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Grid, Placement
from segkit.nn.blocks import Modulated
from segkit.nn.channel_attention import SqueezeExcitation
from segkit.nn.gates import AdditiveGridGate, AdditiveSameLevelGate
from segkit.nn.map_tap import MapInfo, editing, recording, taps
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.spatial_attention import convolutional_block_attention
from segkit.nn.unet import GateFactory, UNet

Downsampling = Literal["stride", "pool"]
DOWNSAMPLING: tuple[Downsampling, ...] = ("stride", "pool")


def grid_gates(spatial_dims: int) -> GateFactory:
    """A grid gate at every level but the finest."""

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module | None:
        if level == 0:
            return None
        return AdditiveGridGate(
            spatial_dims,
            skip_channels=skip_channels,
            signal_channels=coarse_channels,
            stride=stride,
            deepest=deepest,
            initial_bias=0.0,
        )

    return make


def same_level_gates(spatial_dims: int) -> GateFactory:
    """A gate on the skip's own grid at every level."""

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module:
        return AdditiveSameLevelGate(
            spatial_dims, skip_channels=skip_channels, signal_channels=upsampled_channels
        )

    return make


def attentive_unet(
    spatial_dims: int = 2,
    *,
    downsampling: Downsampling = "stride",
    strides: Sequence[Sequence[int]] | None = None,
) -> UNet:
    """Three levels, a map of every kind."""
    torch.manual_seed(0)
    return UNet(
        spatial_dims,
        1,
        out_channels=2,
        channels=(4, 6, 8),
        strides=strides,
        downsampling=downsampling,
        skip_gate=grid_gates(spatial_dims),
        encoder_attention=lambda channels: Modulated(SqueezeExcitation(channels)),
        decoder_attention=lambda channels: convolutional_block_attention(
            spatial_dims, channels, reduction=2, kernel_size=3
        ),
    ).eval()


def image_of(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


KEYS = {
    "encoder.0/channel",
    "encoder.1/channel",
    "encoder.2/channel",
    "skip.1/gate",
    "decoder.0/channel",
    "decoder.0/spatial",
    "decoder.1/channel",
    "decoder.1/spatial",
}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_recording_changes_no_bit_of_the_output(spatial_dims: int) -> None:
    network = attentive_unet(spatial_dims)
    image = image_of(2, 1, *[8, 16, 12][:spatial_dims])
    before = network(image)
    with recording(network) as maps:
        assert torch.equal(network(image), before)
    assert maps.keys() == KEYS
    assert torch.equal(network(image), before)


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
def test_recorded_maps_are_those_that_the_network_declares(downsampling: Downsampling) -> None:
    network = attentive_unet(downsampling=downsampling)
    image = image_of(2, 1, 16, 24)
    with recording(network) as maps:
        network(image)
    declared = network.maps()
    assert declared.keys() == maps.keys() == KEYS
    for key, attention_map in maps.items():
        info = declared[key]
        assert info.key == key
        assert key.endswith(f"/{info.kind}")
        assert info.level == int(key.split("/")[0].split(".")[1])
        assert attention_map.dtype == torch.float32
        assert not attention_map.requires_grad
        assert attention_map.min() >= info.lowest == 0.0
        assert attention_map.max() <= info.highest == 1.0
        if info.placement is None:
            assert info.kind == "channel"
            assert attention_map.shape == (2, (4, 6, 8)[info.level], 1, 1)
        else:
            cells = [
                size / stride
                for size, stride in zip(image.shape[2:], info.placement.stride, strict=True)
            ]
            assert attention_map.shape == (2, 1, *cells)


# Worked out by hand. Pooling by s moves the first cell's centre to (s - 1)/2 of the cells before;
# an odd kernel with stride s leaves it. A gate at level 1 lies on the grid of level 2, whose cells
# its own convolution (kernel and stride s) takes from level 1.
@pytest.mark.parametrize(
    ("downsampling", "strides", "level_1", "gate_1"),
    [
        ("pool", [(2, 2), (2, 2)], ((2, 2), (0.5, 0.5)), ((4, 4), (1.5, 1.5))),
        ("stride", [(2, 2), (2, 2)], ((2, 2), (0, 0)), ((4, 4), (1, 1))),
        ("pool", [(1, 2), (3, 2)], ((1, 2), (0, 0.5)), ((3, 4), (1, 1.5))),
        ("stride", [(1, 2), (3, 2)], ((1, 2), (0, 0)), ((3, 4), (1, 1))),
        (
            "pool",
            [(1, 2, 2), (2, 3, 1)],
            ((1, 2, 2), (0, 0.5, 0.5)),
            ((2, 6, 2), (0.5, 2.5, 0.5)),
        ),
        ("stride", [(1, 2, 2), (2, 3, 1)], ((1, 2, 2), (0, 0, 0)), ((2, 6, 2), (0.5, 2, 0))),
    ],
)
def test_maps_lie_where_their_levels_lie(
    downsampling: Downsampling,
    strides: Sequence[Sequence[int]],
    level_1: tuple[tuple[float, ...], tuple[float, ...]],
    gate_1: tuple[tuple[float, ...], tuple[float, ...]],
) -> None:
    spatial_dims = len(strides[0])
    network = attentive_unet(spatial_dims, downsampling=downsampling, strides=strides)
    placements = {
        key: info.placement for key, info in network.maps().items() if info.placement is not None
    }
    assert placements == {
        "skip.1/gate": Placement(*gate_1),
        "decoder.0/spatial": Placement.identity(spatial_dims),
        "decoder.1/spatial": Placement(*level_1),
    }


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_maps_of_slices_have_one_cell_for_each_voxel_across_them(axis: int) -> None:
    plane = attentive_unet(strides=[(1, 2), (3, 2)], downsampling="pool")
    network = SlicewiseNetwork(plane, axis=axis)
    gate = network.maps()["skip.1/gate"].placement
    assert gate is not None
    stride, offset = [3.0, 4.0], [1.0, 1.5]
    stride.insert(axis, 1.0)
    offset.insert(axis, 0.0)
    assert gate == Placement(tuple(stride), tuple(offset))
    assert network.maps()["encoder.0/channel"].placement is None

    space = [3, 8]
    space.insert(axis, 5)
    image = image_of(2, 1, *space)
    logits = network(image)
    assert logits.shape == (2, 2, *space)
    with recording(network) as maps:
        network(image)
    volume_map = network.stack_slices(maps["skip.1/gate"], 2)
    for sample in range(2):
        for index in range(5):
            with recording(plane) as alone:
                expected = plane(image[[sample]].select(axis + 2, index))
            assert_close(logits[[sample]].select(axis + 2, index), expected)
            assert_close(
                volume_map[[sample]].select(axis + 2, index),
                alone["skip.1/gate"],
            )


def test_recording_ends_with_its_block_even_by_an_exception() -> None:
    network = attentive_unet()
    image = image_of(1, 1, 8, 8)
    with pytest.raises(RuntimeError, match="stop"), recording(network) as maps:
        raise RuntimeError("stop")
    network(image)
    assert maps == {}
    assert all(tap.sink is None for tap in taps(network).values())


def test_editing_ends_with_its_block_even_by_an_exception() -> None:
    network = attentive_unet()
    image = image_of(1, 1, 8, 8)
    before = network(image)
    edits = {"skip.1/gate": torch.zeros_like}
    with pytest.raises(RuntimeError, match="stop"), editing(network, edits):
        assert not torch.equal(network(image), before)
        raise RuntimeError("stop")
    assert torch.equal(network(image), before)
    assert all(tap.edit is None for tap in taps(network).values())


def test_nested_recordings_each_keep_their_own_maps() -> None:
    network = attentive_unet()
    first, second = image_of(2, 1, 8, 8).split(1)
    with recording(network) as outer:
        network(first)
        kept = dict(outer)
        with recording(network) as inner:
            network(second)
        assert all(outer[key] is kept[key] for key in KEYS)
        assert not torch.equal(inner["skip.1/gate"], outer["skip.1/gate"])
        network(second)
    assert inner is not outer
    for key in KEYS:
        assert torch.equal(outer[key], inner[key])


def test_the_maps_of_the_latest_pass_are_kept() -> None:
    network = attentive_unet()
    first, second = image_of(2, 1, 8, 8).split(1)
    with recording(network) as maps:
        network(first)
        network(second)
    with recording(network) as expected:
        network(second)
    for key in KEYS:
        assert torch.equal(maps[key], expected[key])


def test_an_inner_edit_takes_the_place_of_the_outer_one_until_it_ends() -> None:
    network = attentive_unet()
    image = image_of(1, 1, 8, 8)

    def gate_seen() -> Tensor:
        with recording(network) as maps:
            network(image)
        return maps["skip.1/gate"]

    edited, others = {"skip.1/gate": torch.zeros_like}, {"decoder.1/spatial": torch.ones_like}
    with editing(network, edited):
        with editing(network, {"skip.1/gate": torch.ones_like}):
            assert (gate_seen() == 1).all()
        assert (gate_seen() == 0).all()
        with editing(network, others):
            assert (gate_seen() == 0).all()
        assert (gate_seen() == 0).all()
    assert gate_seen().min() > 0 and gate_seen().max() < 1


def test_an_unknown_key_is_refused_with_those_that_are_known() -> None:
    network = attentive_unet()
    known = ", ".join(f"'{key}'" for key in sorted(KEYS))
    with (
        pytest.raises(KeyError, match=rf"expected keys of \[{known}\], found \['skip.9/gate'\]"),
        editing(network, {"skip.1/gate": torch.ones_like, "skip.9/gate": torch.ones_like}),
    ):
        raise AssertionError("the block must not run")
    assert all(tap.edit is None for tap in taps(network).values())


def test_a_network_without_attention_has_no_maps() -> None:
    network = UNet(2, 1, out_channels=2, channels=(4, 6, 8))
    with recording(network) as maps:
        network(image_of(1, 1, 8, 8))
    assert network.maps() == maps == {}
    with (
        pytest.raises(KeyError, match=r"expected keys of \[\], found \['skip.1/gate'\]"),
        editing(network, {"skip.1/gate": torch.ones_like}),
    ):
        raise AssertionError("the block must not run")


def test_edits_come_before_the_record() -> None:
    network = attentive_unet()
    seen: list[Tensor] = []

    def halve(attention_map: Tensor) -> Tensor:
        seen.append(attention_map.detach().clone())
        return attention_map / 2

    with recording(network) as maps, editing(network, {"skip.1/gate": halve}):
        network(image_of(1, 1, 8, 8))
    assert len(seen) == 1
    assert torch.equal(maps["skip.1/gate"], seen[0] / 2)


def test_maps_of_a_trained_pass_hold_no_graph() -> None:
    network = attentive_unet().train()
    with recording(network) as maps:
        network(image_of(1, 1, 8, 8)).sum().backward()
    assert all(attention_map.grad_fn is None for attention_map in maps.values())


# Placement. A network that only moves its input about is fed the field of its voxels' own
# coordinates: what arrives in a cell says where the cell lies.


def transparent_unet(
    num_axes: int,
    *,
    downsampling: Downsampling,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
    skip_gate: GateFactory,
) -> UNet:
    """Its encoder's convolutions take the centre of their kernels; it pools by the mean."""
    network = UNet(
        num_axes,
        num_axes,
        out_channels=2,
        channels=[num_axes] * (len(strides) + 1),
        strides=strides,
        kernels=kernels,
        norm="none",
        downsampling=downsampling,
        skip_gate=skip_gate,
    )
    mean_pool = {2: nn.AvgPool2d, 3: nn.AvgPool3d}[num_axes]
    for level, step in enumerate(strides, start=1):
        if downsampling == "pool":
            network.encoder[level][0] = mean_pool(tuple(step))
    for module in network.encoder.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            centre = tuple(size // 2 for size in module.kernel_size)
            nn.init.zeros_(module.weight)
            with torch.no_grad():
                for axis in range(num_axes):
                    module.weight[(axis, axis, *centre)] = 1
    return network


def index_field(space: Sequence[int]) -> Tensor:
    """Each voxel's own index, (1, axes, *space)."""
    axes = [torch.arange(size, dtype=torch.float32) for size in space]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))[None]


def predicted(placement: Placement, cells: Sequence[int]) -> Tensor:
    """Where a placement says that its cells lie, (1, axes, *cells)."""
    shape = (1, -1, *[1] * len(cells))
    stride, offset = torch.tensor(placement.stride), torch.tensor(placement.offset)
    return index_field(cells) * stride.reshape(shape) + offset.reshape(shape)


def encoder_levels(network: UNet, image: Tensor) -> list[Tensor]:
    levels = []
    for encoder_level in network.encoder:
        image = encoder_level(image)
        levels.append(image)
    return levels


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
@pytest.mark.parametrize(
    ("strides", "kernels"),
    [
        ([(2, 2), (2, 2), (2, 2)], [(3, 3)] * 4),
        ([(1, 2), (3, 2), (2, 1)], [(1, 3), (3, 5), (3, 3), (5, 1)]),
        ([(1, 2, 2), (2, 2, 3)], [(1, 3, 3), (3, 3, 3), (3, 3, 5)]),
    ],
)
def test_every_map_lies_exactly_where_its_placement_says(
    downsampling: Downsampling,
    strides: Sequence[Sequence[int]],
    kernels: Sequence[Sequence[int]],
) -> None:
    num_axes = len(strides[0])
    network = transparent_unet(
        num_axes,
        downsampling=downsampling,
        strides=strides,
        kernels=kernels,
        skip_gate=same_level_gates(num_axes),
    )
    space = [3 * stride for stride in network.total_stride]
    levels = encoder_levels(network, index_field(space))
    for level, features in enumerate(levels[:-1]):
        placement = network.maps()[f"skip.{level}/gate"].placement
        assert placement is not None
        assert_close(features, predicted(placement, features.shape[2:]), rtol=0, atol=1e-5)

    # Gates on the coarser grid: give their downward convolution averaging weights.
    gated = transparent_unet(
        num_axes,
        downsampling=downsampling,
        strides=strides,
        kernels=kernels,
        skip_gate=grid_gates(num_axes),
    )
    for level in range(1, len(strides)):
        gate = gated.decoder[level].gate
        nn.init.zeros_(gate.from_skip.weight)
        with torch.no_grad():
            for axis in range(num_axes):
                cells = gate.from_skip.weight[axis, axis]
                cells.fill_(1 / cells.numel())
        coarse = gate.from_skip(levels[level])
        placement = gated.maps()[f"skip.{level}/gate"].placement
        assert placement is not None
        assert_close(coarse, predicted(placement, coarse.shape[2:]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("downsampling", DOWNSAMPLING)
@pytest.mark.parametrize("strides", [[(2, 2), (2, 2)], [(1, 2), (3, 2)], [(2, 1, 2), (2, 2, 3)]])
def test_a_gate_is_interpolated_to_where_the_skip_lies(
    downsampling: Downsampling, strides: Sequence[Sequence[int]]
) -> None:
    num_axes = len(strides[0])
    network = attentive_unet(num_axes, downsampling=downsampling, strides=strides)
    info = network.maps()
    coarse, fine = info["skip.1/gate"].placement, info["decoder.1/spatial"].placement
    assert coarse is not None and fine is not None
    gate = network.decoder[1].gate
    skip = image_of(1, 6, *[4 * step for step in strides[1]])
    signal = image_of(1, 8, *[4] * num_axes)
    for axis in range(num_axes):
        # The gate's map becomes the image coordinate of its own cells. Linear interpolation keeps a
        # ramp but in the outer half cells, where there is nothing to interpolate with.
        ramp = predicted(coarse, [4] * num_axes)[:, [axis]]

        def coordinates(_: Tensor, ramp: Tensor = ramp) -> Tensor:
            return ramp

        with editing(network, {"skip.1/gate": coordinates}):
            interpolated = gate(skip, signal)
        expected = predicted(fine, skip.shape[2:])[:, [axis]]
        inside = (slice(None), slice(None), *[slice(step, -step) for step in strides[1]])
        assert_close(interpolated[inside], expected[inside], rtol=0, atol=1e-5)


def test_placed_cells_lie_at_the_mean_world_position_of_the_voxels_they_pool() -> None:
    # Oblique, anisotropic and mirrored, so that an exchanged or flipped axis shows.
    affine = np.array(
        [[-0.9, 0.2, 0.3, 12.0], [0.1, 1.4, -0.5, -30.0], [0.2, 0.3, 2.6, 7.0], [0, 0, 0, 1.0]]
    )
    strides = [(1, 2, 2), (2, 2, 3)]
    network = attentive_unet(3, downsampling="pool", strides=strides)
    grid = Grid((4, 8, 12), affine)
    world = torch.from_numpy(grid.centres()).movedim(-1, 0)[None]
    pooled = nn.functional.avg_pool3d(nn.functional.avg_pool3d(world, (1, 2, 2)), (2, 2, 3))
    gate = network.maps()["skip.1/gate"].placement
    assert gate is not None
    placed = grid.placed(pooled.shape[2:], gate.stride, gate.offset)
    assert_close(torch.from_numpy(placed.centres()).movedim(-1, 0)[None], pooled)


def test_a_map_that_no_network_placed_is_not_recorded() -> None:
    loose = SqueezeExcitation(4)
    assert taps(loose) == {}
    with recording(loose) as maps:
        loose(image_of(1, 4, 3, 3))
    assert maps == {}


def test_map_information_cannot_be_changed() -> None:
    info = attentive_unet().maps()["skip.1/gate"]
    assert info == MapInfo("skip.1/gate", "gate", 1, Placement((4, 4), (1, 1)), 0.0, 1.0)
    with pytest.raises(AttributeError, match="cannot assign to field"):
        info.level = 2
