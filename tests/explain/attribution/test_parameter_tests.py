"""Attributions of other outputs, and of networks with random layers."""

import numpy as np
import pytest
import torch
from numpy import ndarray
from torch import Tensor, nn

from segkit.errors import SegkitError
from segkit.explain.attribution.parameter_tests import (
    random_logit,
    randomised,
    rank_similarity,
    smooth_mprt,
)


class Gated(nn.Module):
    """A layer, a parameter without a layer, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(12, 6)
        self.scale = Scale()
        self.last = nn.Linear(6, 3)

    def forward(self, image: Tensor) -> Tensor:
        logits: Tensor = self.last(self.scale(torch.tanh(self.first(image))))
        return logits


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.arange(1.0, 7.0))

    def forward(self, features: Tensor) -> Tensor:
        return features * self.factor


IMAGE = np.random.default_rng(0).normal(size=12).astype(np.float32)


def gradient(network: nn.Module, image: ndarray) -> ndarray:
    at = torch.from_numpy(image).requires_grad_()
    (found,) = torch.autograd.grad(network(at)[1], at)
    return found.numpy()


def test_another_output_is_compared_by_ranks() -> None:
    maps = {"liver": np.array([1.0, 2, 3, np.nan]), "kidney": np.array([30.0, 20, 10, 5])}
    assert random_logit(maps.__getitem__, "liver", list(maps)) == pytest.approx(-1)
    maps["kidney"] = np.exp(maps["liver"])
    assert random_logit(maps.__getitem__, "liver", list(maps)) == pytest.approx(1)
    with pytest.raises(SegkitError, match="expected an output other than liver, found none"):
        random_logit(maps.__getitem__, "liver", ["liver"])


def test_the_other_output_is_drawn_from_the_seed() -> None:
    asked: list[str] = []

    def explain(name: str) -> ndarray:
        asked.append(name)
        return np.arange(3.0)

    for seed in range(20):
        random_logit(explain, "a", ["a", "b", "c"], seed=seed)
    assert set(asked[1::2]) == {"b", "c"} and set(asked[::2]) == {"a"}


def test_layers_become_random_one_after_the_other_from_the_last() -> None:
    network = Gated()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.random.get_rng_state()
    changed = []
    for name, copy in randomised(network, seed=3):
        now = copy.state_dict()
        changed.append((name, {one for one in now if not torch.equal(now[one], before[one])}))
        if name == "scale":
            assert now["scale.factor"].sort().values.tolist() == [1, 2, 3, 4, 5, 6]
    last = {"last.weight", "last.bias"}
    scaled = last | {"scale.factor"}
    first = scaled | {"first.weight", "first.bias"}
    assert changed == [("last", last), ("scale", scaled), ("first", first)]
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_an_attribution_that_ignores_the_network_stays_the_same() -> None:
    found = smooth_mprt(Gated(), lambda network, image: np.abs(image), IMAGE, draws=3)
    assert found == {name: pytest.approx(1) for name in ("last", "scale", "first")}


def test_a_gradient_changes_with_the_weights() -> None:
    found = smooth_mprt(Gated(), gradient, IMAGE, draws=4)
    assert list(found) == ["last", "scale", "first"]
    assert all(abs(value) < 0.95 for value in found.values())
    assert found == smooth_mprt(Gated(), gradient, IMAGE, draws=4)


def test_one_draw_has_no_noise_and_more_are_a_mean() -> None:
    seen: list[ndarray] = []

    def explain(network: nn.Module, image: ndarray) -> ndarray:
        seen.append(image)
        return image

    smooth_mprt(nn.Linear(2, 1), explain, IMAGE, draws=1)
    assert len(seen) == 2 and all((image == IMAGE).all() for image in seen)
    seen.clear()
    smooth_mprt(nn.Linear(2, 1), explain, IMAGE, draws=200, noise=0.5)
    apart = np.stack(seen[:199]) - IMAGE
    assert apart.std() == pytest.approx(0.5 * float(np.ptp(IMAGE)), rel=0.1)
    assert all((one == other).all() for one, other in zip(seen[:200], seen[200:], strict=True))


def test_similarity_uses_only_voxels_that_both_attributions_have() -> None:
    first, second = np.array([1.0, np.nan, 3, 4]), np.array([2.0, 9, np.nan, 5])
    assert rank_similarity(first, second) == pytest.approx(1)


def test_nothing_to_randomise_is_refused() -> None:
    with pytest.raises(SegkitError, match="expected a network with parameters"):
        smooth_mprt(nn.ReLU(), lambda network, image: image, IMAGE)
    with pytest.raises(SegkitError, match="draws: expected 1 or more, found 0"):
        smooth_mprt(Gated(), gradient, IMAGE, draws=0)
