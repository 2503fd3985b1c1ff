"""The progress of a cohort shows its share and an estimate of the time left."""

import io
import json

import pytest
from rich.console import Console

from segkit.system import progress
from segkit.system.progress import CohortProgress, Tracker


def test_a_cohort_estimates_the_time_left_from_volumes_that_took_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    text = io.StringIO()
    console = Console(file=text, force_terminal=False, width=100)
    with CohortProgress(console, "segmenting", 4) as shown:
        shown.done()  # was there already
        for volume in range(3):
            assert list(slab for slab in shown.track([1, 2], 2)) == [1, 2]
            assert shown.share == volume + 2
            shown.done()
            clock += 60
        for slab in shown.track([], 2):
            raise AssertionError(slab)
    assert shown.share == 4
    lines = text.getvalue().splitlines()
    # After a minute, one of three volumes is done, and half of the next.
    assert lines[0] == "segmenting: 2.5 of 4 volumes, about 1 min left"


def test_volumes_that_failed_or_existed_count_without_slabs() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    with CohortProgress(console, "segmenting", 3) as shown:
        for count in (1, 2, 3):
            shown.done()
            assert shown.share == count


def test_a_line_of_progress_tells_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    text = io.StringIO()
    for _ in Tracker(Console(file=text, force_terminal=False, width=100))(range(4), "reading", 4):
        clock += 40
    # The time of the first may be mostly that of starting, so that it tells nothing. After the
    # second of four, which took 40 s, 80 s are left; after the third, 40 s.
    lines = text.getvalue().splitlines()
    assert lines[0] == "reading: 1 of 4"
    assert lines[1] == "reading: 2 of 4, about 1 min left"
    assert lines[2] == "reading: 3 of 4, about 40 s left"


@pytest.mark.parametrize("workers", [1, 4])
def test_the_start_of_processes_does_not_count_in_the_time_left(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes start in 60 s, then each finishes a case every 20 s; 400 cases in all."""
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    text = io.StringIO()
    for number in Tracker(Console(file=text, force_terminal=False, width=100))(
        range(400), "reading", 400
    ):
        clock = 60 + 20 * (1 + number // workers)
    told = {
        int(line.split()[1]): int(line.split("about ")[1].split()[0])
        for line in text.getvalue().splitlines()
        if "min left" in line
    }
    assert text.getvalue().splitlines()[0] == "reading: 1 of 400"
    assert min(told) > 4 * workers
    for number, minutes in told.items():
        assert minutes == pytest.approx((400 - number) * 20 / workers / 60, rel=0.35, abs=1)


class Terminal(io.StringIO):
    """Text that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("file", "live"), [(io.StringIO, False), (Terminal, True)])
def test_a_forced_colour_makes_no_terminal_of_a_file(
    monkeypatch: pytest.MonkeyPatch, file: type[io.StringIO], live: bool
) -> None:
    """Notebooks set FORCE_COLOR: hundreds of frames of a bar stood in what a process printed."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    text = file()
    console = Console(file=text, width=100)
    assert console.is_terminal and progress.is_live(console) == live
    assert list(Tracker(console)(range(4), "reading", 4)) == [0, 1, 2, 3]
    assert bool(text.getvalue()) == live


@pytest.mark.parametrize(
    ("seconds", "text"), [(20, "about 20 s"), (59, "about 59 s"), (90, "about 2 min")]
)
def test_less_than_a_minute_is_told_in_seconds(seconds: float, text: str) -> None:
    assert progress.in_minutes(seconds) == text


def test_a_program_is_told_the_share_that_is_done_and_the_seconds_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock)
    reports = io.StringIO()
    console = Console(file=io.StringIO(), force_terminal=True)
    with CohortProgress(console, "segmenting", 2, reports=reports) as shown:
        for _ in range(2):
            for _slab in shown.track(range(4), 4):
                clock += 1
            shown.done()
    lines = [json.loads(line) for line in reports.getvalue().splitlines()]
    assert all(line["volumes"] == 2 for line in lines)
    shares = [line["progress"] for line in lines]
    # At the start, after each of eight slabs, and again when the last volume is written.
    assert shares == [0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1, 1]
    assert lines[0]["seconds_left"] is None
    assert [line["seconds_left"] for line in lines[1:]] == [7, 6, 5, 4, 3, 2, 1, 0, 0]


def test_a_program_is_told_at_most_twice_a_second_and_always_of_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(progress.time, "monotonic", lambda: 7.0)
    reports = io.StringIO()
    with CohortProgress(Console(file=io.StringIO()), "x", 1, reports=reports) as shown:
        list(shown.track(range(1000), 1000))
    shares = [json.loads(line)["progress"] for line in reports.getvalue().splitlines()]
    assert shares == [0, 1]
