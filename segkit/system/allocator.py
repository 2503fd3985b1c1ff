"""Memory that a training frees stays with the process, so that the next step finds it again.

By default glibc hands every freed array of more than some 32 MB back to the system, which clears
its pages anew for the next step. The small steps of a CPU spend up to a third of their time on
that (2 AVX2 cores, batches of 2 patches of 32 x 40 x 32: 0.104 s a window before, 0.082 s after).
"""

import ctypes
import sys

TRIM_THRESHOLD = -1
TOP_PAD = -2
MMAP_THRESHOLD = -3
"""Numbers of glibc's `malloc.h`."""
KEPT = 2**31 - 1
"""Bytes that are free at the end of the heap and yet are not handed back."""
LARGEST = 2**30
"""Bytes of the largest array that is taken from the heap."""
GROWN_AT_ONCE = 2**26
"""Bytes by which the heap grows."""


def keep_freed_memory() -> bool:
    """Have the process keep the memory that it frees; whether its C library can do so.

    Results stay the same, bit for bit. The setting holds for the whole process, so that commands
    choose it and functions do not.
    """
    if not sys.platform.startswith("linux"):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):  # musl has a mallopt in name only
        return False
    settings = {TRIM_THRESHOLD: KEPT, TOP_PAD: GROWN_AT_ONCE, MMAP_THRESHOLD: LARGEST}
    return all(library.mallopt(name, value) == 1 for name, value in settings.items())
