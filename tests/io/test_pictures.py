"""Pictures of planes: upright, with the patient's proportions, in the colours of the labels."""

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray

from segkit.errors import SegkitError
from segkit.geometry.grid import Grid
from segkit.io import pictures
from segkit.io.pictures import (
    CAPTION,
    GAP,
    INFERNO,
    MAP_OPACITY,
    OPACITY,
    PANEL,
    draw_cases,
    label_colour,
    label_rgb,
    outline,
    overlaid,
    planes_of,
    write_montage,
)
from tests.helpers import affine_of

Image = pytest.importorskip("PIL.Image")


def ball(shape: tuple[int, int, int], spacing: tuple[float, float, float], mm: float) -> ndarray:
    """A ball in the middle of a grid."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    squares = [axis**2 for axis in np.meshgrid(*axes, indexing="ij")]
    return (sum(squares) < mm**2).astype(np.uint8)


def extent(found: ndarray) -> list[int]:
    return [int(index.max() - index.min() + 1) for index in np.nonzero(found)]


def test_the_patients_right_is_on_the_left_and_front_and_head_are_up() -> None:
    label = np.zeros((4, 6, 8), np.uint8)
    label[3, 5, 7] = 1  # the rightmost, foremost, topmost voxel
    planes = planes_of(
        np.zeros(label.shape, np.float32), label, label, spacing=(1, 1, 1), caption="case"
    )
    sagittal, coronal, axial = planes.references
    # Heads and fronts at row 0; right, and front where the plane is sagittal, at column 0.
    for plane, shape in ((sagittal, (8, 6)), (coronal, (8, 4)), (axial, (6, 4))):
        assert plane.shape == shape
        assert np.argwhere(plane).tolist() == [[0, 0]]


def test_planes_pass_through_the_middle_of_the_reference_or_else_of_the_image() -> None:
    image = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    label = np.zeros(image.shape, np.uint8)
    empty = planes_of(image, label, label, spacing=(1, 1, 1), caption="")
    assert empty.images[0].max() == image[2].max() and empty.images[2].max() == image[..., 4].max()
    label[1, 2:5, 1] = 1
    planes = planes_of(image, label, label, spacing=(1, 1, 1), caption="")
    for axis, at in enumerate((1, 3, 1)):
        expected = np.take(image, at, axis=axis)
        assert planes.images[axis].min() == expected.min()
        assert planes.images[axis].max() == expected.max()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 4.0), (3.0, 1.0, 1.0)])
def test_a_ball_is_a_circle_whatever_the_spacing(
    spacing: tuple[float, float, float],
) -> None:
    shape = tuple(round(48 / step) for step in spacing)
    label = ball(shape, spacing, 16.0)
    planes = planes_of(
        np.zeros(shape, np.float32), np.zeros_like(label), label, spacing=spacing, caption=""
    )
    strip = pictures._strip(planes)
    # The scan is black, so that each panel's tint is all there is: three discs beside one another.
    tinted = np.flatnonzero(strip.any(axis=(0, 2)))
    discs = np.split(tinted, np.flatnonzero(np.diff(tinted) > 1) + 1)
    assert len(discs) == 3
    thickest = max(spacing) / 48 * pictures.PANEL
    for disc in discs:
        height, width = extent(strip[:, disc[0] : disc[-1] + 1].any(axis=2))
        for size in (height, width):
            assert abs(size - 2 * 16 / 48 * pictures.PANEL) <= thickest + 2


def test_an_outline_is_the_rim_of_each_class() -> None:
    labels = np.zeros((6, 7), np.uint8)
    labels[1:5, 1:4] = 1
    labels[1:5, 4:6] = 2
    expected = labels > 0
    expected[2:4, 2] = False  # of class 1, what touches class 1 alone
    assert np.array_equal(outline(labels), expected)


def test_predicted_areas_are_tinted_and_references_outlined() -> None:
    bare = np.full((20, 20, 3), 100, np.uint8)
    predicted, reference = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    predicted[:, :2] = 3
    reference[4:8, 4:8] = 2
    panel = overlaid(bare, reference, predicted)
    tint = np.round(100 * (1 - OPACITY) + OPACITY * np.array(label_rgb(3)))
    assert np.array_equal(panel[5, 1], tint)
    assert np.array_equal(panel[8, 8], label_rgb(2)) and np.array_equal(panel[9, 9], label_rgb(2))
    assert np.array_equal(panel[11, 11], [100, 100, 100])  # inside the outline, two pixels wide
    assert np.array_equal(panel[0, 19], [100, 100, 100])


def test_more_classes_than_fit_make_the_picture_wider() -> None:
    label = ball((8, 8, 8), (1, 1, 1), 3.0)
    row = planes_of(label.astype(np.float32), label, label, spacing=(1, 1, 1), caption="case")
    few = draw_cases([row], title="step 1", classes=["background", "ball"])
    many = draw_cases([row, row], title="step 1", classes=["background", *["a long name"] * 30])
    assert many.shape[1] > few.shape[1] and many.shape[0] > few.shape[0]


def test_the_legend_of_a_map_is_the_quantity_that_was_given(tmp_path: Path) -> None:
    values, grid = np.linspace(0, 1, 4096).reshape(16, 16, 16), Grid((16, 16, 16), np.eye(4))

    def drawn(quantities: dict[str, str]) -> ndarray:
        path = tmp_path / "montage.png"
        panels: list[pictures.Panel] = [("gate", values, "map")]
        write_montage(path, values, grid, panels, label_names={}, quantities=quantities)
        return np.asarray(Image.open(path).convert("RGB"))

    plain, other, named = drawn({}), drawn({"another": "share"}), drawn({"gate": "share"})
    assert np.array_equal(plain, other)
    rows = np.flatnonzero((plain != named).any(axis=(1, 2)))
    assert rows.size and rows.min() > CAPTION + 3 * PANEL  # below the planes


def montage(path: Path, panel: pictures.Panel, code: str = "RAS") -> ndarray:
    """The sagittal, coronal and axial plane of one panel over a black scan of 8 mm each way.

    Without its titles: only the pixels below the plane's name.
    """
    grid = Grid((8, 8, 8), affine_of(code, spacing=(1, 1, 1), rotation=(0, 0, 0)))
    write_montage(
        str(path), np.zeros((8, 8, 8)), grid, [("", None, "labels"), panel], label_names={}
    )
    picture = np.asarray(Image.open(path).convert("RGB"))
    left = GAP + PANEL + 3 * GAP
    tops = [CAPTION + (PANEL + GAP) * row for row in range(3)]
    return np.stack([picture[top : top + PANEL, left : left + PANEL] for top in tops])


@pytest.mark.parametrize("code", ["RAS", "LPS"])
def test_a_montage_has_the_patients_right_on_the_left(tmp_path: Path, code: str) -> None:
    labels = np.zeros((8, 8, 8), np.uint8)
    # The three planes are those of index 4 of RAS+ axes: a spot on the patient's right, front, top.
    labels[(7, 7, 4) if code == "RAS" else (0, 0, 4)] = 1
    sagittal, coronal, axial = montage(tmp_path / "x.png", ("", labels, "labels"), code)
    assert not sagittal.any() and not coronal.any()
    spot = np.argwhere(axial.any(axis=2))
    assert spot.min(axis=0).tolist() == [0, 0]
    assert spot.max(axis=0).tolist() == [PANEL // 8 - 1] * 2
    assert np.array_equal(axial[5, 5], np.round(OPACITY * np.array(label_rgb(1))))


def test_a_map_has_no_colour_only_where_it_was_not_computed(tmp_path: Path) -> None:
    values = np.full((8, 8, 8), 0.0)
    values[:, :, :4] = 0.75
    values[4:] = np.nan
    values[:2] = np.nan
    sagittal, coronal, axial = montage(tmp_path / "x.png", ("gate", values, "map"))
    assert not sagittal.any()  # index 4 of the first axis
    eighth = PANEL // 8
    # From the patient's right: four voxels of NaN, two of values, 0 among them, two of NaN.
    columns = coronal.any(axis=(0, 2))
    assert np.flatnonzero(columns).tolist() == list(range(4 * eighth, 6 * eighth))
    ends = [np.round(MAP_OPACITY * np.array(pictures._rgb(INFERNO[end]))) for end in (0, -1)]
    assert np.array_equal(coronal[PANEL // 4, 5 * eighth], ends[0])
    assert np.array_equal(coronal[3 * PANEL // 4, 5 * eighth], ends[1])
    assert axial.any()


def test_a_label_has_one_colour_in_every_picture() -> None:
    labels = np.array([[0, 1], [7, 30]])
    expected = [[(0, 0, 0), label_rgb(1)], [label_rgb(7), label_rgb(30)]]
    assert np.array_equal(pictures._colours_of(labels), expected)
    assert label_rgb(1) == (0x4C, 0x9B, 0xE8) and label_colour(1) == "#4c9be8"
    assert len({label_rgb(number) for number in range(60)}) == 60 and label_colour(0) == "#000000"
    with pytest.raises(ValueError, match="from 0 on, found -1"):
        label_colour(-1)


SEEN_BY = {
    "three cones": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red cones": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "no green cones": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "no blue cones": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
"""Linear RGB as people see it who lack one kind of cone (Machado, Oliveira & Fernandes 2009)."""


def _cielab(linear: np.ndarray) -> np.ndarray:
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    shares = np.array(to_xyz) @ np.clip(linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(shares > 0.008856, np.cbrt(shares), 7.787 * shares + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("seen", SEEN_BY.values(), ids=SEEN_BY)
def test_colour_blind_people_can_tell_the_first_six_labels_apart(seen: Any) -> None:
    shares = np.array([label_rgb(number) for number in range(1, 7)]) / 255
    linear = np.where(shares <= 0.04045, shares / 12.92, ((shares + 0.055) / 1.055) ** 2.4)
    colours = [_cielab(np.array(seen) @ each) for each in linear]
    distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(colours, 2)]
    assert min(distances) > 30  # in CIELAB; a difference of 2 or 3 can just be seen


def test_without_pillow_the_error_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SegkitError, match=r"run pip install 'segkit\[report\]'"):
        montage(tmp_path / "x.png", ("", None, "labels"))
    assert not list(tmp_path.iterdir())
