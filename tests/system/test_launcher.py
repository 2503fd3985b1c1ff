"""A process knows its number among those that were launched with it."""

import pytest

from segkit.errors import SegkitError
from segkit.system.launcher import ProcessPlace, place_of_process


def test_a_process_without_a_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS", "SLURM_JOB_NAME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(SegkitError, match="pass --shard I/N"):
        place_of_process()


def test_torchrun_numbers_its_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"TORCHELASTIC_RUN_ID": "x", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of_process() == ProcessPlace(number=6, count=8, local=1)


def test_slurm_numbers_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    variables = {
        "SLURM_NTASKS": "4",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_JOB_NAME": "predict",
        "SLURM_PROCID": "2",
        "SLURM_LOCALID": "0",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert place_of_process() == ProcessPlace(number=3, count=4, local=0)
