"""Datasets without a dataset.json: files by patterns, files in a table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from segkit.config.dataset_files import FilesConfig
from segkit.config.labels import Labelling
from segkit.config.load import dataset_in, load_config, validated
from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset, read_case, read_dataset
from segkit.data.file_patterns import matched
from segkit.errors import ConfigError, DatasetError, SegkitError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume

GRID = Grid((2, 3, 4), np.eye(4))
LABELS = {"background": 0, "kidney": 1, "tumour": 2}
PATTERNS = {
    "images": {"T1": "sub-*/ses-*/anat/sub-*_T1w.nii.gz", "FLAIR": "sub-*/ses-*/anat/*_FLAIR.nrrd"},
    "label": "derivatives/**/sub-*_ses-*_dseg.nii.gz",
    "labels": LABELS,
}


def save(path: Path, value: int = 0) -> None:
    write_volume(path, Volume(np.full(GRID.shape, value, np.uint8), GRID))


def files_of(**keys: Any) -> FilesConfig:
    return validated(FilesConfig, keys, "files")


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Two subjects, one of them seen twice, a subject without a label, and sidecars."""
    for number, (subject, session) in enumerate([("01", "a"), ("01", "b"), ("x7", "a")]):
        place = tmp_path / f"sub-{subject}" / f"ses-{session}" / "anat"
        save(place / f"sub-{subject}_T1w.nii.gz", 10 * number)
        save(place / f"{session}_FLAIR.nrrd", 10 * number + 1)
        (place / f"sub-{subject}_T1w.json").write_text("{}")
        save(
            tmp_path / "derivatives" / "by hand" / f"sub-{subject}_ses-{session}_dseg.nii.gz",
            number,
        )
    save(tmp_path / "sub-02" / "ses-a" / "anat" / "sub-02_T1w.nii.gz")
    save(tmp_path / "sub-02" / "ses-a" / "anat" / ".sub-02_T1w.nii.gz")
    return tmp_path


def table(folder: Path, text: str, **keys: Any) -> Dataset:
    (folder / "cases.csv").write_text(text)
    return read_dataset(folder, files_of(table="cases.csv", labels=LABELS, **keys))


# Patterns


def test_files_of_a_case_are_those_whose_wildcards_matched_the_same(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = read_dataset(study, files_of(**PATTERNS))
    assert [case.name for case in dataset.cases] == ["01_a", "01_b", "x7_a"]
    assert dataset.channels == ("T1", "FLAIR")
    assert dataset.labels == LABELS
    assert dataset.cases[1] == CaseFiles(
        "01_b",
        (
            study / "sub-01/ses-b/anat/sub-01_T1w.nii.gz",
            study / "sub-01/ses-b/anat/b_FLAIR.nrrd",
        ),
        study / "derivatives/by hand/sub-01_ses-b_dseg.nii.gz",
    )
    image, label = read_case(dataset.cases[1], dataset)
    assert image.data[0, 0, 0].tolist() == [10, 11] and (label.data == 1).all()
    assert "left out because they have no label: 02_a" in caplog.text


NAMES = st.text("abz019.-[]() ü", min_size=1, max_size=6).filter(
    lambda name: name.strip(". ") == name
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(names=st.sets(NAMES, min_size=1, max_size=4))
def test_a_wildcard_stands_for_any_name(
    names: set[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    for name in names:
        (folder / f"[x] {name}").mkdir()
        (folder / f"[x] {name}" / f"{name}+.nii").touch()
    assert set(matched(folder, "[x] */*+.nii")) == names
    assert set(matched(folder, "**/*+.nii")) == names
    assert not matched(folder, "*/?.nii")


def test_two_files_of_one_name_are_refused(study: Path) -> None:
    save(study / "derivatives/by machine/sub-01_ses-b_dseg.nii.gz")
    with pytest.raises(DatasetError, match="both as case '01_b'; change it to match only one file"):
        read_dataset(study, files_of(**PATTERNS))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"label": "labels/*.nii.gz"}, "no file matches labels/"),
        (
            {"label": "derivatives/**/*_dseg.nii.gz"},
            "patterns whose wildcards match the same text",
        ),
        ({"images": {"T1": "sub-*/ses-*/anat/sub-*_T1w.json"}}, "expected a volume named"),
        (
            {"labels": {"background": 0, "kidney": 2, "tumour": 2}},
            "kidney and tumour share the number 2",
        ),
        (
            {"codes": {"liver": {"scheme": "SCT", "value": 10200004, "meaning": "Liver"}}},
            "data.files: codes names liver, which is not one of the labels kidney, tumour",
        ),
    ],
)
def test_patterns_that_do_not_fit_are_refused(
    keys: dict[str, Any], words: str, study: Path
) -> None:
    with pytest.raises(SegkitError, match=words) as refusal:
        read_dataset(study, files_of(**{**PATTERNS, **keys}))
    assert "\n" not in str(refusal.value)


def test_codes_must_name_labels_that_stand_in_data_labels_too(study: Path) -> None:
    liver = {"scheme": "SCT", "value": "10200004", "meaning": "Liver"}
    labelling = Labelling({"background": 0, "kidney": 1, "tumour": 2})
    keys = {key: value for key, value in PATTERNS.items() if key != "labels"}
    with pytest.raises(
        DatasetError,
        match=r"data\.files: codes names liver, which is not one of the labels kidney, tumour",
    ):
        read_dataset(study, files_of(**keys, codes={"liver": liver}), given=labelling)
    assert set(
        read_dataset(study, files_of(**keys, codes={"kidney": liver}), given=labelling).codes
    )


@pytest.mark.parametrize(
    "label", ["labels/one.nii.gz", "/labels/*.nii.gz", "labels/a**.nii.gz", "**", ""]
)
def test_a_string_that_is_not_a_pattern_is_refused(label: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.files"):
        files_of(**{**PATTERNS, "label": label})


def test_regions_and_ignored_voxels_work_as_in_a_dataset_json(study: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    keys = {**PATTERNS, "labels": labels, "regions_class_order": [1, 2]}
    dataset = read_dataset(study, files_of(**keys))
    assert dataset.regions == {"whole": (1, 2), "core": (2,)} and dataset.ignore == 3


# Tables


@pytest.mark.parametrize("between", [",", ";", "\t"])
def test_a_table_names_the_files_of_each_case(study: Path, between: str) -> None:
    rows = [
        ("id", "T1", "FLAIR", "label"),
        ("zoe", "sub-x7/ses-a/anat/sub-x7_T1w.nii.gz", "sub-x7/ses-a/anat/a_FLAIR.nrrd"),
        ("ann, 2", "sub-01/ses-b/anat/sub-01_T1w.nii.gz", "sub-01/ses-b/anat/b_FLAIR.nrrd"),
    ]
    labels = ["sub-x7_ses-a_dseg.nii.gz", "sub-01_ses-b_dseg.nii.gz"]
    lines = [between.join(f'"{cell}"' for cell in rows[0])]
    for row, label in zip(rows[1:], labels, strict=True):
        cells = (*row, f"derivatives/by hand/{label}")
        lines.append(between.join(f'"{cell}"' for cell in cells))
    (study / "cases.csv").write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    dataset = read_dataset(study, files_of(table="cases.csv", labels=LABELS))
    assert [case.name for case in dataset.cases] == ["ann, 2", "zoe"]
    assert dataset.channels == ("T1", "FLAIR")
    by_pattern = read_dataset(study, files_of(**PATTERNS))
    assert [case.images for case in dataset.cases] == [case.images for case in by_pattern.cases[1:]]


def test_columns_may_be_named_and_others_are_let_be(study: Path) -> None:
    save(study / "a.nii.gz", 1)
    text = f"id,age,scan,mask\np,63,a.nii.gz,{study}/a.nii.gz\n"
    dataset = table(study, text, images={"CT": "scan"}, label="mask")
    assert dataset.channels == ("CT",)
    image, label = read_case(dataset.cases[0], dataset)
    assert_array_equal(image.data[..., 0], label.data)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a column id, found none"),
        ("id,image\n", "expected a column label, found id, image"),
        ("id,label\n", "expected a column image, found id, label"),
        ("id,image,label\n", "expected a row for each case"),
        (
            "id,image,label\np,b.nii.gz,a.nii.gz\n",
            "row 2 has b.nii.gz in column image, which is not a file",
        ),
        ("id,image,label\np,a.nii.gz\n", "row 2 has nothing in column label"),
        ("id,age,image,label\np,6,a.nii.gz,a.nii.gz\n", "or set data.files.images if age is not"),
        (
            "id,image,label\n ,a.nii.gz,a.nii.gz\n",
            "row 2 has an empty id; give the case a name there",
        ),
        ("id,image,label\n" + "p,a.nii.gz,a.nii.gz\n" * 2, "case p has several rows"),
        ("id,image,label\np,cases.csv,a.nii.gz\n", "expected a volume named"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(text: str, words: str, study: Path) -> None:
    save(study / "a.nii.gz")
    with pytest.raises(SegkitError, match=words) as refusal:
        table(study, text)
    assert "\n" not in str(refusal.value)


def test_an_id_may_be_any_text_but_gives_one_file_name(
    study: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(study / "a.nii.gz")
    rows = "".join(f"{name},a.nii.gz,a.nii.gz\n" for name in ("../p", "12:30", "q"))
    dataset = table(study, f"id,image,label\n{rows}")
    assert [case.name for case in dataset.cases] == ["../p", "12:30", "q"]
    assert [case.file_name for case in dataset.cases] == ["..-p", "12-30", "q"]
    (said,) = [text for text in caplog.messages if "becomes" in text]
    assert said.endswith("'../p' becomes '..-p', '12:30' becomes '12-30'")
    with pytest.raises(DatasetError, match=r"results of the cases '12-30' and '12:30' would have"):
        table(study, f"id,image,label\n{rows}12-30,a.nii.gz,a.nii.gz\n")


def test_a_table_that_is_no_text_is_refused(study: Path) -> None:
    (study / "cases.csv").write_bytes(b"\xff\xfe\0")
    with pytest.raises(DatasetError, match="cannot be read as CSV"):
        read_dataset(study, files_of(table="cases.csv", labels=LABELS))


# Where they are named


def test_a_yaml_with_only_files_is_a_dataset_and_with_other_settings_a_config(
    tmp_path: Path,
) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"data": {"folder": "study", "files": PATTERNS}}))
    found = dataset_in(path)
    assert found is not None and found.folder == Path("study")
    assert found.files == files_of(**PATTERNS)
    tree = {"data": {"folder": "study", "files": PATTERNS, "patch_size": [8, 8, 8]}}
    path.write_text(json.dumps(tree))
    assert dataset_in(path) is None
    config = load_config(path, ["network.channels=[4,8]"])
    assert config.data.files == found.files
    assert validated(Config, config.model_dump(mode="json"), "again") == config
    folder = dataset_in(tmp_path)
    assert folder is not None and folder.files is None


@pytest.mark.parametrize("more", [{"group_by": "subject"}, {"validation": ["p"], "num_folds": 3}])
def test_a_yaml_may_say_the_split_of_its_dataset(more: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps({"data": {"folder": "study", "files": PATTERNS, **more}}))
    found = dataset_in(path)
    assert found is not None and {name: getattr(found, name) for name in more} == more
    # Without files, it is also the shortest config for training; segkit plan takes it.
    path.write_text(json.dumps({"data": {"folder": "study", **more}}))
    assert dataset_in(path) is None
    found = dataset_in(path, minimal=True)
    assert found is not None and found.model_dump(exclude_unset=True) == {
        "folder": Path("study"),
        **more,
    }


def test_codes_of_a_dataset_json_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "a.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "liver": 1},
        "training": [{"image": "a.nii.gz", "label": "a.nii.gz"}],
        "codes": {"liver": {"scheme": "SCT", "value": "10200004", "meaning": "Liver"}},
    }
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    code = read_dataset(tmp_path).codes["liver"]
    assert (code.scheme, code.value, code.meaning) == ("SCT", "10200004", "Liver")
    assert code.category.meaning == "Anatomical Structure"
    content["codes"] = {"spleen": content["codes"]["liver"]}  # type: ignore[index]
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(
        DatasetError, match="codes names spleen, which is not one of the labels liver"
    ):
        read_dataset(tmp_path)
