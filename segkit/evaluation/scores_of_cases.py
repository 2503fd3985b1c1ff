"""Scores of each case, read from the file of an evaluation, a run or a cross-validation."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from segkit.errors import ConfigError
from segkit.evaluation.scores import ENDING_OF, METRICS, score_name
from segkit.io.picture_rules import MM_OF, Unit
from segkit.io.safe_text import read_json_object

SUMMARY_FILE = "summary.json"
ScoresOfCases: TypeAlias = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Scores by case, then class, then metric; NaN if a score is undefined."""


@dataclass(frozen=True)
class CaseTable:
    """Scores of the cases of a file, with lengths in mm or pixels."""

    scores: ScoresOfCases
    unit: Unit = "mm"
    """The unit of lengths in the file."""
    tolerances: Mapping[str, float] = field(default_factory=dict)
    """Tolerance of the NSD of each case, in mm or pixels, if the file has it."""


def scores_of_cases(path: Path) -> CaseTable:
    """Scores of each case of a file.

    Args:
        path: a file from `segkit evaluate --out`, or the folder of a run or cross-validation.

    Raises:
        ConfigError: if there are no scores.
    """
    source = path / SUMMARY_FILE if path.is_dir() else path
    if not source.is_file():
        raise ConfigError(
            f"{source}: no such file; give a file from segkit evaluate --out, or the folder of a "
            f"finished run or cross-validation"
        )
    unit: Unit = "mm"
    tolerances: dict[str, float] = {}
    try:
        content = read_json_object(source)
        if "cases" in content:
            found: dict[str, dict[str, dict[str, float]]] = {}
            for row in content["cases"]:
                unit = next(
                    (each for each in ENDING_OF if score_name("hd95_mm", each) in row), unit
                )
                scores = {
                    key: _number(row[name]) * (MM_OF[unit] if name != key else 1)
                    for key in METRICS
                    if (name := score_name(key, unit)) in row
                }
                found.setdefault(str(row["case"]), {})[str(row["name"])] = scores
                for each in ENDING_OF:
                    if (tolerance := score_name("tolerance_mm", each)) in row:
                        tolerances[str(row["case"])] = _number(row[tolerance]) * MM_OF[each]
        else:
            found = {
                case: {name: {"dice": _number(value)} for name, value in dice.items()}
                for case, dice in content["validation"]["dice_of_cases"].items()
            }
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{source}: cannot be read as JSON: {error}; make it again with segkit evaluate --out"
        ) from None
    except (KeyError, TypeError, AttributeError):
        found = {}
    if not found:
        raise ConfigError(
            f"{source}: contains no scores of cases; give a file from segkit evaluate --out, or "
            f"the folder of a run with held-out cases"
        )
    return CaseTable(found, unit, tolerances)


def _number(value: Any) -> float:
    return float("nan") if value is None else float(value)
