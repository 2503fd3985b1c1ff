"""Check that MONAI, running a bundle in its own process, gives the same labels as segkit."""

import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial.transform import Rotation

from segkit.errors import ModelError
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.folder import Model

BUNDLE_LIBRARIES = ("monai", "ignite", "fire")
TURNED = (0.1, -0.15, 0.2)
"""Rotation of the scan for a check, as a rotation vector in radians."""
CELL = 6
"""Distance in voxels between the random numbers from which this scan is interpolated."""


def run_bundle(folder: Path, scan: Volume) -> Volume:
    """The labels of a scan, predicted by MONAI with a bundle.

    Raises:
        ModelError: MONAI is not installed or fails.
    """
    if missing := [name for name in BUNDLE_LIBRARIES if find_spec(name) is None]:
        raise ModelError(
            f"--check runs the bundle, but {missing[0]} is not installed; run pip install monai "
            f"pytorch-ignite fire, or export without --check"
        )
    with tempfile.TemporaryDirectory(prefix="segkit-") as temporary:
        place = Path(temporary)
        channels = np.moveaxis(scan.data.reshape(*scan.grid.shape, -1), 3, 0)
        for number, channel in enumerate(channels):
            name = "scan.nii.gz" if len(channels) == 1 else f"scan_{number:04d}.nii.gz"
            # MONAI reads only the grid, in mm.
            write_volume(place / "in" / name, Volume(np.ascontiguousarray(channel), scan.grid))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "monai.bundle", "run"),
                *("--config_file", str(folder.resolve() / "configs" / "inference.json")),
                *("--bundle_root", str(folder.resolve())),
                *("--dataset_dir", str(place / "in")),
                *("--output_dir", str(place / "out")),
            ],
            capture_output=True,
            text=True,
            cwd=place,
        )
        found = sorted((place / "out").glob("*_seg.nii.gz"))
        if done.returncode or len(found) != 1:
            reason = " ".join((done.stderr or done.stdout).split())[-400:]
            raise ModelError(
                f"{folder}: MONAI cannot run this bundle: {reason}; export it in another form"
            )
        return read_volume(found[0])


def same_labels(model: Model, folder: Path, scan: Volume) -> float:
    """Share of a scan's voxels to which a bundle and segkit (in PyTorch) give the same label."""
    scan = as_in_nifti(scan)
    expected = Predictor(model, device="cpu", engine="torch")(scan).labels
    found = run_bundle(folder, scan)
    if not found.grid.agrees_with(expected.grid, tolerance=1e-3):
        return 0.0
    return float((found.data == expected.data).mean())


def as_in_nifti(scan: Volume) -> Volume:
    """The scan with its affine in single precision, as NIfTI stores it.

    The number of the network's voxels along an axis is rounded, so it may depend on the last digit.
    """
    affine = scan.grid.affine.astype(np.float32).astype(np.float64)
    return Volume(scan.data, Grid(scan.grid.shape, affine))


def scan_for(model: Model) -> Volume:
    """A scan of smooth noise: oblique, in LPS order, with thick slices and a margin of 0."""
    spacing = np.array(model.description.spacing) * (0.8, 0.7, 1.6)
    patch = model.description.volume_patch
    # A 2D network's patch is one voxel thick.
    lengths = np.maximum(patch, CELL) * 1.5 * np.array(model.description.spacing)
    x, y, z = (int(size) for size in np.ceil(lengths / spacing))
    coarse = torch.randn(
        1,
        len(model.description.channels),
        *(-(-size // CELL) + 1 for size in (x, y, z)),
        generator=torch.Generator().manual_seed(0),
    )
    smooth = F.interpolate(coarse, size=(x, y, z), mode="trilinear", align_corners=True)
    padded = F.pad(smooth[0], (1, 2, 3, 1, 2, 1)).movedim(0, -1).numpy() * 100
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_rotvec(TURNED).as_matrix() @ np.diag([-1, -1, 1]) * spacing
    affine[:3, 3] = (31.5, -12.0, 4.5)
    values = padded if padded.shape[3] > 1 else padded[..., 0]
    return Volume(values, Grid((x + 3, y + 4, z + 3), affine))
