"""Compare how well doubt tells errors: entropy of one network, mirror images, MC dropout, ensemble.

    python benchmarks/uncertainty.py CONFIG.yaml [--members 3] [--samples 8] [--out FILE.json]

All methods predict the same held-out cases. CONFIG is trained once for each member of the ensemble
(Lakshminarayanan et al. 2017), with the seeds 0, 1, …, and once with dropout after each block of
the encoder (Gal and Ghahramani 2016), which stays on in prediction. The first member alone and with
mirror images are the other two. Each run takes as long as CONFIG says (`train.minutes` or
`train.steps`); a finished run is not trained again.

For each method: mean Dice; ECE and Brier score of voxels in question; the area under the ROC curve
with which the doubt of a voxel in question tells that its label is wrong; and Spearman's
correlation over cases of mean doubt and 1 - Dice. Doubt is the entropy of the mean probabilities,
and the variance between answers. Figures are of one training each: small differences mean nothing.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from scipy.stats import rankdata, spearmanr
from torch import Tensor, nn

from segkit.config.load import changed, load_config
from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset, dataset_of, read_case
from segkit.data.split import split_of
from segkit.errors import ConfigError
from segkit.evaluation.calibration import IN_QUESTION, Calibration
from segkit.evaluation.dice import dice_of
from segkit.inference.predictor import Predictor
from segkit.io.atomic import write_json
from segkit.io.volume import Volume
from segkit.model.file_names import SUMMARY
from segkit.model.folder import Model, load_model
from segkit.nn.network import unet_of
from segkit.nn.unet import UNet
from segkit.training.fit import fit
from segkit.training.parts import prepare


@dataclass
class Method:
    """What is measured of one way to doubt."""

    calibration: Calibration
    dice: dict[str, float] = field(default_factory=dict)
    entropy: list[ndarray] = field(default_factory=list)
    variance: list[ndarray] = field(default_factory=list)
    wrong: list[ndarray] = field(default_factory=list)
    mean_variance: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """The row of a table."""
        wrong = np.concatenate(self.wrong)
        cases = list(self.dice)
        errors = [1 - self.dice[case] for case in cases]
        spread = [self.mean_variance[case] for case in cases]
        told = len(cases) > 2 and np.ptp(spread) > 0 and np.ptp(errors) > 0
        return {
            "cases": len(cases),
            "mean_dice": float(np.nanmean(list(self.dice.values()))),
            "ece_in_question": self.calibration.in_question.ece,
            "brier_in_question": self.calibration.in_question.brier,
            "auroc_of_entropy": auroc(np.concatenate(self.entropy), wrong),
            "auroc_of_variance": auroc(np.concatenate(self.variance), wrong),
            "spearman_of_entropy": self.calibration.correlation(self.dice),
            "spearman_of_variance": float(spearmanr(spread, errors).statistic) if told else np.nan,
        }


def auroc(doubt: ndarray, wrong: ndarray) -> float:
    """The chance that a wrong voxel is doubted more than a right one; NaN if all are alike."""
    bad = int(wrong.sum())
    good = len(wrong) - bad
    if not bad or not good or np.ptp(doubt) == 0:
        return float("nan")
    return float((rankdata(doubt)[wrong].sum() - bad * (bad + 1) / 2) / (bad * good))


class KeptDropout(nn.Module):
    """Dropout of whole channels that stays on in prediction."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share = share

    def forward(self, features: Tensor) -> Tensor:
        """The features, some channels of which are 0."""
        return torch.feature_dropout(features, self.share, True)


class TrainedDropout(KeptDropout):
    """The same in training only."""

    def forward(self, features: Tensor) -> Tensor:
        """The features, in training without some channels."""
        return torch.feature_dropout(features, self.share, self.training)


def with_dropout(network: nn.Module, layer: KeptDropout) -> nn.Module:
    """The network with dropout after each encoder block; its weights keep their names."""
    unet = unet_of(network)  # type: ignore[arg-type]
    if not isinstance(unet, UNet):
        raise ConfigError("dropout is put into segkit's own U-Nets only; leave network.given out")
    for level in unet.encoder:
        assert isinstance(level, nn.Sequential)
        if not isinstance(level[2], nn.Identity):
            raise ConfigError("dropout takes the place of encoder attention; configure none")
        level[2] = layer
    return network


def trained(config: Config, runs: Path, name: str, seed: int, dropout: float = 0.0) -> Model:
    """The model of a finished run, trained if there is none."""
    folder = runs / name
    if not (folder / SUMMARY).is_file():
        parts = prepare(changed(config, [f"name={name}", f"train.seed={seed}"]), runs=runs)
        if dropout:
            parts = replace(parts, network=with_dropout(parts.network, TrainedDropout(dropout)))
        fit(parts, runs=runs)
    return load_model(folder)


def answers(predictor: Predictor, scan: Volume, samples: int) -> tuple[ndarray, ndarray | None]:
    """Mean probabilities (x, y, z, output) and, of several answers, the variance of each voxel."""
    shares, total, squares = None, 0.0, 0.0
    for _ in range(samples):
        found = predictor(scan, probabilities=True, uncertainty=samples == 1)
        assert found.probabilities is not None
        shares = found.probabilities.data.astype(np.float64)
        if samples == 1:
            assert found.variance is not None
            return shares, found.variance.data
        total, squares = total + shares, squares + shares**2
    mean = total / samples
    variance: ndarray = np.maximum(squares / samples - mean**2, 0).mean(axis=-1)
    return mean, variance


def add(
    method: Method, case: CaseFiles, dataset: Dataset, shares: ndarray, spread: ndarray
) -> None:
    """Measure one case."""
    _, label = read_case(case, dataset)
    labels = shares.argmax(axis=-1)
    method.calibration.add(case.name, shares, label.data)
    dice = dice_of(labels, label.data, dataset.labelling)
    method.dice[case.name] = float(np.nanmean(dice)) if np.isfinite(dice).any() else np.nan
    asked = shares[..., 0] <= 1 - IN_QUESTION
    known = np.maximum(shares[asked], 1e-12)
    method.entropy.append(-(known * np.log(known)).sum(axis=-1) / np.log(shares.shape[-1]))
    method.variance.append(spread[asked])
    method.wrong.append((labels != label.data)[asked])
    method.mean_variance[case.name] = float(spread[asked].mean()) if asked.any() else 0.0


def compared(
    config: Config, runs: Path, members: int, samples: int, dropout: float
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each method and its figures."""
    dataset = dataset_of(config.data)
    if dataset.labelling.regions:
        raise ConfigError("regions have no largest probability; give a dataset of classes")
    models = [trained(config, runs, f"member_{seed}", seed) for seed in range(members)]
    dropped = trained(config, runs, "dropout", 0, dropout)
    with_dropout(dropped.network, KeptDropout(dropout))
    torch.manual_seed(0)
    ways = {
        "one network": (Predictor(models[0], engine="torch"), 1),
        "mirror images": (Predictor(models[0], engine="torch", tta=True), 1),
        f"MC dropout, {samples} samples": (Predictor(dropped, engine="torch"), samples),
        f"ensemble of {members}": (Predictor(models, engine="torch"), 1),
    }
    held_out = split_of(dataset, config).held_out
    background = {next(iter(dataset.labelling.numbers)): (0,)}
    for name, (predictor, times) in ways.items():
        outputs = {**background, **dataset.labelling.members}
        method = Method(Calibration(outputs, False, dataset.labelling.ignore))
        for case in held_out:
            image, _ = read_case(case, dataset)
            shares, spread = answers(predictor, image, times)
            assert spread is not None
            add(method, case, dataset, shares, spread)
        yield name, method.figures()


def main() -> None:
    """Train what is missing, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", help="KEY=VALUE")
    parser.add_argument("--runs", type=Path, default=Path("runs_uncertainty"))
    parser.add_argument("--members", type=int, default=3)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    options = parser.parse_args()
    config = load_config(options.config, options.overrides)
    table = {}
    for name, figures in compared(
        config, options.runs, options.members, options.samples, options.dropout
    ):
        table[name] = figures
        print(name, {key: round(value, 4) for key, value in figures.items()}, flush=True)
    if options.out:
        write_json(options.out, {"config": str(options.config), "methods": table})


if __name__ == "__main__":
    main()
