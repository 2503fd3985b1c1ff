"""A plan measures how long it takes to prepare many or large cases."""

import json
from pathlib import Path

import pytest

from segkit.planning import planned_seconds, planning_task, preparing_seconds
from segkit.planning.make_plan import plan_dataset
from segkit.system.core_share import CoreShare
from tests.small import small_dataset


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.05)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    # A value that is measured on busy cores is not stored.
    monkeypatch.setattr(CoreShare, "share", lambda _: 1.0)
    return small_dataset(tmp_path / "data", num_cases=6)


def reserved(dataset: Path, cache: Path) -> float:
    text = plan_dataset(dataset, cache=cache, device="cpu", minutes=10).text.replace("#", "")
    words = " ".join(text.split()).split(" s are reserved for preparing")[0].split()
    return float(words[-1])


@pytest.mark.parametrize("ct", [False, True])
def test_each_case_takes_as_long_as_the_one_that_is_measured(
    ct: bool, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if ct:
        content = json.loads((dataset / "dataset.json").read_text())
        content["modality"] = {"0": "CT"}
        (dataset / "dataset.json").write_text(json.dumps(content))
    assert reserved(dataset, tmp_path / "c") == 30  # a twentieth, as there are few voxels
    monkeypatch.setattr(preparing_seconds, "FEW_VOXELS", 6 * 16**3)
    now = 0.0

    def clock() -> float:
        return now

    stored, read = preparing_seconds.store_cases, preparing_seconds.read_case
    prepared = []

    def storing(cases: list[object], *given: object, **options: object) -> object:
        nonlocal now
        now += 20.0
        prepared.extend(cases)
        return stored(cases, *given, **options)  # type: ignore[arg-type]

    def reading(case: object, of: object) -> object:
        nonlocal now
        now += 5.0
        return read(case, of)  # type: ignore[arg-type]

    monkeypatch.setattr(preparing_seconds.time, "perf_counter", clock)
    monkeypatch.setattr(preparing_seconds, "store_cases", storing)
    monkeypatch.setattr(preparing_seconds, "read_case", reading)
    monkeypatch.setattr(preparing_seconds, "preparing_processes", lambda *_: 3)
    # Six cases of 20 s in three processes; the window of CT reads each of them once more.
    assert reserved(dataset, tmp_path / "c") == (50 if ct else 40)
    assert len(prepared) == 1
    assert reserved(dataset, tmp_path / "c") == (50 if ct else 40) and len(prepared) == 1
