"""Memory that this process may use."""

import os
from pathlib import Path

UNKNOWN_MEMORY = 4 * 1024**3
MEMORY_STATE = Path("/proc/meminfo")
MEMORY_LIMITS = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that may still be allocated: Linux's "available" memory, within the container's limit.

    On other systems it is half of the machine's memory, or 4 GiB if the size is unknown.
    """
    try:
        lines = MEMORY_STATE.read_text(encoding="ascii").splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(available) * 1024
    except (OSError, ValueError):
        return _half_of_what_is_built_in()
    try:
        limit = int((MEMORY_LIMITS / "memory.max").read_text(encoding="ascii"))
        lines = (MEMORY_LIMITS / "memory.stat").read_text(encoding="ascii").splitlines()
        (held,) = (line.split()[1] for line in lines if line.startswith("anon "))
    except (OSError, ValueError):  # not in a container, or its limit is "max"
        return free
    return min(free, max(limit - int(held), 0))


def _half_of_what_is_built_in() -> int:
    if not hasattr(os, "sysconf"):
        return UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def in_words(count: float) -> str:
    """A number of bytes as text, in MB (10⁶) or GB (10⁹)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
