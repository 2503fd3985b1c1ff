"""A plan is a config that trains, with a reason beside each value."""

import math
from pathlib import Path

import pytest
import yaml

from segkit import planning
from segkit.build import default_mirror
from segkit.config import Config
from segkit.config_file import load_config
from segkit.data.rules import multiply_adds
from segkit.planning import Planned, Preset, measured_speed, plan_dataset
from segkit.training import train
from tests.small import magnified, small_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "data set", num_cases=5)


def test_what_is_written_is_what_was_planned(dataset: Path, tmp_path: Path) -> None:
    planned = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu")
    path = tmp_path / "plan.yaml"
    path.write_text(planned.text)
    assert load_config(path) == planned.config
    assert planned.config.name == "data_set"
    assert planned.config.data.patch_size == [16, 16, 16]
    assert planned.config.data.spacing == (1.0, 1.0, 1.0)


def test_a_reason_stands_above_every_value_that_was_chosen(dataset: Path, tmp_path: Path) -> None:
    lines = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").text.splitlines()
    keys = ["spacing", "patch_size", "batch_size", "channels", "strides", "kernels", "steps"]
    for key in keys:
        (number,) = [n for n, line in enumerate(lines) if line.strip().startswith(f"{key}:")]
        assert lines[number - 1].startswith("  # "), key
    assert max(map(len, lines)) <= 100


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_plan_trains(spatial_dims: int, dataset: Path, tmp_path: Path) -> None:
    planned = plan_dataset(
        dataset, cache=tmp_path / "cache", device="cpu", spatial_dims=spatial_dims
    )
    tree = yaml.safe_load(planned.text)
    assert tree["network"]["spatial_dims"] == spatial_dims
    tree["train"]["steps"] = 1
    tree["trainer"] = {"accelerator": "cpu"}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert train(load_config(path), runs=tmp_path / "runs").summary["steps"] == 1


def test_twice_the_time_gives_more_steps_or_a_larger_network(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measured_speed", lambda: 1e9)

    def work(minutes: float) -> float:
        config = plan_dataset(
            dataset, cache=tmp_path / "cache", device="cpu", minutes=minutes
        ).config
        cost = 3 * multiply_adds(
            channels=config.network.channels,
            strides=[tuple(step) for step in config.network.step_strides],
            kernels=[tuple(size) for size in config.network.level_kernels],
            patch_size=tuple(config.data.patch_size),
            in_channels=1,
            num_classes=2,
        )
        return cost * config.data.batch_size * config.train.steps

    budgets = [5.0, 20.0, 80.0]
    works = [work(minutes) for minutes in budgets]
    assert works == sorted(works) and works[0] < works[2]
    for minutes, done in zip(budgets, works, strict=True):
        assert 0.8 * minutes * 60e9 < done <= minutes * 60e9


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return magnified(small_dataset(tmp_path / "large", num_cases=5), 4)


def written(planned: Planned, path: Path) -> Config:
    path.write_text(planned.text)
    return load_config(path)


@pytest.mark.parametrize("preset", ["auto", "nnunet"])
def test_a_large_volume_is_planned_in_two_stages(
    preset: Preset, large: Path, tmp_path: Path
) -> None:
    planned = plan_dataset(
        large,
        cache=tmp_path / "cache",
        device="cuda" if preset == "auto" else "cpu",
        preset=preset,
        gigabytes=0.05,
        runs=Path("elsewhere"),
    )
    assert planned.low is not None and planned.low.low is None
    full, low = written(planned, tmp_path / "a.yaml"), written(planned.low, tmp_path / "b.yaml")
    assert (full, low) == (planned.config, planned.low.config)
    assert (full.name, low.name) == ("large", "large_low")
    assert full.data.first_stage == [Path("elsewhere/large_low")] and low.data.first_stage is None
    assert full.data.spacing == (1.0, 1.0, 1.0)
    assert low.data.spacing is not None and min(low.data.spacing) > 1.2
    whole = math.prod(low.data.patch_size) * math.prod(low.data.spacing)
    assert math.prod(full.data.patch_size) < 0.25 * 64**3 <= 1.1 * whole
    lines = planned.text.splitlines()
    (number,) = [n for n, line in enumerate(lines) if line.startswith("  first_stage:")]
    assert lines[number - 1].startswith("  # ") and "first of two stages" in planned.low.text


def test_two_stages_share_the_minutes(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "measured_speed", lambda: 2e9)
    planned = plan_dataset(large, cache=tmp_path / "cache", device="cpu", minutes=10.0)
    assert planned.low is not None
    total = 0.0
    for config, entering in ((planned.config, 2), (planned.low.config, 1)):
        cost = 3 * multiply_adds(
            channels=config.network.channels,
            strides=[tuple(step) for step in config.network.step_strides],
            kernels=[tuple(size) for size in config.network.level_kernels],
            patch_size=tuple(config.data.patch_size),
            in_channels=entering,
            num_classes=2,
        )
        total += cost * config.data.batch_size * config.train.steps
    assert 0.8 * 10 * 60 * 2e9 < total <= 10 * 60 * 2e9


def test_nnunets_preset_is_its_own_plan_and_schedule(dataset: Path, tmp_path: Path) -> None:
    config = plan_dataset(dataset, cache=tmp_path / "c", device="cpu", preset="nnunet").config
    assert config.train.optimiser == "sgd" and config.train.steps == 250_000
    assert config.network.channels[0] == 32 and config.network.attention.skip is None
    assert config.data.mirror == ["x", "y", "z"]


def test_cases_are_measured_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segkit.data import fingerprint

    first = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").fingerprint

    def unwanted(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(fingerprint, "read_case", unwanted)
    assert plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").fingerprint == first


def test_the_measured_speed_is_that_of_a_processor() -> None:
    assert 1e8 < measured_speed() < 1e14


@pytest.mark.parametrize(
    ("labels", "axes"),
    [
        (["background", "liver", "spleen"], ["x"]),
        (["background", "Left Kidney", "Right Kidney"], []),
        (["background", "kidney_left"], []),
        (["background", "lh.cortex"], []),
        (["background", "hippocampus-R"], []),
        (["background", "cleft", "bright", "central"], ["x"]),
    ],
)
def test_what_tells_left_from_right_is_not_mirrored(labels: list[str], axes: list[str]) -> None:
    assert default_mirror(labels) == axes
