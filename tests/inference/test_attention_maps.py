"""Where maps lie: every kind, at every level, through windows, resampling and orientations.

The network here is built as any other, with every module of attention in its place; only the values
that its maps take are planted, as means of the image over what each cell covers.
"""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
import torch.nn.functional as F
from numpy import ndarray
from numpy.testing import assert_allclose
from torch import Tensor

from segkit.config.attention import (
    AdditiveGridGateConfig,
    AdditiveSameLevelGateConfig,
    AttentionConfig,
    CrossAttentionConfig,
    GlobalContextConfig,
    SelfAttentionConfig,
    SpatialExcitationConfig,
    UTransformerGateConfig,
)
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid, Orientation
from segkit.inference.attention_maps import map_on_source
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from segkit.nn.map_tap import taps
from segkit.nn.unet import UNet
from tests.helpers import affine_of
from tests.models import description, noise_volume, random_model, world_axes

STRIDES = {
    "even": [[2, 2, 2]] * 3,
    "anisotropic": [[2, 2, 1], [1, 2, 1], [2, 2, 2]],
}
KINDS = {
    "grid gates": AttentionConfig(skip=AdditiveGridGateConfig(levels=[0, 1, 2])),
    "same-level gates": AttentionConfig(skip=AdditiveSameLevelGateConfig(levels=[0, 1, 2])),
    "cross-attention": AttentionConfig(
        skip=CrossAttentionConfig(levels=[1, 2], heads=1, head_channels=6)
    ),
    "u-transformer": AttentionConfig(
        skip=UTransformerGateConfig(levels=[2], heads=1, head_channels=6)
    ),
    "spatial": AttentionConfig(
        encoder=SpatialExcitationConfig(), decoder=SpatialExcitationConfig()
    ),
    "self-attention": AttentionConfig(bottleneck=SelfAttentionConfig(heads=1, head_channels=6)),
    "pooling": AttentionConfig(encoder=GlobalContextConfig(), decoder=GlobalContextConfig()),
}
OF_KIND = {
    "grid gates": {"gate"},
    "same-level gates": {"gate"},
    "cross-attention": {"received"},
    "u-transformer": {"gate", "received"},
    "spatial": {"spatial"},
    "self-attention": {"received"},
    "pooling": {"pool"},
}


class Pooled(UNet):
    """Its maps are the image, averaged over the voxels of each cell."""

    def forward(self, image: Tensor) -> Tensor:
        logits = super().forward(image)
        for tap in taps(self).values():
            if tap.info is not None and tap.info.placement is not None:
                tap(F.avg_pool3d(image, [int(step) for step in tap.info.placement.stride]))
        return logits


def pooled(
    attention: AttentionConfig,
    strides: list[list[int]] = STRIDES["even"],
    *,
    channels: int = 1,
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    patch_size: tuple[int, int, int] = (16, 16, 16),
    width: int = 2,
) -> Predictor:
    network = NetworkConfig(
        channels=[width] * 4,
        strides=strides,
        downsampling="pool",
        deep_supervision=False,
        attention=attention,
    )
    told = description(channels=channels, spacing=spacing, patch_size=patch_size, network=network)
    built = build_network(told).eval()
    built.__class__ = Pooled
    for tap in taps(built).values():
        assert tap.info is not None
        tap.info, tap.mean = replace(tap.info, lowest=-1e6, highest=1e6), False
    return Predictor(Model(told, built), device="cpu", engine="torch")


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_map_of_world_coordinates_is_right_in_the_world(kind: str, strides: str) -> None:
    code = "LPS" if strides == "even" else "ASL"
    x, y, z = ((0.7, 1.3, 4.0)[world] for world in world_axes(code))
    grid = Grid((27, 29, 21), affine_of(code, spacing=(x, y, z)))
    world = grid.centres()
    volume = Volume(world.astype(np.float32), grid)
    predictor = pooled(KINDS[kind], STRIDES[strides], channels=3, spacing=(0.7, 1.3, 4.0), width=6)
    maps = {
        key: one
        for key, one in predictor(volume, maps=True).maps.items()
        if one.volume is not None and one.info.kind != "channel"
    }
    assert {one.info.kind for one in maps.values()} == OF_KIND[kind]
    turned = Orientation.of(grid.affine).turn_grid(grid)
    for key, one in maps.items():
        native, placement = one.volume, one.info.placement
        assert native is not None and placement is not None
        # On its own grid, every cell that lies wholly in the scan.
        whole = np.array(turned.shape) // np.array(placement.stride).astype(int)
        cells = tuple(slice(0, size) for size in whole)
        assert_allclose(native.data[cells], native.grid.centres()[cells], atol=1e-2, err_msg=key)
        # On the scan's, every voxel between the centres of such cells.
        index = native.grid.index(world)
        inside = ((index >= 0) & (index <= whole - 1)).all(axis=-1)
        assert inside.mean() > 0.03
        assert_allclose(
            map_on_source(one, volume).data[inside], world[inside], atol=1e-2, err_msg=key
        )


def centroid(weights: ndarray, places: ndarray) -> ndarray:
    return np.tensordot(weights, places, axes=3) / weights.sum()


@pytest.mark.parametrize("strides", STRIDES)
def test_the_centroid_of_a_blob_stays_within_a_twentieth_of_a_voxel(strides: str) -> None:
    grid = Grid((41, 43, 39), affine_of("PIR", spacing=(1.0, 1.0, 1.0)))
    voxels = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), axis=-1)
    centre = np.array([20.3, 20.6, 19.2])
    blob = np.exp(-(((voxels - centre) / 4.5) ** 2).sum(axis=-1) / 2)
    volume = Volume(blob.astype(np.float32), grid)
    predictor = pooled(KINDS["grid gates"], STRIDES[strides], patch_size=(24, 24, 24))
    maps = predictor(volume, maps=True).maps
    assert len(maps) == 3
    for key, one in maps.items():
        native = one.volume
        assert native is not None
        on_scan = map_on_source(one, volume).data.astype(float)
        assert np.abs(centroid(on_scan, voxels) - centre).max() < 0.05, key
        cells = centroid(native.data.astype(float), native.grid.centres())
        assert np.abs(grid.index(cells) - centre).max() < 0.05, key


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("kind", ["grid gates", "spatial"])
def test_the_map_of_a_mirrored_scan_is_the_mirrored_map(kind: str, axis: int) -> None:
    """Of sizes that whole cells fill; else the first cell of one is the torn last of the other."""
    predictor, volume = pooled(KINDS[kind]), noise_volume((32, 24, 16))
    mirrored = volume.like(np.flip(volume.data, axis).copy())
    first, second = (predictor(each, maps=True).maps for each in (volume, mirrored))
    for key, one in first.items():
        there = np.flip(map_on_source(one, volume).data, axis)
        assert_allclose(map_on_source(second[key], mirrored).data, there, atol=1e-5, err_msg=key)


@pytest.mark.parametrize(
    ("strides", "shape"), [("even", (45, 33, 27)), ("anisotropic", (32, 25, 17))]
)
def test_windows_of_a_local_map_cover_all_of_it(strides: str, shape: tuple[int, int, int]) -> None:
    volume = noise_volume(shape)
    attention = KINDS["grid gates"]
    windowed = pooled(attention, STRIDES[strides])(volume, maps=True).maps
    at_once = pooled(attention, STRIDES[strides], patch_size=(48, 48, 48))(volume, maps=True).maps
    assert list(windowed) == list(at_once)
    for key, one in windowed.items():
        first, second = one.volume, at_once[key].volume
        assert first is not None and second is not None and one.info.placement is not None
        whole = np.array(shape) // np.array(one.info.placement.stride).astype(int)
        cells = tuple(slice(0, size) for size in whole)
        assert_allclose(first.data[cells], second.data[cells], atol=1e-5, err_msg=key)
        assert_allclose(first.grid.affine, second.grid.affine)


@pytest.mark.parametrize("code", ["LPS", "RAI", "ASL", "SPR"])
def test_a_scan_stored_another_way_has_the_same_values_in_the_same_places(code: str) -> None:
    """Of a network that looks at what lies around, with random weights and odd sizes."""
    gates = AdditiveGridGateConfig(levels=[0, 1], initial_bias=0.0)
    network = NetworkConfig(channels=[4, 4, 4], attention=AttentionConfig(skip=gates))
    predictor = Predictor(random_model(network), device="cpu")
    grid = Grid((13, 21, 11), affine_of("RAS", spacing=(1.0, 1.0, 1.0)))
    plain = Volume(noise_volume(grid.shape).data, grid)
    image = nib.Nifti1Image(plain.data, grid.affine)
    ways = nib.orientations.axcodes2ornt(tuple(code))
    back = nib.orientations.ornt_transform(nib.io_orientation(grid.affine), ways)
    turned = image.as_reoriented(back)
    stored = Volume(np.asarray(turned.dataobj), Grid(turned.shape, turned.affine))
    assert Orientation.of(stored.grid.affine).code == code
    first, second = (predictor(each, maps=True) for each in (plain, stored))
    assert list(first.maps) == ["skip.0/gate", "skip.1/gate"]
    for key, one in first.maps.items():
        native, other = one.volume, second.maps[key].volume
        assert native is not None and other is not None
        assert other.grid.agrees_with(native.grid, tolerance=1e-3)
        assert_allclose(other.data, native.data, atol=1e-6)
        on_scan = map_on_source(one, plain).data
        assert np.ptp(on_scan) > 1e-4
        found = map_on_source(second.maps[key], stored).data
        assert_allclose(Orientation.of(stored.grid.affine).turn(found), on_scan, atol=1e-5)
