"""Segments of DICOM segmentations become labels on the grid of their series."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_array_equal
from pydicom import Dataset, dcmread
from pydicom.uid import JPEGLSLossless, RLELossless

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.dicom_labels import read_structure_file
from segkit.io.picture_rules import PictureRules
from segkit.io.structure_rules import StructureRules
from segkit.io.volume import read_label_values
from tests.dicom import write_series
from tests.dicom_segments import write_segments
from tests.helpers import affine_of

SHAPE = (12, 10, 6)
GRID = Grid(SHAPE, affine_of("LPS", spacing=(0.8, 1.1, 3.0)))
EXPECTED = np.zeros(SHAPE, int)
EXPECTED[2:7, 1:4, 1:3] = 1
EXPECTED[4:6, 3:8, 4] = 2
NAMES = {1: "liver", 2: "lesion"}
CLASSES = {"liver": ("liver",), "lesion": ("lesion",)}


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "ct", np.zeros(SHAPE, np.uint16), GRID)
    return tmp_path / "ct"


def read(path: Path, series: Path, patterns: Mapping[str, Sequence[str]] = CLASSES) -> ndarray:
    """The labels of a file on GRID; the classes are 1, 2, … in order."""
    numbers = {name: number for number, name in enumerate(patterns, start=1)}
    listed = {name: tuple(each) for name, each in patterns.items()}
    structures = StructureRules(listed, numbers, image=series)
    labels = read_label_values(path, rules=PictureRules(structures=structures))
    places = np.indices(SHAPE).reshape(3, -1).T.astype(float)
    found = np.rint(labels.grid.index(GRID.world(places))).astype(int)
    return labels.data[tuple(found.T)].reshape(SHAPE)


# Compressed frames of so few pixels may be as long as uncompressed ones.
@pytest.mark.filterwarnings("ignore:The number of bytes of compressed pixel data")
@pytest.mark.parametrize(
    ("lesion", "options"),
    [
        (7, {}),
        (300, {}),  # in 16 bits
        (7, {"omit_empty_frames": False}),
        (7, {"transfer_syntax_uid": RLELossless}),
        (7, {"transfer_syntax_uid": JPEGLSLossless}),
    ],
)
def test_the_pixels_of_a_labelmap_are_the_numbers_of_its_segments(
    lesion: int, options: Mapping[str, Any], series: Path, tmp_path: Path
) -> None:
    values = np.array([0, 3, lesion], np.uint16)[EXPECTED]
    path = tmp_path / "seg.dcm"
    write_segments(path, series, values, {3: "liver", lesion: "lesion"}, "LABELMAP", **options)
    assert_array_equal(read(path, series), EXPECTED)
    assert_array_equal(read(path, series, {"tumour": ["les*"]}), EXPECTED == 2)


def test_the_background_of_a_labelmap_is_no_structure(series: Path, tmp_path: Path) -> None:
    path = tmp_path / "seg.dcm"
    write_segments(path, series, EXPECTED.astype(np.uint8), NAMES, "LABELMAP")
    assert dcmread(path).SegmentSequence[0].SegmentLabel == "Background"
    assert read_structure_file(path).names == ("liver", "lesion")
    assert_array_equal(read(path, series, {"organ": ["*"]}), EXPECTED > 0)


@pytest.mark.parametrize("kind", ["BINARY", "LABELMAP"])
def test_a_segment_without_voxels_says_that_its_class_is_absent(
    kind: str, series: Path, tmp_path: Path
) -> None:
    path = tmp_path / "seg.dcm"
    write_segments(path, series, (EXPECTED == 1).astype(np.uint8), NAMES, kind)
    assert not read_structure_file(path).undrawn
    assert_array_equal(read(path, series), EXPECTED == 1)  # with absent: refuse


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL"])
def test_of_two_segments_that_overlap_the_later_class_counts(
    kind: str, series: Path, tmp_path: Path
) -> None:
    masks = np.stack([EXPECTED > 0, EXPECTED == 2], axis=-1).astype(np.uint8)
    path = tmp_path / "seg.dcm"
    write_segments(path, series, masks, NAMES, kind)
    assert_array_equal(read(path, series), EXPECTED)
    turned = {"lesion": ["lesion"], "liver": ["liver"]}
    assert_array_equal(read(path, series, turned), 2 * (EXPECTED > 0))


@pytest.mark.parametrize("highest", [255, 100])
def test_of_fractions_those_of_half_and_more_are_inside(
    highest: int, series: Path, tmp_path: Path
) -> None:
    shares = np.zeros((*SHAPE, 1))
    shares[4:8, 3, 2, 0] = 0.2, 0.49, 0.51, 1.0
    path = tmp_path / "seg.dcm"
    write_segments(path, series, shares, {1: "Nodule"}, "FRACTIONAL", max_fractional_value=highest)
    expected = np.zeros(SHAPE, int)
    expected[6:8, 3, 2] = 1
    assert_array_equal(read(path, series, {"nodule": ["nodule"]}), expected)


def another_type(file: Dataset) -> None:
    file.SegmentationType = "SURFACE"


def without_highest(file: Dataset) -> None:
    del file.MaximumFractionalValue


def with_fewer_positions(file: Dataset) -> None:
    file.PerFrameFunctionalGroupsSequence = file.PerFrameFunctionalGroupsSequence[:1]


def without_positions(file: Dataset) -> None:
    del file.PerFrameFunctionalGroupsSequence


def with_one_number(file: Dataset) -> None:
    file.SegmentSequence[-1].SegmentNumber = file.SegmentSequence[-2].SegmentNumber


def with_fewer_pixels(file: Dataset) -> None:
    file.PixelData = file.PixelData[:-30]


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("BINARY", another_type, "of the type BINARY, FRACTIONAL or LABELMAP, found SURFACE;"),
        ("FRACTIONAL", without_highest, "expected a Maximum Fractional Value"),
        ("BINARY", with_fewer_positions, "expected positions of 3 frames, found 1; export"),
        ("LABELMAP", without_positions, "expected positions of 3 frames, found 0; .* slides"),
        ("LABELMAP", with_one_number, "segments with different numbers, found 1 several times"),
        ("LABELMAP", with_fewer_pixels, "cannot be read as DICOM: .*; export the file again"),
    ],
)
def test_a_segmentation_that_would_be_read_wrongly_is_refused(
    kind: str, change: Callable[[Dataset], None], words: str, series: Path, tmp_path: Path
) -> None:
    path = tmp_path / "seg.dcm"
    values = EXPECTED.astype(np.uint8)
    if kind == "FRACTIONAL":
        values = np.stack([EXPECTED == 1, EXPECTED == 2], axis=-1).astype(float)
    write_segments(path, series, values, NAMES, kind)
    file = dcmread(path)
    change(file)
    file.save_as(path)
    with pytest.raises(VolumeError, match=words) as refusal:
        read(path, series)
    assert str(refusal.value).startswith(f"{path}: ")


@pytest.mark.parametrize("kind", ["BINARY", "FRACTIONAL", "LABELMAP"])
def test_numbers_that_no_segment_describes_are_refused(
    kind: str, series: Path, tmp_path: Path
) -> None:
    path = tmp_path / "seg.dcm"
    masks = np.stack([EXPECTED == 1, EXPECTED == 2], axis=-1).astype(float)
    values = masks if kind == "FRACTIONAL" else EXPECTED.astype(np.uint8)
    write_segments(path, series, values, NAMES, kind)
    file = dcmread(path)
    del file.SegmentSequence[-1]
    file.save_as(path)
    with pytest.raises(VolumeError, match="found 2, which no segment describes; export the file"):
        read(path, series, {"liver": ["liver"]})
    if kind == "LABELMAP":  # such pixels are padding if the file says so
        file.PixelPaddingValue = 2
        file.save_as(path)
        assert_array_equal(read(path, series, {"liver": ["liver"]}), EXPECTED == 1)
