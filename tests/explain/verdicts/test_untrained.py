"""Laws of untrained networks: they come of a seed, and give maps of the trained one's form."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from segkit.config.attention import AdditiveGridGateConfig, AdditiveSameLevelGateConfig
from segkit.errors import ModelError
from segkit.explain.verdicts.untrained import untrained_maps, untrained_network
from segkit.geometry.grid import Placement
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model
from segkit.nn.map_tap import MapTap, recording
from segkit.nn.network import SegmentationNetwork
from tests.explain.heads.test_study import attending_model, noise_case
from tests.planted import KEY, Planted, planted, planted_case

SHAPES = {KEY: (1, 8, 8, 8)}
GRID = {"skip": AdditiveGridGateConfig(levels=[0, 1])}
SAME = {"skip": AdditiveSameLevelGateConfig(levels=[0, 1])}
BEFORE = {
    "skip.1/gate": ("encoder.", "decoder.1.gate."),
    "skip.0/gate": ("encoder.", "decoder.1.", "decoder.0.gate."),
}
"""What each map of GRID is computed from, by the beginnings of parameters' names."""


def lively(model: Model) -> Model:
    """Gates that vary from cell to cell as trained ones do."""
    torch.manual_seed(7)
    for name, parameter in model.network.named_parameters():
        if ".gate." in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("key", BEFORE)
def test_a_map_depends_on_every_weight_upstream_and_on_none_downstream(key: str) -> None:
    network = lively(attending_model(**GRID)).network
    window = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def look() -> torch.Tensor:
        with recording(network, [key]) as maps:
            network(window)
        return maps[key]

    before = look()
    for name, parameter in network.named_parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
            same = torch.equal(look(), before)
            parameter.copy_(kept)
        if not name.startswith(BEFORE[key]):
            assert same, name
        elif parameter.ndim > 1:
            assert not same, name


def test_an_untrained_network_follows_from_its_seed_and_keeps_torchs_generator() -> None:
    told = attending_model(**GRID).description
    state = torch.get_rng_state()
    first, second, other = (untrained_network(told, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    name = "encoder.0.1.layers.0.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


@pytest.mark.parametrize("gate", [AdditiveGridGateConfig, AdditiveSameLevelGateConfig])
@torch.no_grad()
def test_a_hard_gate_of_an_untrained_network_is_open_everywhere(gate: Any) -> None:
    hard = attending_model(skip=gate(levels=[0, 1], coefficients="hard")).description
    window = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    for seed in range(3):
        network = untrained_network(hard, seed)
        with recording(network, ["skip.0/gate", "skip.1/gate"]) as maps:
            network(window)
        assert all((values == 1).all() for values in maps.values()) and len(maps) == 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("attention", [GRID, SAME, {"encoder": "cbam"}], ids=str)
def test_maps_of_untrained_networks_lie_on_the_trained_ones_grid(
    attention: dict[str, Any], spatial_dims: Any
) -> None:
    """A network that is drawn from the seed of the model's own gives its own map."""
    told = attending_model(spatial_dims=spatial_dims, **attention).description
    trained = untrained_network(told, 3)
    with torch.no_grad():  # a weight after the maps, because equal networks are refused
        for name, weight in trained.named_parameters():
            if name.endswith("heads.0.bias"):
                weight.add_(1)
    predictor = Predictor(Model(told, trained), device="cpu")
    volume = noise_case(10, 8, 8).volume
    maps = {key: one.volume for key, one in predictor(volume, maps=True).maps.items()}
    shapes = {
        key: (1 if one.data.ndim == 3 else one.data.shape[3], *one.data.shape[:3])
        for key, one in maps.items()
        if one is not None
    }
    image = predictor.prepare(volume).image
    same, other = untrained_maps(predictor, image, shapes, seed=3, draws=2)
    for key in shapes:
        one = maps[key]
        assert one is not None
        np.testing.assert_allclose(
            np.moveaxis(same[key], 0, -1).reshape(one.data.shape), one.data, atol=1e-5
        )
        assert not np.array_equal(same[key], other[key])


def test_custom_networks_are_made_from_consecutive_seeds() -> None:
    predictor, seeds = planted("mask"), []

    def make(seed: int) -> SegmentationNetwork:
        seeds.append(seed)
        torch.manual_seed(seed)
        return Planted("untrained").eval()

    image = predictor.prepare(planted_case().volume).image
    assert len(list(untrained_maps(predictor, image, SHAPES, seed=5, make=make))) == 8
    assert seeds == list(range(5, 13))


class Stepping(Planted):
    """Its gate has a stride of 2."""

    def __init__(self) -> None:
        super().__init__("untrained")
        self.tap = MapTap("gate", stride=(2, 2, 2))
        self.tap.place("skip.0", 0, Placement.identity(3))


class Doubled(Planted):
    """Its gate has two channels."""

    def __init__(self) -> None:
        super().__init__("untrained")
        self.look = nn.Conv3d(3, 2, kernel_size=1)


class Narrow(Planted):
    """It takes a single channel."""

    def __init__(self) -> None:
        super().__init__("untrained")
        self.look = nn.Conv3d(1, 1, kernel_size=1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Stepping, "has a map skip.0/gate of another stride"),
        (Doubled, r"has a map skip.0/gate of shape \(2, 8, 8, 8\), expected \(1, 8, 8, 8\)"),
        (Narrow, "cannot process the windows of this scan"),
        (lambda: attending_model().network, "lacks the maps skip.0/gate; pass untrained"),
        (lambda: nn.Conv3d(3, 2, kernel_size=1), "returned a Conv3d, expected a network"),
    ],
    ids=["stride", "channels", "input", "keys", "module"],
)
def test_a_network_of_another_architecture_is_refused(make: Callable[[], Any], said: str) -> None:
    predictor = planted("mask")
    image = predictor.prepare(planted_case().volume).image
    with pytest.raises(ModelError, match=rf"untrained\(4\).* ?{said}"):
        next(untrained_maps(predictor, image, SHAPES, seed=4, make=lambda _: make().eval()))


def test_the_trained_network_itself_is_refused() -> None:
    predictor = planted("mask")
    image = predictor.prepare(planted_case().volume).image
    with pytest.raises(ModelError, match="has the weights of the trained network"):
        next(
            untrained_maps(
                predictor, image, SHAPES, seed=0, make=lambda _: deepcopy(predictor.model.network)
            )
        )
    with pytest.raises(ModelError, match=r"description lacks the maps skip.0/gate; pass untrained"):
        next(untrained_maps(predictor, image, SHAPES, seed=0))
