"""`segkit demo`: train and segment a real scan in a few minutes, offline.

The package nilearn contains the ICBM 2009a template (Fonov et al. 2011): an average T1 scan of 152
people without skull, and maps of grey and white matter. The network trains on scans that are
synthesised from the tissue map. It then segments the T1 scan, whose intensities it has never seen.
"""

import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from lightning.pytorch.callbacks import Callback

from segkit.config.load import validated
from segkit.config.training import Config
from segkit.errors import SegkitError
from segkit.explain.page.parts import QUANTITIES
from segkit.geometry.grid import Grid
from segkit.inference.attention_maps import map_on_source
from segkit.inference.map_files import write_maps
from segkit.inference.predictor import Prediction, Predictor
from segkit.io.atomic import write_json
from segkit.io.pictures import Panel, write_montage
from segkit.io.volume import Volume, write_volume
from segkit.system.progress import Track, untracked
from segkit.system.signals import advice_on_stop
from segkit.training.fit import train

TISSUES = {"background": 0, "other": 1, "grey matter": 2, "white matter": 3}
SCORED = ("grey matter", "white matter")
RESOLUTION_MM = 2
DEMO_STEPS = 300
BRAIN_THRESHOLD = 0.02
"""Lowest intensity of brain, on the scan's scale 0 to 1. Interpolation in nilearn leaves small
values outside the brain."""
T1_INTENSITIES = {
    "background": [0.0, 0.0],
    "other": [0.1, 0.4],
    "grey matter": [0.5, 0.7],
    "white matter": [0.75, 1.0],
}
"""Ranges of the mean intensities of tissues in a T1 scan: fluid dark, white matter bright."""


def run_demo(
    out: Path,
    *,
    contrast: Literal["t1", "random"],
    steps: int,
    overwrite: bool,
    say: Callable[[str], None],
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> dict[str, Any]:
    """Train, segment the real scan, and write results and maps.

    Args:
        out: the folder for all results.
        contrast: contrasts of the training scans: similar to a T1 scan, or random.
        steps: training steps.
        overwrite: whether an earlier demo in `out` may be replaced.
        say: prints a line.
        callbacks: Lightning callbacks for the training.
        track: reports the progress.

    Returns:
        The content of `out/summary.json`.

    Raises:
        SegkitError: if the extra `demo` is not installed or `out` contains other files.
    """
    if out.exists() and any(out.iterdir()):
        if not overwrite:
            raise SegkitError(f"{out}: exists already; pass --overwrite or choose another --out")
        if not (out / "summary.json").exists() and not (out / "dataset" / "dataset.json").exists():
            raise SegkitError(
                f"{out}: contains files that are not from a demo; choose another --out"
            )
        shutil.rmtree(out)
    say("A U-Net with attention gates learns grey and white matter from synthesised scans.")
    scan, reference = load_template()
    dataset = out / "dataset"
    write_dataset(dataset, scan, reference)
    with advice_on_stop("segkit demo --overwrite starts again"):
        run = train(
            demo_config(dataset, contrast=contrast, steps=steps),
            runs=out / "runs",
            callbacks=callbacks,
            track=track,
        )
    say("Segmenting the real T1 scan …")
    prediction = Predictor(run.model)(scan, maps=True)
    write_volume(out / "scan.nii.gz", scan)
    write_volume(out / "reference.nii.gz", reference)
    write_volume(out / "segmentation.nii.gz", prediction.labels)
    write_maps(out / "maps", "scan", prediction.maps, scan)
    write_montage(
        out / "montage.png",
        scan.data,
        scan.grid,
        panels(scan, reference, prediction),
        label_names={number: name for name, number in TISSUES.items()},
        quantities={f"gate {key}": QUANTITIES["gate"] for key in prediction.maps},
    )

    dice = {name: run.summary["validation"]["dice"][name] for name in SCORED}
    summary = {
        "mean_dice": float(np.mean(list(dice.values()))),
        "dice": dice,
        "seconds_of_training": run.summary["seconds_of_training"],
        "steps": run.summary["steps"],
        "parameters": run.summary["parameters"],
        "contrast": contrast,
        "seen_in_training": "the template's tissue map, rotated, scaled, mirrored and deformed, "
        "with random intensities "
        + ("similar to those of a T1 scan" if contrast == "t1" else "for each tissue"),
        "not_seen_in_training": "the real T1 scan; but its anatomy is that of the tissue map",
        "versions": run.summary["versions"],
    }
    write_json(out / "summary.json", summary)
    report(out, summary, say)
    return summary


def load_template() -> tuple[Volume, Volume]:
    """The T1 scan and its tissue map on one 2 mm grid, from files in the package nilearn.

    A brain voxel gets the tissue with the largest share: grey matter, white matter, or 'other' (the
    rest to 1, mostly fluid).

    Returns:
        The scan and the tissue labels.

    Raises:
        SegkitError: if nilearn is not installed.

    Example:
        scan, tissues = segkit.load_template()
        segkit.write_volume("t1.nii.gz", scan)
    """
    try:
        from nilearn import datasets
    except ImportError:
        raise SegkitError(
            "the demo needs nilearn and matplotlib; run pip install 'segkit[demo]'"
        ) from None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nilearn warns about its own defaults
        images = [
            load(resolution=RESOLUTION_MM)
            for load in (
                datasets.load_mni152_template,
                datasets.load_mni152_gm_template,
                datasets.load_mni152_wm_template,
            )
        ]
    t1, grey, white = (np.asarray(image.dataobj, dtype=np.float32) for image in images)
    brain = t1 > BRAIN_THRESHOLD
    shares = np.stack([np.clip(1 - grey - white, 0, 1), grey, white])
    tissue = np.where(brain, shares.argmax(0) + 1, 0).astype(np.uint8)
    x, y, z = t1.shape
    grid = Grid((x, y, z), np.asarray(images[0].affine, dtype=float))
    return Volume(np.where(brain, t1, 0).astype(np.float32), grid), Volume(tissue, grid)


def write_dataset(folder: str | Path, scan: Volume, reference: Volume) -> None:
    """Write a dataset of two cases: the tissue map for training, and the held-out real scan.

    Args:
        folder: the folder to write the dataset to.
        scan: the real scan.
        reference: the tissue labels on the same grid.

    Raises:
        OSError: if the folder cannot be written.

    Example:
        segkit.write_dataset("data", *segkit.load_template())
    """
    folder = Path(folder)
    write_volume(folder / "labelsTr" / "tissue_map.nii.gz", reference)
    write_volume(folder / "labelsTr" / "real_t1.nii.gz", reference)
    write_volume(folder / "imagesTr" / "real_t1.nii.gz", scan)
    content = {
        "name": "ICBM 2009a template",
        "modality": {"0": "T1"},
        "labels": {str(number): name for name, number in TISSUES.items()},
        "training": [
            {"label": "labelsTr/tissue_map.nii.gz"},
            {"image": "imagesTr/real_t1.nii.gz", "label": "labelsTr/real_t1.nii.gz"},
        ],
    }
    write_json(folder / "dataset.json", content)


def demo_config(
    dataset: str | Path,
    *,
    contrast: Literal["t1", "random"],
    steps: int = DEMO_STEPS,
    seed: int = 0,
) -> Config:
    """The config of the demo's training.

    Args:
        dataset: a folder from `write_dataset`.
        contrast: contrasts of the training scans: similar to a T1 scan, or random.
        steps: training steps.
        seed: seed of all random numbers.

    Returns:
        The config, for `segkit.train`.

    Raises:
        ConfigError: if a setting is not valid.

    Example:
        scan, reference = segkit.load_template()
        segkit.write_dataset("data", scan, reference)
        run = segkit.train(segkit.demo_config("data", contrast="t1"))
    """
    tree = {
        "name": "demo",
        "data": {
            "folder": str(dataset),
            "validation": ["real_t1"],
            "normalisation": {"kind": "zscore", "nonzero": True},
            "patch_size": [64, 64, 64],
            "batch_size": 1,
            "foreground_share": 0.0,
            "synthesis": {"intensities": T1_INTENSITIES if contrast == "t1" else None},
        },
        "network": {"channels": [8, 16, 32, 64], "attention": {"skip": "additive_grid"}},
        "train": {
            "steps": steps,
            "validate_every": steps,
            "learning_rate": 6e-3,
            "seed": seed,
        },
    }
    return validated(Config, tree, "the demo's config")


def panels(scan: Volume, reference: Volume, prediction: Prediction) -> list[Panel]:
    """The panels of the montage: the scan, its reference, the prediction, and each gate map."""
    shown: list[Panel] = [
        ("real T1 scan", None, "labels"),
        ("reference", reference.data, "labels"),
        ("prediction", prediction.labels.data, "labels"),
    ]
    for key, attention_map in prediction.maps.items():
        if attention_map.volume is not None:
            values = map_on_source(attention_map, scan).data
            shown.append((f"gate {key}", values, "map"))
    return shown


def report(out: Path, summary: dict[str, Any], say: Callable[[str], None]) -> None:
    """Print the score, its limits, and next steps."""
    dice = summary["dice"]
    scores = ", ".join(f"{name} {value:.3f}" for name, value in dice.items())
    say("")
    say(
        f"Mean Dice on the real T1 scan: {summary['mean_dice']:.3f} ({scores}), after "
        f"{summary['steps']} steps in {summary['seconds_of_training']:.0f} s."
    )
    say(f"Seen in training: {summary['seen_in_training']}.")
    say(f"Not seen: {summary['not_seen_in_training']}.")
    say(
        "This shows that a network can learn a new contrast from synthetic scans. It does not show "
        "that it can segment new patients."
    )
    say("")
    say(f"Look at        {out / 'montage.png'}  and the gate maps in {out / 'maps'}/")
    say(
        "Next           segkit predict YOUR_T1.nii.gz (skull-stripped) "
        f"--model {out / 'runs' / 'demo'}"
    )
    say(
        "Your own data  segkit check FOLDER; "
        "segkit train configs/attention_unet_3d.yaml data.folder=FOLDER"
    )
