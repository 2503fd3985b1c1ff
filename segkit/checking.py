"""`segkit check`: describe a config, a dataset or a volume as segkit reads it."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from segkit.config.data import SplitDatasetConfig
from segkit.config.dataset_files import TABLE_SUFFIXES, DatasetConfig
from segkit.config.labels import Labelling
from segkit.config.load import dataset_in, dump_yaml, load_config
from segkit.data.case_facts import facts_of_cases
from segkit.data.case_groups import groups_of, told_of_split
from segkit.data.dataset import Dataset, dataset_of, unlabelled
from segkit.data.dicom_cases import told_tree
from segkit.errors import DatasetError, Problems, VolumeError, counted, first_few
from segkit.evaluation.evaluate import with_pixel_size
from segkit.geometry.grid import Orientation
from segkit.io.dicom import read_series
from segkit.io.dicom_labels import told_names
from segkit.io.dicom_listing import Series, choose_series, find_folders, holds_series, list_series
from segkit.io.dicom_tree import read_tree
from segkit.io.inputs import refuse_volumes_beside_series
from segkit.io.nan_values import value_problem
from segkit.io.nifti import placement
from segkit.io.picture_rules import MM_OF, WORD_OF, PictureFacts, size_in_words
from segkit.io.series_rules import SeriesRule
from segkit.io.volume import AS_IT_SAYS, Volume, read_volume
from segkit.io.whole_numbers import rounded_in_words
from segkit.model.build import build_network
from segkit.nn.cost import count_parameters
from segkit.system.progress import Track, untracked
from segkit.training.cascade import described, first_models
from segkit.training.folds import folds_of
from segkit.training.resolve import check_images, describe, resolve
from segkit.training.split import split_of

MOST_NUMBERS = 20
"""Most undeclared label numbers that are listed; the others are only counted."""
MOST_SHOWN = 40
"""Most labels, cases or maps that one line lists."""
NNUNETS_NORMALISATIONS = ("nonorm", "rescale_to_0_1", "rgb_to_0_1")
"""Names of channels, in small letters, by which nnU-Net selects a normalisation; CT is known here
too."""


@dataclass(frozen=True)
class Understood:
    """The result of `check`: a description of a config, a dataset, DICOM series or a volume.

    Example:
        understood = segkit.check("my_dataset")
        print(understood.text)
        understood.facts  # the same for programs
    """

    kind: Literal["config", "dataset", "series", "volume"]
    text: str
    """The description for a reader, in lines."""
    facts: Mapping[str, Any]
    """The description for a script, as plain dicts, lists and numbers; lengths are in mm."""

    def __str__(self) -> str:
        return self.text


def check(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    series: str | SeriesRule | None = None,
    pixel_size: Sequence[str] | None = None,
    cache: str | Path | None = None,
    track: Track = untracked,
) -> Understood:
    """Description of a config (.yaml), a dataset folder, DICOM series or a volume.

    Args:
        path: the file or folder to describe.
        overrides: changes to a config, such as "train.steps=500".
        series: the UID of a DICOM series in the folder, or a rule for the series in the folder and
            below it. If None, the folder's only series is described, or its several are listed.
        pixel_size: pixel size of a picture, such as ["4 nm"]; it replaces the file's own.
        cache: the folder in which the facts of a large dataset's cases are stored, so that a check
            that was stopped can continue. If None, nothing is stored.
        track: shows the progress over cases.

    Returns:
        The description, as text and as plain data.

    Raises:
        SegkitError: the config, the dataset or the file is wrong; the error names the place.

    Example:
        print(segkit.check("my_dataset"))
    """
    path = Path(path)
    if isinstance(series, str):
        return describe_series(path, series)
    if series is not None or (path.is_dir() and not _is_dataset(path) and _has_series(path)):
        if series is None and holds_series(path):
            refuse_volumes_beside_series(path)
            return describe_series(path, None)
        return describe_tree(path, series or SeriesRule())
    if path.is_dir() or path.suffix.lower() in (".yaml", ".yml", *TABLE_SUFFIXES):
        dataset = dataset_in(path, overrides)
        if dataset is None:
            return check_config(path, overrides, track)
        return check_dataset(dataset, track, cache=None if cache is None else Path(cache))
    rules = with_pixel_size(AS_IT_SAYS, pixel_size)
    return describe_volume(path, read_volume(path, rules=rules))


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset.json").exists()


def _has_series(folder: Path) -> bool:
    """Whether DICOM images lie in a folder, to any depth."""
    return any(holds_series(inner) for inner in find_folders(folder))


def describe_tree(folder: Path, rule: SeriesRule) -> Understood:
    """The DICOM series in a folder to any depth that a rule admits, and names of structures."""
    tree = read_tree(folder)
    chosen = tuple(series for series in tree.series if rule.admits(series, folder))
    tree = replace(tree, series=chosen)
    places = len({series.folder for series in chosen})
    lines = [f"{folder}: {len(chosen)} DICOM series in {places} folders", *told_tree(tree)]
    facts = {
        "series": [
            {**_series_facts(series), "folder": series.folder.relative_to(folder).as_posix()}
            for series in chosen
        ],
        "structures": dict(told_names(tree.structures)),
        "failures": list(tree.failures.values()),
    }
    return Understood("series", "\n".join(lines), facts)


def describe_series(folder: Path, uid: str | None) -> Understood:
    """Description of a DICOM series as a volume.

    If `uid` is None and the folder holds several series, the series are listed instead.
    """
    found = list_series(folder)
    if uid is None and len(found) > 1:
        lines = [f"{folder}: {len(found)} DICOM series; pass the UID of one as --series"]
        facts = {"series": [_series_facts(series) for series in found]}
        return Understood("series", "\n".join([*lines, *map(str, found)]), facts)
    chosen = choose_series(folder, uid)
    volume = describe_volume(folder, read_series(chosen))
    facts = {**volume.facts, "series": [_series_facts(chosen)]}
    return Understood("series", f"DICOM series {chosen}\n{volume}", facts)


def _series_facts(series: Series) -> dict[str, Any]:
    return {
        "uid": series.uid,
        "description": series.description,
        "modality": series.modality,
        "slices": len(series.slices),
    }


def check_config(path: Path, overrides: Sequence[str], track: Track) -> Understood:
    """Description of a config: every value that training uses, the network and the dataset."""
    config = load_config(path, overrides)
    dataset = dataset_of(config.data)
    split = train, held_out = split_of(dataset, config)
    check_images(config, dataset, train, held_out)
    first_stage = first_models(config.data.first_stage or (), dataset)
    resolved = resolve(config, dataset, split, track=track)
    description = described(describe(resolved, dataset), first_stage)
    network = build_network(description)
    parameters = count_parameters(network)
    maps = list(network.maps())
    text = (
        f"{dump_yaml(resolved)}"
        f"# values that come from the dataset, this machine or other settings: "
        f"{_listing(_changes(config, resolved)) or 'none'}\n"
        f"# {counted(len(train), 'case')} to train on, {len(held_out)} held out"
        f"{f', {len(dataset.test)} kept for a test' if dataset.test else ''}\n"
        f"# {_classes_in_words(dataset.labelling)}\n"
        f"# spacing {description.spacing} mm; normalisation "
        f"{[setting.model_dump() for setting in description.normalisation]}\n"
        f"# network: {parameters:,} parameters; attention maps: "
        f"{_listing(maps) or 'none'}"
    )
    facts = {
        "config": resolved.model_dump(mode="json"),
        "settled": _changes(config, resolved),
        "training_cases": [case.name for case in train],
        "held_out_cases": [case.name for case in held_out],
        "test_cases": list(dataset.test),
        "spacing_mm": list(description.spacing),
        "normalisation": [setting.model_dump() for setting in description.normalisation],
        "parameters": parameters,
        "maps": maps,
    }
    return Understood("config", text, facts)


def _changes(before: BaseModel, after: BaseModel) -> list[str]:
    """Dotted names of the settings whose values differ."""
    found = []
    for name in type(after).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and type(old) is type(new):
            found += [f"{name}.{inner}" for inner in _changes(old, new)]
        elif old != new:
            found.append(name)
    return found


def check_dataset(source: DatasetConfig, track: Track, *, cache: Path | None = None) -> Understood:
    """Description of a dataset: sizes, spacings and the voxels of each class, from every case.

    Each case is read and compared with the dataset's declaration. Raises DatasetError or
    VolumeError with one sentence for each wrong case. If this takes long, the facts of cases are
    stored in `cache`, and a check that was stopped continues.
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
            f"size in voxels (right-left, back-front, foot-head): {_range(shapes, 'd')}",
            f"voxel size in mm: {_range(spacings, '.3g')}",
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
    """Lines on groups and own folds, if settings beside a dataset ask for them."""
    lines = []
    if (groups := groups_of(dataset, data)) is not None:
        lines.append(f"{len(groups)} groups stay together (data.group_by)")
    if data.splits is not None or data.fold is not None:
        folds = folds_of(dataset, data)
        lines.append(f"{len(folds)} folds ({folds.source})")
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
    """Lines on each class (its number of cases, its share of voxels), then on partial labels."""
    labelling = dataset.labelling
    lines = [
        f"{name}: in {counted(cases, 'case')}, {share:.2%} of voxels"
        for name, (cases, share) in shares.items()
    ]
    lines += [
        f"case {name} has no labels of {_listing(names)}"
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
            listed = _listing(labelling.in_file(each) for each in numbers)
            groups[f"region {name} ({listed}, written as {labelling.in_file(number)})"] = numbers
    if labelling.ignore is not None:
        ignored = _in_files(labelling, labelling.ignore)
        groups[" ".join(f"label {ignored} ignore, left out".split())] = (labelling.ignore,)
    return groups


def _in_files(labelling: Labelling, number: int) -> str:
    """The numbers in files that one of segkit's label numbers stands for, such as "17, 53"."""
    return _listing(labelling.in_files[number]) if labelling.in_files else str(number)


def _listing(items: Iterable[object]) -> str:
    return first_few(items, MOST_SHOWN)


def _classes_in_words(labelling: Labelling) -> str:
    if labelling.regions:
        return f"regions: {_listing(labelling.regions)}"
    return f"labels: {_listing(labelling.numbers)}"


def describe_volume(path: Path, volume: Volume) -> Understood:
    """Description of a volume: size, spacing, orientation, position, codes and intensities."""
    grid, data = volume.grid, volume.data
    if trouble := value_problem(data):
        raise VolumeError(f"{path}: {trouble}")
    if volume.picture:
        return _describe_picture(path, volume, volume.picture)
    first = np.round(grid.affine[:3, 3], 2) + 0.0  # no minus sign before 0.00
    channels = data.shape[3] if data.ndim == 4 else 1
    orientation = Orientation.of(grid.affine).code
    lines = [
        f"{path}: {' x '.join(str(size) for size in grid.shape)} voxels of "
        f"{' x '.join(f'{size:.3g}' for size in grid.spacing)} mm, {data.dtype}, "
        f"{counted(channels, 'channel')}",
        f"axes run to {orientation}; the first voxel's centre lies at "
        f"({first[0]:.2f}, {first[1]:.2f}, {first[2]:.2f}) mm, RAS+",
    ]
    if volume.header is not None:
        lines.append(placement(volume.header))
    lines.append(f"values {data.min():g} to {data.max():g}, mean {data.mean(dtype=float):g}")
    facts = {
        "shape": list(grid.shape),
        "spacing_mm": list(grid.spacing),
        "affine": grid.affine.tolist(),
        "orientation": orientation,
        "channels": channels,
        "type": str(data.dtype),
        "values": [float(data.min()), float(data.max())],
    }
    return Understood("volume", "\n".join(lines), facts)


def _describe_picture(path: Path, volume: Volume, picture: PictureFacts) -> Understood:
    """Description of a picture: size, pixel size, values, and the notes on how it was read."""
    data, shape = volume.data, volume.grid.shape
    channels = data.shape[3] if data.ndim == 4 else 1
    axes = 3 if shape[2] > 1 else 2
    sizes = " x ".join(str(size) for size in shape[:axes])
    lines = [
        f"{path}: {sizes} pixels{', a stack,' * (axes == 3)} of "
        f"{size_in_words(volume.grid.spacing[:axes], picture.unit)} ({picture.source}), "
        f"{data.dtype}, {counted(channels, 'channel')}",
        *picture.notes,
        f"values {data.min():g} to {data.max():g}, mean {data.mean(dtype=float):g}",
    ]
    facts = {
        "shape": list(shape),
        "unit": picture.unit,
        "pixel_size_from": picture.source,
        "notes": list(picture.notes),
        "spacing_mm": list(volume.grid.spacing) if picture.sized else None,
        "affine": volume.grid.affine.tolist(),
        "channels": channels,
        "type": str(data.dtype),
        "values": [float(data.min()), float(data.max())],
    }
    return Understood("volume", "\n".join(lines), facts)


class PictureSummary:
    """Collects the facts and notes of a dataset's pictures; each note is listed once."""

    def __init__(self) -> None:
        self.facts: list[PictureFacts] = []
        self.all = True
        """Whether all cases are pictures."""
        self.first_with: dict[str, str] = {}

    def add(self, case: str, picture: PictureFacts | None) -> None:
        """Add the facts of a case's image; None if it is not a picture."""
        if picture is None:
            self.all = False
            return
        self.facts.append(picture)
        for note in picture.notes:
            self.first_with.setdefault(note, case)

    def notes(self) -> list[str]:
        """Each note, with the number of its cases and the first of them."""
        counts = Counter(note for facts in self.facts for note in facts.notes)
        return [
            f"{note} (in {count} of {counted(len(self.facts), 'case')}, the first "
            f"{self.first_with[note]})"
            for note, count in counts.items()
        ]

    def lines(
        self,
        shapes: list[tuple[int, int, int]],
        spacings: list[tuple[float, float, float]],
    ) -> list[str]:
        """Lines on sizes, pixel sizes and notes."""
        unit = self.facts[0].unit
        axes = 3 if max(shape[2] for shape in shapes) > 1 else 2
        sources = Counter(facts.source for facts in self.facts)
        scaled = [tuple(step / MM_OF[unit] for step in steps[:axes]) for steps in spacings]
        return [
            f"size in pixels (columns, rows{', slices' * (axes == 3)}): "
            f"{_range([shape[:axes] for shape in shapes], 'd')}",
            f"pixel size in {WORD_OF[unit]}: {_range(scaled, '.3g')}; "
            + "; ".join(
                f"{source} ({counted(count, 'case')})" for source, count in sources.items()
            ),
            *self.notes(),
        ]


def _range(rows: Sequence[tuple[float, ...]], form: str) -> str:
    table = np.array(rows)
    low, middle, high = table.min(0), np.median(table, axis=0), table.max(0)
    return ", ".join(
        f"{low[axis].item():{form}} to {high[axis].item():{form}} (median {middle[axis]:.3g})"
        for axis in range(table.shape[1])
    )
