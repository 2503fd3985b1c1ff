"""Description of a volume or a picture as segkit reads it."""

from pathlib import Path

import numpy as np

from segkit.checking.understood import Understood
from segkit.errors import VolumeError, counted
from segkit.geometry.grid import Orientation
from segkit.io.nan_values import value_problem
from segkit.io.nifti import placement
from segkit.io.picture_rules import PictureFacts, size_in_words
from segkit.io.volume import Volume


def describe_volume(path: Path, volume: Volume) -> Understood:
    """Description of a volume: size, spacing, orientation, position, codes and intensities."""
    grid, data = volume.grid, volume.data
    if trouble := value_problem(data):
        raise VolumeError(f"{path}: {trouble}")
    if volume.picture:
        return _describe_picture(path, volume, volume.picture)
    first = np.round(grid.affine[:3, 3], 2) + 0.0  # no minus sign before 0.00
    channels = data.shape[3] if data.ndim == 4 else 1
    orientation = Orientation.of(grid.affine).code
    lines = [
        f"{path}: {' x '.join(str(size) for size in grid.shape)} voxels of "
        f"{' x '.join(f'{size:.3g}' for size in grid.spacing)} mm, {data.dtype}, "
        f"{counted(channels, 'channel')}",
        f"axes run to {orientation}; the first voxel's centre lies at "
        f"({first[0]:.2f}, {first[1]:.2f}, {first[2]:.2f}) mm, RAS+",
    ]
    if volume.header is not None:
        lines.append(placement(volume.header))
    lines.append(f"values {data.min():g} to {data.max():g}, mean {data.mean(dtype=float):g}")
    facts = {
        "shape": list(grid.shape),
        "spacing_mm": list(grid.spacing),
        "affine": grid.affine.tolist(),
        "orientation": orientation,
        "channels": channels,
        "type": str(data.dtype),
        "values": [float(data.min()), float(data.max())],
    }
    return Understood("volume", "\n".join(lines), facts)


def _describe_picture(path: Path, volume: Volume, picture: PictureFacts) -> Understood:
    """Description of a picture: size, pixel size, values, and the notes on how it was read."""
    data, shape = volume.data, volume.grid.shape
    channels = data.shape[3] if data.ndim == 4 else 1
    axes = 3 if shape[2] > 1 else 2
    sizes = " x ".join(str(size) for size in shape[:axes])
    lines = [
        f"{path}: {sizes} pixels{', a stack,' * (axes == 3)} of "
        f"{size_in_words(volume.grid.spacing[:axes], picture.unit)} ({picture.source}), "
        f"{data.dtype}, {counted(channels, 'channel')}",
        *picture.notes,
        f"values {data.min():g} to {data.max():g}, mean {data.mean(dtype=float):g}",
    ]
    facts = {
        "shape": list(shape),
        "unit": picture.unit,
        "pixel_size_from": picture.source,
        "notes": list(picture.notes),
        "spacing_mm": list(volume.grid.spacing) if picture.sized else None,
        "affine": volume.grid.affine.tolist(),
        "channels": channels,
        "type": str(data.dtype),
        "values": [float(data.min()), float(data.max())],
    }
    return Understood("volume", "\n".join(lines), facts)
