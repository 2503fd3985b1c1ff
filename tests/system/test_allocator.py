"""Freed memory stays with the process if its C library supports it."""

import subprocess
import sys

PROGRAM = """
import resource, sys
import torch
from segkit.system.allocator import keep_freed_memory

kept = sys.argv[1] == "kept" and keep_freed_memory()
if sys.argv[1] == "kept" and not kept:
    sys.exit(7)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(40):  # what else is on the heap settles in some twelve
    torch.ones(16_000_000).sum()
before = faults()
for _ in range(5):
    torch.ones(16_000_000).sum()
print(faults() - before)
"""


def faults(kept: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, kept], capture_output=True, text=True, check=False
    )
    if done.returncode == 7:
        return 0  # another C library: nothing is promised
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_a_new_array_reuses_the_pages_of_a_freed_one() -> None:
    # 64 MB are some 16,000 pages, which are cleared each time unless they are kept.
    assert faults("kept") < 1000
