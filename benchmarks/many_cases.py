"""Time to list, check and plan a dataset of many small cases, and to go on after a stop.

The cases are made first: NIfTI of about 16 x 16 x 16 voxels in nnU-Net's layout. Each step is a
process of its own, as a user starts it.

python benchmarks/many_cases.py [NUM_CASES] [FOLDER]
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np

STOP_AFTER = 0.4
"""The first check is stopped after this share of the time of a whole one."""


def main() -> None:
    """Make the cases, and print the seconds of each command."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    folder = Path(sys.argv[2] if len(sys.argv) > 2 else "many_cases")
    data = folder / "data"
    if not (data / "dataset.json").exists():
        made = time.perf_counter()
        make_cases(data, count)
        print(f"made {count} cases in {time.perf_counter() - made:.0f} s", flush=True)
    whole = seconds_of("check", data, "--runs", folder / "whole")
    print(f"check: {whole:.0f} s, {1000 * whole / count:.1f} ms a case", flush=True)
    print(f"check again: {seconds_of('check', data, '--runs', folder / 'whole'):.0f} s", flush=True)
    seconds_of("check", data, "--runs", folder / "stopped", stop_after=STOP_AFTER * whole)
    rest = seconds_of("check", data, "--runs", folder / "stopped")
    print(f"check, stopped after {STOP_AFTER * whole:.0f} s and started again: {rest:.0f} s more")
    plan = ("plan", data, "--no-race", "--minutes", "2", "--overwrite", "--out", folder / "p.yaml")
    print(f"plan: {seconds_of(*plan, '--runs', folder / 'runs'):.0f} s", flush=True)
    print(f"plan again: {seconds_of(*plan, '--runs', folder / 'runs'):.0f} s")


def make_cases(folder: Path, count: int) -> None:
    """Write small scans with two classes in nnU-Net's layout."""
    random = np.random.default_rng(0)
    for inside in ("imagesTr", "labelsTr"):
        (folder / inside).mkdir(parents=True, exist_ok=True)
    affine = np.diag([1.0, 1.0, 2.0, 1.0])
    for number in range(count):
        shape = tuple(random.integers(12, 20, 3))
        label = np.zeros(shape, np.uint8)
        label[4:8, 4:8, 4:9] = 1 + number % 2
        scan = (random.normal(0, 30, shape) + 100 * (label > 0)).astype(np.int16)
        name = f"case_{number:05d}"
        nib.save(nib.Nifti1Image(scan, affine), folder / "imagesTr" / f"{name}_0000.nii.gz")
        nib.save(nib.Nifti1Image(label, affine), folder / "labelsTr" / f"{name}.nii.gz")
    content = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "a": 1, "b": 2},
        "numTraining": count,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def seconds_of(*words: str | Path, stop_after: float | None = None) -> float:
    """Seconds of a command of segkit; it is stopped as by Ctrl-C if `stop_after` is given."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "segkit", *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ)
    try:
        code = process.wait(stop_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        return time.perf_counter() - started
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
