"""Laws of a first stage's labels beside an image: on its grid, and turned with its reference."""

from collections.abc import Sequence

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.testing import assert_array_equal
from torch import Generator, Tensor

from segkit.data.augment_intensity import IntensityVariation
from segkit.data.augment_labels import LabelCorruption
from segkit.data.augment_spatial import SpatialVariation
from segkit.data.first_stage_labels import VariationWithLabels, majority, out_of_fold, with_labels
from segkit.data.preprocess import prepare_image
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume
from segkit.nn.unet import UNet, spread_labels
from tests.helpers import ORIENTATIONS, affine_of

UNCHANGED = LabelCorruption(reshaping_probability=0.0, removal_probability=0.0)


def unchanged(image: Tensor) -> Tensor:
    return image


def half_spaces(grid: Grid, at: Sequence[float]) -> Volume:
    """Label 1 on one side of a plane through the middle of the world, 2 on the other."""
    middle = grid.world((np.array(grid.shape) - 1) / 2)
    side = (grid.centres() - middle) @ np.array(at) > 0
    return Volume((side + 1).astype(np.uint8), grid)


@pytest.mark.parametrize("code", sorted(ORIENTATIONS)[::5])
def test_first_stage_labels_keep_their_world_positions(code: str) -> None:
    grid = Grid((18, 20, 12), affine_of(code))
    at = (0.3, -0.5, 0.8)
    image = np.zeros(grid.shape, np.float32)
    image[3:-2, 4:-1, 2:-3] = 1  # the body's box is not the volume
    prepared = with_labels(
        prepare_image(Volume(image, grid), spacing=(1.7, 2.1, 2.9), normalisers=[unchanged]),
        half_spaces(grid, at),
    )
    assert len(prepared.image) == 2
    middle = grid.world((np.array(grid.shape) - 1) / 2)
    side = (prepared.grid.centres() - middle) @ np.array(at)
    far = np.abs(side) > 2.5  # mm; voxels that the plane cuts may go either way
    assert far.mean() > 0.4
    expected = np.where(side > 0, 2, 1)
    assert_array_equal(prepared.image[1].numpy()[far], expected[far])


def test_labels_of_another_volume_are_refused() -> None:
    grid = Grid((8, 8, 8), np.eye(4))
    prepared = prepare_image(
        Volume(np.ones(grid.shape), grid), spacing=(1.0, 1.0, 1.0), normalisers=[unchanged]
    )
    for shape, shift in (((8, 8, 7), 0.0), ((8, 8, 8), 1.0)):
        affine = np.eye(4)
        affine[0, 3] = shift
        labels = Volume(np.zeros(shape, np.uint8), Grid(shape, affine))
        with pytest.raises(VolumeError, match="expected labels of the first stage on the grid"):
            with_labels(prepared, labels)


def test_one_channel_of_labels_becomes_one_of_0_and_1_for_each_class() -> None:
    image = torch.randn(2, 3, 4, 5, 6)
    image[:, 2] = torch.randint(0, 4, (2, 4, 5, 6)).float()
    spread = spread_labels(image, 3)
    assert torch.equal(spread[:, :2], image[:, :2])
    assert set(spread[:, 2:].unique().tolist()) == {0.0, 1.0}
    for number in (1, 2, 3):
        assert torch.equal(spread[:, 1 + number] == 1, image[:, 2] == number)


def test_a_network_with_labels_is_one_that_takes_their_channels() -> None:
    torch.manual_seed(0)
    given_labels = UNet(3, 1, out_channels=2, channels=(4, 8), label_classes=3)
    wide = UNet(3, 4, out_channels=2, channels=(4, 8))
    wide.load_state_dict(given_labels.state_dict())
    labels = torch.randint(0, 4, (1, 1, 8, 8, 8)).float()
    image = torch.cat([torch.randn(1, 1, 8, 8, 8), labels], dim=1)
    assert torch.equal(given_labels(image), wide(spread_labels(image, 3)))


@given(st.lists(st.lists(st.integers(0, 3), min_size=9, max_size=9), min_size=1, max_size=5))
def test_the_majority_decides_and_the_first_if_labels_tie(rows: list[list[int]]) -> None:
    grid = Grid((3, 3, 1), np.eye(4))
    volumes = [Volume(np.array(row, np.uint8).reshape(grid.shape), grid) for row in rows]
    expected = [max(voxel, key=voxel.count) for voxel in zip(*rows, strict=True)]
    found = majority(volumes).data
    assert found.dtype == np.uint8 and found.ravel().tolist() == expected


def test_a_case_is_labelled_by_models_that_never_saw_it_if_there_are_any() -> None:
    folds = [{"a", "b"}, {"c"}, {"b", "d"}]
    assert out_of_fold("a", folds) == [0]
    assert out_of_fold("b", folds) == [0, 2]
    assert out_of_fold("c", folds) == [1]
    assert out_of_fold("e", folds) == [0, 1, 2]
    assert out_of_fold("a", [(), ()]) == [0, 1]


def variation(patch: tuple[int, ...], corrupt: LabelCorruption = UNCHANGED) -> VariationWithLabels:
    spatial = SpatialVariation(
        patch, (0, 1, 2), rotation_probability=1.0, scale_probability=1.0, elastic_probability=0.5
    )
    return VariationWithLabels(3, spatial, IntensityVariation(noise_probability=1.0), corrupt)


@pytest.mark.parametrize("patch", [(12, 12, 12), (12, 12, 1)])
def test_labels_are_turned_with_the_reference_and_never_blended(patch: tuple[int, ...]) -> None:
    vary = variation(patch)
    cut = vary.spatial.cut_size  # type: ignore[attr-defined]
    label = torch.randint(0, 4, (2, *cut), dtype=torch.uint8)
    image = torch.cat([torch.randn(2, 2, *cut), label[:, None].float()], dim=1)
    seen, reference = vary(image, label, Generator().manual_seed(1))
    assert seen.shape == (2, 3, *patch) and reference.dtype == torch.uint8
    assert torch.equal(seen[:, 2], reference.float())
    # A reference of its own is seen as it would be alone, and so is the image.
    other = torch.randint(0, 250, (2, *cut), dtype=torch.uint8)
    seen, reference = vary(image, other, Generator().manual_seed(1))
    alone, alone_label = vary.spatial(image[:, :2], other, Generator().manual_seed(1))
    assert torch.equal(reference, alone_label)
    assert seen[:, :2].shape == alone.shape and not torch.equal(seen[:, :2], alone)


def test_labels_are_corrupted_and_the_reference_is_not() -> None:
    corrupt = LabelCorruption(reshaping_probability=1.0, radii=(1, 2))
    vary, honest = variation((12, 12, 12), corrupt), variation((12, 12, 12))
    cut = vary.spatial.cut_size  # type: ignore[attr-defined]
    label = torch.randint(0, 4, (2, *cut), dtype=torch.uint8)
    image = torch.cat([torch.randn(2, 1, *cut), label[:, None].float()], dim=1)
    seen, reference = vary(image, label, Generator().manual_seed(2))
    same, same_reference = honest(image, label, Generator().manual_seed(2))
    assert torch.equal(reference, same_reference)
    assert not torch.equal(seen[:, 1], same[:, 1])
    assert set(seen[:, 1].unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
