"""Files broken at random are accepted or refused, and the fault counter finds planted faults."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.faults import fuzz as fuzzing
from benchmarks.faults.fuzz import (
    OUTCOMES,
    data_files,
    fuzz,
    mutated,
    outcome_of,
    valid_files,
    watched,
)
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.io.volume_names import NOT_PICTURES


def assert_only_accepted_or_refused(counts: dict[str, int], count: int) -> None:
    assert sum(counts.values()) == count
    assert counts["accepted"] + counts["refused"] == count, counts
    # Else the mutations would be too harmless, or too rough, to say anything.
    assert min(counts["accepted"], counts["refused"]) > 0.1 * count, counts


def test_mutated_files_are_accepted_or_refused(tmp_path: Path) -> None:
    counts = fuzz(400, seed=20, keep=tmp_path / "faults")
    assert_only_accepted_or_refused(counts, 400)
    assert not (tmp_path / "faults").exists()


@pytest.mark.slow
def test_ten_thousand_mutated_files_are_accepted_or_refused(tmp_path: Path) -> None:
    assert_only_accepted_or_refused(fuzz(10_000, seed=0, keep=tmp_path / "faults"), 10_000)


def test_every_file_that_is_mutated_is_valid_before(tmp_path: Path) -> None:
    files = valid_files()
    assert {"".join(Path(name).suffixes) for name in files} == set(NOT_PICTURES)
    for name, content in data_files(files).items():
        (tmp_path / name).write_bytes(content)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        assert outcome_of(tmp_path / name) == "accepted", name


def test_a_number_and_a_seed_always_make_the_same_file() -> None:
    files = valid_files()
    made = [mutated(files, 3, number) for number in range(50)]
    assert made == [mutated(files, 3, number) for number in range(50)]
    assert made != [mutated(files, 4, number) for number in range(50)]
    assert len({content for _, content in made}) > 45


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        (KeyError("planted"), "raised"),
        (MemoryError(), "out of memory"),
        (VolumeError("scan.nii: does not fit into memory; free some"), "out of memory"),
        (VolumeError("a sentence that names no file"), "raised"),
    ],
)
def test_a_planted_fault_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: Exception, expected: str
) -> None:
    def fail(path: Path) -> Volume:
        raise failure

    monkeypatch.setattr(fuzzing, "read_volume", fail)
    assert outcome_of(tmp_path / "scan.nii") == expected


def test_a_planted_wrong_grid_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, elsewhere = tmp_path / "scan.nii", np.diag([1.0, 1.0, 2.0, 1.0])
    write_volume(path, Volume(np.zeros((2, 2, 2)), Grid((2, 2, 2), np.eye(4))))
    real: Callable[[Path], Volume] = read_volume

    def astray(path: Path) -> Volume:
        return Volume(real(path).data, Grid((2, 2, 2), elsewhere))

    monkeypatch.setattr(fuzzing, "read_volume", astray)
    assert outcome_of(path) == "raised"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('accepted'); print('refused')", ["accepted", "refused"]),
        (
            "import os; print('accepted', flush=True); os.kill(os.getpid(), 11)",
            ["accepted", "died"],
        ),
        (
            "import time; print('refused', flush=True); time.sleep(60)",
            ["refused", "hung"],
        ),
    ],
)
def test_the_end_of_a_process_is_its_last_outcome(
    monkeypatch: pytest.MonkeyPatch, code: str, expected: list[str]
) -> None:
    monkeypatch.setattr(fuzzing, "SECONDS_EACH", 2)
    assert watched([sys.executable, "-c", code], 2) == expected
    assert set(expected) <= set(OUTCOMES)


def test_a_process_that_cannot_start_has_no_outcome() -> None:
    with pytest.raises(RuntimeError, match="ended with 3"):
        watched([sys.executable, "-c", "raise SystemExit(3)"], 2)
