"""The share of the cores that this process gets, as the kernel counts it."""

import time
from pathlib import Path

import pytest

from segkit.system import core_share
from segkit.system.core_share import CoreShare


def counts(tasks: Path, **threads: str) -> None:
    for name, line in threads.items():
        (tasks / name).mkdir(parents=True, exist_ok=True)
        (tasks / name / "schedstat").write_text(line)


def test_waiting_threads_lower_the_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core_share, "TASKS", tmp_path)
    counts(tmp_path, one="5000 90 3\n", two="7000 0 1\n")
    watch = CoreShare()
    assert watch.share() == 1.0  # nothing ran in between
    # One ran for 100 and waited for 100; another started and ran for 200 without waiting.
    counts(tmp_path, one="5100 190 9\n", three="200 0 1\n")
    assert watch.share() == pytest.approx(300 / 400)
    assert watch.share() < core_share.FREE


@pytest.mark.parametrize("line", ["", "many 0 0", "1"])
def test_a_system_that_does_not_count_is_taken_as_free(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core_share, "TASKS", tmp_path)
    counts(tmp_path, one=line)
    assert CoreShare().share() == 1.0
    monkeypatch.setattr(core_share, "TASKS", tmp_path / "none")
    assert CoreShare().share() == 1.0


def test_the_share_of_this_process_is_a_share() -> None:
    watch, ends = CoreShare(), time.perf_counter() + 0.02
    while time.perf_counter() < ends:
        pass
    assert 0 < watch.share() <= 1
