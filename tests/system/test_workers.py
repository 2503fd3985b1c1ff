import os
from pathlib import Path

import pytest
import torch

from segkit.errors import WorkerError
from segkit.system import resources as machine
from segkit.system.resources import free_memory, num_cores
from segkit.system.workers import in_processes, loading


def threads_of(_: int) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("num_processes", [0, 1])
def test_one_process_does_it_here_in_one_thread_and_in_order(num_processes: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = in_processes(lambda number: (number, os.getpid()), [3, 1, 2], num_processes)
        assert list(here) == [(number, os.getpid()) for number in (3, 1, 2)]
        for threads in in_processes(threads_of, [0, 0], num_processes):
            assert (threads, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


def test_several_processes_keep_the_order_and_tell_what_went_wrong() -> None:
    results = in_processes(os.path.getsize, [__file__, "no such file", __file__], 2)
    assert next(results) == Path(__file__).stat().st_size
    with pytest.raises(FileNotFoundError, match="no such file"):
        next(results)


def test_a_process_that_dies_is_told_in_one_sentence() -> None:
    with pytest.raises(WorkerError, match=r"^one of 2 processes [^\n]* was killed[^\n]*$"):
        list(in_processes(os._exit, [1], 2))


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


def test_free_memory_is_what_linux_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "meminfo"
    monkeypatch.setattr(machine, "MEMORY_STATE", state)
    monkeypatch.setattr(machine, "MEMORY_LIMITS", tmp_path)
    half = free_memory()
    assert half > 0  # of what is built in, as nothing is told
    state.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 300 kB\n")
    assert free_memory() == 300 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert free_memory() == 300 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert free_memory() == 2000
    (tmp_path / "memory.max").write_text("500\n")
    assert free_memory() == 0
    monkeypatch.setattr(machine, "MEMORY_STATE", tmp_path / "none")
    monkeypatch.delattr(os, "sysconf")
    assert free_memory() == 4 * 1024**3


DEATHS = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_a_process_that_loads_is_killed_at_any_moment_in_one_sentence(death: Exception) -> None:
    said = "one of 2 processes that load patches was killed"
    with pytest.raises(WorkerError, match=said), loading(2):
        raise death


def test_where_no_process_loads_a_lost_connection_is_something_else() -> None:
    with pytest.raises(ConnectionResetError), loading(0):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(RuntimeError, match="shapes"), loading(2):
        raise RuntimeError("shapes do not fit")
