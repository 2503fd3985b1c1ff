"""The control groups of Linux around this process, such as a container or a job of a cluster.

Version 1 has a tree of groups for each controller (memory, cpu), version 2 has one for all.
"""

import re
from collections.abc import Iterator
from pathlib import Path

PROCESS = Path("/proc/self")


def groups_around(controller: str) -> Iterator[tuple[Path, str]]:
    """The control groups that limit this process, from its own to the outermost visible.

    Args:
        controller: `memory` or `cpu`.

    Yields:
        The folder of each group, and its file system: `cgroup` (version 1) or `cgroup2`. None on
        systems without control groups.
    """
    try:
        mounts = (PROCESS / "mountinfo").read_text(encoding="utf-8", errors="replace")
        groups = (PROCESS / "cgroup").read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, or /proc is closed
        return
    paths: dict[str, str] = {}
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            paths["cgroup2"] = path
        elif controller in controllers.split(","):
            paths["cgroup"] = path
    for line in mounts.splitlines():
        mount, _, system = line.partition(" - ")
        kind, _, options = system.split(" ", 2)
        if kind not in paths or (kind == "cgroup" and controller not in options.split(",")):
            continue
        root, top = (_unescaped(word) for word in mount.split(" ")[3:5])
        yield from ((folder, kind) for folder in _upwards(top, root, paths[kind]))


def _upwards(top: str, root: str, path: str) -> Iterator[Path]:
    """The folder of a group and those above it, up to the mount point.

    Args:
        top: the mount point.
        root: the group that lies at the mount point.
        path: the group of this process.
    """
    inside = Path(path)
    # A container may see paths of the host, but its mount shows only its own group.
    inside = inside.relative_to(root) if inside.is_relative_to(root) else Path()
    if ".." in inside.parts:
        inside = Path()
    yield Path(top) / inside
    for parent in inside.parents:
        yield Path(top) / parent


def _unescaped(word: str) -> str:
    r"""A path in mountinfo, in which a space is written as `\040`."""
    return re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), word)


def quota_of_cores() -> float | None:
    """Cores' worth of time that the control groups give this process; None without a limit.

    A group with a quota may run for so long in each period, on all cores together. The tightest
    group counts. Its neighbours may use a part of it.

    Example:
        quota_of_cores()  # 1.5 in a container of `docker run --cpus 1.5`
    """
    quotas = [
        quota
        for folder, kind in groups_around("cpu")
        if (quota := _quota_of(folder, kind)) is not None
    ]
    return min(quotas, default=None)


def _quota_of(folder: Path, kind: str) -> float | None:
    """The quota of one group in cores; None if it has none."""
    try:
        if kind == "cgroup2":
            quota, period = (folder / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (folder / "cpu.cfs_quota_us").read_text(encoding="ascii")
            period = (folder / "cpu.cfs_period_us").read_text(encoding="ascii")
        time, of = int(quota), int(period)
    except (OSError, ValueError):  # no such file, as in the outermost group, or `max`
        return None
    return time / of if time > 0 and of > 0 else None  # -1 means no limit in version 1
