"""A proposal of the YAML that describes a folder of volumes without a dataset.json.

p1/t1.nii.gz   p1/seg.nii.gz    ──▶  images: {t1: '*/t1.nii.gz'}, label: '*/seg.nii.gz'

A proposal is only printed, so that a person can correct it. No command uses it by itself.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import yaml

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
    images and of labels, or subjects of BIDS. The numbers of classes are those in the first labels.
    """
    patterns = _patterns(folder)
    if not patterns:
        return None
    most = max(len(files) for files in patterns.values())
    common = {key: files for key, files in patterns.items() if 2 * len(files) >= most}
    labels = [key for key in common if _is_of_labels(key)]
    images = [key for key in common if key not in labels and not key.startswith(f"{DERIVATIVES}/")]
    if not labels or not images or len(images) > PROPOSED_CHANNELS:
        return None
    label = max(labels, key=lambda key: (key.startswith(f"{DERIVATIVES}/"), len(common[key])))
    names = names_of_classes(common[label])
    files = {"images": _channels(images), "label": label}
    return {"data": {"folder": str(folder), "files": files, "labels": names}}


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


def _patterns(folder: Path) -> dict[str, list[Path]]:
    """The files of each pattern that names cases."""
    files = list(itertools.islice(_volumes(folder), LISTED_FILES))
    inside = {path: PurePosixPath(path.relative_to(folder).as_posix()) for path in files}
    tops = {place.parts[0] for place in inside.values() if len(place.parts) > 1}
    if any(top.startswith("sub-") for top in tops):
        wanted = {path: ENTITY_VALUE.sub(r"\1-*", str(place)) for path, place in inside.items()}
    elif any(_is_of_labels(f"{top}/") for top in tops):
        wanted = _by_role(inside)
    else:
        wanted = {
            path: _of_patient(place) for path, place in inside.items() if len(place.parts) > 1
        }
    found: dict[str, list[Path]] = defaultdict(list)
    for path, pattern in wanted.items():
        if "*" in pattern:
            found[pattern].append(path)
    return dict(found)


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


def _by_role(inside: Mapping[Path, PurePosixPath]) -> dict[Path, str]:
    """Patterns of files in folders such as images/ and labels/: `images/*_0000.nii.gz`."""
    groups: dict[PurePosixPath, list[Path]] = defaultdict(list)
    for path, place in inside.items():
        groups[place.parent].append(path)
    wanted = {}
    for parent, paths in groups.items():
        cut = {path: stem_of(path).rpartition("_") for path in paths}
        cases, endings = ({parts[part] for parts in cut.values()} for part in (0, 2))
        has_endings = len(cases) > 1 and len(cases) * len(endings) == len(paths)
        for path in paths:
            ending = f"_{cut[path][2]}" if has_endings and cut[path][0] else ""
            suffix = path.name[len(stem_of(path)) :]
            wanted[path] = str(parent / f"*{ending}{suffix}")
    return wanted


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
