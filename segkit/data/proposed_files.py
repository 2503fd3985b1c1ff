"""A proposal of the YAML that describes a folder of volumes without a dataset.json.

p1/t1.nii.gz   p1/seg.nii.gz    ──▶  images: {t1: '*/t1.nii.gz'}, label: '*/seg.nii.gz'

A proposal is only printed, so that a person can correct it. No command uses it by itself.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

from segkit.data.wildcards import case_name, expression_of
from segkit.errors import VolumeError, printable
from segkit.io.volume import read_label_values
from segkit.io.volume_names import has_volume_suffix, stem_of

LISTED_FILES = 20_000
"""So many files are looked at; larger folders are described by their first files."""
MOST_READ = 3
"""So many label files are read to find their numbers."""
PROPOSED_CLASSES = 12
"""Largest number of classes that a proposal names."""
ENTITY_VALUE = re.compile(r"(?<![A-Za-z0-9])(sub|ses|run)-[A-Za-z0-9]+")
LABEL_WORD = re.compile(
    r"(?:^|[/_.\-*])(?:d?segs?|segm|segmentations?|labels?(?:tr)?|masks?|gt|ground_?truth|truth|"
    r"annotations?|lesions?|rois?|manual)(?:[/_.\-*]|$)"
)
VISIT = re.compile(r"(?i)(ses|visit|time|tp|scan|v)?[-_ ]?[0-9][0-9_.-]*")
"""Names of folders of visits, such as `visit2` or `2020-01-31`."""
PROPOSED_CHANNELS = 8
"""Largest number of channels of a proposal; with more, nothing is proposed."""
DERIVATIVES = "derivatives"
"""The folder of BIDS in which labels and other results lie."""


def told_proposal(folder: Path) -> str:
    """Advice on how to describe a folder: a line of YAML with its files, or the settings' names."""
    tree = proposed_files(folder)
    if tree is None:
        return (
            "add one, or write a YAML file with data.files, whose patterns or table name the files"
        )
    line = yaml.safe_dump(tree, default_flow_style=True, width=10_000, sort_keys=False).strip()[
        1:-1
    ]
    name = folder.resolve().name or "dataset"
    return printable(f"write this line to {name}.yaml, correct it, and give that file: {line}")


def proposed_files(folder: Path) -> dict[str, Any] | None:
    """The section `data` that fits the files in a folder; None if no pattern fits them.

    Patterns are made from the names of folders and files: a folder for each patient, folders of
    images and of labels at any depth, endings such as `_mask`, or subjects of BIDS. The numbers of
    classes are those in the first labels.
    """
    files = itertools.islice(_volumes(folder), LISTED_FILES)
    inside = {path: PurePosixPath(path.relative_to(folder).as_posix()) for path in files}
    if any(len(place.parts) > 1 and place.parts[0].startswith("sub-") for place in inside.values()):
        wanted = {path: ENTITY_VALUE.sub(r"\1-*", str(place)) for path, place in inside.items()}
        found = _chosen(wanted, inside)
    else:
        both = [_chosen(_by_patient(inside), inside), _chosen(_by_folder(inside), inside)]
        found = max(both, key=lambda one: one.num_cases if one else 0)
    if found is None:
        return None
    files_of_case = {"images": _channels(found.images), "label": found.label}
    names = names_of_classes(found.labels)
    return {"data": {"folder": str(folder), "files": files_of_case, "labels": names}}


@dataclass(frozen=True)
class _Proposal:
    """Patterns of the images and the label, the label files, and how many cases are complete."""

    images: Sequence[str]
    label: str
    labels: Sequence[Path]
    num_cases: int


def _chosen(wanted: Mapping[Path, str], inside: Mapping[Path, PurePosixPath]) -> _Proposal | None:
    """The patterns of images and of the label that name the same cases; None if there are none.

    Args:
        wanted: the pattern of each file.
        inside: the place of each file in the folder.
    """
    found: dict[str, dict[str, Path]] = defaultdict(dict)  # files by pattern and name of the case
    for path, pattern in wanted.items():
        match = expression_of(pattern).fullmatch(str(inside[path]))
        if "*" in pattern and match:
            found[pattern][case_name(match)] = path
    most = max(map(len, found.values()), default=0)
    common = {key: cases for key, cases in found.items() if 2 * len(cases) >= most}
    labels = [key for key in common if _is_of_labels(key)]
    if not labels:
        return None
    label = max(labels, key=lambda key: (key.startswith(f"{DERIVATIVES}/"), len(common[key])))
    cases = set(common[label])
    images = [
        key
        for key in common
        if key not in labels
        and not key.startswith(f"{DERIVATIVES}/")
        and 2 * len(cases & common[key].keys()) >= len(cases)
    ]
    if not images or len(images) > PROPOSED_CHANNELS:
        return None
    whole = cases.intersection(*(common[key] for key in images))
    return _Proposal(images, label, list(common[label].values()), len(whole))


def names_of_classes(labels: Sequence[Path]) -> dict[str, int]:
    """A name for each number in the first label files: `{background: 0, class_1: 1}`."""
    numbers: set[int] = set()
    for path in labels[:MOST_READ]:
        try:
            numbers |= {int(number) for number in np.unique(read_label_values(path).data)}
        except VolumeError:  # the proposal stands; the case is reported once it is read
            continue
    found = sorted(numbers - {0})[:PROPOSED_CLASSES] or [1]
    return {"background": 0, **{f"class_{number}": number for number in found}}


def told_labels(labels: Sequence[Path]) -> str:
    """The setting that names the numbers in label files, as it is added to a command."""
    names = ", ".join(f"{name}: {number}" for name, number in names_of_classes(labels).items())
    return f"data.labels='{{{names}}}'"


def _is_of_labels(pattern: str) -> bool:
    return bool(LABEL_WORD.search(pattern.lower().removeprefix(f"{DERIVATIVES}/")))


def _by_patient(inside: Mapping[Path, PurePosixPath]) -> dict[Path, str]:
    """Patterns of files in a folder for each patient: `*/t1.nii.gz`."""
    return {path: _of_patient(place) for path, place in inside.items() if len(place.parts) > 1}


def _of_patient(place: PurePosixPath) -> str:
    """The pattern of a file in a patient's folder: `*/*/*_t1.nii` for `p1/visit2/p1_t1.nii`."""
    patient = re.escape(place.parts[0])
    whole_word = re.compile(rf"(?<![A-Za-z0-9]){patient}(?![A-Za-z0-9])")
    *folders, name = (whole_word.sub("*", part) for part in place.parts)
    return "/".join([*("*" if VISIT.fullmatch(part) else part for part in folders), name])


def _volumes(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if has_volume_suffix(path) and not hidden and path.is_file():
            yield path


def _by_folder(inside: Mapping[Path, PurePosixPath]) -> dict[Path, str]:
    """Patterns of files of many cases in one folder: `*/images/*_0000.png`, `*_mask.png`."""
    groups: dict[PurePosixPath, list[Path]] = defaultdict(list)
    for path, parent in _parents(inside).items():
        groups[parent].append(path)
    wanted = {}
    for parent, paths in groups.items():
        stems = {stem_of(path) for path in paths}
        cut = {stem: stem.rpartition("_") for stem in stems}
        cases, endings = ({parts[part] for parts in cut.values()} for part in (0, 2))
        has_endings = len(cases) > 1 and len(cases) * len(endings) == len(stems)
        for path in paths:
            stem = stem_of(path)
            case, _, last = cut[stem]
            ending = f"_{last}" if case and (has_endings or case in stems) else ""
            wanted[path] = str(parent / f"*{ending}{path.name[len(stem) :]}")
    return wanted


def _parents(inside: Mapping[Path, PurePosixPath]) -> dict[Path, PurePosixPath]:
    """The folder of each file, with `*` at depths of several names, none of which is of labels.

    train/images, train/masks, val/images, val/masks  ──▶  */images, */masks
    """
    depths: dict[int, set[str]] = defaultdict(set)
    for place in inside.values():
        for depth, part in enumerate(place.parts[:-1]):
            depths[depth].add(part)
    varying = {
        depth
        for depth, parts in depths.items()
        if len(parts) > 1 and not any(_is_of_labels(f"{part}/") for part in parts)
    }
    return {
        path: PurePosixPath(
            *("*" if depth in varying else part for depth, part in enumerate(place.parts[:-1]))
        )
        for path, place in inside.items()
    }


def _channels(patterns: Sequence[str]) -> dict[str, str]:
    """The patterns of images by names of channels, such as `T1w` of `sub-*_T1w.nii.gz`."""
    channels: dict[str, str] = {}
    for pattern in patterns:
        word = re.split(r"[*_/]", stem_of(Path(pattern)))[-1].strip("-. ")
        name = wanted = word if word and not word.isdecimal() else "image"
        for number in itertools.count(2):
            if name not in channels:
                break
            name = f"{wanted}_{number}"
        channels[name] = pattern
    return channels
