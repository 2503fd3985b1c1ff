"""A model walks with the windows and the mirror images that it was trained on."""

import pytest

from segkit.config.network import NetworkConfig
from segkit.inference.model_walk import mirror_axes
from segkit.inference.predictor import Predictor
from tests.models import (
    description,
    random_model,
)


def test_a_model_that_knows_of_no_mirroring_is_not_mirrored() -> None:
    predictor = Predictor(random_model(NetworkConfig(channels=[4, 4, 4])), tta=True)
    assert not predictor.mirrors
    assert predictor.model.description.mirror == []


@pytest.mark.parametrize(
    ("slices", "axes"), [("sagittal", (1, 2)), ("coronal", (0, 2)), ("axial", (0, 1))]
)
def test_planes_are_mirrored_within_themselves_alone(slices: str, axes: tuple[int, ...]) -> None:
    flat = description(
        spacing=(1.0, 1.0, 1.0),
        patch_size=(8, 8),
        network=NetworkConfig(spatial_dims=2, channels=[4, 4, 4]),
    ).model_copy(update={"mirror": ["x", "y", "z"], "slices": slices})
    assert mirror_axes(flat) == axes
    assert mirror_axes(description(spacing=(1.0, 1.0, 1.0))) == ()
