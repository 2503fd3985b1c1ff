"""A model is asked about the mirror images that it was trained on, and no others."""

from segkit.config.network import NetworkConfig
from segkit.inference.predictor import Predictor
from tests.models import random_model


def test_a_model_that_knows_of_no_mirroring_is_not_mirrored() -> None:
    predictor = Predictor(random_model(NetworkConfig(channels=[4, 4, 4])), tta=True)
    assert not predictor.mirrors
    assert predictor.model.description.mirror == []
