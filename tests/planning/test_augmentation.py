"""The planned share of augmentation follows the passes over the training cases."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkit.planning import planned_seconds, planning_task
from segkit.planning.augmentation import num_passes, planned_share
from segkit.planning.make_plan import Planned, plan_dataset
from tests.small import small_dataset


@pytest.mark.parametrize(
    ("patch_size", "median", "passes"),
    [
        ((40, 56, 40), (35.0, 51.0, 36.0), 10.0),  # what lies outside the image does not count
        ((20, 51, 36), (40.0, 51.0, 36.0), 5.0),
        ((64, 1, 32), (64.0, 50.0, 64.0), 0.1),  # slices across y
        ((192, 192, 1), (384.0, 192.0, 1.0), 5.0),
    ],
)
def test_passes_count_how_often_a_voxel_is_seen(
    patch_size: tuple[int, ...], median: tuple[float, ...], passes: float
) -> None:
    found = num_passes(600, batch_size=2, patch_size=patch_size, median=median, training_cases=120)
    assert found == pytest.approx(passes)


def test_a_short_training_of_few_passes_is_not_augmented_and_a_long_one_is() -> None:
    assert planned_share(0.1, 10)[0] == planned_share(10.0, 2500)[0] == 0
    assert planned_share(120.0, 10)[0] == planned_share(1e6, 10**6)[0] == 1
    assert planned_share(0.1, 10_000)[0] == 1  # a large dataset
    assert planned_share(math.sqrt(10 * 120), 10)[0] == planned_share(0.1, 5000)[0] == 0.5


def test_a_plan_says_how_often_patches_are_augmented_and_why() -> None:
    seen = "Training sees each voxel {} times, on average. "
    for passes, told in (
        (9.6, seen.format(9.6) + "In so short a training, patches as they are teach more."),
        (
            20.0,
            seen.format(20) + "Patches are augmented with 0.28 times the probabilities of nnU-Net.",
        ),
        (437.0, seen.format(440) + "Patches are augmented as often as in nnU-Net."),
    ):
        assert planned_share(passes, 10)[1] == told


@given(st.floats(0, 1e4), st.floats(0, 1e4), st.integers(1, 10**6))
def test_more_passes_never_have_less_augmentation(one: float, other: float, steps: int) -> None:
    fewer, more = sorted((one, other))
    assert planned_share(fewer, steps)[0] <= planned_share(more, steps)[0]


def test_a_plan_augments_by_its_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cases train; the patch holds a whole case, in batches of 2."""
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e12)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 1.0)
    dataset = small_dataset(tmp_path / "balls", num_cases=5)

    def planned(minutes: float) -> Planned:
        return plan_dataset(dataset, cache=tmp_path / "cache", device="cpu", minutes=minutes)

    for minutes in (0.2, 1.5, 20.0):
        config = planned(minutes).config
        passes = config.train.steps * config.data.batch_size / 4
        assert config.data.augment_share == planned_share(passes, config.train.steps)[0], minutes
        assert config.data.mirror == ["x"]
    shares = [planned(minutes).config.data.augment_share for minutes in (0.2, 1.5, 20.0)]
    assert shares[0] == 0 < shares[1] < shares[2] == 1


def test_nnunets_preset_augments_as_nnunet_does(tmp_path: Path) -> None:
    dataset = small_dataset(tmp_path / "balls", num_cases=5)
    planned = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu", preset="nnunet")
    assert planned.config.data.augment_share == 1 and "augment_share" not in planned.text
