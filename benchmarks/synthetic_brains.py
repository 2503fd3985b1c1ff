"""Write a dataset of synthetic brains for benchmarks. It needs no download and no patients.

    python benchmarks/synthetic_brains.py FOLDER [--cases 40]

Each case is a random deformation of the tissue map of nilearn's 2 mm template, and a synthetic scan
of it with T1 contrast (segkit/data/synthesis.py). The labels are background, other, grey matter and
white matter.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Generator

from segkit.data.synthesis import deform, synthesise
from segkit.demo.demo import T1_INTENSITIES, TISSUES, load_template
from segkit.io.atomic import write_json
from segkit.io.volume import write_volume


def main() -> None:
    """Write the dataset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=40)
    options = parser.parse_args()
    _, tissue = load_template()
    generator = Generator().manual_seed(0)
    ranges = [(low, high) for low, high in T1_INTENSITIES.values()]
    training = []
    for number in range(options.cases):
        batch = torch.from_numpy(tissue.data.astype(np.int64))[None]
        label = deform(batch, amplitude=3.0, generator=generator)
        image = synthesise(label, num_labels=len(TISSUES), intensities=ranges, generator=generator)[
            0, 0
        ]
        # Like the output of a scanner: whole numbers, and 0 around the head.
        brain = label[0] > 0
        scan = torch.where(brain, (image - image[brain].min()) * 200 + 1, 0.0)
        name = f"brain_{number:03d}.nii.gz"
        entry = {"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"}
        image_volume = tissue.like(scan.round().to(torch.int16).numpy())
        write_volume(options.folder / entry["image"], image_volume)
        write_volume(options.folder / entry["label"], tissue.like(label[0].to(torch.uint8).numpy()))
        training.append(entry)
    content = {
        "modality": {"0": "T1"},
        "labels": {str(number): name for name, number in TISSUES.items()},
        "training": training,
    }
    write_json(options.folder / "dataset.json", content)


if __name__ == "__main__":
    main()
