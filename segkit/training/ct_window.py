"""The intensity window of CT, measured in the foreground of the training cases."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from segkit.config.data import CtWindowConfig, NormalisationConfig
from segkit.data.case_processes import reading_processes
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.normalise import foreground_statistics
from segkit.errors import ConfigError, Problems
from segkit.system.progress import Track
from segkit.system.workers import attempted, in_processes

VALUES_FOR_WINDOW, FEWEST_VALUES = 10_000_000, 1000
"""A window is measured from about so many foreground values of all cases, and from at least so many
of each case that has them."""


def with_windows(
    settings: Sequence[NormalisationConfig],
    dataset: Dataset,
    cases: Sequence[CaseFiles],
    track: Track,
) -> list[NormalisationConfig]:
    """The settings, with missing values of CT windows measured in the foreground of the cases.

    Args:
        settings: the normalisation of each channel.
        dataset: the dataset.
        cases: the training cases.
        track: shows the progress over cases.

    Raises:
        DatasetError, VolumeError: a case cannot be read.
        ConfigError: no case has foreground.
        WorkerError: a process that read cases was killed.
    """
    if not any(_incomplete(setting) for setting in settings):
        return list(settings)
    foreground: list[list[np.ndarray]] = [[] for _ in settings]
    draw = partial(
        _drawn,
        dataset=replace(dataset, cases=()),
        count=max(VALUES_FOR_WINDOW // len(cases), FEWEST_VALUES),
    )
    numbered = list(enumerate(cases))
    drawn = in_processes(partial(attempted, draw), numbered, reading_processes(cases, dataset))
    problems = Problems()
    for found in problems.results(track(drawn, "measuring intensities", len(cases))):
        for channel, inside in enumerate(found):
            foreground[channel].append(inside)
    problems.refuse()
    measured: list[NormalisationConfig] = []
    for setting, parts in zip(settings, foreground, strict=True):
        values = np.concatenate(parts)
        if not isinstance(setting, CtWindowConfig) or not _incomplete(setting):
            measured.append(setting)
            continue
        if not len(values):
            raise ConfigError(
                "data.normalisation: the CT window cannot be measured, because no case has "
                "foreground; give its values"
            )
        statistics = dict(
            zip(("lower", "upper", "mean", "std"), foreground_statistics(values), strict=True)
        )
        given = setting.model_dump(exclude_none=True)
        measured.append(CtWindowConfig.model_validate({**statistics, **given}))
    return measured


def _drawn(numbered: tuple[int, CaseFiles], dataset: Dataset, count: int) -> list[np.ndarray]:
    """At most `count` foreground values of each channel of a case, drawn with its number as seed.

    So they do not depend on the number of processes that draw.
    """
    number, case = numbered
    random = np.random.default_rng((1234, number))
    image, label = read_case(case, dataset)
    foreground = dataset.foreground(label.data)
    channels = [values[foreground] for values in np.moveaxis(image.data, 3, 0)]
    return [
        (random.choice(inside, count) if len(inside) > count else inside).astype(np.float64)
        for inside in channels
    ]


def _incomplete(setting: NormalisationConfig) -> bool:
    return isinstance(setting, CtWindowConfig) and None in (
        setting.lower,
        setting.upper,
        setting.mean,
        setting.std,
    )
