"""What `data.elastic` adds: patches bent in mm, image and label together, and never folded."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from torch import Generator, Tensor
from torch.testing import assert_close

from segkit.config.data import DataConfig, SynthesisConfig
from segkit.data.augment_spatial import SpatialVariation
from segkit.data.variation import BENDING, ELASTIC_PROBABILITY, build_variation
from segkit.errors import ConfigError
from tests.small import small_config

PATCHES = [
    ((40, 56, 40), (1.0, 1.0, 1.0)),
    ((64, 64, 20), (0.5, 0.5, 5.0)),
    ((48, 48, 48), (0.1, 0.1, 0.1)),  # a mouse's
    ((96, 96, 1), (1.0, 1.0, 3.0)),
]


def seeded(seed: int) -> Generator:
    return Generator().manual_seed(seed)


def bending(
    patch_size: tuple[int, int, int],
    spacing: tuple[float, float, float],
    *,
    amplitude: float | None = None,
) -> SpatialVariation:
    """A variation that bends every patch as `data.elastic` does, and moves nothing else."""
    apart = min(24.0, max(math.prod(pair) for pair in zip(patch_size, spacing, strict=True)) / 2)
    return SpatialVariation(
        patch_size,
        (),
        spacing=spacing,
        rotation_probability=0.0,
        scale_probability=0.0,
        elastic_probability=1.0,
        elastic_amplitude=apart * BENDING if amplitude is None else amplitude,
        elastic_spacing=apart,
    )


def world(space: tuple[int, ...], spacing: tuple[float, ...]) -> Tensor:
    """Each voxel's place in mm from the middle, one channel an axis."""
    axes = [
        (torch.arange(size) - (size - 1) / 2) * step
        for size, step in zip(space, spacing, strict=True)
    ]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"))


@pytest.mark.parametrize(("patch_size", "spacing"), PATCHES)
def test_bending_turns_no_voxel_inside_out(
    patch_size: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    """The Jacobian's determinant, which is 1 where nothing moves, stays above 0."""
    spatial = bending(patch_size, spacing)
    displacement = spatial._displacement(
        torch.ones(8, dtype=torch.bool), seeded(0), torch.device("cpu")
    )
    moving = spatial.moving_axes
    assert float(displacement[:, moving].abs().amax((1, 2, 3, 4)).min()) > 1  # voxels
    rows = [
        torch.stack(
            [
                torch.gradient(displacement[:, axis], dim=along + 1)[0] + (axis == along)
                for along in moving
            ],
            dim=-1,
        )
        for axis in moving
    ]
    determinants = torch.linalg.det(torch.stack(rows, dim=-2))
    assert float(determinants.min()) > 0.2


@pytest.mark.parametrize(("patch_size", "spacing"), PATCHES)
def test_a_deformed_patch_is_read_inside_the_cut(
    patch_size: tuple[int, int, int], spacing: tuple[float, float, float]
) -> None:
    """The margin is an eighth of the patch and twice the amplitude, so clamping is rare."""
    spatial = bending(patch_size, spacing)
    for axis, size in enumerate(patch_size):
        reach = math.ceil(2 * spatial.elastic_amplitude / spacing[axis])
        expected = math.ceil(size / 8) + reach if axis in spatial.moving_axes else 0
        assert spatial.margin[axis] == expected
    image = world(spatial.cut_size, spacing).expand(4, -1, -1, -1, -1)
    bent, _ = spatial(image, torch.zeros(4, *spatial.cut_size, dtype=torch.uint8), seeded(1))
    for axis in spatial.moving_axes:
        edge = (spatial.cut_size[axis] - 1) / 2 * spacing[axis]
        assert float((bent[:, axis].abs() >= edge - 1e-4).float().mean()) < 0.001


def test_a_label_is_bent_as_its_image_is() -> None:
    """Balls end with one centroid in image and label, away from where they were."""
    patch_size, spacing = (32, 32, 32), (1.0, 2.0, 1.5)
    spatial = bending(patch_size, spacing)
    places = world(spatial.cut_size, (1.0, 1.0, 1.0))
    distances = places.square().sum(0).sqrt()
    image = torch.sigmoid(3 * (8 - distances)).expand(6, 1, -1, -1, -1)
    label = (distances < 8).to(torch.uint8).expand(6, -1, -1, -1)
    bent, bent_label = spatial(image, label, seeded(2))
    voxels = world(patch_size, (1.0, 1.0, 1.0))
    moved = []
    for row, row_label in zip(bent[:, 0], bent_label.float(), strict=True):
        found = [(mass * voxels).sum((1, 2, 3)) / mass.sum() for mass in (row, row_label)]
        assert_close(found[0], found[1], atol=0.2, rtol=0)  # voxels: labels are whole
        moved.append(float(found[0].norm()))
    assert min(moved) > 0.2 and max(moved) > 1


def test_bending_by_nothing_leaves_every_bit() -> None:
    spatial = bending((12, 16, 10), (1.0, 1.0, 1.0), amplitude=0.0)
    image = torch.rand(3, 2, *spatial.cut_size, generator=seeded(3))
    label = (image[:, 0] * 5).to(torch.uint8)
    bent, bent_label = spatial(image, label, seeded(0))
    inside = tuple(slice(m, m + n) for m, n in zip(spatial.margin, (12, 16, 10), strict=True))
    assert torch.equal(bent, image[:, :, *inside])
    assert torch.equal(bent_label, label[:, *inside])


def test_a_config_bends_a_fifth_of_its_patches(tmp_path: Path) -> None:
    """Patches at rest come out as they were cut; those that differ were turned, scaled or bent."""
    size, labels = (24, 24, 1), ["background", "left", "right"]  # which are not mirrored
    still = []
    for elastic in (False, True):
        data = DataConfig(folder=tmp_path, patch_size=list(size), elastic=elastic)
        vary, margin = build_variation(data, size, spacing=(3.0, 3.0, 3.0), labels=labels)
        cut = [n + 2 * m for n, m in zip(size, margin, strict=True)]
        image = torch.zeros(800, 1, *cut)
        label = torch.arange(math.prod(cut)).view(cut).expand(800, *cut)
        _, moved = vary(image, label, seeded(4))
        inside = tuple(slice(m, m + n) for m, n in zip(margin, size, strict=True))
        still.append(float((moved == label[:, *inside]).flatten(1).all(1).float().mean()))
    # Neither turned (0.2) nor scaled (0.2); nor bent. Four standard deviations are 0.07.
    assert still[0] == pytest.approx(0.64, abs=0.07)
    assert still[1] == pytest.approx(0.64 * (1 - ELASTIC_PROBABILITY), abs=0.07)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_nnunets_changes_is_made(share: float, tmp_path: Path) -> None:
    """Places are left by rotation (0.2) and scaling (0.2), intensities by seven changes."""
    size, labels = (24, 24, 1), ["background", "ball"]
    data = DataConfig(folder=tmp_path, patch_size=list(size), augment_share=share)
    vary, margin = build_variation(data, size, spacing=(3.0, 3.0, 3.0), labels=labels)
    assert (margin == (0, 0, 0)) == (share == 0)
    cut = [n + 2 * m for n, m in zip(size, margin, strict=True)]
    image = torch.rand(800, 1, *cut, generator=seeded(5))
    label = torch.arange(math.prod(cut)).view(cut).expand(800, *cut)
    varied, moved = vary(image, label, seeded(4))
    inside = tuple(slice(m, m + n) for m, n in zip(margin, size, strict=True))
    at_rest, values = label[:, *inside], image[:, 0, *inside]
    as_cut = (moved == at_rest).flatten(1).all(1)
    flipped = (moved == at_rest.flip(1)).flatten(1).all(1)
    assert float((as_cut | flipped).float().mean()) == pytest.approx(
        (1 - 0.2 * share) ** 2, abs=0.07
    )
    assert float(flipped.float().mean()) == pytest.approx(0.5 * (1 - 0.2 * share) ** 2, abs=0.07)
    same = torch.where(flipped[:, None, None, None], values.flip(1), values) == varied[:, 0]
    # Noise, blur, brightness, contrast, low resolution and two gamma curves; two of them are drawn
    # for the channel too, with probability 0.5.
    kept = math.prod(1 - share * p for p in (0.1, 0.1, 0.15, 0.15, 0.125, 0.1, 0.3))
    still = same.flatten(1).all(1)[as_cut | flipped]
    assert float(still.float().mean()) == pytest.approx(kept, abs=0.07)


def test_a_share_does_not_concern_drawn_images(tmp_path: Path) -> None:
    size = [16, 16, 1]
    drawn = []
    for share in (0.0, 1.0):
        data = DataConfig(
            folder=tmp_path, patch_size=size, augment_share=share, synthesis=SynthesisConfig()
        )
        vary, margin = build_variation(
            data, (16, 16, 1), spacing=(1.0, 1.0, 1.0), labels=["background", "ball"]
        )
        cut = [n + 2 * m for n, m in zip(size, margin, strict=True)]
        label = (torch.rand(4, *cut, generator=seeded(1)) < 0.3).to(torch.uint8)
        drawn.append(vary(torch.zeros(4, 1, *cut), label, seeded(2)))
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)


def test_bending_is_off_by_default_and_needs_augmentation() -> None:
    assert not small_config(Path("data")).data.elastic
    for augment, synthesis in itertools.product((True, False), (None, {})):
        changes = {"elastic": True, "augment": augment, "synthesis": synthesis}
        if augment or synthesis is not None:
            assert small_config(Path("data"), data=changes).data.elastic
        else:
            with pytest.raises(ConfigError, match=r"data\.elastic needs data\.augment"):
                small_config(Path("data"), data=changes)
    with pytest.raises(ConfigError, match=r"needs data\.augment_share above 0, found 0; set it to"):
        small_config(Path("data"), data={"elastic": True, "augment_share": 0})
