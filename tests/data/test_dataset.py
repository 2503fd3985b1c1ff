import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_array_equal

from segkit.data.dataset import CaseFiles, read_case, read_dataset
from segkit.errors import DatasetError, SegkitError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from tests.helpers import STORED, affine_of, stored_otherwise

SHAPE = (3, 4, 5)
GRID = Grid(SHAPE, affine_of("LPS"))
NAMES = ("anna", "ben", "cleo")


def save(path: Path, values: ndarray, grid: Grid = GRID) -> None:
    write_volume(path, Volume(values, grid))


def image_of(number: int, channels: int = 2) -> ndarray:
    random = np.random.default_rng(number)
    return random.normal(size=(*SHAPE, channels)).astype(np.float32)


def label_of(number: int) -> ndarray:
    return np.random.default_rng(number).integers(0, 3, SHAPE).astype(np.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three subjects with an MR and a CT channel in one file, listed out of order."""
    for number, name in enumerate(NAMES):
        save(tmp_path / "imagesTr" / f"{name}.nii.gz", image_of(number))
        save(tmp_path / "labelsTr" / f"{name}.nii.gz", label_of(number))
    content = {
        "name": "Three",
        "numTraining": 3,
        "modality": {"0": "MR", "1": "CT"},
        "labels": {"0": "background", "1": "organ", "2": "tumour"},
        "training": [
            {"image": f"./imagesTr/{name}.nii.gz", "label": f"./labelsTr/{name}.nii.gz"}
            for name in ("cleo", "anna", "ben")
        ],
        "test": ["./imagesTs/dora.nii.gz"],
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    return tmp_path


def changed(folder: Path, **keys: Any) -> Path:
    """The folder with some keys of its dataset.json replaced; None removes one."""
    path = folder / "dataset.json"
    content = json.loads(path.read_text()) | keys
    kept = {key: value for key, value in content.items() if value is not None}
    path.write_text(json.dumps(kept))
    return folder


def assert_one_sentence(refusal: pytest.ExceptionInfo[SegkitError], start: Path) -> None:
    assert str(refusal.value).startswith(str(start))
    assert "\n" not in str(refusal.value)


# The folder


def test_cases_come_in_the_order_of_their_names(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert [case.name for case in dataset.cases] == list(NAMES)
    assert dataset.channels == ("MR", "CT")
    assert list(dataset.labels.items()) == [("background", 0), ("organ", 1), ("tumour", 2)]
    assert dataset.cases[1] == CaseFiles(
        "ben",
        (folder / "imagesTr" / "ben.nii.gz",),
        folder / "labelsTr" / "ben.nii.gz",
    )


def test_channels_and_labels_come_in_the_order_of_their_numbers(folder: Path) -> None:
    channels = {str(number): f"channel {number}" for number in (10, 2, 0, 1)}
    labels = {str(number): f"label {number}" for number in reversed(range(12))}
    dataset = read_dataset(changed(folder, modality=channels, labels=labels))
    assert dataset.channels == ("channel 0", "channel 1", "channel 2", "channel 10")
    assert list(dataset.labels.items()) == [(f"label {number}", number) for number in range(12)]


def test_a_labels_number_may_have_leading_zeros(folder: Path) -> None:
    dataset = read_dataset(changed(folder, labels={"00": "background", "01": "organ"}))
    assert dataset.labels == {"background": 0, "organ": 1}


def without_folder(folder: Path) -> Path:
    return folder / "elsewhere"


def without_json(folder: Path) -> Path:
    (folder / "dataset.json").unlink()
    return folder


def no_json(folder: Path) -> Path:
    (folder / "dataset.json").write_text("{'modality': ")
    return folder


def no_text(folder: Path) -> Path:
    (folder / "dataset.json").write_bytes(b"\xff\xfe{}")
    return folder


def a_list(folder: Path) -> Path:
    (folder / "dataset.json").write_text("[]")
    return folder


def missing_file(part: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / part).unlink()
        return folder

    return build


def with_keys(**keys: Any) -> Callable[[Path], Path]:
    return lambda folder: changed(folder, **keys)


def listed(*names: str) -> list[dict[str, str]]:
    return [
        {"image": f"imagesTr/{name}.nii.gz", "label": f"labelsTr/{name}.nii.gz"} for name in names
    ]


NUMBERING = "labels must have different whole numbers, found "
REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no folder": (without_folder, "no such dataset folder; set data.folder"),
    "no dataset.json": (without_json, r"expected a dataset\.json in it, found none"),
    "not JSON": (no_json, r"dataset\.json: cannot be read as JSON: "),
    "not text": (no_text, r"dataset\.json: cannot be read as JSON: "),
    "a list": (a_list, r"dataset\.json: it is \[\]: it should be a section of names"),
    "no modality": (
        with_keys(modality=None),
        r"expected channel_names \(or modality\), found neither",
    ),
    "no labels": (
        with_keys(labels=None),
        r"expected labels \(names and numbers of classes\)",
    ),
    "no training": (
        with_keys(training=None),
        r"expected training \(a list\) or file_ending, found neither",
    ),
    "nothing to train on": (
        with_keys(training=[]),
        r"training is \[\]: it should be a list of 1 or",
    ),
    "no label": (
        with_keys(training=[{"image": "imagesTr/anna.nii.gz"}]),
        r"training\.0\.label is missing",
    ),
    "labels from 1": (
        with_keys(labels={"1": "organ", "2": "tumour"}),
        "expected a label with number 0 or name background, found organ, tumour; add the backgr",
    ),
    "names for numbers": (
        with_keys(labels={"background": "0", "organ": "1"}),
        NUMBERING + re.escape("['background', 'organ']"),
    ),
    "background alone": (
        with_keys(labels={"0": "background"}),
        "must have a class in addition to the background",
    ),
    "a number twice": (with_keys(labels={"0": "background", "00": "organ"}), NUMBERING),
    "a missing image": (
        missing_file("imagesTr/ben.nii.gz"),
        r"names .*imagesTr/ben\.nii\.gz, which does not exist",
    ),
    "a missing label": (
        missing_file("labelsTr/ben.nii.gz"),
        r"names .*labelsTr/ben\.nii\.gz, which does not exist",
    ),
    "a case twice": (
        with_keys(training=listed("anna", "ben", "anna")),
        "case anna is listed twice in training",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_folder_whose_parts_do_not_fit_is_refused_in_one_sentence(
    folder: Path, name: str
) -> None:
    build, reason = REFUSALS[name]
    wrong = build(folder)
    with pytest.raises(DatasetError, match=reason) as refusal:
        read_dataset(wrong)
    assert_one_sentence(refusal, wrong)


# A case


def read_first(folder: Path) -> tuple[Volume, Volume]:
    dataset = read_dataset(folder)
    return read_case(dataset.cases[0], dataset)


def test_a_case_is_its_image_and_its_label(folder: Path) -> None:
    image, label = read_first(folder)
    assert_array_equal(image.data, image_of(0))
    assert_array_equal(label.data, label_of(0))
    assert image.grid.agrees_with(GRID, tolerance=1e-3)
    assert label.grid.agrees_with(GRID, tolerance=1e-3)
    assert label.data.dtype == np.uint8


def test_channels_in_files_of_their_own_are_put_together_in_order(folder: Path) -> None:
    for channel in range(2):
        save(folder / f"anna_{channel}.nrrd", image_of(0)[..., channel])
    entry = {"image": ["anna_1.nrrd", "anna_0.nrrd"], "label": "labelsTr/anna.nii.gz"}
    image, _ = read_first(changed(folder, training=[entry]))
    assert_array_equal(image.data, image_of(0)[..., ::-1])


def test_channels_of_different_types_keep_their_values(folder: Path) -> None:
    save(folder / "bytes.nrrd", label_of(7))
    save(folder / "reals.nrrd", image_of(0)[..., 0])
    entry = {"image": ["bytes.nrrd", "reals.nrrd"], "label": "labelsTr/anna.nii.gz"}
    image, _ = read_first(changed(folder, training=[entry]))
    assert_array_equal(image.data[..., 0], label_of(7))
    assert_array_equal(image.data[..., 1], image_of(0)[..., 0])


def test_a_single_channel_has_an_axis_of_its_own(folder: Path) -> None:
    save(folder / "imagesTr" / "anna.nii.gz", image_of(0, channels=1)[..., 0])
    image, _ = read_first(changed(folder, modality={"0": "MR"}))
    assert_array_equal(image.data, image_of(0, channels=1))


@pytest.mark.parametrize("kind", ["float32", "float64", "int16", "int64"])
def test_whole_numbers_of_any_type_are_labels(folder: Path, kind: str) -> None:
    save(folder / "labelsTr" / "anna.nii.gz", label_of(0).astype(kind))
    _, label = read_first(folder)
    assert label.data.dtype == np.uint8
    assert_array_equal(label.data, label_of(0))


@pytest.mark.parametrize("share", [-4e-4, -1e-7, -2.3e-10, 2.3e-10, 1e-7, 4e-4])
@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_labels_that_are_whole_but_for_rounding_are_rounded(
    folder: Path, share: float, kind: str
) -> None:
    save(folder / "labelsTr" / "anna.nii.gz", (label_of(0) * (1 + share)).astype(kind))
    _, label = read_first(folder)
    assert label.data.dtype == np.uint8
    assert_array_equal(label.data, label_of(0))


@pytest.mark.parametrize(("order", "flipped"), STORED)
def test_label_and_channels_may_store_their_axes_in_any_order(
    folder: Path, order: Sequence[int], flipped: Sequence[int]
) -> None:
    save(folder / "anna_0.nrrd", image_of(0)[..., 0])
    save(folder / "anna_1.nrrd", *stored_otherwise(image_of(0)[..., 1], GRID, order, flipped))
    save(folder / "labelsTr" / "anna.nii.gz", *stored_otherwise(label_of(0), GRID, order, flipped))
    entry = {"image": ["anna_0.nrrd", "anna_1.nrrd"], "label": "labelsTr/anna.nii.gz"}
    image, label = read_first(changed(folder, training=[entry]))
    assert_array_equal(image.data, image_of(0))
    assert_array_equal(label.data, label_of(0))
    assert label.grid.agrees_with(image.grid, tolerance=0)


def test_a_header_that_is_off_by_rounding_is_read_as_that_of_the_image(folder: Path) -> None:
    affine = GRID.affine.copy()
    affine[:3, :3] *= 0.99997
    affine[:3, 3] += 0.004
    save(folder / "labelsTr" / "anna.nii.gz", label_of(0), Grid(SHAPE, affine))
    image, label = read_first(folder)
    assert_array_equal(label.data, label_of(0))
    assert label.grid.agrees_with(image.grid, tolerance=0)


def test_labels_beyond_255_keep_their_numbers(folder: Path) -> None:
    names = {str(number): f"region {number}" for number in range(301)}
    many = np.arange(60).reshape(SHAPE).astype(np.int16) * 5
    save(folder / "labelsTr" / "anna.nii.gz", many)
    _, label = read_first(changed(folder, labels=names))
    assert_array_equal(label.data, many)


def test_a_case_without_images_is_a_label_on_a_blank(folder: Path) -> None:
    image, label = read_first(changed(folder, training=[{"label": "labelsTr/anna.nii.gz"}]))
    assert_array_equal(image.data, np.zeros((*SHAPE, 2)))
    assert_array_equal(label.data, label_of(0))


def on_another_grid(part: str) -> Callable[[Path], None]:
    values = {"imagesTr": image_of(0), "labelsTr": label_of(0)}[part]

    def build(folder: Path) -> None:
        moved = GRID.affine.copy()
        moved[2, 3] += 1
        save(folder / part / "anna.nii.gz", values, Grid(SHAPE, moved))

    return build


def cropped_label(folder: Path) -> None:
    save(folder / "labelsTr" / "anna.nii.gz", label_of(0)[:2], Grid((2, 4, 5), GRID.affine))


def label_holding(value: float) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        label = label_of(0).astype(np.float32)
        label[1, 2, 3] = value
        save(folder / "labelsTr" / "anna.nii.gz", label)

    return build


def two_labels_a_voxel(folder: Path) -> None:
    save(folder / "labelsTr" / "anna.nii.gz", np.stack([label_of(0), label_of(1)], axis=3))


def image_holding(value: float) -> Callable[[Path], None]:
    def build(folder: Path) -> None:
        image = image_of(0)
        image[1, 2, 3, 1] = value
        save(folder / "imagesTr" / "anna.nii.gz", image)

    return build


def with_channels(channels: int) -> Callable[[Path], None]:
    return lambda folder: save(folder / "imagesTr" / "anna.nii.gz", image_of(0, channels))


def channels_apart(folder: Path) -> None:
    save(folder / "anna_0.nrrd", image_of(0)[..., 0])
    save(folder / "anna_1.nrrd", image_of(0)[:2, ..., 0], Grid((2, 4, 5), GRID.affine))
    entry = {"image": ["anna_0.nrrd", "anna_1.nrrd"], "label": "labelsTr/anna.nii.gz"}
    changed(folder, training=[entry])


DECLARED = r"which the dataset does not declare \(it has 0 to 2\)"
FIRST_LABEL, FIRST_IMAGE = "labelsTr/anna.nii.gz", "imagesTr/anna.nii.gz"
CASE_REFUSALS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "label off grid": (
        on_another_grid("labelsTr"),
        FIRST_LABEL,
        r"lies on another grid than anna\.nii\.gz: its first voxel lies 1 mm off, so that voxels "
        r"lie up to 0\.45 voxels apart; resample one onto the other",
    ),
    "image off grid": (
        on_another_grid("imagesTr"),
        FIRST_LABEL,
        r"lies on another grid than anna\.nii\.gz: its first voxel lies 1 mm off, so that voxels "
        r"lie up to 0\.45 voxels apart; resample one onto the other",
    ),
    "cropped label": (
        cropped_label,
        FIRST_LABEL,
        r"lies on another grid than anna\.nii\.gz: its shape is 2x4x5, not 3x4x5; resample",
    ),
    "channels on two grids": (
        channels_apart,
        "anna_1.nrrd",
        r"lies on another grid than anna_0\.nrrd: its shape is 2x4x5, not 3x4x5; resample",
    ),
    "undeclared label": (label_holding(3), FIRST_LABEL, f"holds label 3, {DECLARED}"),
    "negative label": (label_holding(-1), FIRST_LABEL, f"holds label -1, {DECLARED}"),
    "fraction of a label": (
        label_holding(0.5),
        FIRST_LABEL,
        f"holds label 0.5, {DECLARED}; labels are whole",
    ),
    "label just off 1": (
        label_holding(1.002),
        FIRST_LABEL,
        rf"holds label 1\.002, {DECLARED}; lab",
    ),
    "label just off 2 in the seventh digit": (
        label_holding(1.998901),
        FIRST_LABEL,
        rf"holds label 1\.998901, {DECLARED}; labels are whole",
    ),
    "NaN label": (label_holding(float("nan")), FIRST_LABEL, f"holds label nan, {DECLARED}"),
    "two labels a voxel": (
        two_labels_a_voxel,
        FIRST_LABEL,
        r"expected one label per voxel, found shape \(3, 4, 5, 2\)",
    ),
    "NaN image": (
        image_holding(float("nan")),
        FIRST_IMAGE,
        r"holds [0-9,]+ NaN or infinite values among [0-9,]+; if",
    ),
    "infinite image": (
        image_holding(float("inf")),
        FIRST_IMAGE,
        r"holds [0-9,]+ NaN or infinite values among [0-9,]+; if",
    ),
    "a channel too few": (
        with_channels(1),
        FIRST_IMAGE,
        r"expected 2 channels \(MR, CT\), found 1",
    ),
    "a channel too many": (
        with_channels(3),
        FIRST_IMAGE,
        r"expected 2 channels \(MR, CT\), found 3",
    ),
}


@pytest.mark.parametrize("name", CASE_REFUSALS)
def test_a_case_whose_parts_do_not_fit_is_refused_in_one_sentence(folder: Path, name: str) -> None:
    build, part, reason = CASE_REFUSALS[name]
    build(folder)
    with pytest.raises(DatasetError, match=reason) as refusal:
        read_first(folder)
    assert_one_sentence(refusal, folder / part)


# Real scans


@pytest.mark.data
def test_the_real_hippocampi_are_listed_and_one_has_the_declared_labels(data_folder: Path) -> None:
    dataset = read_dataset(data_folder / "hippocampus")
    assert len(dataset.cases) == 200
    assert dataset.channels == ("MRI",)
    assert dataset.labels == {"background": 0, "Anterior": 1, "Posterior": 2}
    image, label = read_case(dataset.cases[0], dataset)
    assert sorted(set(label.data.ravel().tolist())) == [0, 1, 2]
    assert image.grid.agrees_with(label.grid, tolerance=1e-3)
    # A hippocampus has some 3000 mm³, which tells mm from voxels and labels from noise.
    volume = (label.data > 0).sum() * abs(np.linalg.det(label.grid.affine[:3, :3]))
    assert 1500 < volume < 6000
