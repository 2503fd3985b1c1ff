"""Structures of DICOM files become labels on the grid of their series, by places in the world."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from matplotlib.path import Path as Outline
from numpy import ndarray
from numpy.testing import assert_array_equal
from pydicom import Dataset, dcmread

from segkit.config.labels import Labelling
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.inference.dicom_seg import write_dicom_segmentation
from segkit.io.dicom_labels import read_structure_file, told_names
from segkit.io.dicom_listing import choose_series
from segkit.io.picture_rules import PictureRules
from segkit.io.structure_rules import StructureRules
from segkit.io.volume import Volume, read_grid, read_label_values, read_volume
from tests.dicom import box_contour, write_enhanced, write_series, write_structures
from tests.helpers import affine_of

SHAPE = (12, 10, 6)
GRID = Grid(SHAPE, affine_of("LPS", spacing=(0.8, 1.1, 3.0)))
STORED = np.zeros(SHAPE, np.uint16)


@pytest.fixture
def series(tmp_path: Path) -> Path:
    write_series(tmp_path / "ct", STORED, GRID)
    return tmp_path / "ct"


def rules_of(series: Path, patterns: Mapping[str, Sequence[str]], **more: object) -> PictureRules:
    numbers = {name: number for number, name in enumerate(patterns, start=1)}
    listed = {name: tuple(each) for name, each in patterns.items()}
    return PictureRules(
        structures=StructureRules(listed, numbers, image=series, **more)  # type: ignore[arg-type]
    )


def painted(
    series: Path,
    contours: Mapping[str, Sequence[ndarray]],
    patterns: Mapping[str, Sequence[str]],
    **more: object,
) -> Volume:
    slice_ = next(series.iterdir())
    path = write_structures(series.parent / "RS.dcm", slice_, contours)
    return read_label_values(path, rules=rules_of(series, patterns, **more))


def block(low: Sequence[int], high: Sequence[int], number: int = 1) -> ndarray:
    expected = np.zeros(SHAPE, int)
    expected[tuple(slice(start, end) for start, end in zip(low, high, strict=True))] = number
    return expected


# Contours


@pytest.mark.parametrize("code", ["LPS", "PSR", "LAI"])
def test_a_voxel_is_inside_if_its_centre_lies_within_the_contour(code: str, tmp_path: Path) -> None:
    grid = Grid(SHAPE, affine_of(code, spacing=(0.8, 1.1, 3.0)))
    write_series(tmp_path / "ct", STORED, grid)
    boxes = [box_contour(grid, (2.6, 1.4), (7.4, 4.6), z) for z in (2, 3)]
    labels = painted(tmp_path / "ct", {"GTV": boxes}, {"tumour": ["gtv*"]})
    inside = np.argwhere(labels.data)
    found = np.unique(np.round(grid.index(labels.grid.world(inside.astype(float)))), axis=0)
    assert_array_equal(found, np.argwhere(block((3, 2, 2), (8, 5, 4))))
    assert labels.grid.agrees_with(read_volume(tmp_path / "ct").grid)


def test_a_contour_in_another_is_a_hole_and_one_in_the_hole_is_filled(series: Path) -> None:
    nested = [
        box_contour(GRID, (0.5, 0.5), (9.5, 8.5), 2),
        box_contour(GRID, (2.5, 2.5), (7.5, 6.5), 2),
        box_contour(GRID, (4.5, 3.5), (5.5, 5.5), 2),
    ]
    expected = block((1, 1, 2), (10, 9, 3))
    expected[3:8, 3:7, 2] = 0
    expected[5:6, 4:6, 2] = 1
    assert_array_equal(painted(series, {"a": nested}, {"a": ["a"]}).data, expected)


def test_several_contours_of_a_slice_are_islands_and_may_reach_beyond_the_image(
    series: Path,
) -> None:
    islands = [
        box_contour(GRID, (-3.5, -2.5), (1.5, 2.5), 1),
        box_contour(GRID, (8.5, 6.5), (30, 30), 1),
    ]
    expected = block((0, 0, 1), (2, 3, 2)) + block((9, 7, 1), (12, 10, 2))
    assert_array_equal(painted(series, {"a": islands}, {"a": ["a"]}).data, expected)


@pytest.mark.parametrize("seed", range(4))
def test_contours_are_filled_as_matplotlib_tells_points_in_polygons(
    seed: int, series: Path
) -> None:
    random = np.random.default_rng(seed)
    angles = np.sort(random.uniform(0, 2 * np.pi, 25))
    radii = random.uniform(1.5, 4.5, (25, 1))
    star = (5.5, 4.5) + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    contour = GRID.world(np.concatenate([star, np.full((25, 1), 3.0)], axis=1))
    labels = painted(series, {"a": [contour]}, {"a": ["a"]}).data[:, :, 3]
    centres = np.stack(np.meshgrid(range(12), range(10), indexing="ij"), axis=-1).reshape(-1, 2)
    inside = Outline(star).contains_points(centres).reshape(12, 10)
    along = np.linspace(star, np.roll(star, -1, axis=0), 200).reshape(-1, 2)
    distance = np.linalg.norm(centres[:, None] - along, axis=2).min(axis=1).reshape(12, 10)
    clear = distance > 0.1  # further from the contour than a fill is exact
    assert clear.mean() > 0.7
    assert_array_equal(labels[clear], inside[clear])


def test_of_two_classes_that_overlap_the_later_counts(series: Path) -> None:
    drawn = {
        "Lung": [box_contour(GRID, (0.5, 0.5), (9.5, 8.5), 2)],
        "GTV 1": [box_contour(GRID, (2.5, 2.5), (4.5, 4.5), 2)],
        "gtv 2": [box_contour(GRID, (6.5, 2.5), (8.5, 4.5), 2)],
    }
    labels = painted(series, drawn, {"lung": ["lung"], "tumour": ["GTV*"]}).data
    expected = block((1, 1, 2), (10, 9, 3))
    expected[3:5, 3:5, 2] = expected[7:9, 3:5, 2] = 2
    assert_array_equal(labels, expected)


def test_a_name_that_is_written_out_wins_over_a_pattern() -> None:
    rules = StructureRules(
        {"lung": ("lung*",), "tumour": ("lung tumour",)}, {"lung": 1, "tumour": 2}
    )
    assert rules.chosen(["Lung Tumour ", "lung left"]) == {"lung": [1], "tumour": [0]}
    both = StructureRules({"a": ("x*",), "b": ("*y",)}, {"a": 1, "b": 2})
    with pytest.raises(VolumeError, match="the patterns of a and b both match the structure xy"):
        both.chosen(["xy"])


def test_brackets_in_names_of_structures_are_no_wildcards() -> None:
    rules = StructureRules({"a": ("GTV[1]*",)}, {"a": 1})
    assert rules.chosen(["GTV1", "GTV[1] new"]) == {"a": [1]}


@pytest.mark.parametrize(
    ("z", "kind", "words"),
    [
        (2.4, "CLOSED_PLANAR", r"a contour between two slices, 0\.4 of a slice distance"),
        (7, "CLOSED_PLANAR", "a contour 2 slices beyond the series; complete the series"),
        (-1, "CLOSED_PLANAR", "a contour 1 slice beyond the series; complete the series"),
        (2, "POINT", "a contour of the kind POINT, but segkit fills only CLOSED_PLANAR; leave"),
    ],
)
def test_contours_that_do_not_lie_on_slices_are_refused(
    z: float, kind: str, words: str, series: Path, tmp_path: Path
) -> None:
    drawn = {"GTV": [box_contour(GRID, (1, 1), (4, 4), z)]}
    path = write_structures(tmp_path / "RS.dcm", next(series.iterdir()), drawn, kind=kind)
    with pytest.raises(VolumeError, match=words) as refusal:
        read_label_values(path, rules=rules_of(series, {"tumour": ["GTV"]}))
    assert str(refusal.value).startswith(f"{path}: structure GTV")


def test_a_class_without_a_structure_is_refused_unless_the_rules_say_what_it_is(
    series: Path,
) -> None:
    drawn = {"Mass": [], "Cord": [box_contour(GRID, (0.5, 0.5), (4.5, 4.5), 2)]}
    told = r"for tumour, found Mass \(no contours\), Cord;"
    for patterns in (["GTV*", "gross"], ["mass"]):  # not listed, or listed and not drawn
        classes = {"tumour": patterns, "cord": ["cord"]}
        with pytest.raises(VolumeError, match=told):
            painted(series, drawn, classes)
        labels = painted(series, drawn, classes, absent="background").data
        assert_array_equal(labels, block((1, 1, 2), (5, 5, 3), 2))


@pytest.mark.parametrize("listed", ["no item", "no sequence", "no contours"])
def test_a_structure_without_contours_is_undrawn(listed: str, series: Path, tmp_path: Path) -> None:
    drawn = {"Mass": [], "Cord": [box_contour(GRID, (1, 1), (4, 4), 2)]}
    path = write_structures(tmp_path / "RS.dcm", next(series.iterdir()), drawn)
    file = dcmread(path)
    if listed == "no item":
        del file.ROIContourSequence[0]
    elif listed == "no sequence":
        del file.ROIContourSequence[0].ContourSequence
    file.save_as(path)
    told = read_structure_file(path)
    assert (told.names, told.undrawn) == (("Mass", "Cord"), {0})
    assert told_names([told]) == {"Cord": 1, "Mass": 0}


def test_contours_of_no_structure_are_refused(series: Path, tmp_path: Path) -> None:
    drawn = {"a": [], "b": [box_contour(GRID, (1, 1), (4, 4), 2)]}
    path = write_structures(tmp_path / "RS.dcm", next(series.iterdir()), drawn)
    file = dcmread(path)
    del file.StructureSetROISequence[-1]
    file.save_as(path)
    with pytest.raises(VolumeError, match="found those of number 8, which no structure has"):
        read_label_values(path, rules=rules_of(series, {"a": ["a"]}))


def test_structures_without_rules_for_their_classes_are_refused(
    series: Path, tmp_path: Path
) -> None:
    path = write_structures(tmp_path / "RS.dcm", next(series.iterdir()), {"a": []})
    with pytest.raises(VolumeError, match=r"name its structures with data\.dicom\.struct"):
        read_label_values(path)


# Segmentations

TWO = Labelling({"background": 0, "liver": 1, "lesion": 2})


def segmentation(series: Path, path: Path) -> ndarray:
    """Write labels of a series as a segmentation, and give them."""
    grid = read_grid(series)
    labels = np.zeros(grid.shape, np.uint8)
    labels[2:7, 1:4, 1:3] = 1
    labels[4:6, 3:8, 4] = 2
    chosen = choose_series(series)
    write_dicom_segmentation(
        path, Volume(labels, grid), chosen, TWO, codes={}, algorithm="segkit test"
    )
    return labels


@pytest.mark.parametrize("enhanced", [False, True])
def test_a_segmentation_comes_back_as_the_labels_that_it_was_made_of(
    enhanced: bool, tmp_path: Path
) -> None:
    if enhanced:
        write_enhanced(tmp_path / "ct" / "all.dcm", STORED, GRID, order=[3, 0, 5, 1, 4, 2])
    else:
        write_series(tmp_path / "ct", STORED, GRID)
    path = tmp_path / "SEG"
    labels = segmentation(tmp_path / "ct", path)
    told = read_structure_file(path)
    assert (told.kind, told.modality, told.names) == ("segmentation", "SEG", ("liver", "lesion"))
    assert told.series == {choose_series(tmp_path / "ct").uid}
    rules = rules_of(tmp_path / "ct", {"liver": ["liver"], "lesion": ["lesion"]})
    assert_array_equal(read_label_values(path, rules=rules).data, labels)


def test_a_segmentation_on_another_grid_is_refused(series: Path, tmp_path: Path) -> None:
    segmentation(series, tmp_path / "SEG")
    moved = affine_of("LPS", spacing=(0.8, 1.1, 3.0), origin=(-80.6, 23.5, 140.25))
    write_series(tmp_path / "other", STORED, Grid(SHAPE, moved))
    rules = rules_of(tmp_path / "other", {"liver": ["*"]})
    with pytest.raises(VolumeError, match="segment liver lies on another grid than the series"):
        read_label_values(tmp_path / "SEG", rules=rules)


def test_a_damaged_file_of_structures_is_refused_in_a_sentence(
    series: Path, tmp_path: Path
) -> None:
    def broken(one: Dataset) -> None:
        one.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2", "3", "4"]

    path = tmp_path / "RS.dcm"
    drawn = {"GTV": [box_contour(GRID, (1, 1), (4, 4), 2)]}
    write_structures(path, next(series.iterdir()), drawn)
    file = dcmread(path)
    broken(file)
    file.save_as(path)
    with pytest.raises(
        VolumeError, match=r"RS\.dcm: cannot be read as DICOM: .*; export the file again, or move"
    ):
        read_label_values(path, rules=rules_of(series, {"tumour": ["GTV"]}))
