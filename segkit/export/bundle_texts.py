"""What a bundle says to its reader: the README and the licence."""

from collections.abc import Mapping
from importlib.metadata import Distribution
from typing import Any

README = """\
# {run}

Segments {names}. Trained and exported by {made_by}.

## Run it

```sh
pip install "monai>=1.5" pytorch-ignite fire nibabel scipy
python -m monai.bundle run --config_file configs/inference.json \\
    --dataset_dir /path/to/scans --output_dir /path/to/segmentations
```

from this folder, or with `--bundle_root` and the config's whole path from any other.

{inputs}
A segmentation `CASE_seg.nii.gz` is written for each case, on its own grid. The labels are

{labels}

**Run it only if you trust who made it.** `models/model.ts`, `scripts/` and the expressions in
`configs/inference.json` are programs, as in every MONAI bundle. `models/segkit/` holds the same
weights as data alone, which `segkit predict --model models/segkit` reads and which can run nothing.

## What it does

MONAI reads a scan, turns it to RAS+ and cuts it to the box of what is not 0.
`scripts/whole_volume.py` normalises it, resamples it to {spacing} mm ({interpolation}), slides
windows of {patch} voxels over it that share {overlap} with their neighbours, blends what the
network says of them by Gaussian weights, and brings that back to the scan's own spacing. Of that
the labels are made, and MONAI puts the box back. `configs/metadata.json` holds all numbers, under
`segkit`.

`network_def` makes {num_outputs} logits of one window (batch, {num_channels}, {shape}). MONAI's
`SlidingWindowInferer` could take the inferer's place after MONAI's own `NormalizeIntensityd` and
`Spacingd`; labels then differ along edges, for its grid and its windows lie elsewhere.

Units of NIfTI files must be millimetres, which MONAI takes for granted.

Research software; no medical device.
"""

LICENSE = """\
scripts/whole_volume.py is part of segkit and is licensed under the Apache License, Version 2.0,
which follows. Whoever trained the model decides on what terms its weights, under models/, may be
used: until they say so here, no licence to these is given.

"""
ELSEWHERE = "The licence is at https://www.apache.org/licenses/LICENSE-2.0\n"


def readme_of(told: Mapping[str, Any]) -> str:
    """The README, of what `deployment` tells."""
    channels = told["input"]["channels"]
    windows = told["windows"]
    inputs = "The scans are files `CASE.nii.gz`."
    if len(channels) > 1:
        files = ", ".join(f"`CASE_{at:04d}.nii.gz` ({name})" for at, name in enumerate(channels))
        inputs = f"A case is the files {files}."
    return README.format(
        run=told["run"],
        names=", ".join(list(told["labels"])[1:]),
        made_by=told["made_by"],
        inputs=inputs,
        labels="\n".join(f"- {number}: {name}" for name, number in told["labels"].items()),
        spacing=_times(told["spacing"]),
        interpolation=told["interpolation"],
        patch=_times(windows["patch"]),
        overlap=_times(windows["overlap"]),
        num_outputs=len(told["outputs"]["logits"]),
        num_channels=len(channels),
        shape=", ".join(str(size) for size in windows["patch"]),
    )


def license_of(segkit: Distribution) -> str:
    """The terms of what is carried along, in full where segkit was installed with them."""
    return LICENSE + (segkit.read_text("licenses/LICENSE") or ELSEWHERE)


def _times(numbers: list[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
