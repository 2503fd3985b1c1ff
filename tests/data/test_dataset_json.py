import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from segkit.checking.check import check
from segkit.config.labels import Labelling
from segkit.data.dataset import read_case, read_dataset
from segkit.data.dataset_json import read_dataset_file, read_labelling
from segkit.errors import DatasetError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from tests.helpers import affine_of
from tests.small import small_dataset

SHAPE = (3, 4, 5)
GRID = Grid(SHAPE, affine_of("LPS"))
BRATS = {
    "background": 0,
    "whole tumour": [1, 2, 3],
    "tumour core": [2, 3],
    "enhancing": 3,
    "ignore": 4,
}
NESTED = Labelling(
    {"background": 0, "whole tumour": 1, "tumour core": 2, "enhancing": 3},
    {"whole tumour": (1, 2, 3), "tumour core": (2, 3), "enhancing": (3,)},
    4,
)


def image_of(number: int, channel: int) -> np.ndarray:
    return np.random.default_rng([number, channel]).normal(size=SHAPE).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two subjects of two channels, named as nnU-Net names them."""
    for number, name in enumerate(("anna", "ben_2")):
        for channel in range(2):
            path = tmp_path / "imagesTr" / f"{name}_{channel:04d}.nii.gz"
            write_volume(path, Volume(image_of(number, channel), GRID))
        label = np.random.default_rng(number).integers(0, 5, SHAPE).astype(np.uint8)
        write_volume(tmp_path / "labelsTr" / f"{name}.nii.gz", Volume(label, GRID))
    return written(tmp_path)


def written(folder: Path, **keys: Any) -> Path:
    """The folder with a dataset.json of nnU-Net's form; None leaves a key out."""
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": BRATS,
        "regions_class_order": [1, 2, 3],
        "numTraining": 2,
        "file_ending": ".nii.gz",
        **keys,
    }
    kept = {key: value for key, value in content.items() if value is not None}
    (folder / "dataset.json").write_text(json.dumps(kept))
    return folder


def test_files_in_nnunets_folders_that_belong_to_no_case_are_named(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = read_dataset(folder)
    assert not caplog.records
    images, labels = folder / "imagesTr", folder / "labelsTr"
    for name in ("anna_0002.nii.gz", "carl_0000.nii.gz", "carl_0001.nii.gz"):
        (images / name).touch()
    for path in (labels / "carl.nii", labels / "shown.png", labels / "._anna.nii.gz"):
        path.touch()
    assert read_dataset(folder) == before
    assert [record.getMessage() for record in caplog.records] == [
        f"{images}: left out because dataset.json has fewer channels: anna_0002.nii.gz",
        f"{images}: left out because they have no label CASE.nii.gz: carl_0000.nii.gz, "
        "carl_0001.nii.gz",
        f"{labels}: left out because their names do not end in .nii.gz (file_ending): carl.nii",
    ]


def test_a_raw_folder_of_nnunets_is_read_channel_by_channel(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert [case.name for case in dataset.cases] == ["anna", "ben_2"]
    assert dataset.channels == ("T1", "T2")
    image, label = read_case(dataset.cases[1], dataset)
    assert_array_equal(image.data, np.stack([image_of(1, 0), image_of(1, 1)], axis=3))
    assert_array_equal(label.data, np.random.default_rng(1).integers(0, 5, SHAPE))
    assert image.grid.agrees_with(GRID, tolerance=1e-3)


def test_regions_and_ignore_are_told_apart_as_nnunet_means_them(folder: Path) -> None:
    dataset = read_dataset(folder)
    assert dataset.labelling == NESTED
    assert dataset.labelling.outputs == ("whole tumour", "tumour core", "enhancing")
    assert dataset.labelling.written == (1, 2, 3)
    label = np.array([0, 1, 2, 3, 4])
    assert dataset.foreground(label).tolist() == [False, True, True, True, False]


def test_names_with_numbers_are_classes_in_the_order_of_their_numbers(folder: Path) -> None:
    labels = {"tumour": 2, "background": 0, "kidney": [1], "ignore": 3}
    dataset = read_dataset(written(folder, labels=labels, regions_class_order=None))
    assert list(dataset.labels.items()) == [("background", 0), ("kidney", 1), ("tumour", 2)]
    assert dataset.labelling.outputs == ("background", "kidney", "tumour")
    assert dataset.labelling.written is None and dataset.ignore == 3
    assert dataset.labelling.members == {"kidney": (1,), "tumour": (2,)}
    assert dataset.labelling.value_names == ("background", "kidney", "tumour", "ignore")


def test_both_forms_say_the_same(folder: Path) -> None:
    ours = read_dataset_file(
        written(folder, labels={"background": 0, "a": 1, "ignore": 2}, regions_class_order=None)
    )
    theirs = read_dataset_file(
        written(
            folder,
            labels={"2": "ignore", "0": "background", "1": "a"},
            channel_names=None,
            modality={"1": "T2", "0": "T1"},
            training=[
                {
                    "image": [f"imagesTr/{name}_0000.nii.gz", f"imagesTr/{name}_0001.nii.gz"],
                    "label": f"labelsTr/{name}.nii.gz",
                }
                for name in ("anna", "ben_2")
            ],
        )
    )
    assert ours == theirs


def test_a_number_that_no_region_is_written_as_is_a_label_all_the_same(folder: Path) -> None:
    labels = {"background": 0, "kidney": [1, 2, 3], "masses": [2, 3], "tumour": 2}
    dataset = read_dataset(written(folder, labels=labels, regions_class_order=[1, 3, 2]))
    assert dataset.labelling.value_names == ("background", "kidney", "tumour", "masses")
    labels = {"background": 0, "kidney": [1, 2, 3], "tumour": 3}
    dataset = read_dataset(written(folder, labels=labels, regions_class_order=[1, 3]))
    assert dataset.labelling.value_names == ("background", "kidney", "2", "tumour")


def test_to_score_by_labels_may_leave_gaps(folder: Path) -> None:
    path = written(folder, labels={"0": "background", "7": "liver"}) / "dataset.json"
    assert read_labelling(path) == Labelling({"background": 0, "liver": 1}, in_files=((0,), (7,)))
    assert read_labelling(path).numbers_in_files == {"background": 0, "liver": 7}


ALONE = "labels must have a class in addition to the background, found background; add"
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no order": (
        {"regions_class_order": None},
        "add regions_class_order, with the number to write for each",
    ),
    "a short order": (
        {"regions_class_order": [1, 2]},
        r"must have 3 different numbers, .* whole tumour, tumour core, enhancing, found \[1, 2\]",
    ),
    "an order with one twice": ({"regions_class_order": [1, 3, 3]}, "must have 3 different"),
    "a region written as another": (
        {"regions_class_order": [3, 1, 2]},
        "writes tumour core as 1, which is not one of its numbers 2, 3",
    ),
    "a region under another": (
        {
            "labels": {"background": 0, "core": [2, 3], "whole": [1, 2, 3]},
            "regions_class_order": [2, 1],
        },
        "whole would overwrite all of core, which lies inside it; put core after whole",
    ),
    "a region with background": (
        {"labels": {"background": 0, "all": [0, 1]}, "regions_class_order": [1]},
        "background and all share the number 0; give each its own",
    ),
    "regions alone": (
        {"labels": {"whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]},
        "expected a label with number 0 or name background, found whole, core",
    ),
    "ignore within another": (
        {"labels": {"background": 0, "organ": [1, 2], "ignore": 2}},
        "organ and ignore share the number 2; give each its own$",
    ),
    "nothing but ignore": ({"labels": {"background": 0, "ignore": 1}}, ALONE),
    "a number that no file can hold": (
        {"labels": {"background": 0, "a": 70000}},
        "a is written to files as a number from 0 to 65535, but its list has 70000; add such a",
    ),
    "a class of negative numbers": (
        {"labels": {"background": 0, "a": [-1, -2]}, "regions_class_order": None},
        "a is written to files as a number from 0 to 65535, but its list has -1, -2",
    ),
    "a number twice": (
        {"labels": {"background": 0, "a": 1, "b": 1}},
        "a and b share the number 1",
    ),
    "an empty region": (
        {"labels": {"background": 0, "a": []}},
        r"labels\.a must be a number or a list of numbers, found \[\]",
    ),
    "both forms at once": (
        {"labels": {"background": 0, "1": "organ"}},
        r"labels\.1 must be a number or a list of numbers, found 'organ'",
    ),
    "no names of channels": ({"channel_names": None}, r"expected channel_names \(or modality\)"),
    "no ending": (
        {"file_ending": None},
        r"expected training \(a list\) or file_ending, found neither",
    ),
    "an ending of its own": (
        {"file_ending": ".gif"},
        r"file_ending must be one of \.nii, \.nii\.gz, \.nrrd, \.mha, \.nhdr, \.mhd, .*found \.gif",
    ),
    "an ending that none has": ({"file_ending": ".mha"}, r"expected labels CASE\.mha in it"),
    "another number of cases": (
        {"numTraining": 3},
        "numTraining is 3, but .*labelsTr has 2 labels; correct the number or add",
    ),
    "a channel more": (
        {"channel_names": {"0": "a", "1": "b", "2": "c"}},
        r"anna_0002\.nii\.gz: no such file; anna\.nii\.gz needs 3 images, one per channel",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_contradictions_in_a_dataset_json_are_refused_in_one_sentence(
    folder: Path, name: str
) -> None:
    keys, reason = REFUSALS[name]
    with pytest.raises(DatasetError, match=reason) as refusal:
        read_dataset(written(folder, **keys))
    assert str(refusal.value).startswith(str(folder)) and "\n" not in str(refusal.value)


def test_cases_whose_labels_share_a_name_have_the_name_of_the_path(tmp_path: Path) -> None:
    entries = []
    for number, patient in enumerate(("p2", "p1")):
        label = Volume(np.full(SHAPE, number, np.uint8), GRID)
        write_volume(tmp_path / patient / "seg.nii.gz", label)
        write_volume(tmp_path / patient / "ct.nii.gz", Volume(image_of(number, 0), GRID))
        entries.append({"image": f"{patient}/ct.nii.gz", "label": f"./{patient}/seg.nii.gz"})
    content = {
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": "organ"},
        "training": entries,
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    dataset = read_dataset(tmp_path)
    assert [case.name for case in dataset.cases] == ["p1_seg", "p2_seg"]
    assert [read_case(case, dataset)[1].data.max() for case in dataset.cases] == [1, 0]
    content["training"] = [*entries, entries[0]]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="case p2_seg is listed twice in training"):
        read_dataset(tmp_path)


def test_a_normalisation_of_nnunet_that_segkit_lacks_is_told(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    path = folder / "dataset.json"
    described = json.loads(path.read_text())
    kind = "channel_names" if "channel_names" in described else "modality"
    for name, told in (("noNorm", 1), ("T1", 0), ("CT", 0)):
        path.write_text(json.dumps({**described, kind: {"0": name}}))
        lines = [line for line in check(folder).text.splitlines() if "nnU-Net" in line]
        assert len(lines) == told, lines
        assert all(line.startswith(f"{name}: ") and "mean 0" in line for line in lines)
