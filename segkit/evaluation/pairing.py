"""Pair each prediction with its reference by name.

Two files are a pair if they have, tried in this order:

    1  the same path in the two folders        sub-01/a.nii.gz   sub-01/a.mha
    2  the same name and last folders          x/sub-01/a        sub-01/a
    3  the same name, in any folder            fold_0/a          a
    4  the same name without final words       a_seg, a_0000     a-label
    5  the same after changes that make a name possible on every system   12-30   12:30

Each file is in one pair at most. If a name is only such a word, or all files have the same name,
the name of the folder is used instead: `sub-01/seg.nii.gz`. Ambiguous files are an error; segkit
does not guess.
"""

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from segkit.errors import VolumeError, first_few
from segkit.evaluation.references import BESIDE, NamedVolume, Parts, References, volumes_in
from segkit.io.dicom_headers import DICOM_SUFFIX
from segkit.io.file_names import safe_name

LABEL_WORDS = (
    *("seg", "dseg", "segmentation", "pred", "prediction", "label", "labels", "labelmap", "mask"),
    *("gt", "truth", "groundtruth", "ref", "reference", "manual", "0000"),
)
"""Final words of file names that mean 'label', and the number of a first channel."""
DESCRIPTION_ENTITY = "desc-[a-z0-9]+"
"""An entity of BIDS names that describes how a file was made."""
ENDING = re.compile(
    rf"(?<=.)[ _.-]({'|'.join((*LABEL_WORDS, DESCRIPTION_ENTITY))})$", re.IGNORECASE
)


@dataclass(frozen=True)
class Pairing:
    """Pairs of prediction and reference, and files without a partner."""

    pairs: tuple[tuple[str, Path, Path], ...]
    """Name, prediction and reference of each case."""
    missing: tuple[tuple[str, Path], ...] = ()
    """Name and reference of each case without a prediction."""
    extra: tuple[Path, ...] = ()
    """Predictions without a reference."""


def pair_with(predictions: Path, references: References, where: Path) -> Pairing:
    """Pair predictions with given references by the rule of this module.

    If both paths are files, they are a pair, whatever their names.

    Args:
        predictions: a segmentation, or a folder of segmentations with its subfolders. Hidden files
            are left out.
        references: from `references_in`.
        where: path of the references, for messages.

    Raises:
        VolumeError: if there is no pair, or files are ambiguous.
    """
    if not predictions.exists():
        raise VolumeError(f"{predictions}: no such file or folder; check the path")
    only = references.volumes[0] if references.volumes else None
    if predictions.is_file() and only is not None and only.path == where:
        return Pairing(((only.case, predictions, only.path),))
    found = volumes_in(predictions, but=where)
    pairing = pair_by_name(found, references.volumes)
    if not pairing.pairs:
        if _is_only_dicom(predictions, found):
            raise VolumeError(
                f"{predictions}: expected predictions in NIfTI or another format of volumes, found "
                f"*{DICOM_SUFFIX}, which are not scored; predict again without --dicom-seg"
            )
        raise VolumeError(
            f"{predictions}: expected volumes named like those in {where} "
            f"({first_few([volume.case for volume in references.volumes], 3) or 'none'}), found "
            f"{first_few([volume.case for volume in found], 3) or 'none'}; rename the files"
        )
    # If the user gave a single prediction, the other references are not missing.
    return pairing if predictions.is_dir() else Pairing(pairing.pairs)


def _is_only_dicom(folder: Path, found: Sequence[NamedVolume]) -> bool:
    """Whether a folder holds DICOM files, and no volumes but those written beside predictions."""
    return all(BESIDE.search(volume.names[0][-1]) for volume in found) and any(
        folder.rglob(f"*{DICOM_SUFFIX}")
    )


def pair_by_name(predictions: Sequence[NamedVolume], references: Sequence[NamedVolume]) -> Pairing:
    """Pair volumes by the rule of this module.

    Raises:
        VolumeError: if several volumes may belong to the same case.
    """
    mine, theirs = _Side(predictions), _Side(references)
    partner: dict[int, int] = {}
    """For the index of each reference, the index of its prediction."""
    loose: set[int] = set()
    """References that were paired by name only, without their folder."""
    deepest = max((len(name) for side in (mine, theirs) for name in side.all_names), default=1)
    rounds: list[int | None] = [None, *range(deepest, 0, -1)]  # None: the whole path
    for sides, bare, depth in itertools.product(
        ((mine, theirs), (mine.safe(), theirs.safe())), (False, True), rounds
    ):
        for found, reference in _matches(*sides, bare, depth, partner):
            partner[reference] = found
            if depth == 1 or len(theirs.names[reference][0]) == 1:
                loose.add(reference)
    _check_clear(mine, theirs, partner, loose)
    used = set(partner.values())
    return Pairing(
        tuple(
            (volume.case, predictions[partner[place]].path, volume.path)
            for place, volume in enumerate(references)
            if place in partner
        ),
        tuple(
            (volume.case, volume.path)
            for place, volume in enumerate(references)
            if place not in partner
        ),
        tuple(
            volume.path
            for place, volume in enumerate(predictions)
            if place not in used and not BESIDE.search(volume.names[0][-1])
        ),
    )


class _Side:
    """All predictions, or all references, with their names."""

    def __init__(self, volumes: Sequence[NamedVolume]) -> None:
        self.volumes = volumes
        self.names = [volume.names for volume in volumes]
        self.all_names = [name for names in self.names for name in names]
        # The names at one index are of the same kind, such as those of labels or of first channels.
        kinds: dict[int, list[str]] = defaultdict(list)
        for names in self.names:
            for kind, name in enumerate(names):
                kinds[kind].append(name[-1])
        self.shared = {kind: Counter(stems) for kind, stems in kinds.items()}

    def safe(self) -> "_Side":
        """The same volumes by names that every system can write, as results are called."""
        return _Side(
            [
                replace(volume, names=tuple(tuple(map(safe_name, parts)) for parts in volume.names))
                for volume in self.volumes
            ]
        )

    def keys(self, place: int, bare: bool, depth: int | None) -> set[Parts]:
        """The names of a volume: their last `depth` parts, or the whole path if None.

        Args:
            place: index of the volume.
            bare: whether final words are removed.
            depth: number of parts.
        """
        found = set()
        for kind, name in enumerate(self.names[place]):
            for parts in self._without_words(kind, name) if bare else (name,):
                if depth is None or len(parts) >= depth:
                    found.add(parts if depth is None else parts[-depth:])
        if depth == 1 and not bare:  # a shared name, or a mere label word, does not name a case
            found -= {
                name[-1:]
                for kind, name in enumerate(self.names[place])
                if len(name) > 1
                and (self.shared[kind][name[-1]] > 1 or name[-1].lower() in LABEL_WORDS)
            }
        return found

    def _without_words(self, kind: int, name: Parts) -> Iterator[Parts]:
        *folders, stem = name
        shared = self.shared[kind]
        if folders and (stem.lower() in LABEL_WORDS or (len(shared) == 1 and shared[stem] > 1)):
            yield tuple(folders)
        if not folders or stem.lower() not in LABEL_WORDS:
            yield (*folders, _without_endings(stem))


def _matches(
    mine: _Side, theirs: _Side, bare: bool, depth: int | None, partner: Mapping[int, int]
) -> list[tuple[int, int]]:
    """Pairs of prediction and reference that match each other and no other volume.

    Args:
        mine: the predictions.
        theirs: the references.
        bare: whether names are compared without final words such as `_seg`.
        depth: number of last parts of a path that are compared; None for the whole path.
        partner: the pairs so far: the index of the prediction, by that of the reference.
    """
    by_key: dict[Parts, set[int]] = defaultdict(set)
    for place in range(len(mine.volumes)):
        for key in mine.keys(place, bare, depth):
            by_key[key].add(place)
    wanted: dict[int, set[int]] = defaultdict(set)
    fits: dict[int, set[int]] = {}
    for place in range(len(theirs.volumes)):
        keys = theirs.keys(place, bare, depth)
        fits[place] = set().union(*(by_key.get(key, set()) for key in keys))
        for found in fits[place]:
            wanted[found].add(place)
    used = set(partner.values())
    return [
        (found, place)
        for place, founds in fits.items()
        if len(founds) == 1 and place not in partner
        for found in founds - used
        if len(wanted[found]) == 1
    ]


def _check_clear(mine: _Side, theirs: _Side, partner: Mapping[int, int], loose: set[int]) -> None:
    """Raise VolumeError if a volume without a partner may belong to a case that has a pair.

    Args:
        mine: the predictions.
        theirs: the references.
        partner: the pairs: the index of the prediction, by that of the reference.
        loose: references that were paired by name only, without their folder.
    """
    used = set(partner.values())
    places: dict[Parts, tuple[list[int], list[int]]] = defaultdict(lambda: ([], []))
    for number, side in enumerate((mine, theirs)):
        for place in range(len(side.volumes)):
            for key in side.keys(place, True, 1):
                places[key][number].append(place)
    troubles: dict[str, None] = {}
    for key, (founds, references) in places.items():
        left = [place for place in founds if place not in used]
        bare = [place for place in references if place not in partner]
        paired = [place for place in references if place in partner]
        if not founds or not references or not (left or bare):
            continue
        if paired and not loose.intersection(paired):
            continue  # whole paths distinguish the cases
        if len(founds) > 1 and left:
            several = [mine.volumes[each] for each in founds]
            troubles[_ambiguous("predictions", key, several)] = None
        elif len(references) > 1:
            several = [theirs.volumes[each] for each in references]
            troubles[_ambiguous("references", key, several)] = None
    if troubles:
        raise VolumeError(first_few(list(troubles), 3, between="; "))


def _ambiguous(what: str, key: Parts, volumes: Sequence[NamedVolume]) -> str:
    """The message for several volumes that may belong to the same case."""
    first, *_, last = sorted(volumes, key=lambda volume: str(volume.path))
    same = first.path.parent == last.path.parent
    return (
        f"{last.path}: is the same case as {first.path.name if same else first.path}; remove or "
        f"rename one, because {len(volumes)} {what} are called {'/'.join(key)}"
    )


def _without_endings(stem: str) -> str:
    while (shorter := ENDING.sub("", stem)) != stem:
        stem = shorter
    return stem
