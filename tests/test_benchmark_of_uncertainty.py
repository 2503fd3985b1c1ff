"""The comparison of doubts runs, and its figures are those of the definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.uncertainty import KeptDropout, TrainedDropout, auroc, compared, with_dropout
from segkit.model.build import build_network
from segkit.nn.network import SegmentationNetwork, weights_of
from tests.models import description
from tests.small import small_config, small_dataset


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order() -> None:
    doubt, wrong = np.array([0.1, 0.4, 0.35, 0.8]), np.array([False, False, True, True])
    assert auroc(doubt, wrong) == pytest.approx(3 / 4)
    assert np.isnan(auroc(doubt, np.zeros(4, bool))) and np.isnan(auroc(np.ones(4), wrong))


def test_dropout_keeps_names_of_weights_and_is_on_where_it_should_be() -> None:
    def network() -> SegmentationNetwork:
        torch.manual_seed(0)
        return build_network(description(spacing=(1, 1, 1)))

    image = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    plain, kept, trained = network().eval(), network().eval(), network().eval()
    with_dropout(kept, KeptDropout(0.5))
    with_dropout(trained, TrainedDropout(0.5)).eval()
    assert list(weights_of(kept).state_dict()) == list(weights_of(plain).state_dict())
    assert torch.equal(trained(image), plain(image))
    assert not torch.equal(kept(image), kept(image))


@pytest.mark.slow
def test_four_ways_are_compared_on_the_same_cases(tmp_path: Path) -> None:
    config = small_config(
        small_dataset(tmp_path / "data", num_cases=6),
        data={"validation": 0.5},
        train={"steps": 4, "validate_every": 4, "pictures": 0},
    )
    found = dict(compared(config, tmp_path / "runs", members=2, samples=3, dropout=0.2))
    assert list(found) == ["one network", "mirror images", "MC dropout, 3 samples", "ensemble of 2"]
    assert {figures["cases"] for figures in found.values()} == {3}
    assert np.isnan(found["one network"]["auroc_of_variance"])
    for name in list(found)[1:]:
        assert 0 <= found[name]["auroc_of_variance"] <= 1, name
