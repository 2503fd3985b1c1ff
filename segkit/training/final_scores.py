"""Final scores of a run: Dice of whole held-out cases on their own grids."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Unpack

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint

from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.label_numbers import volume_as_in_files, within
from segkit.evaluation.dice import dice_of
from segkit.evaluation.overlap import mean_of_defined
from segkit.evaluation.temperature import HeldOutVoxels, Temperature
from segkit.inference.model_walk import PredictionOptions
from segkit.inference.postprocess import Operation, candidates, class_means
from segkit.inference.predictor import Predictor
from segkit.io.disk_arrays import in_memory
from segkit.io.volume import read_volume
from segkit.model.folder import Model
from segkit.system.progress import Track
from segkit.training.held_out_files import HeldOutFiles
from segkit.training.parts import TrainingParts
from segkit.training.time_budget import TimeBudget

logger = logging.getLogger(__name__)


def score(
    model: Model,
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    track: Track,
    *,
    first_labels: Mapping[str, Path] | None = None,
    operations: Mapping[str, Operation] = MappingProxyType({}),
    until: float = math.inf,
    files: HeldOutFiles | None = None,
    voxels: HeldOutVoxels | None = None,
    **options: Unpack[PredictionOptions],
) -> dict[str, Any]:
    """Dice of held-out cases: per case, as mean per class, and as mean over classes.

    Each case is scored on its own grid. Regions are scored as they are in the labels that are
    written. Ignored voxels do not count. Classes that nobody labelled in a case are NaN.

    Args:
        model: the trained model.
        dataset: the dataset of the cases.
        cases: the held-out cases.
        track: shows the progress over cases.
        first_labels: files with first-stage labels of each case. They come from the models that
            held the case out; models that were trained on it would do better than on a new case.
        operations: operations on predicted labels, by name. The Dice of every case after each
            operation is returned as `dice_of_cases_after`; a cross-validation selects by it.
        until: time of the monotonic clock at which scoring should end. At least one case is scored,
            and then as many as fit.
        files: writes the predictions, if given.
        voxels: receives voxels with their probabilities, from cases that are labelled completely.
        options: those of `Predictor`, such as `device`.

    Returns:
        The entry `validation` of the run's summary.

    Raises:
        DatasetError: a case cannot be read.
    """
    predictor = Predictor(model, **options)
    labelling = dataset.labelling
    names = list(labelling.members)
    dice: dict[str, list[float]] = {}
    after: dict[str, dict[str, list[float]]] = {name: {} for name in operations}
    presence_correct: list[list[float]] = []
    started = time.monotonic()
    for case in track(cases, "scoring", len(cases)):
        now = time.monotonic()
        if dice and now + (now - started) / len(dice) > until:
            logger.warning(
                "%d of %d held-out cases were scored before the time was over; use segkit predict "
                "and segkit evaluate to score the others",
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
            presence_correct.append(
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

    def by_class_name(rows: Mapping[str, list[float]]) -> dict[str, dict[str, float]]:
        return {case: dict(zip(names, row, strict=True)) for case, row in rows.items()}

    more: dict[str, Any] = {}
    if presence_correct:
        shares = class_means(np.array(presence_correct, np.float64)).tolist()
        more["presence_accuracy"] = dict(zip(names, shares, strict=True))
    if len(dice) < len(cases):
        more["held_out"] = [case.name for case in cases]
    if after:
        more["dice_of_cases_after"] = {name: by_class_name(rows) for name, rows in after.items()}
    return {
        "cases": len(dice),
        "dice": dict(zip(names, means.tolist(), strict=True)),
        "mean_dice": mean_of_defined(means),
        "dice_of_cases": by_class_name(dice),
        **more,
    }


def scored_model(model: Model, folder: Path, budget: TimeBudget | None) -> Model:
    """The model as the final scores use it.

    Only a model that lies in a folder is converted by OpenVINO (`choose_engine`), which takes up to
    half a minute and then needs half the time of PyTorch. So a timed run names the folder if its
    scores take longer than two such conversions. A run with a fixed number of steps never does, so
    that its scores are the same bit for bit everywhere.
    """
    if budget is None or not budget.scores_are_long:
        return model
    return replace(model, folder=folder)


def scores_of_run(
    parts: TrainingParts,
    config: Config,
    model: Model,
    trainer: L.Trainer,
    track: Track,
    until: float,
) -> tuple[dict[str, Any], Temperature | None]:
    """The scores of the run on its held-out cases, and the best score during training.

    With `train.calibrate`, also the temperature of its probabilities.
    """
    # Only a cross-validation selects post-processing, so only a fold measures it. Regions overlap:
    # removing a component of one would change others.
    adopts = config.data.fold is not None and not parts.dataset.regions
    best = trainer.checkpoint_callback
    assert isinstance(best, ModelCheckpoint)
    highest = best.best_model_score
    assert best.dirpath is not None
    labelling, keep = model.description.labelling, config.train.keep_held_out
    voxels = None
    if config.train.calibrate:
        background = {} if labelling.regions else {next(iter(labelling.numbers)): (0,)}
        voxels = HeldOutVoxels(
            {**background, **labelling.members},
            bool(labelling.regions),
            len(parts.split.held_out),
            labelling.ignore,
        )
    scores = {
        "note": "Dice of whole held-out volumes on their own grids, by the weights in model/",
        **score(
            model,
            parts.dataset,
            parts.split.held_out,
            track,
            device=str(trainer.strategy.root_device),
            first_labels=parts.first_labels,
            operations=candidates(list(model.description.labels.values())[1:]) if adopts else {},
            # A cross-validation needs all cases of a fold.
            until=until if config.data.fold is None else math.inf,
            files=None if keep == "nothing" else HeldOutFiles(Path(best.dirpath), keep),
            voxels=voxels,
        ),
        f"best_mean_{parts.validation.measure}_during_training": (
            None if highest is None else float(highest)
        ),
    }
    temperature = voxels.fit() if voxels is not None else None
    if temperature is None and voxels is not None:
        logger.warning(
            "train.calibrate: no held-out case is completely labelled, so no temperature is stored"
        )
    if temperature is not None and temperature.at_limit:
        logger.warning("train.calibrate: %s", temperature.told)
    return scores, temperature
