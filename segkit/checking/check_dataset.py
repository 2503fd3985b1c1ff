"""Description of a dataset as segkit reads it, from every case."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.checking.dataset_pictures import PictureSummary, range_of
from segkit.checking.understood import Understood, listed
from segkit.config.data import SplitDatasetConfig
from segkit.config.dataset_files import DatasetConfig
from segkit.config.labels import Labelling
from segkit.data.case_facts import facts_of_cases
from segkit.data.case_groups import groups_of, told_of_split
from segkit.data.dataset import Dataset, dataset_of, unlabelled
from segkit.data.folds import folds_of
from segkit.data.split import split_with
from segkit.data.split_settings import changed_split_settings
from segkit.errors import DatasetError, Problems, counted
from segkit.io.whole_numbers import rounded_in_words
from segkit.system.progress import Track

MOST_NUMBERS = 20
"""Most undeclared label numbers that are listed; the others are only counted."""
NNUNETS_NORMALISATIONS = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")
"""Names of channels, in small letters, by which nnU-Net selects a normalisation; CT is known here
too."""


def check_dataset(source: DatasetConfig, track: Track, *, cache: Path | None = None) -> Understood:
    """Description of a dataset: sizes, spacings and the voxels of each class, from every case.

    Each case is read and compared with the dataset's declaration.

    Args:
        source: settings of the dataset.
        track: shows the progress over cases.
        cache: the folder in which the facts of cases are stored if reading takes long, so that a
            check that was stopped can continue.

    Raises:
        DatasetError, VolumeError: cases are wrong; `problems` has a sentence for each.
    """
    dataset, folder = dataset_of(source), source.folder
    pictures = PictureSummary()
    shapes, spacings, problems, orientations = [], [], Problems(), set[str]()
    labelling = dataset.labelling
    groups = _groups(labelling)
    held = np.zeros(len(labelling.value_names), dtype=np.int64)
    present = np.zeros(len(groups), dtype=np.int64)
    undeclared, rounded = UndeclaredNumbers(), dict[str, float]()
    for examined in facts_of_cases(dataset, problems, cache=cache, track=track):
        known = examined.facts
        undeclared.add((examined.others or {}) if known is None else known.others)
        if known is None:
            continue
        pictures.add(known.name, known.picture)
        rounded.update(known.rounded)
        orientations.add(known.orientation)
        shapes.append(known.shape)
        spacings.append(known.spacing)
        of_case = np.array(known.voxels)
        held += of_case
        present += [of_case[list(numbers)].any() for numbers in groups.values()]
    if undeclared.voxels and labelling.others is None:
        with problems.noted():
            raise DatasetError(
                f"{folder}: expected only numbers that data.labels declares, found {undeclared}; "
                f"add them to data.labels, or set others there"
            )
    problems.refuse()
    voxels = [int(held[list(numbers)].sum()) for numbers in groups.values()]
    seen = set(np.flatnonzero(held).tolist())
    warning = unlabelled(dataset, seen, f"the {counted(len(dataset.cases), 'case')}")
    own = source if isinstance(source, SplitDatasetConfig) else None
    lines = [
        f"{folder}: {counted(len(dataset.cases), 'case')}, all readable and on their labels' grids",
        *([f"{len(dataset.test)} more kept for a test"] if dataset.test else []),
        *(_lines_of_split(dataset, own) if own else []),
        *told_of_split(dataset, source),
        *_lines_of_channels(dataset.channels),
    ]
    total = sum(math.prod(shape) for shape in shapes)
    if pictures.all:
        lines += pictures.lines(shapes, spacings)
    else:
        lines += [
            f"orientations: {', '.join(sorted(orientations))}",
            f"size in voxels (right-left, back-front, foot-head): {range_of(shapes, 'd')}",
            f"voxel size in mm: {range_of(spacings, '.3g')}",
        ]
    shares = {
        name: (int(cases), float(count / total))
        for name, cases, count in zip(groups, present, voxels, strict=True)
    }
    lines += _lines_of_labels(dataset, shares, undeclared)
    if (told := rounded_in_words(rounded)) is not None:
        lines.append(told)
    if warning:
        lines.append(f"warning: {warning}")
    facts = {
        "cases": [case.name for case in dataset.cases],
        "channels": list(dataset.channels),
        "orientations": sorted(orientations),
        "unit": dataset.unit,
        "notes": pictures.notes(),
        "shapes": shapes,
        "spacings_mm": spacings,
        "classes": [
            {"name": name, "cases": int(cases), "voxels": int(count)}
            for name, cases, count in zip(groups, present, voxels, strict=True)
        ],
        "unlabelled": {name: list(names) for name, names in dataset.unlabelled.items()},
        "rounded": rounded,
        "other_numbers": [
            {"number": number, "cases": undeclared.cases[number], "voxels": count}
            for number, count in sorted(undeclared.voxels.items())
        ],
    }
    return Understood("dataset", "\n".join(lines), facts)


def _lines_of_split(dataset: Dataset, data: SplitDatasetConfig) -> list[str]:
    """Lines on groups, folds and the sizes of both parts, if a setting of the split is changed.

    Raises:
        DatasetError, ConfigError: the split does not fit the dataset.
    """
    lines: list[str] = []
    if not changed_split_settings(data):
        return lines
    if (groups := groups_of(dataset, data)) is not None:
        lines.append(f"{len(groups)} groups stay together (data.group_by)")
    if data.splits is not None or data.fold is not None:
        folds = folds_of(dataset, data)
        lines.append(f"{len(folds)} folds ({folds.source})")
    train, held_out = split_with(dataset, data, seed=0)
    part = "" if data.fold is None and data.splits is None else f"fold {data.fold or 0}: "
    lines.append(f"{part}{counted(len(train), 'case')} to train on, {len(held_out)} held out")
    return lines


def _lines_of_channels(channels: Sequence[str]) -> list[str]:
    """The channels, and those whose names ask nnU-Net for a normalisation that segkit lacks."""
    lines = [f"channels: {', '.join(channels)}"]
    if asked := [name for name in channels if name.lower() in NNUNETS_NORMALISATIONS]:
        lines.append(
            f"{', '.join(asked)}: nnU-Net reads this name as a normalisation that segkit does not "
            f"have; segkit normalises each image to mean 0 and standard deviation 1"
        )
    return lines


def _lines_of_labels(
    dataset: Dataset, shares: Mapping[str, tuple[int, float]], undeclared: "UndeclaredNumbers"
) -> list[str]:
    """Lines on each class (its number of cases, its share of voxels), then on partial labels.

    Args:
        dataset: the dataset.
        shares: for each class, the number of its cases and its share of the voxels.
        undeclared: numbers in label files that belong to no name.
    """
    labelling = dataset.labelling
    lines = [
        f"{name}: in {counted(cases, 'case')}, {share:.2%} of voxels"
        for name, (cases, share) in shares.items()
    ]
    lines += [
        f"case {name} has no labels of {listed(names)}"
        for name, names in list(dataset.unlabelled.items())[:MOST_NUMBERS]
    ]
    if (more := len(dataset.unlabelled) - MOST_NUMBERS) > 0:
        lines.append(f"{counted(more, 'more case')} {'is' if more == 1 else 'are'} partly labelled")
    if labelling.others is not None:
        name = labelling.value_names[labelling.others]
        lines.append(
            f"other numbers, read as {name}: {undeclared if undeclared.voxels else 'none'}"
        )
    return lines


@dataclass(frozen=True)
class UndeclaredNumbers:
    """Undeclared numbers in label files, with the voxels and cases of each."""

    voxels: Counter[int] = field(default_factory=Counter)
    cases: Counter[int] = field(default_factory=Counter)

    def add(self, found: Mapping[int, int]) -> None:
        """Add the undeclared numbers of a case, with their voxels."""
        self.voxels.update(found)
        self.cases.update(found.keys())

    def __str__(self) -> str:
        texts = [
            f"{number} ({counted(self.voxels[number], 'voxel', form=',')} in "
            f"{counted(self.cases[number], 'case')})"
            for number in sorted(self.voxels)
        ]
        return ", ".join(
            [*texts[:MOST_NUMBERS], *[f"{len(texts) - MOST_NUMBERS} more"]][: len(texts)]
        )


def _groups(labelling: Labelling) -> dict[str, tuple[int, ...]]:
    """Label numbers of each class or region and of the ignored label, by their printed names."""
    groups: dict[str, tuple[int, ...]] = {}
    for name, number in labelling.numbers.items():
        if not labelling.regions:
            groups[f"label {_in_files(labelling, number)} {name}"] = (number,)
        elif name in labelling.regions:
            numbers = labelling.regions[name]
            told = listed(labelling.in_file(each) for each in numbers)
            groups[f"region {name} ({told}, written as {labelling.in_file(number)})"] = numbers
    if labelling.ignore is not None:
        ignored = _in_files(labelling, labelling.ignore)
        groups[" ".join(f"label {ignored} ignore, left out".split())] = (labelling.ignore,)
    return groups


def _in_files(labelling: Labelling, number: int) -> str:
    """The numbers in files that one of segkit's label numbers stands for, such as "17, 53"."""
    return listed(labelling.in_files[number]) if labelling.in_files else str(number)
