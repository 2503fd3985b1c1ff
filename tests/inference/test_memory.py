"""Peak memory follows slab and patch, not the volume times its classes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.peak_memory import SIDE

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="reads the peak as Linux tells it"),
]
PROGRAM = Path(__file__).parents[1] / "peak_memory.py"


def peak(folder: Path, *, classes: int, slices: int) -> int:
    """Largest own memory in bytes of a process that predicts probabilities and uncertainty."""
    folder.mkdir()
    result = subprocess.run(
        [sys.executable, PROGRAM, folder, str(classes), str(slices)],
        capture_output=True,
        text=True,
        # Where the C library keeps what was freed, what is measured is its habits.
        env={
            **os.environ,
            "MALLOC_MMAP_THRESHOLD_": "1000000",
            "PYTHONPATH": str(PROGRAM.parents[1]),
        },
    )
    assert result.returncode == 0, result.stderr
    return int(result.stdout)


def test_six_times_the_classes_take_no_more_memory_but_for_the_slab(tmp_path: Path) -> None:
    ten, sixty = (peak(tmp_path / str(n), classes=n, slices=1500) for n in (10, 60))
    assert sixty < 1.1 * ten
    # What fifty more classes of the whole volume would take in float32, were they held.
    assert sixty - ten < 0.1 * 50 * SIDE * SIDE * 1500 * 4


def test_twice_the_slices_take_no_more_memory_but_for_input_and_output(tmp_path: Path) -> None:
    once, twice = (peak(tmp_path / str(n), classes=10, slices=n) for n in (1500, 3000))
    # Of each voxel: int16 as it was read, float32 as the network sees it, and its label.
    arrays = 1500 * SIDE * SIDE * (2 + 4 + 1)
    assert twice - arrays < 1.1 * once
    assert twice - once < 3 * arrays
