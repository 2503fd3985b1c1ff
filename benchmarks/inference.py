"""Time and memory of prediction from file to file: segkit, MONAI and nnU-Net.

All use the same weights, windows and machine.

    pip install monai nnunetv2==2.8.1 "segkit[demo,openvino,onnx]"    # in one environment
    python benchmarks/inference.py brain body classes60 classes10 maps size large [--rounds 3]
        [--device cuda] [--template T1.nii.gz]

brain      nilearn's 1 mm T1 without black background: 36 windows of 96³ at 1.2 mm, 3 classes
body       the same with black background, which segkit and nnU-Net crop
classes60  60 classes, 256x256x200 voxels of 1x1x1.5 mm at 1.5 mm; classes10 the same with 10
maps       segkit on `brain` with and without attention maps
size       segkit on `body`, and on 2 and 4 copies stacked in depth
large      segkit on 512x512x300 voxels and 60 classes

On a GPU each program segments the volume twice, and the second time counts, because the device is
then warm. MONAI is measured with its defaults and with its fastest settings (bfloat16, four windows
at once). Without nilearn, `--template` gives a 1 mm T1 volume.

Programs run in turn, each in its own process. The table has medians over rounds and ratios of
medians. The first run of segkit, which converts the network, is reported separately.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.ndimage import zoom

CHILD = Path(__file__).parent / "peers" / "inference.py"
PEERS = {"brain": ["monai"], "body": ["nnunet"], "classes60": ["monai", "nnunet"]}
MODULES = {"monai": "monai", "nnunet": "nnunetv2"}
Figures = dict[str, Any]


def load_template(file: Path | None) -> nib.Nifti1Image:
    """The 1 mm T1 template, from a file or from nilearn."""
    if file is not None:
        return nib.load(file)
    from nilearn.datasets import load_mni152_template

    return load_mni152_template(resolution=1)


def brain(folder: Path, template: nib.Nifti1Image, *, background: bool, depth: int = 1) -> Path:
    """A file of the T1 template as int16, with background 0 or 1, and copies stacked in depth."""
    values = np.asarray(template.dataobj, dtype=np.float32)
    values = np.round(values * (1000 / values.max()))
    values[values < 10] = 0 if background else 1
    stacked = np.concatenate([values] * depth, axis=2).astype(np.int16)
    path = folder / f"brain-{background}-{depth}.nii.gz"
    nib.save(nib.Nifti1Image(stacked, template.affine), path)
    return path


def smooth(folder: Path, shape: Sequence[int]) -> Path:
    """A file of smooth noise as int16, in voxels of 1x1x1.5 mm."""
    random = np.random.default_rng(0)
    coarse = random.normal(500, 200, [max(size // 8, 2) for size in shape]).astype(np.float32)
    values = zoom(coarse, np.array(shape) / coarse.shape, order=1).astype(np.int16)
    path = folder / f"noise-{'x'.join(map(str, shape))}.nii.gz"
    nib.save(nib.Nifti1Image(values, np.diag([1.0, 1.0, 1.5, 1.0])), path)
    return path


def run(contender: str, case: str, source: Path, target: Path, **settings: str) -> Figures:
    """Time and memory of one process."""
    settings["model"] = str(target.parent / f"model-{case}")
    words = [contender, case, str(source), str(target), *(f"{k}={v}" for k, v in settings.items())]
    done = subprocess.run([sys.executable, str(CHILD), *words], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{contender}, {case}: exit {done.returncode}\n{done.stderr[-1500:]}")
    figures: Figures = json.loads(done.stdout.splitlines()[-1])
    return figures


def rounds(
    runs: Mapping[str, Sequence[Any]], count: int, console: Console
) -> dict[str, list[Figures]]:
    """The figures of each run, repeated `count` times in turn."""
    found: dict[str, list[Figures]] = {name: [] for name in runs}
    for number in range(count):
        for name, (contender, case, source, target, settings) in runs.items():
            with console.status(f"{name}, round {number + 1}"):
                figures = run(contender, case, source, target, **settings)
            found[name].append(figures)
            console.print(f"{name}: {figures['seconds']:.1f} s", highlight=False)
    return found


def agreement(first: Path, second: Path) -> float:
    """The share of voxels with the same label in two segmentations."""
    a, b = (np.asarray(nib.load(path).dataobj).squeeze() for path in (first, second))
    return float((a == b).mean())


def show(
    title: str,
    found: Mapping[str, Sequence[Figures]],
    console: Console,
    same: Mapping[str, float] | None = None,
) -> None:
    """Print a table with ratios to the first row."""
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
            f"{medians[name]:.2f}",
            f"{medians[name] / first:.2f}",
            str(each[0]["windows"]),
            f"{inside:.0%}" if inside else "",
            memory + (f" + {child:.2f}" if child > 0.3 else ""),
            f"{same[name]:.4%}" if same and name in same else "",
        )
    console.print(table)
    seconds = {name: round(median, 2) for name, median in medians.items()}
    print(json.dumps({"case": title.split(",")[0], "seconds": seconds}), flush=True)


def compared(
    case: str, source: Path, folder: Path, count: int, console: Console, device: str
) -> None:
    """Compare segkit, segkit with PyTorch only, and the other programs for this case."""
    on_gpu = {"device": device, "repeat": "2"} if device != "cpu" else {}
    contenders: dict[str, tuple[str, dict[str, str]]] = {"segkit": ("segkit", {})}
    if not on_gpu:
        contenders["segkit, torch"] = ("segkit", {"engine": "torch"})
    for peer in PEERS.get(case, []):
        if find_spec(MODULES[peer]) is None:
            console.print(f"{peer} is not installed, so it is not measured")
            continue
        contenders[peer] = (peer, {})
        if on_gpu and peer == "monai":
            contenders["monai, best"] = (peer, {"half": "bfloat16", "batch": "4"})
    targets = {name: folder / f"{case}-{name.replace(', ', '-')}.nii.gz" for name in contenders}
    runs = {
        name: (contender, case, source, targets[name], {**on_gpu, **settings})
        for name, (contender, settings) in contenders.items()
    }
    if not on_gpu:
        first = run("segkit", case, source, targets["segkit"])
        console.print(f"segkit, first run: {first['seconds']:.1f} s", highlight=False)
    found = rounds(runs, count, console)
    same = {name: agreement(targets["segkit"], path) for name, path in targets.items()}
    show(f"{case}, {source.name}", found, console, same)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    choices = ["brain", "body", "classes60", "classes10", "maps", "size", "large"]
    parser.add_argument("cases", nargs="+", choices=choices)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--template", type=Path)
    options = parser.parse_args()
    console = Console(width=110)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        on_device = {"device": options.device}
        if {"brain", "body", "maps", "size"} & set(options.cases):
            template = load_template(options.template)
        for case in options.cases:
            match case:
                case "brain" | "body":
                    source = brain(folder, template, background=case == "body")
                    compared(case, source, folder, options.rounds, console, options.device)
                case "classes60" | "classes10":
                    source = smooth(folder, (256, 256, 200))
                    compared(case, source, folder, options.rounds, console, options.device)
                case "maps":
                    source = brain(folder, template, background=False)
                    out = folder / "maps.nii.gz"
                    run("segkit", "brain", source, out, maps=str(folder / "maps"), **on_device)
                    runs = {
                        "without maps": ("segkit", "brain", source, out, on_device),
                        "with maps": (
                            "segkit",
                            "brain",
                            source,
                            out,
                            {"maps": str(folder / "m"), **on_device},
                        ),
                    }
                    show("maps", rounds(runs, options.rounds, console), console)
                case "size":
                    sources = {
                        n: brain(folder, template, background=True, depth=n) for n in (1, 2, 4)
                    }
                    run("segkit", "body", sources[1], folder / "size.nii.gz", **on_device)
                    runs = {
                        f"{n} deep": ("segkit", "body", path, folder / f"size{n}.nii.gz", on_device)
                        for n, path in sources.items()
                    }
                    show("depth", rounds(runs, options.rounds, console), console)
                case "large":
                    source = smooth(folder, (512, 512, 300))
                    settings = {**on_device, "repeat": "1" if options.device == "cpu" else "2"}
                    out = folder / "l.nii.gz"
                    runs = {"segkit": ("segkit", "classes60", source, out, settings)}
                    show("large", rounds(runs, 1, console), console)


if __name__ == "__main__":
    main()
