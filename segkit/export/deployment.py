"""Data that a program needs to run an exported network, written as JSON."""

import math
from typing import Any

from segkit.geometry.grid import ANISOTROPY
from segkit.inference.engines.converted import INPUT
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE
from segkit.inference.model_walk import layout_of
from segkit.model.folder import Model
from segkit.nn.map_tap import MapInfo

DEPLOYMENT_KEY = "segkit"
"""Key of this data in the metadata of an exported file."""
DEPLOYMENT_FORMAT = 1


def deployment(model: Model, *, overlap: float = 0.5, any_size: bool = False) -> dict[str, Any]:
    """The steps from a scan to windows, and from the network's outputs to a segmentation.

    The steps are in order. `docs/export.md` explains each. `any_size` says whether the file takes
    windows of other sizes than the patch.
    """
    description = model.description
    labelling = description.labelling
    patch, overlaps, multiple = layout_of(model, overlap)
    stage, adopted = description.first_stage, description.postprocessing
    return {
        "format": DEPLOYMENT_FORMAT,
        "made_by": f"segkit {description.segkit}",
        "run": description.run,
        "input": {
            "name": INPUT,
            "axes": "batch, channel, x, y, z",
            "channels": description.channels,
            # The channel after the image channels holds the numbers 1, 2, … of these classes.
            "labels_of_first_stage": list(stage.classes) if stage else [],
        },
        "nan": description.nan,
        "orientation": "RAS",
        "box": "of voxels that are not 0 in every channel",
        "normalisation": [setting.model_dump(mode="json") for setting in description.normalisation],
        "spacing": list(description.spacing),
        "interpolation": description.interpolation,
        "nearest_slice_beyond": ANISOTROPY,
        "windows": {
            "patch": list(patch),
            "overlap": list(overlaps),
            "multiple": list(multiple),
            "any_size": any_size,
            "padding": "the last voxels again, beyond the far ends",
            "weights": "gaussian, sigma patch / 8",
            "skipped": "where the scan is 0 throughout",
        },
        "mirror_axes": [int(axis) for axis in description.mirror_axes],
        "outputs": {
            LOGITS: list(labelling.outputs),
            "maps": {key: _map(info) for key, info in model.network.maps().items()},
            PRESENCE: list(labelling.members) if model.network.presence is not None else [],
        },
        "decision": "largest logit" if labelling.written is None else "each logit above 0",
        "temperature": description.temperature,
        "labels": labelling.numbers_in_files,
        # In this order; later regions overwrite earlier ones.
        "regions": {name: labelling.numbers_in_files[name] for name in labelling.regions},
        "postprocessing": {
            "largest_foreground": adopted.largest_foreground,
            "largest_of": [labelling.in_file(number) for number in adopted.largest_of],
        },
    }


def _map(info: MapInfo) -> dict[str, Any]:
    placement = info.placement
    return {
        "kind": info.kind,
        "level": info.level,
        "stride": None if placement is None else list(placement.stride),
        "offset": None if placement is None else list(placement.offset),
        "range": [info.lowest, info.highest if math.isfinite(info.highest) else None],
    }
