"""Facts of cases: a check that was stopped goes on where it was."""

import dataclasses
from pathlib import Path

import pytest

from segkit.config.dataset_files import DatasetConfig
from segkit.data import case_facts
from segkit.data.case_facts import Examined, facts_of_cases
from segkit.data.dataset import CaseFiles, Dataset, dataset_of
from segkit.errors import DatasetError, Problems
from tests.small import small_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return dataset_of(DatasetConfig(folder=small_dataset(tmp_path / "data")))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that are read from now on; facts are stored after each of them."""
    found: list[str] = []
    examine = case_facts._examined

    def counted(case: CaseFiles, dataset: Dataset) -> Examined:
        found.append(case.name)
        return examine(case, dataset)

    monkeypatch.setattr(case_facts, "_examined", counted)
    monkeypatch.setattr(case_facts, "SECONDS_BEFORE_STORING", -1.0)
    return found


def test_a_stopped_check_continues_without_reading_cases_again(
    dataset: Dataset, reads: list[str], tmp_path: Path
) -> None:
    names = [case.name for case in dataset.cases]
    whole = list(facts_of_cases(dataset, Problems()))
    reads.clear()
    stopped = facts_of_cases(dataset, Problems(), cache=tmp_path / "cache")
    next(stopped), next(stopped)
    stopped.close()  # as Ctrl-C does
    assert reads == names[:2]
    again = list(facts_of_cases(dataset, Problems(), cache=tmp_path / "cache"))
    assert reads == names and again == whole


def test_only_a_changed_or_a_wrong_case_is_read_again(
    dataset: Dataset, reads: list[str], tmp_path: Path
) -> None:
    label = dataset.cases[1].label
    good = label.read_bytes()
    label.write_bytes(b"nothing")
    problems = Problems()
    found = list(facts_of_cases(dataset, problems, cache=tmp_path / "cache"))
    assert [examined.facts is None for examined in found] == [False, True, False, False]
    with pytest.raises(Exception, match=r"cannot be read as"):
        problems.refuse()
    reads.clear()
    label.write_bytes(good)
    assert all(one.facts for one in facts_of_cases(dataset, Problems(), cache=tmp_path / "cache"))
    assert reads == [dataset.cases[1].name]


def test_other_settings_are_checked_anew_and_a_quick_check_stores_nothing(
    dataset: Dataset, reads: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(facts_of_cases(dataset, Problems(), cache=tmp_path / "cache"))
    other = dataclasses.replace(dataset, nan="background")
    list(facts_of_cases(other, Problems(), cache=tmp_path / "cache"))
    assert len(reads) == 2 * len(dataset.cases)
    monkeypatch.setattr(case_facts, "SECONDS_BEFORE_STORING", 60.0)
    list(facts_of_cases(dataset, Problems(), cache=tmp_path / "quick"))
    assert not (tmp_path / "quick").exists()


def test_a_damaged_file_of_stored_facts_is_refused_by_name(
    dataset: Dataset, reads: list[str], tmp_path: Path
) -> None:
    list(facts_of_cases(dataset, Problems(), cache=tmp_path))
    (stored,) = tmp_path.glob("checked-*.json")
    stored.write_text("{")
    with pytest.raises(DatasetError, match=r"checked-\w+\.json: .*delete the file to check all"):
        list(facts_of_cases(dataset, Problems(), cache=tmp_path))
