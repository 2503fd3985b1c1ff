"""Share of the cores that this process gets, so that a busy machine is not taken for a slow one.

Linux counts for each thread how long it ran, and how long it was ready to run and waited for a core
(`/proc/PID/schedstat`). On a free machine threads hardly wait.
"""

from collections.abc import Iterator
from pathlib import Path

TASKS = Path("/proc/self/task")
FREE = 0.85
"""If threads get less than this share of the time that they could use, other programs take it."""


class CoreShare:
    """The share of time that the threads of this process ran, since this object was made.

    Example:
        watch = CoreShare()
        work()
        watch.share()  # 0.5 if another program took half of the cores; 1.0 if none did
    """

    def __init__(self) -> None:
        self.before = dict(_times())

    def share(self) -> float:
        """Time that threads ran, divided by the time that they ran or waited for a core.

        It is 1 if no thread did anything, or if the system does not count this.
        """
        ran = waited = 0
        for thread, (running, waiting) in _times():
            earlier = self.before.get(thread, (0, 0))
            ran += running - earlier[0]
            waited += waiting - earlier[1]
        return ran / (ran + waited) if ran > 0 else 1.0


def _times() -> Iterator[tuple[str, tuple[int, int]]]:
    """For each thread, nanoseconds that it ran and that it waited for a core, since it started."""
    for task in TASKS.glob("*") if TASKS.is_dir() else ():
        try:
            counts = (task / "schedstat").read_text(encoding="ascii").split()
            running, waiting = int(counts[0]), int(counts[1])
        except (OSError, ValueError, IndexError):  # the thread ended, or the kernel does not count
            continue
        yield task.name, (running, waiting)
