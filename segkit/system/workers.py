"""Work on many cases in several processes; results come in the order of the cases."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from segkit.errors import SegkitError, WorkerError

Argument = TypeVar("Argument")
Result = TypeVar("Result")


def in_processes(
    function: Callable[[Argument], Result], items: Sequence[Argument], num_processes: int
) -> Iterator[Result]:
    """The function's result for each item, in order; 0 or 1 processes run it in this process.

    Torch uses one thread, so that no bit of a result depends on the number of processes or cores.

    Args:
        function: the work for one item; it must be picklable.
        items: picklable arguments.
        num_processes: the number of worker processes.

    Raises:
        Exception: the function's own.
        WorkerError: a process was killed.
    """
    work = partial(_in_one_thread, function)
    if num_processes <= 1:
        yield from map(work, items)
        return
    # Spawned, because a forked process would inherit torch's threads and locks.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            num_processes, mp_context=context, initializer=end_with_parent
        ) as executor:
            yield from executor.map(work, items)
    except BrokenProcessPool:
        raise WorkerError(
            f"one of {num_processes} processes that read cases was killed, probably because memory "
            "ran out; free some memory and run again, which continues from here (a script must "
            "call segkit under `if __name__ == '__main__':`)"
        ) from None


def attempted(function: Callable[[Argument], Result], item: Argument) -> Result | SegkitError:
    """The function's result for an item, or the SegkitError that it raises."""
    try:
        return function(item)
    except SegkitError as error:
        return error


def end_with_parent(*_: object) -> None:
    """Make this process end when its parent ends, even if the parent is killed.

    A terminal sends Ctrl-C to all processes; this one ignores it and leaves it to the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def loading(workers: int) -> Iterator[None]:
    """Raise WorkerError if one of the `workers` processes that load patches is killed."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # If a process dies while it sends a batch, the connection is lost.
        lost = workers > 0 and not isinstance(error, RuntimeError)
        if not lost and "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"{_one_that_loads(workers)} was killed, probably because memory ran out; free some "
            f"memory or lower data.workers in the run's config.yaml, "
            "and --resume it"
        ) from None


def _one_that_loads(workers: int) -> str:
    if workers == 1:
        return "the process that loads patches"
    return f"one of {workers} processes that load patches"


def _in_one_thread(function: Callable[[Argument], Result], item: Argument) -> Result:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(item)
    finally:
        torch.set_num_threads(num_threads)
