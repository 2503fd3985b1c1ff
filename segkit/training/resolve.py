"""What a config leaves open, settled by the dataset that it names."""

from collections.abc import Sequence

import numpy as np

from segkit.config.data import CtWindowConfig, NormalisationConfig, ZScoreConfig
from segkit.config.model import ModelDescription, description_of
from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset, fold_of, read_case, split
from segkit.data.normalise import foreground_statistics
from segkit.data.preprocess import median_spacing
from segkit.errors import ConfigError, DatasetError
from segkit.io.volume import read_grid
from segkit.system.progress import Track


def split_of(
    dataset: Dataset, config: Config
) -> tuple[tuple[CaseFiles, ...], tuple[CaseFiles, ...]]:
    """The cases to train on and those held out."""
    if config.data.fold is not None:
        return fold_of(dataset, config.data.fold)
    return split(dataset, config.data.validation, config.train.seed)


def describe(
    config: Config, dataset: Dataset, train_cases: Sequence[CaseFiles], track: Track
) -> ModelDescription:
    """What the model will be, with spacing and normalisation settled by the training cases."""
    spacing = config.data.spacing or median_spacing([read_grid(case.label) for case in train_cases])
    settings: list[NormalisationConfig] = [
        config.data.normalisation or (CtWindowConfig() if name.lower() == "ct" else ZScoreConfig())
        for name in dataset.channels
    ]
    return description_of(
        config,
        channels=dataset.channels,
        labelling=dataset.labelling,
        codes=dataset.codes,
        spacing=spacing,
        normalisation=_measured(settings, dataset, train_cases, track),
    )


def check_images(
    config: Config,
    dataset: Dataset,
    train_cases: Sequence[CaseFiles],
    held_out: Sequence[CaseFiles],
) -> None:
    """Cases without an image can be trained on by synthesis alone, and never scored.

    Raises DatasetError or ConfigError, in one sentence.
    """
    needed = held_out if config.data.synthesis else (*train_cases, *held_out)
    for case in needed:
        if not case.images:
            raise DatasetError(
                f"{dataset.folder}: case {case.name} has no image; give it one, or train on it by "
                f"data.synthesis and hold out others by data.validation"
            )
    if config.data.synthesis and len(dataset.channels) > 1:
        raise ConfigError(
            f"data.synthesis draws one channel; {dataset.folder} has {len(dataset.channels)}"
        )


def _measured(
    settings: Sequence[NormalisationConfig],
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    track: Track,
) -> list[NormalisationConfig]:
    """The settings, with what a CT window lacks read off the foreground of the cases."""
    if not any(_incomplete(setting) for setting in settings):
        return list(settings)
    foreground: list[list[np.ndarray]] = [[] for _ in settings]
    random = np.random.default_rng(1234)
    per_case = max(10_000_000 // len(cases), 1000)
    for case in track(cases, "measuring intensities", len(cases)):
        image, label = read_case(case, dataset)
        for channel, values in enumerate(np.moveaxis(image.data, 3, 0)):
            inside = values[dataset.foreground(label.data)]
            if len(inside) > per_case:
                inside = random.choice(inside, per_case)
            foreground[channel].append(inside.astype(np.float64))
    measured: list[NormalisationConfig] = []
    for setting, parts in zip(settings, foreground, strict=True):
        values = np.concatenate(parts)
        if not isinstance(setting, CtWindowConfig) or not _incomplete(setting):
            measured.append(setting)
            continue
        if not len(values):
            raise ConfigError("data.normalisation: no case has foreground; give the CT window")
        statistics = dict(
            zip(("lower", "upper", "mean", "std"), foreground_statistics(values), strict=True)
        )
        given = setting.model_dump(exclude_none=True)
        measured.append(CtWindowConfig.model_validate({**statistics, **given}))
    return measured


def _incomplete(setting: NormalisationConfig) -> bool:
    return isinstance(setting, CtWindowConfig) and None in (
        setting.lower,
        setting.upper,
        setting.mean,
        setting.std,
    )
