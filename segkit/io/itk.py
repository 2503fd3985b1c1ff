"""SimpleITK, imported when it is first asked for, and its images of volumes."""

from typing import Any

import numpy as np

from segkit.geometry.grid import LPS_TO_RAS
from segkit.io.gridded import Volume


def simple_itk() -> Any:
    """The package SimpleITK, imported at its first use."""
    # It takes 0.1 GiB, a third of all imports for a NIfTI file, which does not need it.
    import SimpleITK

    return SimpleITK


def itk_image(volume: Volume) -> Any:
    """The volume as an image of SimpleITK, placed in LPS+."""
    affine = LPS_TO_RAS @ volume.grid.affine
    spacing = volume.grid.spacing
    axes = (2, 1, 0, *range(3, volume.data.ndim))
    array = np.ascontiguousarray(volume.data.transpose(axes))
    image = simple_itk().GetImageFromArray(
        array.astype(np.float32) if array.dtype == np.float16 else array,
        isVector=volume.data.ndim == 4,
    )
    image.SetSpacing(spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / np.array(spacing)).ravel().tolist())
    return image
