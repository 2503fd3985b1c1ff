"""A plan is a config that trains, with a reason beside each value."""

import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from segkit.config.data import CtWindowConfig, SplitDatasetConfig, ZScoreConfig
from segkit.config.load import load_config
from segkit.config.training import Config
from segkit.errors import DatasetError, SegkitError, TrainingError, counted
from segkit.geometry.grid import Grid
from segkit.inference.window_seconds import num_windows
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.nn.network import SegmentationNetwork
from segkit.planning import make_plan, planned_seconds, planning_task
from segkit.planning.candidates import plan_candidates
from segkit.planning.make_plan import Planned, _run_name, plan_dataset
from segkit.planning.planning_task import Preset
from segkit.planning.schedule import Schedule
from segkit.system.progress import untracked
from segkit.training.fit import train
from tests.small import magnified, small_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "data set", num_cases=5)


def test_the_written_config_equals_the_plan(dataset: Path, tmp_path: Path) -> None:
    planned = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu")
    path = tmp_path / "plan.yaml"
    path.write_text(planned.text)
    assert load_config(path) == planned.config
    assert planned.config.name == "data_set"
    assert planned.config.data.patch_size == [16, 16, 16]
    assert planned.config.data.spacing == (1.0, 1.0, 1.0)


def test_a_reason_stands_above_every_value_that_was_chosen(dataset: Path, tmp_path: Path) -> None:
    lines = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").text.splitlines()
    keys = [
        "spacing",
        "interpolation",
        "patch_size",
        "batch_size",
        "channels",
        "strides",
        "kernels",
        "steps",
    ]
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
    tree["train"].update(steps=1, minutes=None)
    tree["trainer"] = {"accelerator": "cpu"}
    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert train(load_config(path), runs=tmp_path / "runs").summary["steps"] == 1


def test_twice_the_time_gives_more_steps_or_a_larger_network(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between them, 1200 steps of this dataset's network at width 8 fit, and not at width 32.
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)

    def planned(minutes: float) -> Config:
        return plan_dataset(dataset, cache=tmp_path / "cache", device="cpu", minutes=minutes).config

    widths = [planned(minutes).network.channels[0] for minutes in (5.0, 50.0, 500.0)]
    assert widths == sorted(widths) and widths[0] < widths[2]
    assert planned(1000.0).network == planned(500.0).network
    assert planned(1000.0).train.steps == pytest.approx(2 * planned(500.0).train.steps, rel=0.01)


def words_of(planned: Planned) -> str:
    """The text of a plan without line breaks."""
    return " ".join(planned.text.replace("#", "").split())


def test_a_plan_within_the_minutes_counts_the_time_that_it_took(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)

    def planned(began: float | None) -> Planned:
        return plan_dataset(
            dataset, cache=tmp_path / "cache", device="cpu", minutes=10, began=began
        )

    whole, shorter = planned(None), planned(time.monotonic() - 120)
    assert whole.config.train.minutes == shorter.config.train.minutes == 10
    saved = whole.config.train.steps - shorter.config.train.steps
    assert saved == pytest.approx(2 * 120, abs=20)
    assert "s are for planning" not in words_of(whole)
    assert "s are for planning" in words_of(shorter)


def test_candidates_of_a_race_are_planned_for_the_time_that_is_left_after_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)

    def told(starters: int, began: float | None) -> bool:
        plans = plan_candidates(
            dataset,
            cache=tmp_path / "cache",
            device="cpu",
            minutes=10,
            starters=lambda names: names[:starters],
            began=began,
            seconds_of_race=90.0,
        )
        assert len(plans) == starters
        return all("90 s are for planning" in words_of(plan) for plan in plans.values())

    assert told(2, time.monotonic())
    assert not told(1, time.monotonic()) and not told(2, None)


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


def test_a_plan_for_a_gpu_elsewhere_follows_its_memory_and_the_minutes(
    large: Path, tmp_path: Path
) -> None:
    def planned(gigabytes: float, minutes: float) -> Planned:
        found = plan_dataset(
            large,
            cache=tmp_path / "cache",
            device="cuda",
            gigabytes=gigabytes,
            minutes=minutes,
            spatial_dims=2,
        )
        assert found.low is None
        return found

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which is measured")
    small, long, roomy = planned(0.002, 10.0), planned(0.002, 20.0), planned(0.02, 10.0)
    assert math.prod(roomy.plan.patch_size) * roomy.plan.batch_size > math.prod(
        small.plan.patch_size
    ) * (small.plan.batch_size)
    assert long.plan == small.plan
    assert long.config.train.steps == pytest.approx(2 * small.config.train.steps, rel=0.1)
    assert small.config.train.steps > 2 * 600 / 0.05  # a small step takes less than 25 ms
    assert (small.config.train.minutes, long.config.train.minutes) == (10.0, 20.0)
    text = " ".join(small.text.replace("#", " ").split())
    assert "0.002 GB of memory and 10 minutes of training on a GPU that this machine" in text
    assert "s on a GPU like an NVIDIA H200, in bfloat16" in text


def in_two_stages(large: Path, cache: Path) -> Planned:
    return plan_dataset(
        large, cache=cache, device="cpu", spatial_dims=3, minutes=10.0, gigabytes=0.05
    )


def test_two_stages_share_the_minutes(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 2e9)
    # Scoring takes the same time on every machine, however busy it is.
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    entered = []

    def half_a_second(
        network: SegmentationNetwork, image: Tensor, *_: object, **__: object
    ) -> float:
        assert list(network.maps())  # what is timed has its gates
        entered.append(image.shape[1])
        return 0.5

    monkeypatch.setattr(planned_seconds, "step_seconds", half_a_second)
    planned = in_two_stages(large, tmp_path / "cache")
    assert planned.low is not None
    for config in (planned.config, planned.low.config):
        assert config.train.minutes == 5.0 and config.train.steps > 400
    # The second stage is given the labels of the first beside the image.
    # Each is timed with all of nnU-Net's augmentation, and then as often as planned.
    assert entered == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("speed", "asked", "planned_dims"),
    [(1e7, None, 2), (1e7, 3, 3), (1e13, None, 3)],
    ids=["little time", "little time, but 3D is asked for", "much time"],
)
def test_volumes_are_planned_in_slices_if_time_leaves_a_small_patch(
    speed: float,
    asked: int | None,
    planned_dims: int,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: speed)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    planned = plan_dataset(
        large, cache=tmp_path / "cache", device="cpu", minutes=4.0, spatial_dims=asked
    )
    assert planned.config.network.spatial_dims == planned_dims
    told = " ".join(planned.text.replace("#", "").split())
    assert ("Slices, as 4 minutes leave a 3D patch of" in told) == (planned_dims == 2)
    if planned_dims == 2:
        assert planned.low is None and planned.config.data.slices is not None


@pytest.mark.parametrize(
    ("shrunk", "gigabytes", "planned_dims"),
    [
        ((62, 34, 62), 8.0, 2),  # half of the patch that fits, and more than a quarter of an image
        ((62, 35, 62), 8.0, 3),
        ((62, 35, 62), 64.0, 3),  # more memory never leads to slices
        ((62, 34, 62), 64.0, 2),
        ((64, 20, 64), 8.0, 3),  # the whole image along two axes
    ],
)
def test_volumes_are_planned_in_slices_if_time_takes_half_of_the_patch(
    shrunk: tuple[int, int, int],
    gigabytes: float,
    planned_dims: int,
    large: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fitting(*_: object, gigabytes: float, **__: object) -> SimpleNamespace:
        return SimpleNamespace(patch_size=(64, 64, 64) if gigabytes <= 8 else (256, 256, 256))

    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planning_task, "plan_for_memory", fitting)
    monkeypatch.setattr(
        planning_task.PlanningTask,
        "plan",
        lambda self: SimpleNamespace(patch_size=shrunk, low_resolution=None),
    )
    task = planning_task.planning_task(
        planning_task.source_of(large, None, None), cache=tmp_path / "cache", device="cpu",
        gigabytes=gigabytes, minutes=4.0, spatial_dims=None, preset="auto", runs=tmp_path,
        track=untracked,
    )  # fmt: skip
    assert task.spatial_dims == planned_dims
    assert ("which holds 0.5 of the patch that 8 GB hold" in task.why_slices) == (planned_dims == 2)


def test_each_of_two_stages_must_have_time_for_its_patch(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(task: planning_task.PlanningTask) -> SimpleNamespace:
        edge = 64 if task.minutes > 4 else 32
        return SimpleNamespace(patch_size=(edge, edge, edge), low_resolution="a first stage")

    monkeypatch.setattr(planning_task.PlanningTask, "plan", planned)
    monkeypatch.setattr(
        planning_task, "plan_for_memory", lambda *_, **__: SimpleNamespace(patch_size=(64, 64, 64))
    )
    for minutes, dims in ((6.0, 2), (10.0, 3)):
        task = planning_task.planning_task(
            planning_task.source_of(large, None, None), cache=tmp_path / "cache", device="cpu",
            gigabytes=8.0, minutes=minutes, spatial_dims=None, preset="auto", runs=tmp_path,
            track=untracked,
        )  # fmt: skip
        assert task.spatial_dims == dims
        told = "Slices, as 3 of 6 minutes, for each of two stages, leave a 3D patch of 32x32x32"
        assert (told in task.why_slices) == (dims == 2)


def test_slices_are_planned_as_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)
    folder = sliced(small_dataset(tmp_path / "slices", num_cases=5))
    planned = plan_dataset(folder, cache=tmp_path / "c", device="cpu")
    assert planned.config.network.spatial_dims == 2 and planned.config.data.slices == "coronal"
    with pytest.raises(DatasetError, match="one voxel along y in every case; plan for 2"):
        plan_dataset(folder, cache=tmp_path / "c", device="cpu", spatial_dims=3)


def sliced(folder: Path) -> Path:
    """The dataset with one voxel along y left of each file, which its header calls the finest."""
    for path in folder.glob("*Tr/*.nii.gz"):
        volume = read_volume(path)
        matrix = volume.grid.affine.copy()
        matrix[:, 1] *= 0.01
        plane = np.ascontiguousarray(volume.data[:, 8:9])
        write_volume(path, Volume(plane, Grid(plane.shape[:3], matrix)))
    return folder


def test_nnunets_preset_is_its_own_plan_and_schedule(dataset: Path, tmp_path: Path) -> None:
    config = plan_dataset(dataset, cache=tmp_path / "c", device="cpu", preset="nnunet").config
    assert config.train.optimiser == "sgd" and config.train.steps == 250_000
    assert config.network.channels[0] == 32 and config.network.attention.skip is None
    assert config.data.mirror == ["x", "y", "z"]


@pytest.mark.parametrize(("device", "optimiser"), [("cpu", "muon"), ("cuda", "adamw")])
def test_a_plan_has_the_optimiser_that_was_the_best_on_its_device(
    device: str, optimiser: str, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[bool] = []

    def step_seconds(*args: object, muon: bool, **named: object) -> float:
        timed.append(muon)
        return 0.1

    monkeypatch.setattr("segkit.planning.planned_seconds.step_seconds", step_seconds)
    planned = plan_dataset(dataset, cache=tmp_path / "c", device=device, gigabytes=1.0)
    assert planned.config.train.optimiser == optimiser
    assert f"optimiser: {optimiser}" in planned.text
    if device == "cpu" or torch.cuda.is_available():
        assert timed == [device == "cpu"]  # a step is timed with this optimiser


def test_a_plan_says_what_is_mirrored_and_which_names_decide(dataset: Path, tmp_path: Path) -> None:
    planned = plan_dataset(dataset, cache=tmp_path / "c", device="cpu")
    assert planned.config.data.mirror == ["x"]
    described = json.loads((dataset / "dataset.json").read_text())
    described["labels"] = {"0": "background", "1": "LeftLung"}
    (dataset / "dataset.json").write_text(json.dumps(described))
    for preset, axes, why in (
        ("auto", [], "Patches are not mirrored; 'LeftLung' tells left from right."),
        (
            "nnunet",
            ["x", "y", "z"],
            "Patches are mirrored along x, y and z, although 'LeftLung' tells left from right.",
        ),
    ):
        planned = plan_dataset(dataset, cache=tmp_path / "c", device="cpu", preset=preset)
        assert planned.config.data.mirror == axes
        assert f"  # {why}\n  mirror: {axes}\n".replace("'x', 'y', 'z'", "x, y, z") in planned.text


def test_cases_are_measured_once(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from segkit.planning import fingerprint

    first = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").fingerprint

    def unwanted(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(fingerprint, "read_case", unwanted)
    assert plan_dataset(dataset, cache=tmp_path / "cache", device="cpu").fingerprint == first


def planned_in(folder: Path, minutes: float, cache: Path) -> Planned:
    return plan_dataset(folder, cache=cache, device="cpu", minutes=minutes)


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a step takes half a second and a window a hundredth."""
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    monkeypatch.setattr(planned_seconds.CoreShare, "share", lambda _: 1.0)


@pytest.mark.parametrize("minutes", [0.1, 1.0, 5.0, 60.0, 1000.0])
def test_a_plan_says_one_number_of_steps(
    minutes: float, dataset: Path, tmp_path: Path, steady: None
) -> None:
    planned = planned_in(dataset, minutes, tmp_path / "c")
    told = re.findall(r"([\d,]+) steps", " ".join(planned.text.replace("#", " ").split()))
    assert {int(number.replace(",", "")) for number in told} == {planned.config.train.steps}
    assert planned.config.train.minutes == minutes


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Öl", "Ol"),
        ("cm²", "cm2"),
        ("é", "e"),
        ("日本", "run_日本"),
        ("½ dose", "1_2_dose"),
        ("…", "run"),
        ("-x", "x"),
        ("con", "run_con"),
    ],
)
def test_a_folder_of_any_name_gives_a_run_its_name(folder: str, name: str, tmp_path: Path) -> None:
    found = _run_name(tmp_path / folder)
    assert found == name
    assert Config.model_validate(
        {"name": found, "data": {"folder": "x", "patch_size": [16, 16, 16]}}
    )


def test_each_channel_beside_a_ct_keeps_its_own_normalisation(
    dataset: Path, tmp_path: Path
) -> None:
    content = json.loads((dataset / "dataset.json").read_text())
    for path in (dataset / "imagesTr").glob("*.nii.gz"):
        volume = read_volume(path)
        ct = np.zeros((20, 20, 20), np.float32)
        ct[2:18, 2:18, 2:18] = np.abs(volume.data) + 1  # half of the volume
        padded = np.stack([ct, ct], axis=-1)
        write_volume(path, Volume(padded, Grid((20, 20, 20), np.eye(4))))
        label = dataset / "labelsTr" / path.name
        inside = np.pad(read_volume(label).data.astype(np.uint8), 2)
        write_volume(label, Volume(inside, Grid((20, 20, 20), np.eye(4))))
    content["modality"] = {"0": "CT", "1": "PET"}
    (dataset / "dataset.json").write_text(json.dumps(content))
    planned = plan_dataset(dataset, cache=tmp_path / "cache", device="cpu")
    assert [one.kind for one in planned.plan.normalisation] == ["ct", "zscore nonzero"]
    wanted = [CtWindowConfig(), ZScoreConfig(nonzero=True)]
    assert planned.config.data.normalisation == wanted
    assert Config.model_validate(yaml.safe_load(planned.text)).data.normalisation == wanted


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"spatial_dims": 4}, "spatial_dims: expected 2, 3 or None, found 4"),
        ({"preset": "resenc-m"}, "preset: expected auto or nnunet, found 'resenc-m'"),
        ({"gigabytes": 0}, "memory: expected a number of GB above 0, found 0"),
        ({"gigabytes": math.inf}, "memory: expected a number of GB above 0, found inf"),
        ({"minutes": math.inf}, "minutes: expected a number of minutes above 0, found inf"),
        ({"minutes": math.nan}, "minutes: expected a number of minutes above 0, found nan"),
        ({"device": "gpu"}, "device: expected auto, cpu or cuda, found 'gpu'"),
    ],
)
def test_arguments_of_a_plan_that_are_out_of_range_are_refused(
    dataset: Path, tmp_path: Path, wrong: dict[str, Any], told: str
) -> None:
    with pytest.raises(SegkitError, match=re.escape(told)):
        plan_dataset(dataset, cache=tmp_path / "c", **{"device": "cpu", **wrong})


@pytest.mark.parametrize(
    ("settings", "beside", "held_out"),
    [
        ({"splits": "mine.json"}, None, 2),
        ({"fold": 1}, [["case_0"], ["case_1", "case_2", "case_3"]], 3),
        ({"fold": 1, "num_folds": 5}, None, 1),
        ({"validation": ["case_0", "case_4"]}, None, 2),
        ({"validation": 0.6}, None, 3),
        ({}, None, 1),
    ],
)
def test_a_plan_reserves_time_for_the_cases_that_are_really_held_out(
    dataset: Path,
    tmp_path: Path,
    settings: dict[str, Any],
    beside: list[list[str]] | None,
    held_out: int,
) -> None:
    names = [f"case_{number}" for number in range(5)]
    folds = [
        {"train": [name for name in names if name not in chosen], "val": chosen}
        for chosen in (beside or [["case_0", "case_1"], ["case_2", "case_3"]])
    ]
    target = "mine.json" if beside is None else "splits_final.json"
    if "splits" in settings or beside is not None:
        (dataset / target).write_text(json.dumps(folds))
    source = SplitDatasetConfig.model_validate({"folder": str(dataset), **settings})
    planned = plan_dataset(source, cache=tmp_path / "cache", device="cpu", minutes=1)
    assert re.search(rf"validations? of {counted(held_out, 'case')}", planned.text)


def test_the_time_of_a_validation_counts_the_windows_of_each_case(
    dataset: Path, tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of five cases are twice as long along each axis; the median case has one window."""
    magnified(dataset, 2, "case_[13]")
    seen: list[float] = []
    schedule = make_plan.schedule_within

    def watched(minutes: float, **values: Any) -> Schedule:
        seen.append(values["seconds_per_case"])
        return schedule(minutes, **values)

    monkeypatch.setattr(make_plan, "schedule_within", watched)
    config = planned_in(dataset, 1.0, tmp_path / "c").config
    assert config.data.patch_size == [16, 16, 16]
    assert seen[0] == pytest.approx(0.01 * (3 * 1 + 2 * 27) / 5) and len(set(seen)) == 1


def test_a_step_is_timed_with_the_augmentation_of_the_plan(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Augmentation by nnU-Net takes a second; without it, twice as many steps fit."""
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    shares: list[float] = []

    def seconds(config: Config, *_: object) -> float:
        shares.append(config.data.augment_share)
        return 1.0 + shares[-1]

    monkeypatch.setattr(planned_seconds, "seconds_of_step", seconds)
    planned = planned_in(dataset, 0.5, tmp_path / "c")
    assert shares == [1.0, 0.0] and planned.config.data.augment_share == 0
    assert "A step takes 1 s here" in planned.text


def test_the_second_stage_reserves_time_for_the_labels_of_the_first(
    large: Path, tmp_path: Path, steady: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 2e9)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.5)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.2)
    planned = in_two_stages(large, tmp_path / "cache")
    assert planned.low is not None
    told = " ".join(planned.text.replace("#", "").split())
    reserved = re.search(r"([\d.]+) s are reserved for preparing and the labels", told)
    windows = window_count(planned.low)
    # A twentieth of 5 minutes, and 0.2 s for each window of the five cases on the coarse grid.
    assert reserved is not None and float(reserved[1]) == round(15 + 5 * 0.2 * windows)
    assert "reserved for preparing," in " ".join(planned.low.text.replace("#", "").split())


def window_count(planned: Planned) -> int:
    """Number of windows of a case of `large`, all of which are cubes of one size."""
    (spacing,) = set(planned.plan.spacing)
    size = round(64 / spacing)
    stride = planned.config.network.total_stride
    return num_windows((size, size, size), planned.config.data.patch_size, stride)


def test_too_little_memory_for_a_step_is_one_sentence(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planning_task, "free_memory_of", lambda _: 1_200_000_000)
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e9)
    monkeypatch.setattr(planned_seconds, "seconds_of_step", full)
    told = r"memory is too small to time .* of a plan for 80 GB, and 1\.2 GB are free; end"
    with pytest.raises(TrainingError, match=told):
        plan_dataset(dataset, cache=tmp_path / "c", device="cpu", gigabytes=80, minutes=1)


@pytest.mark.parametrize(
    ("device", "half", "timed", "expected"),
    [
        ("cpu", torch.float32, True, 1.0),
        ("cpu", torch.bfloat16, True, 1.4),
        ("cpu", torch.bfloat16, False, 1.0),
        ("cuda", torch.bfloat16, True, None),
    ],
)
def test_the_cost_of_muon_follows_the_precision_of_training(
    device: str,
    half: torch.dtype,
    timed: bool,
    expected: float | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("segkit.planning.planning_task.precision_of", lambda _: half)
    task = SimpleNamespace(device=torch.device(device), timed=timed)
    assert planning_task.PlanningTask.muon_cost.fget(task) == expected  # type: ignore[attr-defined]


@pytest.mark.parametrize(("device", "devices"), [("cuda", None), ("cuda:1", [1])])
def test_a_plan_for_one_of_several_gpus_trains_on_it(
    device: str, devices: list[int] | None, dataset: Path, tmp_path: Path
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, which is measured")
    planned = plan_dataset(dataset, cache=tmp_path / "cache", device=device, minutes=1)
    trainer = written(planned, tmp_path / "plan.yaml").trainer
    assert (trainer.accelerator, trainer.devices) == ("gpu", devices or 1)


def test_a_gpu_too_full_to_be_timed_is_told_in_a_sentence(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> float:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(planning_task, "multiply_adds_per_second", full)
    monkeypatch.setattr(planning_task, "free_memory_of", lambda _: 1_200_000_000)
    told = r"cpu: its memory is too small to time .* 8 GB, and 1\.2 GB are free; end other"
    with pytest.raises(TrainingError, match=told):
        plan_dataset(dataset, cache=tmp_path / "cache", device="cpu", minutes=1)
