"""A table is a dataset by itself, and columns of a split that are not used are reported."""

import logging
from pathlib import Path

import pytest

from segkit.checking.check import check
from segkit.config.data import SplitDatasetConfig
from segkit.config.load import dataset_in, load_config
from segkit.data.case_table import unused_columns
from segkit.data.dataset import dataset_of
from segkit.data.split import split_of
from segkit.errors import ConfigError, DatasetError
from segkit.planning.make_plan import plan_dataset
from tests.cli.command import run
from tests.small import small_dataset

LABELS = "data.labels={background: 0, ball: 1}"
COLUMNS = "patient,fold,set,age"
ROWS = ["p0,0,train,50", "p0,1,val,60", "p1,0,train,70", "p1,1,test,80"]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Four cases of two patients, with folds, parts of a split, and ages."""
    folder = small_dataset(tmp_path / "data", num_cases=4)
    path = folder / "cases.csv"
    files = [f"imagesTr/case_{n}.nii.gz,labelsTr/case_{n}.nii.gz" for n in range(4)]
    rows = [f"c{n},{file},{ROWS[n]}" for n, file in enumerate(files)]
    path.write_text("\n".join([f"id,image,label,{COLUMNS}", *rows]) + "\n")
    return path


def data_of(path: Path, *overrides: str) -> SplitDatasetConfig:
    found = dataset_in(path, [LABELS, *overrides])
    assert found is not None
    return found


def test_columns_of_a_split_that_nothing_uses_are_named_with_their_settings(table: Path) -> None:
    assert unused_columns(data_of(table)) == [
        f"{table}: column patient is not used; data.group_by={{column: patient}} keeps the cases "
        f"of each patient together",
        f"{table}: column fold is not used; data.splits={{column: fold}} uses these folds",
        f"{table}: column set is not used; data.test={{column: set}} keeps its test cases for a "
        f"last test, and data.validation=[c1] holds out its validation cases",
    ]
    grouped = unused_columns(data_of(table, "data.group_by={column: patient}"))
    assert len(grouped) == 2 and not any("column patient" in sentence for sentence in grouped)
    assert unused_columns(data_of(table, "data.splits={column: fold}", "data.test=[c3]")) == []


@pytest.mark.parametrize(
    ("column", "values", "advice"),
    [
        ("Patient ID", "a,a,b,b", "data.group_by={column: Patient ID} keeps"),
        ("subject_id", "a,b,c,d", None),
        ("is_test", "0,0,0,1", "data.test={column: is_test} keeps its test cases"),
        ("test", "no,no,no,no", None),
        ("split", "0,1,2,0", "data.splits={column: split} uses these folds"),
        ("split", "train,train,train,validation", "data.validation=[c3] holds out its validation"),
        ("labelled", "ball,all,all,ball", "data.labelled={column: labelled} says which classes"),
        ("fold", ",,,", None),
        ("hospital", "a,a,b,b", None),
    ],
)
def test_columns_are_known_by_their_names_and_values(
    column: str, values: str, advice: str | None, table: Path
) -> None:
    lines = table.read_text().splitlines()
    kept = [",".join(line.split(",")[:3]) for line in lines]
    added = [column, *values.split(",")]
    table.write_text("\n".join(f"{a},{b}" for a, b in zip(kept, added, strict=True)))
    found = unused_columns(data_of(table))
    assert len(found) == (advice is not None)
    assert advice is None or f"column {column} is not used; {advice}" in found[0]


@pytest.mark.slow
def test_check_plan_and_train_report_unused_columns(
    table: Path, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    sentences = unused_columns(data_of(table))
    text = check(table, [LABELS]).text
    assert all(sentence in text.splitlines() for sentence in sentences)
    with caplog.at_level(logging.WARNING):
        planned = plan_dataset(data_of(table), minutes=0.1, device="cpu", runs=tmp_path / "runs")
    assert all(sentence in caplog.text for sentence in sentences)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        split_of(dataset_of(planned.config.data), planned.config)
    assert all(sentence in caplog.text for sentence in sentences)


def test_check_describes_the_split_that_a_table_asks_for(table: Path) -> None:
    text = check(table, [LABELS, "data.group_by={column: patient}"]).text
    assert "2 groups stay together (data.group_by)" in text
    assert "column patient is not used" not in text
    text = check(table, [LABELS, "data.group_by={column: patient}", "data.test=[c3]"]).text
    assert "leaves others for training: p1; keep all or none of a group" in text
    with pytest.raises(DatasetError, match="expected a column clinic"):
        check(table, [LABELS, "data.group_by={column: clinic}"])


def test_a_column_of_patients_is_proposed_before_the_names_of_cases(table: Path) -> None:
    named = table.read_text()
    for number in range(4):
        named = named.replace(f"\nc{number},", f"\nsub-{number // 2}_ses-{number % 2},")
    table.write_text(named)
    text = check(table, [LABELS]).text
    assert text.count("data.group_by=") == 1 and "data.group_by={column: patient}" in text
    table.write_text(named.replace("id,image,label,patient", "id,image,label,age"))
    text = check(table, [LABELS]).text
    assert text.count("data.group_by=") == 1 and "data.group_by=subject" in text


def test_a_table_is_planned_with_settings_of_the_command(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [LABELS, "data.group_by={column: patient}", "data.test={column: set}"]
    options = ["--minutes", "0.1", "--device", "cpu", "--no-race"]
    code, out, err = run("plan", table, *words, *options, capsys=capsys)
    assert code == 0, err
    assert "group_by: {column: patient}" in out and "column patient is not used" not in out
    config = load_config(tmp_path / "data.yaml")
    assert config.data.files is not None and config.data.files.table == Path("cases.csv")
    assert [case.name for case in dataset_of(config.data).cases] == ["c0", "c1", "c2"]
    held_out = split_of(dataset_of(config.data), config).held_out
    assert {case.name for case in held_out} in ({"c0", "c1"}, {"c2"})
    code, _, err = run("plan", table, LABELS, "train.steps=5", capsys=capsys)
    assert code == 2 and "found 'train.steps=5'; give it to segkit train" in err


def test_columns_that_name_files_are_channels_without_a_column_image(table: Path) -> None:
    text = table.read_text().replace("id,image,", "id,T1,")
    lines = [f"{line},{line.split(',')[1]}" for line in text.splitlines()]
    lines[0] = lines[0].removesuffix(",T1") + ",FLAIR"
    table.write_text("\n".join(lines))
    assert dataset_of(data_of(table)).channels == ("T1", "FLAIR")
    assert check(table, [LABELS]).facts["channels"] == ["T1", "FLAIR"]


def test_a_table_without_names_of_labels_is_refused_with_the_numbers_that_it_holds(
    table: Path,
) -> None:
    words = (
        r"set data\.labels, such as data\.labels='\{background: 0, class_1: 1\}' for the numbers"
    )
    with pytest.raises(DatasetError, match=words):
        check(table)
    with pytest.raises(ConfigError, match=r"data\.labels"):
        check(table, ["data.labels=5"])
