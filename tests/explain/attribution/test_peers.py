"""Attributions and measures beside Captum's and Quantus's."""

import numpy as np
import pytest

from segkit.explain.attribution.road import impute
from segkit.explain.attribution.stability import (
    max_sensitivity,
    relative_input_stability,
    relative_output_stability,
)

IMAGE = np.array([[[1.0, 2.0], [3.0, 4.0]]])
COPY = np.array([[[1.1, 2.0], [2.7, 4.2]]])


def explain(image: np.ndarray) -> np.ndarray:
    found: np.ndarray = image**2 + image
    return found


@pytest.mark.parity
def test_measures_have_the_values_that_captum_0_9_and_quantus_0_6_gave() -> None:
    """The numbers are those of captum.metrics.sensitivity_max, and of the objectives of Quantus's
    RelativeInputStability and RelativeOutputStability, for these arrays."""
    found = max_sensitivity(explain, IMAGE, [COPY])
    assert found == pytest.approx(0.11348918239439357)
    assert relative_input_stability(explain, IMAGE, [COPY]) == pytest.approx(1.64039629)

    def output(image: np.ndarray) -> np.ndarray:
        return np.array([image.sum(), image.prod()])

    stability = relative_output_stability(explain, output, IMAGE, [COPY])
    assert stability == pytest.approx(0.25955638)


@pytest.mark.parity
def test_voxels_are_filled_as_quantus_0_6_filled_them() -> None:
    """By its noisy_linear_imputation without noise."""
    image = np.arange(16.0).reshape(1, 4, 4) ** 1.5
    deleted = np.zeros((4, 4), bool)
    for place in [(0, 0), (1, 1), (1, 2), (2, 2), (3, 2), (3, 3)]:
        deleted[place] = True
    expected = [
        *(6.3568595231, 13.7842976157, 16.4464205273),
        *(28.7060266877, 34.5181304185, 35.4594400085),
    ]
    found = impute(image, deleted, noise=0)[0][deleted]
    assert sorted(found) == pytest.approx(expected)


@pytest.mark.parity
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_attributions_and_measures_agree_with_captum_and_quantus() -> None:
    pytest.importorskip("captum", reason="needs captum; benchmarks/attributions.py says how")
    pytest.importorskip("quantus", reason="needs quantus; benchmarks/attributions.py says how")
    from benchmarks.attributions import agreement

    found = agreement()
    for name, apart in found["attributions, largest relative difference"].items():
        assert apart < 1e-5, name
    for name, (own, peer) in found["measures, segkit and peer"].items():
        assert own == pytest.approx(peer, rel=1e-3, abs=1e-6), name
