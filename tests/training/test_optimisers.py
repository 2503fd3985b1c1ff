"""Each optimiser follows each schedule; configs from before schedules had names mean the same."""

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from segkit.config.load import validated
from segkit.config.training import Config, TrainConfig
from segkit.errors import ConfigError
from segkit.training.optimisers import make_optimiser, make_schedule


def rates_of(steps: int = 20, **settings: Any) -> list[float]:
    """The learning rate of each step, and the one after the last."""
    tree = {"learning_rate": 0.5, "weight_decay": 0.0, "steps": steps, **settings}
    config = TrainConfig.model_validate(tree)
    optimiser = make_optimiser(config)([nn.Parameter(torch.zeros(1))])
    schedule = make_schedule(config)(optimiser)
    rates = []
    for _ in range(steps):
        rates.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    return [*rates, optimiser.param_groups[0]["lr"]]


@pytest.mark.parametrize("optimiser", ["adamw", "sgd", "muon"])
def test_every_optimiser_follows_every_schedule(optimiser: str) -> None:
    polynomial = rates_of(optimiser=optimiser, schedule="polynomial", polynomial={"power": 2})
    assert polynomial == pytest.approx([0.5 * (1 - step / 20) ** 2 for step in range(21)])
    one_cycle = rates_of(optimiser=optimiser, schedule="one_cycle", one_cycle={"rise_factor": 5})
    assert one_cycle[0] == pytest.approx(0.1) and max(one_cycle) == pytest.approx(0.5, rel=0.02)
    cosine = rates_of(optimiser=optimiser, schedule="cosine", cosine={"warm_up": 0.2})
    rise = [0.5 * step / 5 for step in range(1, 5)]
    fall = [0.25 * (1 + math.cos(math.pi * step / 16)) for step in range(17)]
    assert cosine == pytest.approx([*rise, *fall])


@pytest.mark.parity
@pytest.mark.parametrize(("warm_up", "lowest"), [(0.2, 0.1), (0.05, 0.0), (0.5, 0.3)])
def test_the_cosine_is_that_of_torch_after_a_rise_in_a_line(warm_up: float, lowest: float) -> None:
    rising = round(warm_up * 20)
    optimiser = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    rise = LinearLR(optimiser, start_factor=1 / (rising + 1), total_iters=rising)
    fall = CosineAnnealingLR(optimiser, T_max=20 - rising, eta_min=lowest * 0.5)
    schedule = SequentialLR(optimiser, [rise, fall], milestones=[rising])
    expected = []
    for _ in range(21):
        expected.append(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()
    found = rates_of(schedule="cosine", cosine={"warm_up": warm_up, "lowest": lowest})
    assert found == pytest.approx(expected)


def test_a_cosine_of_one_step_and_one_without_warm_up_begin_at_the_highest_rate() -> None:
    assert rates_of(1, schedule="cosine") == pytest.approx([0.5, 0.0])
    assert rates_of(1, schedule="cosine", cosine={"warm_up": 0.9}) == pytest.approx([0.25, 0.5])
    assert rates_of(schedule="cosine", cosine={"warm_up": 0})[0] == pytest.approx(0.5)


def test_the_momentum_moves_only_with_adamw_and_one_cycle() -> None:
    for optimiser, schedule, moved in [
        ("adamw", "one_cycle", True),
        ("adamw", "cosine", False),
        ("sgd", "one_cycle", False),
        ("muon", "one_cycle", False),
    ]:
        config = TrainConfig.model_validate(
            {
                "optimiser": optimiser,
                "schedule": schedule,
                "steps": 10,
                "learning_rate": 0.1,
                "weight_decay": 0.0,
            }
        )
        made = make_optimiser(config)([nn.Parameter(torch.zeros(2, 2, 3, 3))])
        advance = make_schedule(config)(made)
        key = "betas" if optimiser == "adamw" else "momentum"
        before = made.param_groups[0][key]
        made.step()
        advance.step()
        assert (made.param_groups[0][key] != before) == moved, (optimiser, schedule)


def test_settings_of_schedules_from_before_they_had_sections_mean_the_same() -> None:
    old = {"adamw": {"rise": 0.4, "epsilon": 1e-7}, "sgd": {"power": 0.5, "momentum": 0.9}}
    config = validated(TrainConfig, old, "old")
    assert config.one_cycle.rise == 0.4 and config.polynomial.power == 0.5
    assert config.adamw.epsilon == 1e-7 and config.sgd.momentum == 0.9
    both = validated(TrainConfig, {"adamw": {"rise": 0.4}, "one_cycle": {"rise": 0.2}}, "both")
    assert both.one_cycle.rise == 0.2
    data = {"folder": "x", "patch_size": [8, 8, 8]}
    with pytest.raises(ConfigError, match=r"old: train\.one_cycle\.rise is 2: it should be less"):
        validated(Config, {"data": data, "train": {"adamw": {"rise": 2}}}, "old")


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        ({"optimiser": "lion"}, r"c: optimiser is 'lion': it should be 'adamw', 'sgd' or 'muon'"),
        ({"schedule": "step"}, r"c: schedule is 'step': it should be 'one_cycle', 'polynomial' or"),
        ({"cosine": {"warm_up": 1}}, r"c: cosine\.warm_up is 1: it should be less than 1"),
        ({"muon": {"iterations": 0}}, r"c: muon\.iterations is 0: it should be greater than"),
        ({"sgd": {"momentum": 0}}, r"c: sgd: nesterov needs a momentum above 0; raise momentum"),
    ],
)
def test_invalid_settings_of_optimisers_are_refused(tree: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        validated(TrainConfig, tree, "c")
