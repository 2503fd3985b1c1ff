"""segkit on a GPU: time of training steps, GPU utilisation, accuracy, and prediction.

    python benchmarks/gpu.py [DATASET] [--template T1.nii.gz] [--only step accuracy predict tests]
    python benchmarks/gpu.py [DATASET] --rehearse        # on a CPU, tiny: does everything run?

DATASET is the Decathlon's hippocampus dataset, for `accuracy`: it plans for 100 s and trains on
fold 0 of nnU-Net's five folds. The other parts need no data. Each part runs in its own process, and
its failure does not stop the next; the exit status is then 1. All parts together take at most 8
minutes: a part that is not done by then is stopped. At the end, one table shows all figures. MONAI
is measured beside prediction if it is installed; nnU-Net's figures in the table were measured on an
H200.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback

import segkit

HERE = Path(__file__).parent
ROOT = HERE.parent
SIZES = {
    "small": {"channels": [32, 64, 128, 256], "patch": [40, 56, 40], "batch": 7, "steps": 600},
    "large": {
        "channels": [32, 64, 128, 256, 320, 320],
        "patch": [128, 128, 128],
        "batch": 2,
        "steps": 120,
    },
}
CASES = {"small": (10, (36, 50, 36)), "large": (4, (180, 220, 180))}
TINY = {"channels": [4, 8, 8], "patch": [16, 16, 16], "batch": 2, "steps": 6}
TINY_CASES = (4, (20, 20, 20))


FOLD, BUSY = "hippocampus fold 0", "GPU busy %, first to last sample above 50 %"
SECONDS = 480.0
"""Seconds for all parts together."""
UTILISATION = (
    "exec nvidia-smi -i {} --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 250"
)


class StepClock(Callback):
    """Measures the second half of a number of steps, after warm-up.

    The host runs ahead of a GPU, so it waits for the GPU at the beginning and at the end.
    """

    def __init__(self, steps: int) -> None:
        self.first, self.last = steps // 2, steps
        self.ends: dict[int, float] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Record the time of the first and the last step that counts."""
        if trainer.global_step in (self.first, self.last):
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.ends[trainer.global_step] = time.perf_counter()

    def per_step(self) -> float:
        """Milliseconds per step."""
        seconds = self.ends[self.last] - self.ends[self.first]
        return seconds / (self.last - self.first) * 1e3


def write_dataset(folder: Path, count: int, shape: Sequence[int]) -> None:
    """Write cases of noise with two labelled blocks, in the Decathlon's layout."""
    random = np.random.default_rng(0)
    grid = segkit.Grid(tuple(shape), np.eye(4))
    names = []
    for number in range(count):
        label = np.zeros(shape, np.uint8)
        x, y, z = (size // 4 for size in shape)
        label[x : 2 * x, y : 3 * y, z : 3 * z] = 1
        label[2 * x : 3 * x, y : 3 * y, z : 3 * z] = 2
        image = random.normal(size=shape).astype(np.float32) + label
        name = f"case_{number:02}.nii.gz"
        segkit.write_volume(folder / "imagesTr" / name, segkit.Volume(image, grid))
        segkit.write_volume(folder / "labelsTr" / name, segkit.Volume(label, grid))
        names.append(name)
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "a", "2": "b"},
        "training": [{"image": f"imagesTr/{n}", "label": f"labelsTr/{n}"} for n in names],
    }
    (folder / "dataset.json").write_text(json.dumps(content))


def step(size: str, *, rehearsed: bool) -> None:
    """Print the milliseconds per step of `segkit train` with default settings."""
    setting: dict[str, Any] = TINY if rehearsed else SIZES[size]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_dataset(folder / "data", *(TINY_CASES if rehearsed else CASES[size]))
        config = folder / "config.yaml"
        config.write_text(
            json.dumps(
                {
                    "data": {
                        "folder": str(folder / "data"),
                        "validation": 0.25,
                        "patch_size": setting["patch"],
                        "batch_size": setting["batch"],
                    },
                    "network": {
                        "channels": setting["channels"],
                        "attention": {"skip": "additive_grid"},
                    },
                    "train": {
                        "steps": setting["steps"],
                        "validate_every": setting["steps"],
                        "averaging": 0.999,
                        "pictures": 0,
                    },
                    "trainer": {"accelerator": "cpu" if rehearsed else "gpu"},
                }
            )
        )
        clock = StepClock(setting["steps"])
        started = time.perf_counter()
        segkit.train(segkit.load_config(config), runs=folder / "runs", callbacks=[clock])
        figures = {
            "ms": round(clock.per_step(), 2),
            "seconds in total": round(time.perf_counter() - started, 1),
        }
        if not rehearsed:
            figures["peak GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    print(json.dumps({"step": "large step" if size == "large" else size, **figures}))


def accuracy(dataset: Path, *, rehearsed: bool) -> None:
    """Print the Dice of hippocampus fold 0 after a plan for 100 s, and the GPU utilisation."""
    device, minutes = ("cpu", "0.2") if rehearsed else ("cuda", "1.667")
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    watched = "while sleep 0.25; do echo 0; done" if rehearsed else UTILISATION.format(card)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = folder / "hippocampus.yaml"
        words = ["plan", str(dataset), "--device", device, "--minutes", minutes, "--no-race"]
        started = time.perf_counter()
        _segkit(*words, "--out", str(config), cwd=folder)
        planned = time.perf_counter() - started
        with (folder / "busy.csv").open("w") as file:
            watch = subprocess.Popen(["sh", "-c", watched], stdout=file, stderr=subprocess.DEVNULL)
            try:
                started = time.perf_counter()
                _segkit("train", str(config), "name=fold0", "data.fold=0", cwd=folder)
                wall = time.perf_counter() - started
            finally:
                watch.kill()
                watch.wait()
        # A part of a card (MIG) has no utilisation, and a machine without nvidia-smi tells none.
        told = (folder / "busy.csv").read_text().split()
        shares = [int(each) for each in told if each.isdecimal()]
        used = [number for number, share in enumerate(shares) if share > 50]
        between = shares[used[0] : used[-1] + 1] if used else []
        summary = json.loads((folder / "runs" / "fold0" / "summary.json").read_text())
    print(
        json.dumps(
            {
                FOLD: summary["validation"]["mean_dice"],
                "steps": summary["steps"],
                "seconds of training": summary["seconds_of_training"],
                "seconds of planning": round(planned, 1),
                "seconds of segkit train": round(wall, 1),
                "GPU busy %, whole command": _mean(shares),
                BUSY: _mean(between),
            }
        )
    )


def table(lines: Sequence[str]) -> str:
    """All figures beside those of version 0.1, those that are wanted, and those of other programs.

    Args:
        lines: the output of all parts; those with figures are JSON objects.
    """
    found: dict[str, Any] = {}
    tests = ""
    for line in lines:
        if line.startswith("{"):
            told = json.loads(line)
            if "step" in told:
                found[told["step"]] = told["ms"]
            elif "case" in told:
                found[told["case"]] = told["seconds"]
            else:
                found |= told
        elif " in " in line and ("passed" in line or "failed" in line):
            tests = line.strip("= ")
    brain, large = found.get("brain", {}), found.get("large", {})
    peers = ", ".join(f"{name} {value}" for name, value in brain.items() if name != "segkit")
    rows = [
        ("small step, ms", "36.3", "<= 10", found.get("small"), "nnU-Net 19.1"),
        ("large step, ms", "90.7", "<= 40", found.get("large step"), ""),
        ("GPU busy, %", "29", ">= 90", found.get(BUSY), ""),
        ("hippocampus fold 0", "0.8806", ">= 0.887", found.get(FOLD), "nnU-Net 0.8730"),
        ("60 classes, 512x512x300, s", "13.1", "<= 3", large.get("segkit"), ""),
        ("1 mm brain, s", "0.54", "<= 0.3", brain.get("segkit"), peers),
        ("pytest -m gpu", "3 of 4", "all", tests or None, ""),
    ]
    shown = [
        ("", "0.1", "wanted", "now", "others"),
        *((*row[:3], "not measured" if row[3] is None else str(row[3]), row[4]) for row in rows),
    ]
    widths = [max(len(row[column]) for row in shown) for column in range(len(shown[0]))]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in shown
    )


def _mean(shares: Sequence[int]) -> float | None:
    return round(statistics.mean(shares), 1) if shares else None


def _run(command: Sequence[str], seconds: float) -> tuple[int | None, str, str]:
    """Status, output and errors of a command; the status is None if it was stopped."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        # Files, not pipes: what a stopped command has started cannot keep them open.
        process = subprocess.Popen(command, stdout=output, stderr=errors, start_new_session=True)
        status: int | None = None
        try:
            status = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        errors.seek(0)
        return status, output.read(), errors.read()


def _segkit(*words: str, cwd: Path) -> None:
    subprocess.run([sys.executable, "-m", "segkit", *words, "--quiet"], check=True, cwd=cwd)


def main() -> None:
    """Run every part in its own process and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", nargs="?", type=Path)
    parser.add_argument("--template", type=Path)
    parser.add_argument("--only", nargs="+", default=["step", "accuracy", "predict", "tests"])
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        parts: dict[str, Callable[[], None]] = {
            "small": lambda: step("small", rehearsed=options.rehearse),
            "large": lambda: step("large", rehearsed=options.rehearse),
            "accuracy": lambda: accuracy(options.dataset.resolve(), rehearsed=options.rehearse),
        }
        parts[options.part]()
        return
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    about = {"device": name, "torch": torch.__version__, "segkit": segkit.__file__}
    print(json.dumps(about), flush=True)
    tiny = ["--rehearse"] if options.rehearse else []
    data = [str(options.dataset)] if options.dataset else []
    own = [sys.executable, __file__, *data, *tiny, "--part"]
    template = ["--template", str(options.template)] if options.template else []
    inference = [sys.executable, str(HERE / "inference.py"), *template]
    pytest = [sys.executable, "-m", "pytest", "-q", str(ROOT / "tests")]
    commands = {
        "step": [[*own, "small"], [*own, "large"]],
        "accuracy": [[*own, "accuracy"]] if options.dataset else [],
        # Two commands, because the brain needs a template, and the other volume none.
        "predict": [[*inference, "--device", "cuda", case] for case in ("brain", "large")],
        "tests": [[*pytest, "-m", "gpu"]],
    }
    if options.rehearse:  # volumes of the real size would take minutes on a CPU
        commands |= {"predict": [[*inference, "--help"]], "tests": [[*pytest, "-m", "gpu", "--co"]]}
    failed, began = False, time.perf_counter()
    told: list[str] = []
    for part in options.only:
        for command in commands[part]:
            started = time.perf_counter()
            status, output, errors = _run(command, began + options.seconds - started)
            told += output.splitlines()
            print("\n".join(output.splitlines()[-40:]))
            if status != 0:
                failed = True
                print(errors[-1500:])
            how = "stopped" if status is None else f"exit {status}"
            print(f"{part}: {how}, {time.perf_counter() - started:.0f} s", flush=True)
    print(table(told), flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
