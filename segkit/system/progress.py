"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TypeAlias, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
Track: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""A function of items, the name of the work and the number of items; it yields the items."""
SECONDS_BETWEEN_LINES = 15.0


def untracked(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """The items, without a progress display; the default value of `track` parameters."""
    return items


def bars(console: Console) -> Progress:
    """A live display of progress bars; it shows nothing if the console is not a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Tracker:
    """Shows progress over any iterable, with the name of the work and the number of items."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, items: Iterable[Item], what: str, count: int) -> Iterator[Item]:
        """Yield the items unchanged."""
        with bars(self.console) as display:
            task = display.add_task(what, total=count)
            started = last = time.monotonic()
            for number, item in enumerate(items, start=1):
                yield item
                display.advance(task)
                if not self.console.is_terminal:
                    now = time.monotonic()
                    if now - last > SECONDS_BETWEEN_LINES:
                        left = (now - started) / number * max(count - number, 0)
                        self.console.print(
                            f"{what}: {number} of {count}, {_in_minutes(left)} left",
                            highlight=False,
                        )
                        last = now


def _in_minutes(seconds: float) -> str:
    """A duration as text, such as "about 3 min"; in seconds below one minute."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else f"about {seconds:.0f} s"


class CohortProgress:
    """Shows progress over several volumes, slab by slab, and the time left for all of them.

    It is a context manager. `track` shows progress over the slabs of one volume; call `done` after
    each volume, even if it failed.
    """

    def __init__(self, console: Console, what: str, count: int) -> None:
        self.console = console
        self.what = what
        self.count = count
        self.display = bars(console)
        self.task = self.display.add_task(what, total=count)
        self.share = 0.0
        self.told = 0
        self.first: tuple[float, float] | None = None
        self.last = time.monotonic()

    def __enter__(self) -> Self:
        self.display.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.display.stop()

    def track(self, slabs: Iterable[Item], count: int) -> Iterator[Item]:
        """Yield the slabs of one volume unchanged."""
        before = round(self.share)
        self.first = self.first or (time.monotonic(), self.share)
        for number, slab in enumerate(slabs, start=1):
            yield slab
            del slab  # free its memory before the next slab is made
            self._show(before + number / count)

    def done(self) -> None:
        """Count a finished volume; one whose result existed already takes no time."""
        self.told += 1
        self._show(max(self.told, self.share))

    def _show(self, share: float) -> None:
        self.share = share = min(share, self.count)
        self.display.update(self.task, completed=share)
        now = time.monotonic()
        if self.console.is_terminal or self.first is None:
            return
        started, before = self.first
        if now - self.last > SECONDS_BETWEEN_LINES and share > before:
            self.last = now
            left = (now - started) / (share - before) * (self.count - share) / 60
            self.console.print(
                f"{self.what}: {share:.1f} of {self.count} volumes, about {left:.0f} min left",
                highlight=False,
            )
