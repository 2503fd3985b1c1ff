"""Facts of a run that may be shared: settings and scores, without paths and names of cases.

Each fact is taken by its name. A new setting of a config, or a new entry of a summary, is therefore
not shared until somebody adds it here.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from segkit.config.load import dump_yaml, load_config, validated
from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.errors import ModelError
from segkit.evaluation.scores import ENDING_OF, METRICS, Statistic, statistic_of
from segkit.evaluation.tolerance import tolerance_in_words
from segkit.io.checksums import checksum
from segkit.io.picture_rules import MM_OF, Unit
from segkit.io.safe_text import read_json_object
from segkit.model.file_names import CONFIG, FOLD, SUMMARY, WEIGHTS

OVERALL = "mean over classes"
OF_DATA = (
    *("nan", "spacing", "interpolation", "normalisation", "slices", "patch_size", "batch_size"),
    *("num_folds", "foreground_share", "draw_classes", "augment", "elastic", "mirror", "synthesis"),
)
OF_TRAINER = ("precision", "accumulate_grad_batches", "deterministic")
NOT_OF_TRAIN = ("start_from",)
OF_SUMMARY = ("steps", "seconds_of_training", "parameters", "seed", "training_cases")
OF_VERDICT = ("map", "channel", "structure", "direction", "word", "reason")
EXPLANATIONS = ("cohort.json", "measures.json")
"""The files of `segkit explain` that hold verdicts: over several scans, and of one scan."""
FOLDER = "my_dataset"
"""Text in place of the folder of the dataset."""
NOT_IN_NAMES = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class Scores:
    """A statistic of each metric, by class; the last is the mean over classes."""

    cases: int
    classes: Mapping[str, Mapping[str, Statistic]]
    note: str = ""
    unit: str = "mm"
    """The unit of lengths, also of those whose names end in _mm."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts and numbers."""
        classes = {
            name: {metric: asdict(value) for metric, value in found.items()}
            for name, found in self.classes.items()
        }
        return {
            "cases": self.cases,
            "unit": self.unit,
            "note": self.note,
            "classes": classes,
        }


@dataclass(frozen=True)
class SharedVerdicts:
    """Verdicts on gates, the best of each map first, and the number of scans behind them."""

    scans: int
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class SharedFacts:
    """All facts of a run that its card and its files tell."""

    config: Config | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    held_out: Scores | None = None
    tested: Scores | None = None
    verdicts: SharedVerdicts | None = None


def run_of(path: Path) -> Path | None:
    """The folder with the summary of a finished run or cross-validation; None if there is none."""
    for folder in (path, path.parent) if path.name == "model" else (path,):
        if (folder / SUMMARY).is_file():
            return folder
    return None


def facts_of_run(run: Path, name: str) -> SharedFacts:
    """The settings and the scores of a finished run or cross-validation.

    Args:
        run: its folder.
        name: the name under which it is shared.

    Raises:
        ModelError: its summary cannot be read.
        ConfigError: its config cannot be read.
    """
    configs = [run / CONFIG, *sorted(run.glob(f"{FOLD}*/{CONFIG}"))]
    config = next((shared_config(path, name) for path in configs if path.is_file()), None)
    summaries = [run / SUMMARY, *sorted(run.glob(f"{FOLD}*/{SUMMARY}"))]
    try:
        whole, *folds = [read_json_object(path) for path in summaries]
        first = folds[0] if folds else {}
        one_of_folds = {key: first[key] for key in ("parameters", "seed") if key in first}
        training = {key: whole[key] for key in OF_SUMMARY if key in whole} | one_of_folds
        training |= {"folds": len(folds)} if folds else {}
        if "versions" in whole:
            training["versions"] = {str(k): str(v) for k, v in whole["versions"].items()}
        return SharedFacts(config, training, _held_out(whole))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{run / SUMMARY}: cannot be read: {error!r}; repair it, or share {run}/model"
        ) from None


def shared_config(path: Path, name: str) -> Config:
    """The settings of a run that may be shared; those that name files or cases have defaults.

    Raises:
        ConfigError: the config cannot be read.
    """
    own = load_config(path).model_dump(mode="json")
    data = {key: own["data"][key] for key in OF_DATA}
    if not isinstance(own["data"]["validation"], list):
        data["validation"] = own["data"]["validation"]
    tree = {
        "name": NOT_IN_NAMES.sub("-", name).lstrip("_.-") or "shared",
        "data": {"folder": FOLDER, **data},
        "network": own["network"],
        "train": {key: value for key, value in own["train"].items() if key not in NOT_OF_TRAIN},
        "trainer": {key: own["trainer"][key] for key in OF_TRAINER},
        "replaced": own["replaced"],
    }
    return validated(Config, tree, str(path))


def config_text(config: Config) -> str:
    """A shared config as YAML."""
    return (
        "# The settings of the training. Those that name files, folders or cases are left out;\n"
        f"# data.folder stands for your own dataset.\n{dump_yaml(config)}"
    )


def _held_out(summary: Mapping[str, Any]) -> Scores:
    """Dice of the held-out cases of a run, from its summary."""
    validation = summary["validation"]
    names = list(validation["dice"])
    rows = [[case[name] for name in names] for case in validation["dice_of_cases"].values()]
    table = np.array(rows, np.float64).reshape(len(rows), len(names)).T
    each = {name: table[place][None] for place, name in enumerate(names)}
    if len(names) > 1:
        each[OVERALL] = table
    classes = {name: {"dice": statistic_of(values)} for name, values in each.items()}
    note = str(validation.get("note", ""))
    return Scores(len(rows), classes, note)


def tested_scores(path: Path, description: ModelDescription) -> Scores:
    """The scores that `segkit evaluate --out` wrote, without those of single cases.

    Raises:
        ModelError: the file cannot be read, or its classes are not those of the model.
    """
    try:
        content = read_json_object(path)
        unit: Unit = content["unit"]
        ending = ENDING_OF[unit]
        named = {key: key.replace("_mm", ending) for key in METRICS}
        classes = {}
        for one in [*content["classes"], content["overall"]]:
            shown = str(one["name"]) if one["label"] is not None else OVERALL
            if one["label"] is not None and shown not in description.labels:
                raise ModelError(
                    f"{path}: expected scores of {', '.join(list(description.labels)[1:])}, found "
                    f"{shown}; evaluate predictions of this model"
                )
            classes[shown] = {
                key: Statistic(**_numbers(one[name])) for key, name in named.items() if name in one
            }
        pixels, length = content.get("tolerance_pixels"), f"tolerance{ending}"
        own_pixels = pixels is not None and length not in content  # of a size of its own
        length_mm = None if own_pixels else float(content[length]) * MM_OF[unit]
        note = f"NSD within {tolerance_in_words(length_mm, pixels, unit)}"
        return Scores(int(content["num_cases"]), classes, note, unit)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: cannot be read as scores: {error!r}; give a file of segkit evaluate --out"
        ) from None


def _numbers(statistic: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: value if isinstance(value, int) else float("nan" if value is None else value)
        for key, value in statistic.items()
    }


def found_verdicts(run: Path, folders: Sequence[Path]) -> SharedVerdicts | None:
    """The verdicts on this model in the folder of its run: those over the most scans, if any."""
    found = []
    for name in EXPLANATIONS:
        for path in sorted(run.rglob(name)):
            try:
                found.append(read_verdicts(path, folders))
            except ModelError:  # it belongs to another model, or has no verdicts
                continue
    return max(found, key=lambda verdicts: verdicts.scans, default=None)


def read_verdicts(path: Path, folders: Sequence[Path]) -> SharedVerdicts:
    """The verdicts that `segkit explain --verdicts` wrote, without the scans behind them.

    Args:
        path: its `--out` folder, or the file `cohort.json` or `measures.json` in it.
        folders: the model folders that are shared.

    Raises:
        ModelError: there are none, or they are of another model.
    """
    inside = [path / name for name in EXPLANATIONS if (path / name).is_file()]
    path = inside[0] if inside else path
    try:
        content = read_json_object(path)
        judged = [one[WEIGHTS] for one in content["provenance"]["models"]]
        judgement = content.get("worth", content)  # in measures.json they lie one level deeper
        rows = [{key: one[key] for key in OF_VERDICT} for one in judgement["verdicts"]]
        scans = int(content.get("scans", 1))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path}: cannot be read as verdicts: {error!r}; give the folder of segkit explain "
            f"--verdicts"
        ) from None
    own = {checksum(folder / WEIGHTS) for folder in folders}
    if not rows or not set(judged) <= own:
        raise ModelError(
            f"{path}: expected verdicts on the gates of this model, found "
            f"{'those of another model' if rows else 'none'}; explain this model with --verdicts"
        )
    return SharedVerdicts(scans, rows)
