"""Pictures and verdicts of docs/gallery.md: planted gates, and what segkit says of each.

    python -m benchmarks.gallery docs/pictures

Takes about a minute. The gates are some of those in benchmarks/planted_gallery.py, in 2D. For each
gate the script segments scans and applies the rule of docs/verdicts.md. It writes
`gallery_NAME.png` with a channel of the first scan, the structure and the gate's map.
`gallery.json` gets each verdict and its sentence.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from benchmarks.planted_gallery import GALLERY, predictor_of
from benchmarks.planted_gates import SHAPES, Planted
from benchmarks.verdicts import evidence_of
from segkit.explain.verdicts.rule import judge_evidence
from segkit.geometry.grid import Grid
from segkit.io.atomic import write_json
from segkit.io.volume import Volume

SHOWN = (
    ("mask", 12),
    ("mask", 3),
    ("inverted mask", 12),
    ("mask that is done without", 12),
    ("intensity, stride 1", 12),
    ("blur of 2.5 voxels", 12),
    ("gradient", 12),
    ("noise", 12),
    ("always the middle", 12),
)
"""Names of planted gates, each with a number of scans."""
DIMS = 2
PLANE = 0


def file_of(name: str) -> str:
    """The name of a gate's picture."""
    return f"gallery_{name.replace(',', '').replace('.', '_').replace(' ', '_')}.png"


def judged_once(planted: Planted, num_scans: int) -> dict[str, Any]:
    """The verdict on a planted gate after some scans: its word, its sentence and its direction."""
    verdicts = judge_evidence(evidence_of(planted, DIMS, num_scans, 0))
    best = next(one for one in verdicts if one.map == f"skip.{planted.target}/gate")
    return {
        "gate": planted.name,
        "scans": num_scans,
        "word": str(best.word),
        "direction": best.direction,
        "reason": best.reason,
        "picture": file_of(planted.name),
    }


def first_scan(planted: Planted) -> tuple[ndarray, ndarray, ndarray]:
    """A plane of the first scan's first channel, of its structure, and of the gate's map."""
    channels, labels = planted.case(np.random.default_rng((0, 0, DIMS)), SHAPES[DIMS])
    volume = Volume(np.stack(channels, axis=-1).astype(np.float32), Grid(SHAPES[DIMS], np.eye(4)))
    if planted.channels == 1:
        volume = volume.like(volume.data[..., 0])
    found = predictor_of(planted, DIMS, 1000)(volume, maps=True).maps
    native = found[f"skip.{planted.target}/gate"].volume
    assert native is not None
    return channels[0][..., PLANE], labels[..., PLANE], native.data[..., PLANE]


def draw(planted: Planted, path: Path) -> None:
    """Write the picture of a gate."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(5.4, 1.95), layout="constrained", dpi=110)
    channel, structure, gate = (np.squeeze(values).T for values in first_scan(planted))
    shown = ((channel, "gray", "scan, channel 0"), (structure, "gray", "structure"))
    for axis, (values, colours, title) in zip(axes, shown, strict=False):
        axis.imshow(values, cmap=colours, interpolation="nearest", origin="lower")
        axis.set_title(title, fontsize=9)
    drawn = axes[2].imshow(gate, cmap="inferno", interpolation="nearest", origin="lower")
    axes[2].set_title("gate", fontsize=9)
    bar = figure.colorbar(drawn, ax=axes[2], shrink=0.85)
    bar.ax.tick_params(labelsize=7)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Judge each gate, draw it, and write both."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="the folder for the pictures and gallery.json")
    out = parser.parse_args().out
    torch.set_num_threads(1)
    known = {planted.name: planted for planted in GALLERY}
    rows = []
    for name, num_scans in SHOWN:
        rows.append(judged_once(known[name], num_scans))
        draw(known[name], out / file_of(name))
        print(f"{name}, {num_scans} scans: {rows[-1]['word']}. {rows[-1]['reason']}", flush=True)
    write_json(out / "gallery.json", {"rows": rows})


if __name__ == "__main__":
    main()
