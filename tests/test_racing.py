"""Plans race on training cases only, for a small share of the time, and the table says how."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from segkit import racing
from segkit.config.data import SplitDatasetConfig
from segkit.config.load import changed, load_config
from segkit.data.dataset import Dataset, dataset_of, read_dataset
from segkit.data.split import split_of
from segkit.planning import planned_seconds, planning_task
from segkit.planning.candidates import plan_candidates
from segkit.racing import (
    Entry,
    affordable_candidates,
    best_of,
    dice_in_common,
    plan_by_race,
    shortened_for_race,
    shortest_training,
    shortest_trainings,
    table,
)
from segkit.system.progress import untracked
from segkit.training.parts import prepare
from tests.small import small_config, small_dataset


def test_each_round_trains_the_better_half_twice_as_long() -> None:
    # Four, then two for twice as long; three keep two; two meet once.
    assert [shortest_trainings(count) for count in (1, 2, 3, 4)] == [0, 2, 7, 8]


@pytest.mark.parametrize(("minutes", "count"), [(4, 1), (10, 2), (60, 4)])
def test_as_many_start_as_there_is_time_for(minutes: float, count: int) -> None:
    needed = dict.fromkeys("abcd", racing.SHORTEST)
    assert len(affordable_candidates(needed, racing.SHARE * 60 * minutes)) == count


def test_a_plan_races_only_if_it_has_time_for_enough_steps() -> None:
    assert affordable_candidates({"3D": 30, "2D": 30}, 90) == ["3D", "2D"]
    assert affordable_candidates({"3D": 46, "2D": 30}, 90) == ["3D"]
    # A third candidate that is slow is left out, and the first two race.
    assert affordable_candidates({"3D": 30, "2D": 30, "coarser": 100}, 300) == ["3D", "2D"]
    assert affordable_candidates({"2D": 30, "3D": 285, "narrower": 30}, 170) == ["2D", "narrower"]
    assert affordable_candidates({"3D": 285, "2D": 30, "narrower": 30}, 170) == ["3D"]


def test_the_shortest_training_has_enough_steps_beside_its_scoring(
    dataset: Path, tmp_path: Path
) -> None:
    config = plan_candidates(dataset, cache=tmp_path / "c", device="cpu", minutes=10)["3D"].config
    a_step = 60 * 10 / config.train.steps
    seconds = shortest_training(config)
    assert seconds == max(racing.SHORTEST, 200 * a_step / 0.7)
    slow = config.model_copy(update={"train": config.train.model_copy(update={"steps": 1000})})
    assert shortest_training(slow) == pytest.approx(200 * 0.6 / 0.7)
    short = shortened_for_race(slow, 0.7 * shortest_training(slow), tmp_path)
    assert short.train.steps == 200


def test_candidates_are_compared_on_cases_that_all_have_scored() -> None:
    a = {"one": {"x": 0.4, "y": math.nan}, "two": {"x": 0.6, "y": 0.8}}
    b = {"two": {"x": 0.5, "y": 0.5}}
    assert dice_in_common({"a": a, "b": b}) == pytest.approx({"a": 0.7, "b": 0.5})


def test_the_rule_gives_way_only_to_a_plan_that_is_clearly_better() -> None:
    rule, other = Entry("3D", 10, 20, 0.50), Entry("2D", 10, 20, 0.51)
    assert best_of([rule, other], "3D") == "3D"
    assert best_of([rule, Entry("2D", 10, 20, 0.60)], "3D") == "2D"
    assert best_of([other, Entry("coarse", 10, 20, math.nan)], "3D") == "2D"


def test_the_plan_of_the_rules_leaves_the_race_only_if_another_is_clearly_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def last_two(dice: dict[str, float]) -> set[str]:
        def entry(name: str, *_: object) -> tuple[dict[str, dict[str, float]], int]:
            return {"case": {"a": dice[name]}}, 1

        monkeypatch.setattr(racing, "_entry", entry)
        configs, empty = dict(zip(dice, dice, strict=True)), ()
        every: Any = {"dataset": None, "track": lambda items, *_: items}
        rounds = racing._raced(configs, cases=(empty, empty), seconds=9, cache=tmp_path, **every)  # type: ignore[arg-type]
        return {entry.candidate for entry in rounds[1]}

    assert last_two({"rule": 0.500, "2D": 0.505, "coarser": 0.510}) == {"rule", "coarser"}
    assert last_two({"rule": 0.480, "2D": 0.505, "coarser": 0.510}) == {"2D", "coarser"}


def test_the_table_says_who_was_stopped_and_who_is_planned() -> None:
    rounds = [[Entry("3D", 12, 30, 0.5), Entry("2D", 12, 90, 0.7)], [Entry("2D", 24, 180, 0.8)]]
    lines = table(rounds, "2D", 3).splitlines()
    assert lines[3] == "#   3D            0.500 in 12 s, 30 steps"
    assert lines[4] == (
        "#   2D            0.700 in 12 s, 90 steps; 0.800 in 24 s, 180 steps  <- planned"
    )


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.05)
    monkeypatch.setattr(planned_seconds, "seconds_of_window", lambda *_: 0.01)
    return small_dataset(tmp_path / "data", num_cases=6)


def test_the_rules_plan_is_the_first_candidate_and_all_differ(
    dataset: Path, tmp_path: Path
) -> None:
    found = plan_candidates(dataset, cache=tmp_path / "c", device="cpu")
    assert list(found)[:2] == ["3D", "2D"]
    alone = plan_candidates(dataset, cache=tmp_path / "c", device="cpu", spatial_dims=2)
    assert {plan.plan.spatial_dims for plan in alone.values()} == {2}


def names_of(dataset: Dataset) -> set[str]:
    """Names of all cases."""
    return {case.name for case in dataset.cases}


def test_a_race_has_only_cases_with_foreground(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=12)
    known = read_dataset(folder)
    config = small_config(folder, data={"validation": 0.0})
    few = {"case_2", "case_5", "case_7", "case_11"}
    cases = racing._cases_of(known, config, few)
    assert cases is not None and {case.name for part in cases for case in part} == few
    assert racing._cases_of(known, config, {"case_2", "case_5"}) is None


def test_a_race_never_sees_the_cases_that_score_the_run(dataset: Path, tmp_path: Path) -> None:
    planned = plan_candidates(dataset, cache=tmp_path / "c", device="cpu")["3D"]
    known = read_dataset(dataset)
    cases = racing._cases_of(known, planned.config, names_of(known))
    assert cases is not None
    trained, scored = ({case.name for case in part} for part in cases)
    held_out = {case.name for case in split_of(known, planned.config).held_out}
    assert trained and scored and not trained & scored and not (trained | scored) & held_out
    short = shortened_for_race(planned.config, 12.0, tmp_path)
    assert short.data.validation == [] and short.train.minutes == 0.2


def test_a_race_knows_the_cases_that_settings_hold_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 1e10)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.05)
    folder = small_dataset(tmp_path / "data", num_cases=12)
    raced: list[set[str]] = []

    def noted(
        configs: object, dataset: object, cases: tuple[Any, Any], **_: object
    ) -> list[list[Entry]]:
        raced.append({case.name for part in cases for case in part})
        return []

    monkeypatch.setattr(racing, "_raced", noted)
    for seed in (0, 1, 2):
        planned = plan_by_race(
            folder, cache=tmp_path / "c", device="cpu", minutes=60, settings=[f"train.seed={seed}"]
        )
        config = changed(planned.config, [f"train.seed={seed}"])
        held_out = {case.name for case in split_of(read_dataset(folder), config).held_out}
        assert len(held_out) == 2 and not raced[-1] & held_out
    assert len(raced) == 3


def test_a_race_gives_no_hints_on_a_split_that_is_not_the_runs(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (dataset / "splits_final.json").write_text(json.dumps(FOLDS))
    source = SplitDatasetConfig.model_validate({"folder": str(dataset), "fold": 0})
    config = plan_candidates(source, cache=tmp_path / "c", device="cpu")["3D"].config
    known = dataset_of(config.data)
    cases = racing._cases_of(known, config, names_of(known))
    assert cases is not None
    hints: list[str] = []

    def trained(short: Any, *, runs: str, dataset: Dataset) -> Any:
        split_of(dataset, short)
        hints.extend(record.message for record in caplog.records)
        return SimpleNamespace(model=None, summary={"steps": 1})

    monkeypatch.setattr(racing, "train", trained)
    monkeypatch.setattr(racing, "score", lambda *_, **__: {"dice_of_cases": {}})
    caplog.clear()
    racing._entry(config, known, cases, 1.0, tmp_path)
    assert hints == []


FOLDS = [
    {"train": ["case_2", "case_3", "case_4", "case_5"], "val": ["case_0", "case_1"]},
    {"train": ["case_0", "case_1", "case_2", "case_3"], "val": ["case_4", "case_5"]},
]


@pytest.mark.parametrize(
    "settings",
    [
        {"splits": FOLDS},
        {"fold": 0},
        {"group_by": {"column": "patient"}, "validation": 0.0},
        {"group_by": {"column": "patient"}, "stratify_by": {"column": "site"}, "fold": 1},
        {"group_by": {"column": "patient"}, "test": ["case_5"], "splits": [FOLDS[0] | {
            "train": ["case_2", "case_3", "case_4"]}]},
    ],
)  # fmt: skip
def test_a_race_trains_on_its_cases_whatever_the_split_of_the_run(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=6)
    table = "id,patient,site\n" + "".join(f"case_{n},p{n},{n % 2}\n" for n in range(6))
    (folder / "cases.csv").write_text(table)
    config = small_config(folder, data={**settings, "case_table": folder / "cases.csv"})
    config = config.model_copy(update={"train": config.train.model_copy(update={"minutes": 10.0})})
    dataset = dataset_of(config.data)
    cases = racing._cases_of(dataset, config, names_of(dataset))
    assert cases is not None
    short = shortened_for_race(config, 12.0, tmp_path)
    raced = split_of(replace(dataset, cases=tuple(cases[0])), short)
    assert raced.held_out == () and set(raced.train) == set(cases[0])
    assert set(cases[0]) | set(cases[1]) <= set(split_of(dataset, config).train)


def test_no_patient_both_trains_and_scores_a_race(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=12)
    dataset, scored = read_dataset(folder), set()
    # Cases 0, 3, 6 and 9 are of one patient, and so on: there are three patients.
    table = "id,patient\n" + "".join(f"case_{n},p{n % 3}\n" for n in range(12))
    (folder / "cases.csv").write_text(table)
    table_of_patients = {"case_table": folder / "cases.csv", "group_by": {"column": "patient"}}
    for seed in range(8):
        data = {**table_of_patients, "validation": 0.0}
        config = small_config(folder, data=data, train={"seed": seed})
        cases = racing._cases_of(dataset, config, names_of(dataset))
        assert cases is not None
        trained, judged = ({int(case.name.split("_")[1]) % 3 for case in part} for part in cases)
        assert len(judged) == 1 and trained == {0, 1, 2} - judged
        assert (len(cases[0]), len(cases[1])) == (8, racing.SCORED)
        scored |= judged
    assert len(scored) > 1
    two = small_config(folder, data={**table_of_patients, "validation": 0.3})
    assert racing._cases_of(dataset, two, names_of(dataset)) is None


def test_there_is_no_race_once_planning_has_taken_its_share_of_the_time(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([0.0, *[20.0] * 100])  # 15 % of 4 minutes are 36 s, of which planning took 20
    monkeypatch.setattr(racing.time, "monotonic", lambda: next(times))
    monkeypatch.setattr(racing, "train", None)
    planned = plan_by_race(dataset, cache=tmp_path / "c", device="cpu", minutes=4)
    assert planned.plan.spatial_dims == 3 and "Raced" not in planned.text


@pytest.mark.parametrize(("seconds_of_one", "trained"), [(5.0, 3), (20.0, 2), (45.0, 1)])
def test_a_race_begins_no_candidate_once_its_time_is_over(
    seconds_of_one: float, trained: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    now, names = 0.0, []

    def entry(config: str, *_: object) -> tuple[dict[str, dict[str, float]], int]:
        nonlocal now
        now += seconds_of_one
        names.append(config)
        return {"case": {"a": 0.5}}, 1

    monkeypatch.setattr(racing.time, "monotonic", lambda: now)
    monkeypatch.setattr(racing, "_entry", entry)
    configs: dict[str, Any] = {"rule": "rule", "2D": "2D", "coarser": "coarser"}
    empty: Any = None
    rounds = racing._raced(
        configs, empty, ((), ()), seconds=35.0, cache=tmp_path, track=lambda items, *_: items
    )
    assert names[:3] == ["rule", "2D", "coarser"][:trained] and bool(rounds) == (trained == 3)


def test_cases_are_prepared_before_the_first_candidate_trains(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The channel is named CT, so the first candidate measures a window, and all others use it."""
    (dataset / "dataset.json").write_text(
        (dataset / "dataset.json").read_text().replace("MRI", "CT")
    )
    candidates = plan_candidates(dataset, cache=tmp_path / "c", device="cpu")
    known = read_dataset(dataset)
    configs = {name: planned.config for name, planned in candidates.items()}
    cases = racing._cases_of(known, configs["3D"], names_of(known))
    assert cases is not None

    def ready(left: float) -> dict[str, Any]:
        return racing.prepared_for_race(
            configs, known, cases[0], left=lambda: left, cache=tmp_path / "p", track=untracked
        )

    assert ready(0.0) == {}
    found = ready(10.0)
    assert list(found) == list(configs)
    (window,) = found["3D"].data.normalisation
    assert window.kind == "ct" and window.mean is not None
    assert all(config.data.normalisation == [window] for config in found.values())
    prepared = sorted((tmp_path / "p").glob("case_*"))
    assert len(prepared) >= len(cases[0])
    short = shortened_for_race(found["2D"], 1.0, tmp_path / "p")
    assert len(prepare(short, dataset=replace(known, cases=tuple(cases[0]))).cases) == len(cases[0])
    assert sorted((tmp_path / "p").glob("case_*")) == prepared


def test_a_schedule_without_a_time_is_not_raced(dataset: Path, tmp_path: Path) -> None:
    planned = plan_by_race(dataset, cache=tmp_path / "c", device="cpu", preset="nnunet")
    assert planned.config.train.minutes is None and "Chosen by mean Dice" not in planned.text


@pytest.mark.slow
def test_a_plan_that_was_raced_is_a_config_with_a_table(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(racing, "SHORTEST", 2.0)
    monkeypatch.setattr(racing, "FEWEST_STEPS", 2)
    monkeypatch.setattr(racing, "SHARE", 0.9)
    planned = plan_by_race(dataset, cache=tmp_path / "c", device="cpu", minutes=1)
    assert "# Chosen by mean Dice of at most 1 training case" in planned.text
    path = tmp_path / "plan.yaml"
    path.write_text(planned.text)
    assert load_config(path) == planned.config
