"""Progress of long work: a bar on a terminal, plain lines elsewhere."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self, TextIO, TypeAlias, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from segkit.errors import counted

Item = TypeVar("Item")
Track: TypeAlias = Callable[[Iterable[Any], str, int], Iterable[Any]]
"""A function of items, the name of the work and the number of items; it yields the items."""
SECONDS_BETWEEN_LINES = 15.0
SECONDS_BETWEEN_REPORTS = 0.5
"""Least time between two reports for programs, except the first and the last."""


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
        disable=not is_live(console),
    )


def is_live(console: Console) -> bool:
    """Whether a console can redraw a line.

    The variable FORCE_COLOR, which notebooks set for all processes that they start, makes Rich
    treat any output as a terminal. A file or a pipe then gets colours, but no progress bars: each
    step of a bar would be a line of its own.
    """
    forced = bool(os.environ.get("FORCE_COLOR")) and not console.is_jupyter
    return console.is_terminal and not (forced and not console.file.isatty())


class Tracker:
    """Shows progress over any iterable, with the name of the work and the number of items."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, items: Iterable[Item], what: str, count: int) -> Iterator[Item]:
        """Yield the items unchanged."""
        with bars(self.console) as display:
            task = display.add_task(what, total=count)
            started = last = time.monotonic()
            first = math.inf
            for number, item in enumerate(items, start=1):
                yield item
                display.advance(task)
                if not is_live(self.console):
                    now = time.monotonic()
                    first = min(first, now)
                    if now - last > SECONDS_BETWEEN_LINES:
                        left = _time_left(started, first, now, number, count)
                        self.console.print(f"{what}: {number} of {count}{left}", highlight=False)
                        last = now


def _time_left(started: float, first: float, now: float, number: int, count: int) -> str:
    """The time left as text, such as ", about 3 min left"; empty before it can be estimated.

    The time until the first item includes the start of processes, and several processes finish
    their first items together. So the speed is measured after the first item, and for at least as
    long as the first item took.

    Args:
        started, first, now: times of the start, of the end of the first item, and of now, in
            seconds.
        number: number of items that are done.
        count: number of all items.
    """
    if now - first < first - started or number < 2:
        return ""
    left = (now - first) / (number - 1) * max(count - number, 0)
    return f", {in_minutes(left)} left"


def in_minutes(seconds: float) -> str:
    """A duration as text, such as "about 3 min"; in seconds below one minute."""
    return f"about {seconds / 60:.0f} min" if seconds >= 60 else f"about {seconds:.0f} s"


class CohortProgress:
    """Shows progress over several volumes, slab by slab, and the time left for all of them.

    It is a context manager. `track` shows progress over the slabs of one volume; call `done` after
    each volume, even if it failed.

    Args:
        console: the console for bars or lines for people.
        what: the name of the work.
        count: the number of volumes.
        reports: a stream to which reports for programs are written: one JSON object per line, with
            `progress` (the share that is done, from 0 to 1), `volumes` (their number) and
            `seconds_left` (null before it can be estimated).
    """

    def __init__(
        self, console: Console, what: str, count: int, *, reports: TextIO | None = None
    ) -> None:
        self.console = console
        self.reports = reports
        self.reported = -SECONDS_BETWEEN_REPORTS
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
        self._report(time.monotonic())
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
        self._report(now)
        left = self._seconds_left(now)
        if is_live(self.console) or left is None or now - self.last <= SECONDS_BETWEEN_LINES:
            return
        self.last = now
        self.console.print(
            f"{self.what}: {share:.1f} of {counted(self.count, 'volume')}, {in_minutes(left)} left",
            highlight=False,
        )

    def _seconds_left(self, now: float) -> float | None:
        """An estimate from the work since the first slab; None before there is any."""
        if self.first is None or self.share <= self.first[1]:
            return None
        started, before = self.first
        return (now - started) / (self.share - before) * (self.count - self.share)

    def _report(self, now: float) -> None:
        waiting = now - self.reported < SECONDS_BETWEEN_REPORTS and self.share < self.count
        if self.reports is None or not self.count or waiting:
            return
        self.reported = now
        left = self._seconds_left(now)
        report = {
            "progress": round(self.share / self.count, 4),
            "volumes": self.count,
            "seconds_left": None if left is None else round(left, 1),
        }
        print(json.dumps(report), file=self.reports, flush=True)
