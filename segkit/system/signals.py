"""Ctrl-C and SIGTERM, with which a user or a scheduler stops a command, raised as `Stopped`."""

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
    """Call the handler for both signals within the block; afterwards the earlier handlers are back.

    Python handles signals only in its main thread; in another thread this changes nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None stands for a handler that was not set from Python; it cannot be set again.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def advising(advice: str) -> Iterator[None]:
    """Add to a Stopped from the block how to go on."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signum, advice) from None
