"""A dataset of bright balls in noise, small enough to train on in seconds."""

import json
from pathlib import Path

import numpy as np

from segkit.config.load import validated
from segkit.config.training import Config
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.training.fit import train


def small_dataset(folder: Path, num_cases: int = 4, size: int = 16) -> Path:
    """Balls of 3 to 5 voxels, 1 mm voxels, one label."""
    random = np.random.default_rng(0)
    grid = Grid((size, size, size), np.eye(4))
    entries = []
    for number in range(num_cases):
        centre = random.uniform(6, size - 6, 3)
        inside = np.linalg.norm(grid.centres() - centre, axis=-1) < random.uniform(3, 5)
        image = random.normal(0, 0.3, grid.shape) + inside
        name = f"case_{number}.nii.gz"
        write_volume(folder / "imagesTr" / name, Volume(image.astype(np.float32), grid))
        write_volume(folder / "labelsTr" / name, Volume(inside.astype(np.uint8), grid))
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    content = {
        "modality": {"0": "MRI"},
        "labels": {"0": "background", "1": "ball"},
        "training": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


def magnified(folder: Path, times: int, cases: str = "*") -> Path:
    """The dataset with each voxel of some cases repeated along each axis, every one of 1 mm."""
    for path in sorted(folder.glob(f"*Tr/{cases}.nii.gz")):
        data = read_volume(path).data
        for axis in range(3):
            data = data.repeat(times, axis)
        x, y, z = data.shape
        write_volume(path, Volume(data, Grid((x, y, z), np.eye(4))))
    return folder


def small_config(folder: Path, **sections: dict[str, object]) -> Config:
    """A gated 3D U-Net of a few thousand weights; `sections` change it."""
    tree: dict[str, dict[str, object]] = {
        "data": {"folder": str(folder), "patch_size": [16, 16, 16], "validation": 0.25},
        "network": {"channels": [4, 8, 8], "attention": {"skip": "additive_grid"}},
        "train": {"steps": 4, "validate_every": 2},
        # The same numbers on every machine, whatever its cores are fastest in.
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
    }
    for name, section in sections.items():
        tree[name] = {**tree[name], **section}
    return validated(Config, {"name": "small", **tree}, "small")


def trained_run(folder: Path) -> Path:
    """The folder of a finished run."""
    data = small_dataset(folder / "data")
    return train(small_config(data), runs=folder / "runs").folder
