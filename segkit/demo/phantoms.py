"""Synthetic scans with a structure like the hippocampus: a dataset without patients, for trials.

A bent tube, thick in front and thin behind, lies in white matter, below a ventricle and beside
cortex of the same intensity. A network therefore needs more than intensity to find it. Every case
has its own random deformation and contrast (segkit.data.synthesis).
"""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Integer
from numpy import ndarray
from torch import Generator

from segkit.data.synthesis import deform, synthesise
from segkit.geometry.grid import Grid
from segkit.io.atomic import write_json
from segkit.io.volume import Volume, write_volume

PHANTOM_LABELS = {"background": 0, "anterior": 1, "posterior": 2}
SHAPE = (24, 32, 24)
SPACING = 1.5
"""Voxel size in mm; the image is 36 × 48 × 36 mm."""
# Tissues. The two parts of the structure have the intensity of cortex.
WHITE, FLUID, CORTEX, ANTERIOR, POSTERIOR = range(5)
INTENSITIES = [(0.75, 0.85), (0.15, 0.25), (0.5, 0.55), (0.5, 0.55), (0.5, 0.55)]
PHANTOM_BENDING = 1.2
"""Standard deviation, in voxels, of the displacement at points 16 voxels apart."""


def write_hippocampi(folder: str | Path, num_cases: int, *, seed: int = 0) -> None:
    """Write a dataset with scans, labels and dataset.json.

    The labels are those of the Decathlon's Task04: 'anterior' (here 40 % of the tube's length) and
    'posterior' (the rest).

    Args:
        folder: the folder to write the dataset to.
        num_cases: number of cases.
        seed: seed of all random numbers; the same seed gives the same files.

    Raises:
        OSError: if the folder cannot be written.

    Example:
        segkit.write_hippocampi("hippocampi", 12)
        print(segkit.check("hippocampi"))
    """
    folder = Path(folder)
    generator = Generator().manual_seed(seed)
    origin = -SPACING * (np.array(SHAPE) - 1) / 2
    affine = np.diag([SPACING, SPACING, SPACING, 1.0])
    affine[:3, 3] = origin
    grid = Grid(SHAPE, affine)
    plan = torch.from_numpy(tissues(grid))[None]
    training = []
    for number in range(num_cases):
        bent = deform(plan, amplitude=PHANTOM_BENDING, generator=generator)
        image = synthesise(
            bent, num_labels=len(INTENSITIES), intensities=INTENSITIES, generator=generator
        )
        # Like the output of a scanner: whole numbers from 0.
        scan = ((image[0, 0] - image.min()) * 200).round().to(torch.int16)
        label = torch.where(bent[0] >= ANTERIOR, bent[0] - CORTEX, 0).to(torch.uint8)
        name = f"hippocampus_{number:03d}.nii.gz"
        entry = {"image": f"imagesTr/{name}", "label": f"labelsTr/{name}"}
        write_volume(folder / entry["image"], Volume(scan.numpy(), grid))
        write_volume(folder / entry["label"], Volume(label.numpy(), grid))
        training.append(entry)
    content = {
        "name": "Phantoms of hippocampi",
        "modality": {"0": "MRI"},
        "labels": {str(number): name for name, number in PHANTOM_LABELS.items()},
        "training": training,
    }
    write_json(folder / "dataset.json", content)


def tissues(grid: Grid) -> Integer[ndarray, "x y z"]:
    """The tissue of every voxel.

    Args:
        grid: its world coordinates (mm) have their origin in the middle of the image.
    """
    x, y, z = np.moveaxis(grid.centres(), -1, 0)
    found = np.full(grid.shape, WHITE, np.int64)
    # Cortex: a folded sheet at the outer side. Ventricle: a tube above the structure.
    found[x > 11 + 2 * np.sin(y / 4) + np.cos(z / 3)] = CORTEX
    found[np.hypot(x + 2, z - 9 - y / 12) < 3] = FLUID
    # Structure: from front (y = 19) to back (y = -19), curved upwards and inwards at the back.
    along = np.clip((19 - y) / 38, 0, 1)
    centre_x, centre_z = 2 - 7 * along**2, -6 + 9 * along**2
    radius = 6 - 3 * along
    beyond = np.maximum(np.abs(y) - 19, 0)
    tube = np.sqrt((x - centre_x) ** 2 + (z - centre_z) ** 2 + beyond**2) < radius
    found[tube & (along < 0.4)] = ANTERIOR
    found[tube & (along >= 0.4)] = POSTERIOR
    return found
