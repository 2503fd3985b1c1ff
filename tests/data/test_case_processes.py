"""Many or large cases are read in several processes, with the results of one."""

from pathlib import Path

import numpy as np
import pytest

from segkit.data import case_processes
from segkit.data.case_facts import facts_of_cases
from segkit.data.case_processes import reading_processes
from segkit.data.dataset import read_dataset
from segkit.errors import Problems
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from tests.small import magnified, small_dataset


@pytest.fixture(autouse=True)
def cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_processes, "num_cores", lambda: 8)
    monkeypatch.setattr(case_processes, "free_memory", lambda: 10**12)


def test_large_cases_and_many_cases_are_read_in_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_dataset(small_dataset(tmp_path / "data"))
    voxels, opened = 4 * 16**3, 4 * case_processes.READ_PER_CASE

    def processes(per_process: int) -> int:
        monkeypatch.setattr(case_processes, "READ_PER_PROCESS", per_process)
        return reading_processes(dataset.cases, dataset)

    assert processes(voxels + opened + 1) == 1
    assert processes((voxels + opened) // 3) == 3
    assert processes((voxels + opened) // 20) == 8
    assert reading_processes(dataset.cases[:1], dataset) == 1
    # Memory for two of the largest case.
    largest = case_processes.READ_PER_CASE + 8 * 16**3
    magnified(dataset.folder, 2, "case_1")
    free = 2 * largest * case_processes.BYTES_TO_READ + 1
    monkeypatch.setattr(case_processes, "free_memory", lambda: free)
    assert processes(1) == 2


def test_a_case_with_a_wrong_header_is_reported_by_reading_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = small_dataset(tmp_path / "data")
    (folder / "labelsTr" / "case_2.nii.gz").write_bytes(b"no volume")
    monkeypatch.setattr(case_processes, "READ_PER_PROCESS", 10**12)
    problems = Problems()
    dataset = read_dataset(folder)
    found = list(facts_of_cases(dataset, problems))
    assert [each.facts is None for each in found] == [False, False, True, False]


def test_facts_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = read_dataset(small_dataset(tmp_path / "data"))
    alone = list(facts_of_cases(dataset, Problems()))
    monkeypatch.setattr(case_processes, "num_cores", lambda: 2)
    monkeypatch.setattr(case_processes, "READ_PER_PROCESS", 1)
    assert reading_processes(dataset.cases, dataset) == 2
    assert list(facts_of_cases(dataset, Problems())) == alone


def test_voxels_of_all_channels_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    grid = Grid((16, 16, 16), np.eye(4))
    dataset = read_dataset(folder)
    second = tmp_path / "second.nii.gz"
    write_volume(second, Volume(np.zeros(grid.shape, np.float32), grid))
    monkeypatch.setattr(case_processes, "READ_PER_CASE", 0)
    monkeypatch.setattr(case_processes, "READ_PER_PROCESS", 16**3)
    assert reading_processes(dataset.cases, dataset) == 2
    case = dataset.cases[0]
    both = [type(case)(each.name, (*each.images, second), each.label) for each in dataset.cases]
    assert reading_processes(both, dataset) == 4
