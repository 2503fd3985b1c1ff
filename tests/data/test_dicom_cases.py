"""Cases of a folder of DICOM files: which series, which structures, and what they come to."""

import shutil
from collections.abc import Iterable
from contextvars import copy_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pydicom import dcmread

from segkit.config.dataset_files import DatasetConfig
from segkit.data.case_inputs import inputs_in
from segkit.data.dataset import (
    check_headers,
    dataset_of,
    grid_of_case,
    read_case,
    read_case_label,
)
from segkit.errors import DatasetError, SegkitError
from segkit.evaluation.evaluate import evaluate
from segkit.explain.references import find_references
from segkit.geometry.grid import Grid
from segkit.io import dicom, dicom_headers, dicom_listing
from segkit.io.checksums import file_states
from segkit.io.dicom_tree import read_tree
from segkit.io.volume import write_volume
from segkit.system.listing import show_listing
from tests.cli.command import run
from tests.dicom import box_contour, write_series, write_structures
from tests.helpers import affine_of

SHAPE = (12, 10, 6)
GRID = Grid(SHAPE, affine_of("LPS", spacing=(0.8, 1.1, 3.0)))
TUMOUR = {"modality": "CT", "description": "*thorax*"}


def patient(root: Path, name: str, structure: str | None = "GTV", seed: int = 0) -> Path:
    """A CT series, a scout in the same folder, and a box of 3 x 3 x 2 voxels as a structure."""
    random = np.random.default_rng(seed)
    folder = root / name / "CT"
    slices = write_series(folder, random.integers(0, 3000, SHAPE).astype(np.uint16), GRID)
    scout = write_series(
        root / "tmp",
        np.zeros((4, 4, 2), np.uint16),
        Grid((4, 4, 2), np.eye(4)),
        description="scout",
    )
    for number, path in enumerate(scout):
        path.rename(folder / f"scout{number}")
    (root / "tmp").rmdir()
    if structure:
        boxes = [box_contour(GRID, (2.5, 3.5), (5.5, 6.5), z) for z in (1, 2)]
        body = [box_contour(GRID, (0.5, 0.5), (10.5, 8.5), z) for z in range(5)]
        write_structures(root / name / "RS.dcm", slices[0], {"Body": body, structure: boxes})
    return folder


@pytest.fixture(scope="module")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made") / "cohort"
    patient(root, "p1", "GTV primary", 1)
    patient(root, "p2", "gross mass", 2)
    patient(root, "p3", None, 3)
    return root


@pytest.fixture
def cohort(made_once: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made_once, tmp_path / "cohort")


def settings(root: Path, **dicom: Any) -> DatasetConfig:
    told = {"images": {"CT": TUMOUR}, "structures": {"tumour": ["GTV*", "gross mass"]}, **dicom}
    return DatasetConfig.model_validate({"folder": str(root), "dicom": told})


def test_series_with_structures_are_cases_whose_labels_lie_on_them(
    cohort: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = dataset_of(settings(cohort))
    assert [case.name for case in dataset.cases] == ["p1_CT", "p2_CT"]
    assert "left out, because no file of structures refers to them: p3_CT" in caplog.text
    assert dataset.channels == ("CT",) and dataset.labels == {"background": 0, "tumour": 1}
    check_headers(dataset.cases, dataset)
    for case in dataset.cases:
        image, label = read_case(case, dataset)
        assert image.data.shape == (*SHAPE, 1) and grid_of_case(case, dataset).agrees_with(GRID)
        expected = np.zeros(SHAPE)
        expected[3:6, 4:7, 1:3] = 1
        assert_array_equal(label.data, expected)
        assert len(file_states(case.images)) == SHAPE[2]  # without the scout


def test_labels_are_written_in_the_numbers_of_data_labels(cohort: Path) -> None:
    told = {"background": 0, "body": 3, "tumour": [17, 53]}
    config = settings(cohort, structures={"tumour": ["GTV*", "gross*"]})
    dataset = dataset_of(
        config.model_copy(
            update={"labels": {k: v if isinstance(v, list) else [v] for k, v in told.items()}}
        )
    )
    _, label = read_case(dataset.cases[0], dataset)
    assert dataset.labelling.numbers_in_files == {"background": 0, "body": 3, "tumour": 17}
    assert_array_equal(np.unique(label.data), [0, 1, 2])
    assert (label.data == 2).sum() == 18


@pytest.mark.parametrize(
    ("dicom", "words"),
    [
        (
            {"images": {"CT": {"modality": "MR"}}},
            r"no DICOM series in it is modality MR .*; it hol",
        ),
        (
            {"structures": {"tumour": ["GTV*"]}},
            r"case p2_CT: .*RS\.dcm: expected a structure calle",
        ),
        ({"structures": {}}, r"give data\.dicom\.structures, such as \{tumour: \[GTV\*\]\}"),
        (
            {"label": {"modality": "SEG"}},
            "none of 3 cases has labels, because no structure set or",
        ),
        (
            {"images": {"a": TUMOUR, "b": {"description": "absent"}}},
            "no DICOM series in it is desc",
        ),
    ],
)
def test_dicom_settings_that_do_not_fit_the_files_are_refused_in_a_sentence(
    dicom: dict[str, Any], words: str, cohort: Path
) -> None:
    with pytest.raises(DatasetError, match=words):
        dataset_of(settings(cohort, **dicom))


def test_a_case_without_structures_of_a_class_may_be_partly_labelled(cohort: Path) -> None:
    both = {"tumour": ["GTV*"], "body": ["body"]}
    dataset = dataset_of(settings(cohort, structures=both, absent="unlabelled"))
    assert dataset.unlabelled == {"p2_CT": ("tumour",)}
    dataset = dataset_of(settings(cohort, structures=both, absent="background"))
    assert not dataset.unlabelled
    _, label = read_case(dataset.cases[1], dataset)
    assert_array_equal(np.unique(label.data), [0, 2])


def test_a_structure_without_contours_is_one_that_nobody_drew(cohort: Path) -> None:
    slice_ = next(path for path in (cohort / "p2" / "CT").iterdir() if path.name[:2] == "IM")
    body = [box_contour(GRID, (0.5, 0.5), (10.5, 8.5), z) for z in range(5)]
    write_structures(cohort / "p2" / "RS.dcm", slice_, {"Body": body, "GTV": []})
    both = {"tumour": ["GTV*"], "body": ["body"]}
    with pytest.raises(DatasetError, match=r"case p2_CT: .*, found Body, GTV \(no contours\);"):
        dataset_of(settings(cohort, structures=both))
    dataset = dataset_of(settings(cohort, structures=both, absent="unlabelled"))
    assert dataset.unlabelled == {"p2_CT": ("tumour",)}


def test_two_structure_sets_of_a_series_are_told_apart_by_a_rule(cohort: Path) -> None:
    slice_ = next(path for path in (cohort / "p1" / "CT").iterdir() if path.name[:2] == "IM")
    write_structures(cohort / "p1" / "old.dcm", slice_, {"GTV": []}, description="old")
    with pytest.raises(
        DatasetError, match=r"case p1_CT: expected one file of structures, found 2: .*old"
    ):
        dataset_of(settings(cohort))
    dataset = dataset_of(settings(cohort, label={"description": "plan"}))
    assert [case.label.name for case in dataset.cases] == ["RS.dcm", "RS.dcm"]


def test_channels_of_a_case_are_series_of_one_study(tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    for number, name in enumerate(("p1", "p2")):
        study = f"1.2.{number + 1}"

        def of_study(_: int, one: Any, study: str = study) -> None:
            one.StudyInstanceUID = study

        t1 = write_series(
            root / name / "SE0", np.ones(SHAPE, np.uint16), GRID, description="T1", change=of_study
        )
        write_series(
            root / name / "SE1",
            np.full(SHAPE, 2, np.uint16),
            GRID,
            description="FLAIR",
            change=of_study,
        )
        write_structures(root / name / "RS", t1[0], {"a": [box_contour(GRID, (1, 1), (4, 4), 2)]})
    told = {"FLAIR": {"description": "flair"}, "T1": {"description": "t1"}}
    dataset = dataset_of(settings(root, images=told, structures={"a": "A"}))
    assert [case.name for case in dataset.cases] == ["p1", "p2"]
    image, label = read_case(dataset.cases[0], dataset)
    assert_array_equal(image.data[0, 0, 0], [2 - 1024, 1 - 1024])
    assert label.data.any()
    with pytest.raises(DatasetError, match="case p1: 2 DICOM series fit the channel T1"):
        dataset_of(settings(root, images={**told, "T1": {}}, structures={"a": "A"}))


def test_patterns_and_tables_may_name_folders_of_series_and_structures(cohort: Path) -> None:
    for path in (cohort / "p1" / "CT").glob("scout*"):
        path.unlink()
    for path in (cohort / "p2" / "CT").glob("scout*"):
        path.unlink()
    files = {"images": {"CT": "*/CT"}, "label": "*/RS.dcm"}
    told: dict[str, Any] = {"folder": str(cohort), "labels": {"background": 0, "tumour": 1}}
    structures = {"structures": {"tumour": ["GTV*", "gross mass"]}}
    by_pattern = DatasetConfig.model_validate({**told, "files": files, "dicom": structures})
    (cohort / "cases.csv").write_text("id,image,label\np1,p1/CT,p1/RS.dcm\np2,p2/CT,p2/RS.dcm\n")
    table = {"table": "cases.csv"}
    by_table = DatasetConfig.model_validate({**told, "files": table, "dicom": structures})
    for config in (by_pattern, by_table):
        dataset = dataset_of(config)
        assert [case.name for case in dataset.cases] == ["p1", "p2"]
        assert (read_case(dataset.cases[1], dataset)[1].data == 1).sum() == 18


def test_images_are_named_by_files_or_by_dicom_and_not_by_both(cohort: Path) -> None:
    files = {"images": {"CT": "*/CT"}, "label": "*/RS.dcm"}
    with pytest.raises(ValueError, match=r"data\.files and data\.dicom\.images both select"):
        DatasetConfig.model_validate(
            {"folder": str(cohort), "files": files, "dicom": {"images": {"CT": {}}}}
        )


def shared_structures(root: Path) -> Path:
    """Two series of one coordinate system, and a structure set that names only this system.

    One has every slice of GRID. The other has every second one, and begins two columns further.
    """
    slices = write_series(root / "thin", np.zeros(SHAPE, np.uint16), GRID)
    source = dcmread(slices[0])

    def of_same(_: int, one: Any) -> None:
        one.StudyInstanceUID = source.StudyInstanceUID
        one.FrameOfReferenceUID = source.FrameOfReferenceUID

    coarse = GRID.affine @ np.diag([1, 1, 2, 1])
    coarse[:, 3] += 2 * coarse[:, 0]
    thick = Grid((10, 10, 3), coarse)
    write_series(root / "thick", np.zeros(thick.shape, np.uint16), thick, change=of_same)
    boxes = [box_contour(GRID, (3.5, 1.5), (6.5, 4.5), z) for z in (2, 4)]
    path = write_structures(root / "RS.dcm", slices[0], {"GTV": boxes})
    file = dcmread(path)
    del file.ReferencedFrameOfReferenceSequence[0].RTReferencedStudySequence
    file.save_as(path)
    return path


def test_a_structure_set_of_two_series_is_painted_on_the_grid_of_each(tmp_path: Path) -> None:
    root = tmp_path / "cohort"
    shared_structures(root)
    (root / "cases.csv").write_text("id,image,label\nthin,thin,RS.dcm\nthick,thick,RS.dcm\n")
    told = {"folder": str(root), "labels": {"background": 0, "tumour": 1}}
    by_table = DatasetConfig.model_validate(
        {**told, "files": {"table": "cases.csv"}, "dicom": {"structures": {"tumour": ["GTV"]}}}
    )
    for config in (settings(root), by_table):
        dataset = dataset_of(config)
        assert [case.name for case in dataset.cases] == ["thick", "thin"]
        check_headers(dataset.cases, dataset)
        (_, thick), (_, thin) = (read_case(case, dataset) for case in dataset.cases)
        expected = np.zeros(SHAPE)
        expected[4:7, 2:5, [2, 4]] = 1
        assert_array_equal(thin.data, expected)
        assert_array_equal(thick.data, expected[2:, :, ::2])
        assert_array_equal(read_case_label(dataset.cases[0], dataset).data, thick.data)


def test_predictions_of_two_series_are_scored_against_one_structure_set(tmp_path: Path) -> None:
    root, out = tmp_path / "cohort", tmp_path / "out"
    shared_structures(root)
    study = tmp_path / "study.yaml"
    study.write_text(
        f"data:\n  folder: {root}\n  dicom:\n    images: {{CT: {{modality: CT}}}}\n"
        "    structures: {tumour: GTV}\n"
    )
    dataset = dataset_of(settings(root))
    for case in dataset.cases:
        label = read_case_label(case, dataset)
        write_volume(out / f"{case.name}.nii.gz", label)
        shares = np.stack([label.data == 0, label.data == 1], axis=-1).astype(np.float32)
        write_volume(out / f"{case.name}_prob.nii.gz", label.like(shares))
    scores = evaluate(out, study, probabilities=True)
    assert not scores.failures and scores.dice_of_cases == {"thick": 1, "thin": 1}
    found = find_references(inputs_in([study], ["CT"]), study)
    assert {name: each.image for name, each in found.items()} == {
        "thick": root / "thick",
        "thin": root / "thin",
    }


def test_predictions_are_scored_against_structures(cohort: Path, tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    study.write_text(
        f"data:\n  folder: {cohort}\n  dicom:\n    images: {{CT: {{description: thorax}}}}\n"
        "    structures: {tumour: [GTV*, gross mass]}\n"
    )
    dataset = dataset_of(settings(cohort))
    for case in dataset.cases:
        _, label = read_case(case, dataset)
        label.data[3, 4, 1] = 0  # one of 18 voxels is missed
        write_volume(tmp_path / "out" / f"{case.name}.nii.gz", label)
    scores = evaluate(tmp_path / "out", study)
    assert [row.case for row in scores.cases] == ["p1_CT", "p2_CT"]
    assert scores.cases[0].metrics["dice"] == pytest.approx(2 * 17 / 35)
    empty = evaluate(tmp_path / "out", study, missing="empty")
    assert empty.summary.num_cases == 2


def test_check_lists_the_series_and_structures_of_a_dicom_folder(
    cohort: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run("check", cohort, capsys=capsys)
    assert (code, err) == (0, "")
    assert "6 DICOM series in 3 folders" in out
    assert "3 series: CT, thorax, 6 slices" in out
    assert "structure Body: in 2 of 2 files" in out and "structure gross mass: in 1 of 2" in out


def test_each_header_of_a_cohort_is_read_once(
    cohort: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    whole = dicom_headers.reader_of

    def counted(file: Path) -> Any:
        read.append(file)
        return whole(file)

    for module in (dicom, dicom_listing):
        monkeypatch.setattr(module, "reader_of", counted)
    dataset = dataset_of(settings(cohort))
    check_headers(dataset.cases, dataset)
    dataset_of(settings(cohort))
    assert len(read) == len(set(read)) == 3 * (SHAPE[2] + 2)


def test_listing_shows_its_progress_by_files(cohort: Path) -> None:
    told: list[tuple[str, int, int]] = []

    def display(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
        each = list(items)
        told.append((what, count, len(each)))
        return each

    copy_context().run(lambda: (show_listing(display), read_tree(cohort)))
    files = 3 * (SHAPE[2] + 2) + 2
    assert told == [("reading DICOM headers", files, files)]


def test_a_damaged_file_stops_a_dataset_with_its_name(cohort: Path) -> None:
    (cohort / "p1" / "CT" / "bad.dcm").write_bytes(b"nothing")
    with pytest.raises(SegkitError, match=r"bad\.dcm: cannot be read as DICOM"):
        dataset_of(settings(cohort))


def test_unknown_classes_of_structures_are_refused(cohort: Path) -> None:
    config = settings(cohort).model_copy(update={"labels": {"background": [0], "mass": [1]}})
    with pytest.raises(DatasetError, match=r"expected classes \(mass\), found tumour; correct"):
        dataset_of(config)
