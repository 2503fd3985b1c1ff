"""A race between plans: candidates train for a short time, and the best plan is chosen.

The race uses successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943). All candidates
train for the same short time; the worse half is dropped; the others train again, for twice as long,
until one is left. Each is trained and scored like any run, on the grids of the scans. The cases
that score a race belong to the training part of the split, so the cases that later score the run
do not influence the choice.

    candidates   4 ──12 s──▶ 2 ──24 s──▶ 1
"""

import math
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from segkit.config.dataset_files import DatasetConfig, FilesConfig
from segkit.config.load import changed
from segkit.config.pictures import PicturesConfig
from segkit.config.training import Config
from segkit.data.case_groups import groups_of
from segkit.data.dataset import CaseFiles, Dataset, dataset_of
from segkit.data.split import ALL_TRAIN, split_of
from segkit.errors import counted
from segkit.planning.candidates import plan_candidates
from segkit.planning.make_plan import Planned
from segkit.planning.planning_task import Preset, source_of
from segkit.system.only_errors import only_errors
from segkit.system.progress import Track, untracked
from segkit.training.final_scores import score
from segkit.training.fit import train
from segkit.training.parts import prepare

SHARE = 0.15
"""Planning and a race take at most this share of the minutes."""
SHORTEST = 30.0
"""Shortest time of a candidate's first training, in seconds; without this time, there is no race.
Shorter races chose 3D for sarcoma CT, for which 2D is twice as good after 4 minutes."""
FEWEST_STEPS = 200
"""Fewest steps of a candidate's first training; if there is no time for them, it does not race.
On hippocampus, a race of 62 steps in 3D chose 2D; one of 222 steps chose 3D, which is better."""
SECONDS_TO_PLAN = 5.0
"""About the time that timing the steps of the candidates takes."""
SHARE_OF_SCORING = 0.3
"""Share of a candidate's time for scoring."""
MARGIN = 0.02
"""Another plan must have a Dice higher by this margin than the plan of the rules. A smaller
difference may be chance after such a short training."""
SCORED, TRAINED = 3, 12
"""Largest numbers of training cases that score a race, and that it trains on."""


@dataclass(frozen=True)
class Entry:
    """The result of one candidate in one round."""

    candidate: str
    seconds: float
    """Training time of the candidate."""
    steps: int
    dice: float
    """Mean Dice over classes and over the cases that all candidates scored; NaN if undefined."""


def plan_by_race(
    folder: str | Path | DatasetConfig,
    files: FilesConfig | None = None,
    *,
    pictures: PicturesConfig | None = None,
    cache: str | Path | None = None,
    device: str = "auto",
    spatial_dims: int | None = None,
    gigabytes: float | None = None,
    minutes: float = 20.0,
    preset: Preset = "auto",
    runs: str | Path = "runs",
    held_out: Sequence[str] | None = None,
    settings: Sequence[str] = (),
    track: Track = untracked,
    began: float | None = None,
) -> Planned:
    """The best of two to four plans, chosen by a race. The text has the results as comments.

    One of the plans is that of `segkit.plan_dataset`, which also describes the other arguments and
    the errors. Planning and racing take 15 % of the minutes. There is no race on a GPU, or if the
    time that is left after the dataset was measured is too short for one.

    Args:
        held_out: names of cases that the race must not use, if the split is not the plan's.
        settings: KEY=VALUE settings that will change the plan. Of these, only `train.seed` matters
            here, which draws the split: the race does not use the cases that will be held out.
    """
    runs, started = Path(runs), time.monotonic() if began is None else began
    on_cpu = _no_card(device)

    def left() -> float:
        return SHARE * 60 * minutes - (time.monotonic() - started)

    def in_time(names: list[str]) -> list[str]:
        if not on_cpu:
            return names[:1]
        return affordable_candidates(dict.fromkeys(names, SHORTEST), left() - SECONDS_TO_PLAN)

    cache = runs / ".cache" if cache is None else Path(cache)
    candidates = plan_candidates(
        folder,
        files,
        pictures=pictures,
        cache=cache,
        device=device,
        spatial_dims=spatial_dims,
        gigabytes=gigabytes,
        minutes=minutes,
        preset=preset,
        runs=runs,
        track=track,
        starters=in_time,
        began=began,
        seconds_of_race=SHARE * 60 * minutes,
    )
    by_rule = next(iter(candidates))
    if len(candidates) < 2:  # such as nnU-Net's own schedule, which has no time
        return candidates[by_rule]
    share = 1.0 if began is None else 1.0 - SHARE
    configs = {
        name: _for_all_minutes(planned.config, share) for name, planned in candidates.items()
    }
    needed = {name: shortest_training(config) for name, config in configs.items()}
    names = affordable_candidates(needed, left())
    if len(names) < 2:
        return candidates[by_rule]
    dataset = dataset_of(source_of(folder, files, pictures))
    of_split = [word for word in settings if word.startswith("train.seed=")]
    config = changed(candidates[by_rule].config, of_split)
    if held_out is not None:
        split = {"validation": list(held_out), "fold": None, "splits": None}
        data = config.data.model_copy(update=split)
        config = config.model_copy(update={"data": data})
    foreground = {case.name for case in candidates[by_rule].fingerprint.cases if case.classes}
    cases = _cases_of(dataset, config, foreground)
    if cases is None:
        return candidates[by_rule]
    configs = {name: configs[name] for name in names}
    configs = prepared_for_race(configs, dataset, cases[0], left=left, cache=cache, track=track)
    names = affordable_candidates({name: needed[name] for name in configs}, left())
    if len(names) < 2:
        return candidates[by_rule]
    rounds = _raced(
        {name: configs[name] for name in names},
        dataset,
        cases,
        seconds=left(),
        cache=cache,
        track=track,
    )
    chosen = best_of(rounds[-1], by_rule) if rounds else by_rule
    return _with_table(candidates[chosen], table(rounds, chosen, len(cases[1])))


def _no_card(device: str) -> bool:
    return device == "cpu" or (device == "auto" and not torch.cuda.is_available())


def affordable_candidates(needed: Mapping[str, float], seconds: float) -> list[str]:
    """The candidates for which there is time, with all rounds of their race.

    While there is too little time for all, the slowest one is left out, but never the first.

    Args:
        needed: for each candidate, the fewest seconds of its first training. All get the same time.
        seconds: time for the race.
    """
    names = list(needed)
    while len(names) > 1:
        each = seconds / shortest_trainings(len(names))
        if all(needed[name] <= each for name in names):
            break
        names.remove(max(reversed(names[1:]), key=lambda name: needed[name]))
    return names


def _for_all_minutes(config: Config, share: float) -> Config:
    """The config with the steps of all its minutes, if it has those of a share of them."""
    steps = round(config.train.steps / share)
    return config.model_copy(update={"train": config.train.model_copy(update={"steps": steps})})


def shortest_training(config: Config) -> float:
    """The fewest seconds after which a candidate can be judged, its scoring included."""
    minutes = config.train.minutes
    assert minutes is not None, "only plans for a time can race"
    for_steps = FEWEST_STEPS * 60 * minutes / config.train.steps
    return max(SHORTEST, for_steps / (1 - SHARE_OF_SCORING))


def shortest_trainings(count: int) -> int:
    """The time of a race of `count` candidates, in units of the shortest training."""
    units, length = 0, 1
    while count > 1:
        units += count * length
        count, length = math.ceil(count / 2), 2 * length
    return units


def _cases_of(
    dataset: Dataset, config: Config, foreground: Collection[str]
) -> tuple[Sequence[CaseFiles], Sequence[CaseFiles]] | None:
    """Training cases of the split that a race trains on, and others that score it.

    A group of `data.group_by` has cases in only one of the two. None if there are fewer than three
    groups, or three cases if they are not grouped.

    Args:
        dataset: the dataset.
        config: the config, whose split counts.
        foreground: names of the cases with foreground. A race uses no others: from a dozen cases
            without any, nothing could be learned or scored.
    """
    known = [case for case in split_of(dataset, config).train if case.name in foreground]
    order = np.random.default_rng(config.train.seed).permutation(len(known)).tolist()
    shuffled = [known[number] for number in order]
    group_of = {case.name: case.name for case in known}
    for group, numbers in (groups_of(dataset, config.data) or {}).items():
        group_of |= {dataset.cases[number].name: group for number in numbers}
    groups = list(dict.fromkeys(group_of[case.name] for case in shuffled))
    if len(groups) < 3:
        return None
    scoring = groups[: min(SCORED, max(len(groups) // 4, 1))]
    scored = [case for case in shuffled if group_of[case.name] in scoring]
    trained = [case for case in shuffled if group_of[case.name] not in scoring]
    return trained[:TRAINED], scored[:SCORED]


def prepared_for_race(
    configs: Mapping[str, Config],
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    *,
    left: Callable[[], float],
    cache: Path,
    track: Track,
) -> dict[str, Config]:
    """The configs of the candidates whose training cases could be prepared in time.

    Cases are prepared before any candidate trains, because candidates on the same grid share them:
    otherwise the first would lose time that the others do not. All have the intensity window that
    was measured for the first.

    Args:
        configs: the config of each candidate, by name; the first is the plan of the rules.
        dataset: the dataset.
        cases: the cases that the race trains on.
        left: a function that returns the seconds that are left for the race.
        cache: the folder of prepared cases.
        track: shows the progress over cases.
    """
    ready: dict[str, Config] = {}
    data: dict[str, Any] = {}
    for name, config in configs.items():
        if left() <= 0:
            break
        config = config.model_copy(update={"data": config.data.model_copy(update=data)})
        short = shortened_for_race(config, SHORTEST, cache)
        with _without_warnings():
            parts = prepare(short, dataset=replace(dataset, cases=tuple(cases)), track=track)
        data = {"normalisation": parts.config.data.normalisation}
        ready[name] = config.model_copy(update={"data": config.data.model_copy(update=data)})
    return ready


def _raced(
    configs: Mapping[str, Config],
    dataset: Dataset,
    cases: tuple[Sequence[CaseFiles], Sequence[CaseFiles]],
    *,
    seconds: float,
    cache: Path,
    track: Track,
) -> list[list[Entry]]:
    """The rounds of a race that takes about `seconds`; a round without time is left out.

    The time includes scoring. If this takes so long that the time is over before the last candidate
    of a round has begun, this round does not count.

    Args:
        configs: the config of each candidate, by name; the first is the plan of the rules.
        dataset: the dataset.
        cases: the cases to train on, and those that score.
        seconds: time of the whole race.
        cache: the folder of prepared cases.
        track: shows the progress over candidates.
    """
    started, each = time.monotonic(), seconds / shortest_trainings(len(configs))
    rounds: list[list[Entry]] = []
    names = list(configs)
    by_rule = names[0]
    while len(names) > 1:
        if time.monotonic() - started + len(names) * each > 1.2 * seconds and rounds:
            break
        found: dict[str, Any] = {}
        for name in track(names, f"racing for {each:.0f} s each", len(names)):
            if time.monotonic() - started > seconds:
                return rounds
            found[name] = _entry(configs[name], dataset, cases, each, cache)
        dice = dice_in_common({name: of_cases for name, (of_cases, _) in found.items()})
        rounds.append([Entry(name, each, found[name][1], dice[name]) for name in names])
        ordered = sorted(rounds[-1], key=lambda entry: -_merit(entry, by_rule))
        names = [entry.candidate for entry in ordered[: math.ceil(len(ordered) / 2)]]
        each *= 2
    return rounds


def _entry(
    config: Config,
    dataset: Dataset,
    cases: tuple[Sequence[CaseFiles], Sequence[CaseFiles]],
    seconds: float,
    cache: Path,
) -> tuple[dict[str, dict[str, float]], int]:
    """Train and score one candidate in `seconds`: the Dice of each case, and the steps it did.

    Windows do not overlap here: in 3D they cost an eighth of those that do, which leaves more time
    for training.

    Args:
        config: the config of the candidate.
        dataset: the dataset.
        cases: the cases to train on, and those that score.
        seconds: time to train and score.
        cache: the folder of prepared cases.
    """
    ends = time.monotonic() + seconds
    short = shortened_for_race(config, (1 - SHARE_OF_SCORING) * seconds, cache)
    with _without_warnings(), tempfile.TemporaryDirectory(prefix="segkit-race-") as folder:
        run = train(short, runs=folder, dataset=replace(dataset, cases=tuple(cases[0])))
        scores = score(
            run.model, dataset, cases[1], untracked, until=ends, overlap=0.0, engine="torch"
        )
    return scores["dice_of_cases"], run.summary["steps"]


@contextmanager
def _without_warnings() -> Iterator[None]:
    """A candidate's training is short on purpose, and its split is not the run's: no warnings."""
    with only_errors("segkit.training"), only_errors("segkit.data.split"):
        yield


def shortened_for_race(config: Config, seconds: float, cache: Path) -> Config:
    """The config of a candidate's short training, on all cases that it gets."""
    minutes = config.train.minutes
    assert minutes is not None, "only plans for a time can race"
    steps = max(round(config.train.steps * seconds / (60 * minutes)), 1)
    data: dict[str, Any] = {**ALL_TRAIN, "first_stage": None, "cache": cache}
    short: dict[str, Any] = {"minutes": seconds / 60, "steps": steps, "validate_every": 10**6}
    short |= {"pictures": 0, "validation_cases": None}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update=short),
            "trainer": config.trainer.model_copy(update={"loggers": []}),
        }
    )


def dice_in_common(
    scores: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, float]:
    """The mean Dice of each candidate over the cases that all candidates had time to score."""
    common = sorted(set.intersection(*(set(cases) for cases in scores.values())))
    means: dict[str, float] = {}
    for name, cases in scores.items():
        values = np.array([list(cases[case].values()) for case in common], float)
        means[name] = float(np.nanmean(values)) if np.isfinite(values).any() else math.nan
    return means


def best_of(entries: Sequence[Entry], by_rule: str) -> str:
    """The candidate with the highest Dice, or `by_rule` if it is in the round and hardly worse."""
    return max(entries, key=lambda entry: _merit(entry, by_rule)).candidate


def _merit(entry: Entry, by_rule: str) -> float:
    """The Dice by which candidates are compared; the plan of the rules has a lead of MARGIN."""
    dice = -1.0 if math.isnan(entry.dice) else entry.dice
    return dice + MARGIN * (entry.candidate == by_rule)


def table(rounds: Sequence[Sequence[Entry]], chosen: str, num_cases: int) -> str:
    """The results of the race as lines of YAML comments; empty if there was no race.

    Args:
        rounds: the entries of each round.
        chosen: name of the chosen candidate.
        num_cases: number of cases that scored.
    """
    if not rounds:
        return ""
    lines = [
        f"# Chosen by mean Dice of at most {counted(num_cases, 'training case')} that the race "
        f"held out",
        "# (successive halving, Jamieson and Talwalkar 2016). The held-out cases of the run were "
        "not used.",
        f"# Another plan than the first must be better by {MARGIN:g}:",
    ]
    for name in [entry.candidate for entry in rounds[0]]:
        results = [
            f"{entry.dice:.3f} in {entry.seconds:.0f} s, {counted(entry.steps, 'step')}"
            for entries in rounds
            for entry in entries
            if entry.candidate == name
        ]
        mark = "  <- planned" if name == chosen else ""
        lines.append(f"#   {name:<14}" + "; ".join(results) + mark)
    return "\n".join(lines) + "\n"


def _with_table(planned: Planned, lines: str) -> Planned:
    head, name, rest = planned.text.partition("\nname: ")
    return replace(planned, text=f"{head}\n{lines.rstrip()}{name}{rest}" if lines else planned.text)
