"""Prediction from file to file: segkit and its peers, on the same weights, windows and machine.

    pip install monai nnunetv2==2.8.1 "segkit[demo,openvino,onnx]"    # in one environment
    python benchmarks/inference.py brain body classes60 classes10 maps size large [--rounds 3]

brain      nilearn's 1 mm T1 without a black background: 36 windows of 96³ at 1.2 mm, 3 classes
body       the same with one, to whose body segkit and nnU-Net cut it
classes60  60 classes, 256x256x200 voxels of 1x1x1.5 mm at 1.5 mm; classes10 the same with 10
maps       segkit on `brain` with attention maps and without
size       segkit on `body` once and stacked twice and four times as deep
large      segkit on 512x512x300 voxels and 60 classes

Contenders take turns, each in a process of its own; medians over rounds, and ratios of medians. Of
segkit the first run, which converts the network, is told apart from those that find it converted.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nilearn.datasets import load_mni152_template
from rich.console import Console
from rich.table import Table
from scipy.ndimage import zoom

CHILD = Path(__file__).parent / "peers" / "inference.py"
PEERS = {"brain": ["monai"], "body": ["nnunet"], "classes60": ["monai", "nnunet"]}
Figures = dict[str, Any]


def brain(folder: Path, *, background: bool, depth: int = 1) -> Path:
    """The T1 template as int16, its background 0 or 1, stacked on itself so many times."""
    template = load_mni152_template(resolution=1)
    values = np.round(np.asarray(template.dataobj) * 1000)
    values[values < 10] = 0 if background else 1
    stacked = np.concatenate([values] * depth, axis=2).astype(np.int16)
    path = folder / f"brain-{background}-{depth}.nii.gz"
    nib.save(nib.Nifti1Image(stacked, template.affine), path)
    return path


def smooth(folder: Path, shape: Sequence[int]) -> Path:
    """Smooth noise as int16, in voxels of 1x1x1.5 mm."""
    random = np.random.default_rng(0)
    coarse = random.normal(500, 200, [max(size // 8, 2) for size in shape]).astype(np.float32)
    values = zoom(coarse, np.array(shape) / coarse.shape, order=1).astype(np.int16)
    path = folder / f"noise-{'x'.join(map(str, shape))}.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.5, 1.0])), path)
    return path


def run(contender: str, case: str, source: Path, target: Path, **settings: str) -> Figures:
    """The figures of one process."""
    settings["model"] = str(target.parent / f"model-{case}")
    words = [contender, case, str(source), str(target), *(f"{k}={v}" for k, v in settings.items())]
    done = subprocess.run(
        [sys.executable, str(CHILD), *words], check=True, capture_output=True, text=True
    )
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def rounds(
    runs: Mapping[str, Sequence[Any]], count: int, console: Console
) -> dict[str, list[Figures]]:
    """Each run so many times, in turns."""
    found: dict[str, list[Figures]] = {name: [] for name in runs}
    for number in range(count):
        for name, (contender, case, source, target, settings) in runs.items():
            with console.status(f"{name}, round {number + 1}"):
                figures = run(contender, case, source, target, **settings)
            found[name].append(figures)
            console.print(f"{name}: {figures['seconds']:.1f} s", highlight=False)
    return found


def agreement(first: Path, second: Path) -> float:
    """The share of voxels that two segmentations label alike."""
    a, b = (np.asarray(nib.load(path).dataobj).squeeze() for path in (first, second))
    return float((a == b).mean())


def show(
    title: str,
    found: Mapping[str, Sequence[Figures]],
    console: Console,
    same: Mapping[str, float] | None = None,
) -> None:
    """One table; ratios are to the first row."""
    table = Table(title=title)
    table.add_column("")
    for column in ("seconds", "ratio", "windows", "in the engine", "GiB", "same labels"):
        table.add_column(column, justify="right")
    medians = {name: statistics.median(f["seconds"] for f in each) for name, each in found.items()}
    first = next(iter(medians.values()))
    for name, each in found.items():
        memory = f"{max(f['gib'] for f in each):.2f}"
        child = max(f["gib_of_child"] for f in each)
        inside = statistics.median(f.get("in_engine", 0) / f["seconds"] for f in each)
        table.add_row(
            name,
            f"{medians[name]:.1f}",
            f"{medians[name] / first:.2f}",
            str(each[0]["windows"]),
            f"{inside:.0%}" if inside else "",
            memory + (f" + {child:.2f}" if child > 0.3 else ""),
            f"{same[name]:.4%}" if same and name in same else "",
        )
    console.print(table)


def compared(case: str, source: Path, folder: Path, count: int, console: Console) -> None:
    """segkit, as it is and by PyTorch alone, and the case's peers."""
    settings: dict[str, dict[str, str]] = {"segkit": {}, "segkit, torch": {"engine": "torch"}}
    targets = {name: folder / f"{case}-{name.replace(', ', '-')}.nii.gz" for name in settings}
    runs = {name: ("segkit", case, source, targets[name], settings[name]) for name in settings}
    for peer in PEERS.get(case, []):
        targets[peer] = folder / f"{case}-{peer}.nii.gz"
        runs[peer] = (peer, case, source, targets[peer], {})
    first = run("segkit", case, source, targets["segkit"])
    console.print(f"segkit, the first time: {first['seconds']:.1f} s", highlight=False)
    found = rounds(runs, count, console)
    same = {name: agreement(targets["segkit"], path) for name, path in targets.items()}
    show(f"{case}, {source.name}", found, console, same)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["brain", "body", "classes60", "classes10", "maps", "size", "large"]
    parser.add_argument("cases", nargs="+", choices=choices)
    parser.add_argument("--rounds", type=int, default=1)
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for case in options.cases:
            match case:
                case "brain" | "body":
                    source = brain(folder, background=case == "body")
                    compared(case, source, folder, options.rounds, console)
                case "classes60" | "classes10":
                    source = smooth(folder, (256, 256, 200))
                    compared(case, source, folder, options.rounds, console)
                case "maps":
                    source = brain(folder, background=False)
                    out = folder / "maps.nii.gz"
                    run("segkit", "brain", source, out, maps=str(folder / "maps"))
                    runs = {
                        "without maps": ("segkit", "brain", source, out, {}),
                        "with maps": ("segkit", "brain", source, out, {"maps": str(folder / "m")}),
                    }
                    show("maps", rounds(runs, options.rounds, console), console)
                case "size":
                    sources = {n: brain(folder, background=True, depth=n) for n in (1, 2, 4)}
                    run("segkit", "body", sources[1], folder / "size.nii.gz")
                    runs = {
                        f"{n} deep": ("segkit", "body", path, folder / f"size{n}.nii.gz", {})
                        for n, path in sources.items()
                    }
                    show("depth", rounds(runs, options.rounds, console), console)
                case "large":
                    source = smooth(folder, (512, 512, 300))
                    runs = {"segkit": ("segkit", "classes60", source, folder / "l.nii.gz", {})}
                    show("large", rounds(runs, 1, console), console)


if __name__ == "__main__":
    main()
