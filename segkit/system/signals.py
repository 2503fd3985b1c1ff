"""Ctrl-C and SIGTERM, which stop a command, raised as the exception `Stopped`."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from segkit.errors import Stopped

ASKING = (signal.SIGINT, signal.SIGTERM)
Handler = Callable[[int, FrameType | None], None]


def stop(signum: int, frame: FrameType | None) -> None:
    """Signal handler that raises Stopped."""
    raise Stopped(signum)


@contextmanager
def handling_signals(handler: Handler = stop) -> Iterator[None]:
    """Use the handler for SIGINT and SIGTERM within the block, then restore the earlier handlers.

    Python handles signals only in its main thread, so in other threads this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in ASKING}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None means that the handler was not set from Python; it cannot be restored.
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def advice_on_stop(advice: str) -> Iterator[None]:
    """Replace the advice of a Stopped that is raised in the block."""
    try:
        yield
    except Stopped as stopped:
        raise Stopped(stopped.signum, advice) from None
