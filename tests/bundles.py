"""Models for bundles."""

from typing import Any

import torch

from segkit.config.model import ModelDescription
from segkit.model.build import build_network
from segkit.model.folder import Model

REGIONS: dict[str, Any] = {
    "channels": ["T1", "T2"],
    "labels": {"background": 0, "whole": 2, "core": 1},
    "regions": {"whole": [1, 2], "core": [1]},
    "normalisation": [
        {"kind": "ct", "lower": -90, "upper": 80, "mean": 5, "std": 40},
        {"kind": "zscore", "nonzero": True},
    ],
    "postprocessing": {"largest_foreground": True, "largest_of": [1]},
    "interpolation": "cubic",
    "spacing": (1.0, 1.0, 3.5),
}


def model_for(seed: int = 1, **changes: Any) -> Model:
    torch.manual_seed(seed)
    told = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "brains",
            "channels": ["T1"],
            "labels": {"background": 0, "grey": 1, "white": 2},
            "network": {"channels": [4, 8, 8], "attention": {"skip": "additive_grid"}},
            "spacing": (1.0, 1.2, 1.5),
            "interpolation": "cubic",
            "normalisation": ["zscore"],
            "slices": "axial",
            "patch_size": [16, 16, 8],
            **changes,
        }
    )
    return Model(told, build_network(told).eval())
