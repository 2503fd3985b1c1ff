"""The display of progress while files are listed, which the command line sets once.

Many functions list files before their own work, so this display is not passed as an argument.
"""

from collections.abc import Iterable
from contextvars import ContextVar

from segkit.system.progress import Item, Track, untracked

_DISPLAY: ContextVar[Track] = ContextVar("listing", default=untracked)


def show_listing(display: Track) -> None:
    """Show the listing of files by `display` from now on, a function like `Tracker`."""
    _DISPLAY.set(display)


def tracked(items: Iterable[Item], what: str, count: int) -> Iterable[Item]:
    """The items unchanged, with the display of the command line if there is one.

    Args:
        items: files or other steps of listing.
        what: name of the work.
        count: number of items.
    """
    return _DISPLAY.get()(items, what, count)
