"""Files are complete or absent, and unfinished files are recognised."""

import errno
import os
import signal
from pathlib import Path

import pytest

from segkit.errors import Stopped, VolumeError, sentence_of
from segkit.io.atomic import (
    ABANDONED,
    mark_finished,
    mark_unfinished,
    naming,
    refuse_existing,
    remove_leftovers,
    unfinished_files,
    whole,
    write_text,
)
from segkit.system.signals import advice_on_stop, handling_signals
from segkit.training.csv_logger import MetricsFile


def test_an_unfinished_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "before")
    with pytest.raises(ZeroDivisionError), whole(path) as partial:
        partial.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_an_error_names_the_file_that_was_to_be_written(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with pytest.raises(OSError, match="No space") as refused, whole(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert sentence_of(refused.value) == (
        f"{path}: no space left on device; free some space there and run the same command again"
    )
    with pytest.raises(OSError, match="requested") as refused, naming(path):
        raise OSError("9 requested and 3 written")  # as NumPy has it
    assert sentence_of(refused.value).startswith(f"{path}: 9 requested and 3 written; ")
    with pytest.raises(FileNotFoundError) as refused, whole(path):
        (tmp_path / "other").read_text()
    assert sentence_of(refused.value).startswith(f"{tmp_path / 'other'}: no such file")


def test_the_traceback_of_another_process_becomes_one_line() -> None:
    text = "Caught OSError in DataLoader worker process 0.\nTraceback\n  File\nOSError: gone\n"
    assert sentence_of(OSError(text)) == (
        "OSError: gone; check the disk and run the same command again"
    )
    assert sentence_of(OSError()).startswith("OSError; ")


def test_unfinished_files_are_removed_once_no_process_writes_them(tmp_path: Path) -> None:
    fresh, stale, other = (tmp_path / name for name in (".partial-1-a", ".partial-2-b", "c"))
    folder = tmp_path / ".partial-3"
    for path in (fresh, stale, other, folder / "case" / "image.npy"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    long_ago = fresh.stat().st_mtime - ABANDONED - 1

    def age(*paths: Path) -> None:
        for path in paths:
            os.utime(path, (long_ago, long_ago))

    age(stale, other, folder, folder / "case")
    remove_leftovers(tmp_path)  # within the folder something was written just now
    assert sorted(tmp_path.iterdir()) == sorted([fresh, folder, other])
    age(folder / "case" / "image.npy")
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([fresh, other])
    remove_leftovers(tmp_path / "nowhere")


def test_only_files_of_a_stopped_run_may_be_overwritten(tmp_path: Path) -> None:
    labels, shares, foreign = (tmp_path / name for name in ("labels", "shares", "foreign"))
    assert unfinished_files(labels) == frozenset()
    mark_unfinished(labels, [shares])
    write_text(shares, "half of the work")
    write_text(foreign, "somebody's")
    left = unfinished_files(labels)
    refuse_existing([labels, shares], overwrite=False, left=left)
    with pytest.raises(VolumeError, match="foreign: exists already; pass --overwrite"):
        refuse_existing([labels, shares, foreign], overwrite=False, left=left)
    write_text(labels, "the rest")
    mark_finished(labels)
    assert unfinished_files(labels) == frozenset()
    with pytest.raises(VolumeError, match="labels: exists already"):
        refuse_existing([labels, shares], overwrite=False, left=unfinished_files(labels))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["foreign", "labels", "shares"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"unfinished": 3}', "\x00"])
def test_a_damaged_note_allows_no_overwriting(text: str, tmp_path: Path) -> None:
    write_text(tmp_path / ".unfinished-labels.json", text)
    assert unfinished_files(tmp_path / "labels") == frozenset()


def test_readers_always_see_a_complete_table(tmp_path: Path) -> None:
    path = tmp_path / "metrics.csv"
    table = MetricsFile(path, [{"a": "1.5", "step": "0"}])
    table.log_metrics({"a": 2.5}, 1)
    table.save()
    assert path.read_text() == "a,step\n1.5,0\n2.5,1\n"
    table.log_metrics({"b": 3.5}, 2)
    table.save()  # so soon after the last it is left alone
    assert path.read_text() == "a,step\n1.5,0\n2.5,1\n"
    table.finalize("success")
    assert path.read_text() == "a,b,step\n1.5,,0\n2.5,,1\n,3.5,2\n"


def test_a_signal_is_raised_with_the_advice_of_the_outermost_block(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for signum, name in ((signal.SIGINT, "Ctrl-C"), (signal.SIGTERM, "SIGTERM")):
        with pytest.raises(Stopped) as stopped, handling_signals():
            signal.raise_signal(signum)
        assert str(stopped.value) == f"stopped by {name}; run the same command again to go on"
        assert stopped.value.signum == signum
        with (
            pytest.raises(Stopped, match=f"^stopped by {name}; outer$"),
            advice_on_stop("outer"),
            advice_on_stop("inner"),
            handling_signals(),
        ):
            signal.raise_signal(signum)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
