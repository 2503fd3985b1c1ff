import os
from pathlib import Path

import pytest
import torch

from segkit.errors import WorkerError
from segkit.system.workers import in_processes, loading


def threads_of(_: int) -> int:
    return torch.get_num_threads()


@pytest.mark.parametrize("num_processes", [0, 1])
def test_one_process_means_this_one_with_one_thread_and_results_in_order(
    num_processes: int,
) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        here = in_processes(lambda number: (number, os.getpid()), [3, 1, 2], num_processes)
        assert list(here) == [(number, os.getpid()) for number in (3, 1, 2)]
        for threads in in_processes(threads_of, [0, 0], num_processes):
            assert (threads, torch.get_num_threads()) == (1, 2)
    finally:
        torch.set_num_threads(before)


def test_several_processes_keep_the_order_and_pass_errors_on() -> None:
    results = in_processes(os.path.getsize, [__file__, "no such file", __file__], 2)
    assert next(results) == Path(__file__).stat().st_size
    with pytest.raises(FileNotFoundError, match="no such file"):
        next(results)


def test_a_killed_process_is_one_sentence() -> None:
    with pytest.raises(WorkerError, match=r"^one of 2 processes [^\n]* was killed[^\n]*$"):
        list(in_processes(os._exit, [1], 2))


DEATHS = [
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."),
    ConnectionResetError(104, "Connection reset by peer"),
    EOFError(),
]


@pytest.mark.parametrize("death", DEATHS, ids=lambda death: type(death).__name__)
def test_a_killed_loader_is_one_sentence_at_any_moment(death: Exception) -> None:
    said = "one of 2 processes that load patches was killed"
    with pytest.raises(WorkerError, match=said), loading(2):
        raise death


def test_without_loader_processes_a_lost_connection_is_passed_on() -> None:
    with pytest.raises(ConnectionResetError), loading(0):
        raise ConnectionResetError(104, "Connection reset by peer")
    with pytest.raises(RuntimeError, match="shapes"), loading(2):
        raise RuntimeError("shapes do not fit")
