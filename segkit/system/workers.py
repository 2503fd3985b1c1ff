"""Work on many cases in several processes, with the results in order."""

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
    """The function's result for each item, in order; 0 or 1 processes mean this one.

    Function, items and results must pickle. Torch works in one thread, so that the bits of a result
    do not depend on the number of processes or cores. Raises what the function raises, and
    WorkerError if a process was killed.
    """
    work = partial(_in_one_thread, function)
    if num_processes <= 1:
        yield from map(work, items)
        return
    # A fresh process each: a forked one would inherit threads and locks that torch holds.
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(
            num_processes, mp_context=context, initializer=end_with_parent
        ) as executor:
            yield from executor.map(work, items)
    except BrokenProcessPool:
        raise WorkerError(
            f"one of {num_processes} processes that read cases was killed, as happens where memory "
            "runs out; free some and run again, which goes on where this ended (a script that "
            "calls segkit must do so under `if __name__ == '__main__':`)"
        ) from None


def attempted(function: Callable[[Argument], Result], item: Argument) -> Result | SegkitError:
    """The function's result for an item, or the error that it raises, for `in_processes`."""
    try:
        return function(item)
    except SegkitError as error:
        return error


def end_with_parent(*_: object) -> None:
    """Make this process end with its parent, even if the parent is killed.

    A terminal sends Ctrl-C to all of them; only the parent reacts to it.
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
    """Raise WorkerError if one of so many processes that load patches is killed."""
    try:
        yield
    except (RuntimeError, ConnectionError, EOFError) as error:
        # One that dies while it hands a batch over is a connection that was lost.
        lost = workers > 0 and not isinstance(error, RuntimeError)
        if not lost and "DataLoader worker" not in str(error):
            raise
        raise WorkerError(
            f"one of {workers} processes that load patches was killed, as happens where memory "
            "runs out; free some, or lower data.workers in the run's config.yaml, and --resume it"
        ) from None


def _in_one_thread(function: Callable[[Argument], Result], item: Argument) -> Result:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function(item)
    finally:
        torch.set_num_threads(num_threads)
