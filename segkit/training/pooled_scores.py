"""Scores of the folds of a cross-validation, pooled."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from jaxtyping import Float64
from numpy import ndarray

from segkit.evaluation.overlap import mean_of_defined
from segkit.inference.postprocess import Decision, class_means, decide
from segkit.provenance import versions

DiceOfCases: TypeAlias = Mapping[str, Mapping[str, float | None]]
"""Dice by case, then by class; None if a class is in neither prediction nor reference."""


def pool_folds(name: str, folds: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    """The summary of a cross-validation, from the summaries of its folds; their cases are pooled.

    `validation` holds the Dice before post-processing, in the form of a run's summary.
    `postprocessing` holds the selected operations and their effect on the Dice. Regions have no
    post-processing, because they overlap.
    """
    scores = {fold: summary["validation"] for fold, summary in folds.items()}
    first = next(iter(scores.values()))
    classes = list(first["dice"])
    dice_of_cases = _pooled(validation["dice_of_cases"] for validation in scores.values())
    raw = _table(dice_of_cases, classes)
    after = {
        operation: _table(
            _pooled(validation["dice_of_cases_after"][operation] for validation in scores.values()),
            classes,
        )
        for operation in first.get("dice_of_cases_after", {})
    }
    decision = decide(raw, after) if after else Decision(False, ())
    return {
        "run": name,
        "steps": sum(summary["steps"] for summary in folds.values()),
        "seconds_of_training": round(
            sum(summary["seconds_of_training"] for summary in folds.values()), 1
        ),
        "validation": {
            "note": "each case scored by the fold that held it out, before post-processing",
            "cases": len(raw),
            **_means(raw, classes),
            "dice_of_cases": dice_of_cases,
        },
        "folds": {
            str(fold): {
                "steps": summary["steps"],
                "seconds_of_training": summary["seconds_of_training"],
                **{key: scores[fold][key] for key in ("cases", "dice", "mean_dice")},
            }
            for fold, summary in folds.items()
        },
        "postprocessing": {
            "note": "selected if it raises the Dice of the cases above (Isensee et al. 2021)",
            "largest_foreground": decision.largest_foreground,
            "largest_of": [classes[column] for column in decision.largest_of],
            "adopted": _means(decision.dice(raw, after) if after else raw, classes),
            "after": {operation: _means(table, classes) for operation, table in after.items()},
        },
        "versions": versions("lightning"),
    }


def _pooled(folds: Iterable[DiceOfCases]) -> DiceOfCases:
    return {case: dice for fold in folds for case, dice in fold.items()}


def _table(cases: DiceOfCases, classes: Sequence[str]) -> Float64[ndarray, "case classes"]:
    """Dice as an array; null in JSON becomes NaN."""
    return np.array([[dice[name] for name in classes] for dice in cases.values()], np.float64)


def _means(table: Float64[ndarray, "case classes"], classes: Sequence[str]) -> dict[str, Any]:
    means = class_means(table)
    return {
        "dice": dict(zip(classes, means.tolist(), strict=True)),
        "mean_dice": mean_of_defined(means),
    }
