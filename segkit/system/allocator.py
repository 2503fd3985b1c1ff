"""A setting of the C library that keeps freed memory in the process for the next training step.

By default glibc returns every freed array of more than some 32 MB to the system, which has to clear
its pages again for the next step. Small steps on a CPU spend up to a third of their time on this (2
AVX2 cores, batches of 2 patches of 32 x 40 x 32: 0.104 s per window before, 0.082 s after).
"""

import ctypes
import sys

TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
"""Numbers of the options in glibc's `malloc.h`."""
KEPT = 2**31 - 1
"""Free bytes at the end of the heap that are not returned to the system."""
LARGEST = 2**30
"""Size in bytes of the largest array that is allocated on the heap."""
GROWN_AT_ONCE = 2**26
"""Bytes by which the heap grows at a time."""


def keep_freed_memory() -> bool:
    """Make this process keep the memory that it frees, and return whether its C library can.

    Results stay the same, bit for bit. The setting holds for the whole process, so only commands
    call this function.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt in name only
        return False
    settings = {TRIM_THRESHOLD: KEPT, TOP_PAD: GROWN_AT_ONCE, MMAP_THRESHOLD: LARGEST}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())
