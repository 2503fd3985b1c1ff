"""Enhanced DICOM files: each frame has its own place and its own scale."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pydicom import Dataset

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.dicom_listing import list_series
from segkit.io.inputs import find_inputs
from segkit.io.volume import read_grid, read_volume
from tests.dicom import write_enhanced, write_series
from tests.helpers import affine_of

SHAPE = (5, 6, 4)
GRID = Grid(SHAPE, affine_of("LPS"))
STORED = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
SHUFFLED = [2, 0, 3, 1]


@pytest.mark.parametrize("by", ["folder", "file"])
def test_every_voxel_of_an_enhanced_file_keeps_its_value_and_its_place(
    by: str, tmp_path: Path
) -> None:
    path = write_enhanced(tmp_path / "IM0", STORED, GRID, order=SHUFFLED)
    volume = read_volume(tmp_path if by == "folder" else path)
    assert_array_equal(volume.data, STORED.astype(int) - 1024)
    assert volume.data.dtype.kind == "i"
    assert_allclose(volume.grid.centres(), GRID.centres(), atol=1e-4)
    assert read_grid(path).agrees_with(GRID)


def test_frames_with_scales_of_their_own_become_float32(tmp_path: Path) -> None:
    slopes = [0.5, 1.0, 1.5, 2.0]
    write_enhanced(tmp_path / "IM0", STORED, GRID, order=SHUFFLED, slopes=slopes, intercept=2)
    volume = read_volume(tmp_path)
    assert volume.data.dtype == np.float32
    assert_allclose(volume.data, STORED * np.array(slopes) + 2, rtol=1e-6)


def test_an_enhanced_file_of_one_frame_has_its_place(tmp_path: Path) -> None:
    grid = Grid((5, 6, 1), GRID.affine)
    write_enhanced(tmp_path / "IM0", STORED[:, :, :1], grid)
    assert_allclose(read_volume(tmp_path).grid.affine, grid.affine, atol=1e-4)


def test_an_enhanced_file_is_an_input_but_a_single_slice_is_not(tmp_path: Path) -> None:
    path = write_enhanced(tmp_path / "a" / "scan.dcm", STORED, GRID)
    write_enhanced(tmp_path / "a" / "other.dcm", STORED, GRID)
    (source,) = find_inputs([path], 1)
    assert (source.name, source.files, source.suffix) == ("scan", (path,), ".nii.gz")
    slices = write_series(tmp_path / "b", STORED, GRID)
    with pytest.raises(VolumeError, match="is one file of a DICOM series; pass the folder"):
        find_inputs(slices[:1], 1)


def test_a_series_of_one_place_twice_names_the_frames(tmp_path: Path) -> None:
    twice = np.concatenate([STORED, STORED[:, :, :1]], axis=2)

    def again(file: Dataset) -> None:
        first = file.PerFrameFunctionalGroupsSequence[0].PlanePositionSequence
        file.PerFrameFunctionalGroupsSequence[4].PlanePositionSequence = first

    path = write_enhanced(tmp_path / "IM0", twice, Grid((5, 6, 5), GRID.affine), change=again)
    with pytest.raises(
        VolumeError, match=r"frame [15]: lies at the same position as IM0 frame [15]; split"
    ):
        read_volume(path)


def test_frames_without_positions_are_refused(tmp_path: Path) -> None:
    def bare(file: Dataset) -> None:
        del file.PerFrameFunctionalGroupsSequence

    path = write_enhanced(tmp_path / "IM0", STORED, GRID, change=bare)
    with pytest.raises(
        VolumeError, match="found 4 frames without their positions; convert it to NIfTI"
    ):
        read_volume(path)


def test_fewer_places_than_frames_are_refused(tmp_path: Path) -> None:
    def cut(file: Dataset) -> None:
        del file.PerFrameFunctionalGroupsSequence[3]

    path = write_enhanced(tmp_path / "IM0", STORED, GRID, change=cut)
    with pytest.raises(VolumeError, match="expected positions of 4 frames, found 3; export"):
        list_series(path.parent)
