"""Laws of randomisation: what lies behind a map never changes it, and what it is made of does."""

import json
from dataclasses import asdict
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from segkit.config.attention import AdditiveGridGateConfig, AdditiveSameLevelGateConfig
from segkit.explain.verdicts.randomisation import (
    OWN,
    cascade,
    randomise,
    untrained,
    upstream_parameters,
)
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model
from segkit.nn.map_tap import recording, taps
from segkit.nn.network import unet_of
from tests.explain.heads.test_study import attending_model, noise_case
from tests.planted import KEY, Planted, planted, planted_case

GRID = {"skip": AdditiveGridGateConfig(levels=[0, 1])}
SAME = {"skip": AdditiveSameLevelGateConfig(levels=[0, 1])}


def lively(model: Model) -> Model:
    """Gates that vary from cell to cell as trained ones do."""
    torch.manual_seed(7)
    for name, parameter in model.network.named_parameters():
        if ".gate." in name and parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    ("attention", "key", "prefixes", "stages"),
    [
        (GRID, "skip.1/gate", ["encoder", "decoder.1.gate"], [OWN]),
        (
            GRID,
            "skip.0/gate",
            ["encoder", "decoder.1", "decoder.0.gate"],
            [OWN, "decoder.1"],
        ),
        (
            SAME,
            "skip.0/gate",
            ["encoder", "decoder.1", "decoder.0.gate", "decoder.0.upsample"],
            [OWN, "decoder.0", "decoder.1"],
        ),
    ],
)
def test_a_gate_depends_on_the_encoder_its_own_weights_and_the_decoder_below(
    attention: dict[str, Any],
    key: str,
    prefixes: list[str],
    stages: list[str],
    spatial_dims: Literal[2, 3],
) -> None:
    model = attending_model(spatial_dims=spatial_dims, **attention)
    found = upstream_parameters(model.network, key, torch.zeros(1, 1, 8, 8, 8))
    names = [name for name, _ in unet_of(model.network).named_parameters()]
    expected = {name for name in names if any(name.startswith(f"{p}.") for p in prefixes)}
    assert found == expected
    staged = cascade(model.network, key, found)
    assert list(staged) == [*stages, "encoder.2", "encoder.1", "encoder.0"]
    assert set().union(*staged.values()) == expected
    assert sum(len(names) for names in staged.values()) == len(expected)
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert all(tap.edit is None for tap in taps(model.network).values())


def test_a_map_of_the_encoder_depends_on_what_comes_before_it_alone() -> None:
    model = attending_model(encoder="sse")
    found = upstream_parameters(model.network, "encoder.1/spatial", torch.zeros(1, 1, 8, 8, 8))
    staged = cascade(model.network, "encoder.1/spatial", found)
    assert list(staged) == [OWN, "encoder.1", "encoder.0"]
    assert all(".attention_maps." in f"{name}." for name in staged[OWN])
    assert all(name.startswith(("encoder.0.", "encoder.1.")) for name in found)


def test_a_map_moves_with_every_weight_upstream_and_with_none_downstream() -> None:
    model = lively(attending_model(**GRID))
    network, key = model.network, "skip.1/gate"
    window = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    upstream = upstream_parameters(network, key, window)

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
        if name not in upstream:
            assert same, name
        elif parameter.ndim > 1:
            assert not same, name


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("attention", [GRID, SAME, {"encoder": "cbam"}], ids=str)
def test_randomising_changes_maps_upstream_alone_and_never_the_model(
    attention: dict[str, Any], spatial_dims: Literal[2, 3]
) -> None:
    model = lively(attending_model(spatial_dims=spatial_dims, **attention))
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    predictor, volume = Predictor(model, device="cpu"), noise_case(10, 8, 8).volume
    rows = randomise(predictor, volume, case="x", seed=1)
    placed = [key for key, info in model.network.maps().items() if info.placement is not None]
    assert [row.map for row in rows] == placed
    for row in rows:
        assert row.downstream_change == 0 and row.downstream_weights > 0
        assert len(row.stages) == len(row.correlations) and row.stages[0] == OWN
        assert row.last < 0.9
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])
    json.dumps([asdict(row) for row in rows], allow_nan=False)
    again = randomise(predictor, volume, case="x", seed=1, keys=placed[:1])
    assert again == rows[:1]


def test_an_untrained_network_comes_of_its_seed_and_leaves_torch_alone() -> None:
    told = attending_model(**GRID).description
    state = torch.get_rng_state()
    first, second, other = (untrained(told, seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    name = "encoder.0.1.layers.0.weight"
    assert torch.equal(first[name], second[name]) and not torch.equal(first[name], other[name])


def test_a_map_of_untrained_weights_is_itself_when_drawn_from_the_same_seed() -> None:
    """Nothing changes, stage by stage, where what is drawn is what was there."""
    told = attending_model(**SAME).description
    predictor = Predictor(Model(told, untrained(told, 3)), device="cpu")
    for row in randomise(predictor, noise_case(8, 8, 8).volume, case="x", seed=3):
        assert row.correlations == (1.0,) * len(row.stages) and row.last == 1


def test_a_gate_that_was_learned_forgets_the_mask() -> None:
    torch.manual_seed(0)
    (row,) = randomise(planted("mask"), planted_case().volume, case="x", fresh=Planted("untrained"))
    assert (row.map, row.stages) == (KEY, ("look",))
    assert abs(row.last) < 0.9
    assert row.downstream_change == 0


def test_a_map_that_depends_on_no_weight_stays_as_it_is() -> None:
    class Fixed(Planted):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            gate = self.tap(torch.sigmoid(image[:, :1]))
            return torch.cat([-gate, gate], dim=1)

    predictor = planted("mask")
    predictor.model.network.__class__ = Fixed
    (row,) = randomise(predictor, planted_case().volume, case="x", fresh=Planted("mask"))
    assert row.stages == () and row.last == 1 and row.downstream_change == 0
    weights = sum(parameter.numel() for parameter in predictor.model.network.parameters())
    assert row.downstream_weights == weights


def test_correlations_are_of_ranks() -> None:
    """A gate that is drawn steeper, and no other, keeps its ranks."""
    predictor, steeper = planted("noise"), Planted("noise")
    with torch.no_grad():
        steeper.look.weight.mul_(1.5)
    (row,) = randomise(predictor, planted_case().volume, case="x", fresh=steeper)
    assert row.last == pytest.approx(1, abs=1e-3)
    assert np.isfinite(row.downstream_change)
