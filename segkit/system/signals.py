"""Ctrl-C and SIGTERM, by which a user or a scheduler asks for the end, raised as `Stopped`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from segkit.errors import Stopped

ASKING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


def stop(signum: int, frame: FrameType | None) -> None:
    """Raise Stopped."""
    raise Stopped(signum)


@contextmanager
def handling(handler: Handler = stop) -> Iterator[None]:
    """Have the handler called for both within the block, and whoever was asked before after it.

    Python hears signals in its first thread alone; in another this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None stands for one that was not set from Python, which cannot be set from here.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Have Stopped say how to go on with what the block does."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signum, advice) from None
