"""What the system refuses: each ends in one sentence, and what was there before is untouched.

A full disk is a small file system in memory where this process may mount one, which takes root, and
else a limit of a file's size. A folder that cannot be written is one mounted read-only, or one
without the permission, which root does not heed.
"""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.faults.asked import wait_for
from benchmarks.faults.jobs import Bench, Job, Words
from benchmarks.faults.killed import finish
from benchmarks.faults.trial import Stored, Trial, broken, lost, stored, visible
from benchmarks.faults.zygote import Ended, Fault

ROOM = 160 * 1024
"""Bytes of a disk that is soon full: enough to begin, too few to end."""


def may_mount(folder: Path) -> bool:
    """Whether this process may mount a file system."""
    try:
        with mounted(folder / "probe", ROOM):
            return True
    except (OSError, subprocess.CalledProcessError):
        return False


@contextmanager
def mounted(folder: Path, size: int) -> Iterator[None]:
    """A file system of so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True, capture_output=True)


def full_disk(bench: Bench, job: Job) -> Iterator[Trial]:
    """The disk is full before the job is done; with more room, the same command finishes it."""
    expected = _unstruck(bench, job)
    folder = bench.fresh(f"{job.name}-full")
    if may_mount(bench.folder):
        with mounted(folder, ROOM):
            before = _earlier(folder)
            ended = bench.zygote.run(job.words, folder)
            yield _trial(
                bench,
                job,
                folder,
                "full disk",
                ended,
                expected,
                before,
                mend=lambda: _mount("-o", f"remount,size={1000 * ROOM}", folder),
            )
    folder = bench.fresh(f"{job.name}-limit")
    before = _earlier(folder)
    largest = max(file.size for file in expected.values())
    ended = bench.zygote.run(job.words, folder, Fault(file_limit=largest // 2))
    yield _trial(bench, job, folder, "a file's size is limited", ended, expected, before)


def read_only(bench: Bench, job: Job) -> Iterator[Trial]:
    """The folder cannot be written."""
    expected = _unstruck(bench, job)
    folder = bench.fresh(f"{job.name}-read-only")
    if may_mount(bench.folder):
        with mounted(folder, 1000 * ROOM):
            before = _earlier(folder)
            _mount("-o", "remount,ro", folder)
            ended = bench.zygote.run(job.words, folder)
            yield _trial(
                bench,
                job,
                folder,
                "read-only folder",
                ended,
                expected,
                before,
                mend=lambda: _mount("-o", "remount,rw", folder),
            )
    elif os.geteuid() != 0:
        before = _earlier(folder)
        folder.chmod(0o555)
        ended = bench.zygote.run(job.words, folder)
        yield _trial(
            bench,
            job,
            folder,
            "read-only folder",
            ended,
            expected,
            before,
            mend=lambda: folder.chmod(0o755),
        )


def vanished_input(bench: Bench, job: Job, trigger: Path, victim: Path) -> Iterator[Trial]:
    """A file that was listed is gone when it is to be read; once it is back, the job finishes."""
    expected = _unstruck(bench, job)
    folder = bench.fresh(f"{job.name}-vanished")
    before, content, state = _earlier(folder), victim.read_bytes(), victim.stat()

    def restore() -> None:
        victim.write_bytes(content)
        os.utime(victim, ns=(state.st_atime_ns, state.st_mtime_ns))

    fault = Fault(vanish=(str(trigger), str(victim)))
    ended = bench.zygote.run(job.words, folder, fault)
    assert not victim.exists(), "the fault did not strike"
    try:
        yield _trial(bench, job, folder, "vanished input", ended, expected, before, mend=restore)
    finally:
        restore()


def dead_worker(bench: Bench, job: Job) -> Iterator[Trial]:
    """A process that loads patches is killed, as the system does where memory runs out."""
    folder = bench.fresh(f"{job.name}-worker")
    words: Words = [*job.words, "data.workers=1"]
    expected = _unstruck(bench, job)
    before = _earlier(folder)
    child = bench.zygote.start(words, folder)
    wait_for(folder, "runs/*/last.ckpt")
    for worker in workers_of(child.pid):
        os.kill(worker, signal.SIGKILL)
    yield _trial(bench, job, folder, "dead data worker", child.wait(), expected, before)


def workers_of(pid: int, seconds: float = 60.0) -> list[int]:
    """Processes that a process began to work for it."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        found = [
            int(child)
            for child in children
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError("no process was begun")


def _unstruck(bench: Bench, job: Job) -> dict[str, Stored]:
    folder = bench.folder / "work" / f"{job.name}-unstruck"
    if not folder.exists():
        ended = bench.zygote.run(job.words, bench.fresh(folder.name))
        assert ended.code == 0, f"{job.name} fails where nothing strikes: {ended.err}"
    return job.results(folder)


def _earlier(folder: Path) -> dict[str, Stored]:
    """Results of something else that lie there already."""
    (folder / "earlier").mkdir()
    for number in range(3):
        (folder / "earlier" / f"{number}.txt").write_text(f"earlier result {number}\n" * 50)
    return stored(visible(folder / "earlier"), folder)


def _trial(
    bench: Bench,
    job: Job,
    folder: Path,
    fault: str,
    ended: Ended,
    expected: dict[str, Stored],
    before: dict[str, Stored],
    mend: Callable[[], object] = lambda: None,
) -> Trial:
    problems = []
    if not ended.told:
        problems.append(f"exit code {ended.code}: {ended.err.strip()[-300:]}")
    if ended.survivors:
        problems.append(f"{len(ended.survivors)} processes left behind")
    halves = sum(path.stat().st_size for path in broken(_results_in(folder)))
    gone = lost(before, stored(visible(folder / "earlier"), folder))
    told = ended.err.strip().splitlines()[0] if ended.err.strip() else ""
    mend()
    failure = finish(bench, job, folder)
    problems += [failure] if failure else []
    found = {name: file for name, file in job.results(folder).items() if "earlier" not in name}
    missing = lost(expected, found)
    bad = halves + gone + missing
    return Trial(job.name, fault, not problems and not bad, bad, "; ".join(problems) or told)


def _results_in(folder: Path) -> list[Path]:
    return [path for path in visible(folder) if path.suffix != ".txt"]


def _mount(*words: object) -> None:
    subprocess.run(["mount", *(str(word) for word in words)], check=True, capture_output=True)
