"""Memory that this process may use."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from segkit.system.control_groups import groups_around

UNKNOWN_MEMORY = 4 * 1024**3
MEMORY_STATE = Path("/proc/meminfo")


class GroupFiles(NamedTuple):
    """The files in which a version of Linux's control groups keeps limits and use of memory."""

    limits: tuple[str, ...]
    used: str
    """The file with the memory that the group uses, including cached files, which can be freed."""
    held: tuple[str, ...]
    """Lines of `memory.stat` with memory that cannot be freed: that of the group's processes,
    shared memory, and memory that the system itself uses for them."""


GROUP_FILES = {
    "cgroup": GroupFiles(
        ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_rss", "total_shmem")
    ),
    "cgroup2": GroupFiles(
        ("memory.max", "memory.high"), "memory.current", ("anon", "shmem", "slab_unreclaimable")
    ),
}
"""The files of version 1 and version 2, by the name of their file system."""


def free_memory() -> int:
    """Bytes that may still be allocated: Linux's "available" memory, within all limits.

    Limits are those of each control group that this process lies in, such as a container, a job of
    a cluster, or a user's session: the one that leaves least counts. On other systems it is half of
    the machine's memory, or 4 GiB if the size is unknown.
    """
    try:
        lines = MEMORY_STATE.read_text(encoding="ascii").splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(available) * 1024
    except (OSError, ValueError):
        return _half_of_what_is_built_in()
    for folder, kind in groups_around("memory"):
        free = min(free, _left(folder, GROUP_FILES[kind], free))
    return max(free, 0)


def _left(folder: Path, files: GroupFiles, unlimited: int) -> int:
    """Bytes that a control group leaves; `unlimited` if it has no limit."""
    limits = [limit for name in files.limits if (limit := _number(folder / name)) is not None]
    if not limits:
        return unlimited
    statistics = _statistics(folder / "memory.stat")
    held = [statistics[name] for name in files.held if name in statistics]
    used = sum(held) if held else _number(folder / files.used) or 0
    return min(limits) - used


def _number(file: Path) -> int | None:
    """The number in a file; None if there is no such file, or it says `max`."""
    try:
        return int(file.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _statistics(file: Path) -> Mapping[str, int]:
    try:
        lines = file.read_text(encoding="ascii").splitlines()
    except OSError:
        return {}
    pairs = (line.split() for line in lines)
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}


def _half_of_what_is_built_in() -> int:
    if not hasattr(os, "sysconf"):
        return UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def in_words(count: float) -> str:
    """A number of bytes as text, in MB (10⁶) or GB (10⁹)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
