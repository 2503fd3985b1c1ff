"""The card of a shared model: README.md, in the form that model hubs read."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from segkit.config.data import CtWindowConfig
from segkit.config.model import ModelDescription
from segkit.config.training import SCHEDULE_OF
from segkit.errors import counted
from segkit.evaluation.scores import METRICS, Statistic
from segkit.export.shared_facts import Scores, SharedFacts, SharedVerdicts

HUB_LICENCES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0"),
    *("cc-by-nc-4.0", "cc-by-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0"),
    *("agpl-3.0", "mpl-2.0", "openrail", "unlicense"),
)
"""Licences that a hub knows by these names; it calls all others `other`."""
NOT_STATED = "The author has not stated it."
MEANT_FOR = (
    "Research. This is not a medical device; do not use its results for the care of patients. The "
    "author has not stated any other intended use."
)
KNOWN_LIMITS = (
    "Scores are those of the cases described above. The model may be worse on scans from other "
    "scanners, sites, protocols, ages or diseases, and it gives no warning. Try it on your own "
    "labelled scans first (`segkit evaluate`)."
)
SHORTEST_INTERVAL = 2
"""Smallest number of scores for which an interval is shown."""


@dataclass(frozen=True)
class AuthorsWords:
    """Statements of a model's author about it, as Markdown; None if one is not made."""

    licence: str | None = None
    data: str | None = None
    intended_use: str | None = None
    limits: str | None = None


def card_text(
    name: str,
    address: str,
    descriptions: Sequence[ModelDescription],
    facts: SharedFacts,
    words: AuthorsWords,
    *,
    picture: str | None = None,
) -> str:
    """The card as Markdown, with the header in YAML that model hubs read.

    Args:
        name: name of the model.
        address: the value of `--model` that loads it.
        descriptions: the description of the model, or of the model of each fold.
        facts: settings, scores and verdicts.
        words: the author's statements.
        picture: name of the file with a picture, if one is shared.
    """
    described = descriptions[0]
    names = _listed(list(described.labels)[1:])
    folds = f" {len(descriptions)} models, whose predictions are averaged." * (
        len(descriptions) > 1
    )
    parts = [
        _header(words, described),
        f"# {_plain(name)}",
        f"![A picture of the model's work]({picture})" if picture else "",
        f"Segments {names} in {_listed(described.channels)} ({described.network.spatial_dims}D). "
        f"Trained with segkit {described.segkit}.{folds}",
        "## Use",
        f"```sh\npip install 'segkit[hub]'\nsegkit predict scan.nii.gz --model {address}\n```",
        "Weights and settings are plain data and cannot run code. `SHA256SUMS` lists the checksums "
        "of the model; segkit compares them each time.",
        "## Labels",
        _table(
            ("number", "label"),
            ((number, label) for label, number in described.labelling.numbers_in_files.items()),
        ),
        "## Data",
        words.data or f"Source of the training data: {NOT_STATED[0].lower()}{NOT_STATED[1:]}",
        _cases(facts),
        "## Plan",
        _plan(described, facts),
        "## Scores",
        *_all_scores(facts),
        "## Verdicts on its gates",
        _verdicts(facts.verdicts),
        "## Licence",
        f"{words.licence}"
        if words.licence
        else f"{NOT_STATED} Without a licence, nobody but the "
        "author may use, change or pass on the weights.",
        "## Intended use",
        words.intended_use or MEANT_FOR,
        "## Limits",
        "\n\n".join(filter(None, [words.limits, KNOWN_LIMITS])),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _header(words: AuthorsWords, described: ModelDescription) -> str:
    header: dict[str, Any] = {
        "library_name": "segkit",
        "pipeline_tag": "image-segmentation",
        "tags": ["segkit", "medical", "segmentation", f"{described.network.spatial_dims}d"],
    }
    if words.licence:
        known = words.licence.lower()
        header["license"] = known if known in HUB_LICENCES else "other"
        if known not in HUB_LICENCES:
            header["license_name"] = words.licence
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---"


def _cases(facts: SharedFacts) -> str:
    trained = facts.training.get("training_cases")
    held_out = facts.held_out.cases if facts.held_out else None
    if facts.training.get("folds") and held_out:
        return (
            f"{counted(held_out, 'case')} in {counted(facts.training['folds'], 'fold')}: each "
            f"was held out by one model, and the others were trained on it."
        )
    if trained is None or held_out is None:
        return "The number of training cases is not known, because only the model was shared."
    others = f"{held_out} other{' was' if held_out == 1 else 's were'}"
    return f"The model was trained on {counted(trained, 'case')}; {others} held out to score it."


def _plan(described: ModelDescription, facts: SharedFacts) -> str:
    rows: list[tuple[str, Any]] = [
        ("voxel size (x, y, z)", f"{_times(described.spacing)} mm"),
        ("window", f"{_times(described.patch_size)} voxels"),
        ("normalisation", _listed(map(_normalisation, described.normalisation))),
        ("interpolation", described.interpolation),
    ]
    network = described.network
    if network.given is not None:
        rows.append(("network", "a module from Python, which is not shared"))
    else:
        kinds = network.attention.model_dump(mode="json")
        used = [f"{place}: {one['kind']}" for place, one in kinds.items() if _is_used(one)]
        rows += [
            ("channels of each level", ", ".join(map(str, network.channels))),
            ("attention", "; ".join(used) or "none"),
        ]
    if facts.config is not None:
        train = facts.config.train
        rows += [
            ("batch", facts.config.data.batch_size),
            (
                "optimiser",
                f"{train.optimiser}, schedule {train.schedule or SCHEDULE_OF[train.optimiser]}",
            ),
        ]
    told = {
        "parameters": "weights of the network",
        "steps": "steps",
        "seconds_of_training": "seconds of training",
        "seed": "seed",
    }
    rows += [
        (words, f"{facts.training[key]:,}") for key, words in told.items() if key in facts.training
    ]
    if described.temperature is not None:
        rows.append(("temperature", f"{described.temperature:.3f}, fitted on held-out cases"))
    return _table(("setting", "value"), rows)


def _is_used(section: Any) -> bool:
    return isinstance(section, Mapping) and section.get("kind") not in (None, "none")


def _normalisation(setting: Any) -> str:
    if isinstance(setting, CtWindowConfig):
        return f"CT window {setting.lower:g} to {setting.upper:g} HU"
    return str(getattr(setting, "kind", setting))


def _all_scores(facts: SharedFacts) -> Iterable[str]:
    if facts.held_out is None and facts.tested is None:
        yield "None were shared."
    if facts.held_out is not None:
        yield f"Scores of {counted(facts.held_out.cases, 'held-out case')} of the training:"
        yield _scores(facts.held_out)
        yield f"Note: {facts.held_out.note}." if facts.held_out.note else ""
    if facts.tested is not None:
        yield f"Scores of {counted(facts.tested.cases, 'case')}, computed by `segkit evaluate`:"
        yield _scores(facts.tested)
        yield f"Note: {facts.tested.note}." if facts.tested.note else ""


def _scores(scores: Scores) -> str:
    metrics = list(dict.fromkeys(metric for found in scores.classes.values() for metric in found))
    rows = [
        (name, _heading(metric, scores.unit), *_statistic_cells(metric, found[metric]))
        for name, found in scores.classes.items()
        for metric in metrics
        if metric in found
    ]
    return (
        _table(("class", "score", "mean", "95 % interval", "scored"), rows)
        + "\n\nIntervals are bootstrap intervals of the mean over cases. A class that is in "
        "neither image of a case has no score there."
    )


def _heading(metric: str, unit: str) -> str:
    return METRICS[metric].heading.replace("(mm)", f"({unit})")


def _statistic_cells(metric: str, value: Statistic) -> tuple[str, str, int]:
    def number(one: float) -> str:
        return "–" if math.isnan(one) else format(one, METRICS[metric].form)

    enough = value.num_scored >= SHORTEST_INTERVAL
    interval = f"{number(value.low)} to {number(value.high)}" if enough else "–"
    return number(value.mean), interval, value.num_scored


def _verdicts(verdicts: SharedVerdicts | None) -> str:
    if verdicts is None:
        return "Whether its attention maps matter was not judged (`segkit explain --verdicts`)."
    best: dict[str, Mapping[str, Any]] = {}
    for row in verdicts.rows:
        best.setdefault(str(row["map"]), row)
    rows = [(key, row["structure"], row["word"] or "–", row["reason"]) for key, row in best.items()]
    return (
        f"Over {counted(verdicts.scans, 'scan')}, the best verdict on each map; `verdicts.json` "
        "has all.\n\n" + _table(("map", "structure", "verdict", "reason"), rows)
    )


def _table(heading: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(_plain(str(cell)) for cell in line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, also in a cell of a table."""
    return "".join(f"\\{letter}" if letter in "|<>`*[]\\" else letter for letter in text)


def _listed(words: Iterable[str]) -> str:
    return ", ".join(_plain(word) for word in words)


def _times(numbers: Sequence[float]) -> str:
    return " × ".join(f"{number:g}" for number in numbers)
