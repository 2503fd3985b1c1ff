"""Dice of whole held-out cases on their own grids: what a run says of itself."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.label_numbers import volume_as_in_files, within
from segkit.evaluation.overlap import Overlap, mean_of_defined
from segkit.evaluation.temperature import HeldOutVoxels
from segkit.inference.postprocess import Operation, class_means
from segkit.inference.predictor import Predictor
from segkit.io.disk_arrays import in_memory
from segkit.io.volume import read_volume
from segkit.model.folder import Model
from segkit.system.progress import Track
from segkit.training.held_out_files import HeldOutFiles

logger = logging.getLogger(__name__)


def score(
    model: Model,
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    track: Track,
    *,
    device: str = "auto",
    first_labels: Mapping[str, Path] | None = None,
    operations: Mapping[str, Operation] = MappingProxyType({}),
    until: float = math.inf,
    files: HeldOutFiles | None = None,
    voxels: HeldOutVoxels | None = None,
) -> dict[str, Any]:
    """Mean Dice over held-out cases, per class and over classes, each case on its own grid.

    Or of regions, as they come out of the labels that are written. Ignored voxels do not count. Of
    a partly labelled case only what is labelled does; the rest is NaN.
    `first_labels` are files with the labels that a first stage gives each case: those of its models
    that held the case out, where the whole first stage would do better than on a new case.
    Of each of the `operations` on predicted labels, by name, the Dice of every case after it, as
    `dice_of_cases_after`: all that a cross-validation must know to adopt one.
    `files` keeps predictions, if it is given, and `voxels` draws some with their probabilities, of
    cases that are labelled whole.
    `until` is the monotonic clock's time at which scoring should be over: at least one case is
    scored, and then as many more as fit.
    """
    predictor = Predictor(model, device=device)
    labelling = dataset.labelling
    names = list(labelling.members)
    dice: dict[str, list[float]] = {}
    after: dict[str, dict[str, list[float]]] = {name: {} for name in operations}
    told_right: list[list[float]] = []
    started = time.monotonic()
    for case in track(cases, "scoring", len(cases)):
        now = time.monotonic()
        if dice and now + (now - started) / len(dice) > until:
            logger.warning(
                "%d of %d held-out cases are scored: the time is over; segkit predict and segkit "
                "evaluate score the others",
                len(dice),
                len(cases),
            )
            break
        image, label = read_case(case, dataset)
        unlabelled = dataset.unlabelled.get(case.name, ())
        first = None
        if first_labels:
            stage = model.first[0].description.labelling
            first = volume_as_in_files(read_volume(first_labels[case.name]), stage)
        drawn = voxels if voxels is not None and not unlabelled else None
        prediction = predictor(
            image,
            first_labels=first,
            probabilities=drawn is not None or (files is not None and files.probabilities),
            allocate=files.allocate if files is not None else in_memory,
        )
        if files is not None:
            files.write(case, prediction)
        if drawn is not None and prediction.probabilities is not None:
            shares = prediction.probabilities.data
            drawn.add(shares if shares.ndim == 4 else shares[..., None], label.data)
        found = within(prediction.labels.data, labelling)
        if prediction.presence is not None:
            told_right.append(
                [
                    np.nan
                    if name in unlabelled
                    else (prediction.presence[name] > 0.5)
                    == bool(np.isin(label.data, numbers).any())
                    for name, numbers in labelling.members.items()
                ]
            )
        known = np.array([np.nan if name in unlabelled else 1.0 for name in names])
        dice[case.name] = (known * dice_of(found, label.data, labelling)).tolist()
        for name, operation in operations.items():
            treated = operation(found)
            after[name][case.name] = (known * dice_of(treated, label.data, labelling)).tolist()
    table = np.array(list(dice.values())).reshape(len(dice), len(names))
    means = class_means(table)

    def told_by_name(rows: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
        return {case: dict(zip(names, row, strict=True)) for case, row in rows.items()}

    more: dict[str, Any] = {}
    if told_right:
        right = class_means(np.array(told_right, np.float64)).tolist()
        more["presence_accuracy"] = dict(zip(names, right, strict=True))
    if len(dice) < len(cases):
        more["held_out"] = [case.name for case in cases]
    if after:
        more["dice_of_cases_after"] = {name: told_by_name(rows) for name, rows in after.items()}
    return {
        "cases": len(dice),
        "dice": dict(zip(names, means.tolist(), strict=True)),
        "mean_dice": mean_of_defined(means),
        "dice_of_cases": told_by_name(dice),
        **more,
    }


def dice_of(
    prediction: Integer[ndarray, "*space"],
    reference: Integer[ndarray, "*space"],
    labelling: Labelling,
) -> list[float]:
    """The Dice of each class but the background, or of each region; NaN of one that is in neither.

    Voxels that the reference ignores do not count.
    """
    overlap = Overlap.of_labels(
        prediction,
        reference,
        list(labelling.members.values()),
        num_labels=len(labelling.value_names),
        ignore=labelling.ignore,
    )
    dice: list[float] = overlap.dice.tolist()
    return dice
