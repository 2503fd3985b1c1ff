"""Which prediction belongs to which reference, by their names.

One rule, tried in this order; a file that has found its partner takes no other:

    1  the same path in the two folders        sub-01/a.nii.gz   sub-01/a.mha
    2  the same name and last folders          x/sub-01/a        sub-01/a
    3  the same name, in whatever folder       fold_0/a          a
    4  the same name without words at its end  a_seg, a_0000     a-label

A file that is called only by such a word, or as all others are, has the name of its folder:
`sub-01/seg.nii.gz`. Files that this cannot tell apart are refused; nothing is guessed.
"""

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from segkit.config.labels import Labelling
from segkit.config.load import dataset_in, load_config
from segkit.data.bids import bids_label_names, bids_labels, is_bids
from segkit.data.dataset import CaseFiles, dataset_of, read_dataset
from segkit.data.dataset_json import labelling_of
from segkit.data.file_patterns import ID, LABEL
from segkit.data.tables import TABLE_SUFFIXES, read_csv
from segkit.errors import DatasetError, VolumeError, first_few
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import (
    AS_IT_SAYS,
    SUFFIXES,
    case_name_of,
    is_picture,
    stem_of,
    volumes_among,
)

LABEL_WORDS = (
    *("seg", "dseg", "segmentation", "pred", "prediction", "label", "labels", "labelmap", "mask"),
    *("gt", "truth", "groundtruth", "ref", "reference", "manual", "0000"),
)
"""Words for labels at the end of names of files, and the number of a first channel."""
DESCRIPTION_ENTITY = "desc-[a-z0-9]+"
"""An entity of BIDS that says what made a file."""
ENDING = re.compile(
    rf"(?<=.)[ _.-]({'|'.join((*LABEL_WORDS, DESCRIPTION_ENTITY))})$", re.IGNORECASE
)
BESIDE = re.compile(r"_(prob|probseg|entropy|variance|preview)$|_map-")
"""In names of volumes that lie beside predictions and are none."""

Parts = tuple[str, ...]
"""A path without its suffix: folders, then the name."""


@dataclass(frozen=True)
class NamedVolume:
    """A volume of labels, and the names that it may be paired by."""

    path: Path
    case: str
    names: tuple[Parts, ...]


@dataclass(frozen=True)
class References:
    """Volumes of true labels, and what their numbers mean if a dataset says so."""

    volumes: tuple[NamedVolume, ...]
    labelling: Labelling | None = None
    source: Path | None = None
    """The file that says what they mean."""
    rules: PictureRules = AS_IT_SAYS
    """How they are read, if they are pictures."""
    unlabelled: Mapping[Path, tuple[str, ...]] = field(default_factory=dict)
    """By the file of partly labelled cases, the classes that they have no labels of."""


@dataclass(frozen=True)
class Pairing:
    """References with their predictions, and files without a partner."""

    pairs: tuple[tuple[str, Path, Path], ...]
    """The name of each case, its prediction and its reference."""
    missing: tuple[tuple[str, Path], ...] = ()
    """The names of cases without a prediction, and their references."""
    extra: tuple[Path, ...] = ()
    """Predictions without a reference."""


def find_pairs(predictions: Path, references: Path) -> Pairing:
    """Name, prediction and reference of each case, by the rule of this module.

    Two files are a pair, whatever their names. A file pairs with its reference in a folder.

    Args:
        predictions: a segmentation, or a folder of them with its subfolders. Hidden files are left
            out.
        references: the same of references; or a dataset, by its folder, or by a YAML file.

    Raises:
        VolumeError: nothing pairs, or files cannot be told apart.
        ConfigError: a YAML file cannot be understood.
        DatasetError: a dataset cannot be understood.
    """
    return pair_with(predictions, references_in(references, but=predictions), references)


def references_in(path: Path, *, but: Path | None = None) -> References:
    """The references in a file, a folder or a dataset.

    Args:
        path: a volume; a folder of volumes; a dataset folder with a dataset.json; a folder in the
            form of BIDS, whose `…_dseg` are references; a table with the columns `id` and `label`;
            or a YAML file with `data.folder`, and maybe `data.files` or `data.dicom`.
        but: a folder inside that holds predictions.

    Raises as `find_pairs` does.
    """
    if path.suffix.lower() in (".yaml", ".yml") and not path.is_dir():
        named = dataset_in(path) or load_config(path).data
        dataset = dataset_of(named, with_test=True)
        own = named.files or named.labels or named.dicom or is_bids(named.folder)
        source = path if own else named.folder / "dataset.json"
    elif path.is_dir() and (path / "dataset.json").is_file() and not _at_top(path):
        dataset = read_dataset(path)
        source = path / "dataset.json"
    elif path.suffix.lower() in TABLE_SUFFIXES and path.is_file():
        return References(tuple(_in_table(path)))
    elif is_bids(path) and (labels := bids_labels(path)):
        return _in_bids(path, labels)
    elif path.exists():
        return References(tuple(volumes_in(path, but=but)))
    else:
        raise VolumeError(f"{path}: no such file or folder; check the path")
    volumes = tuple(_of_case(case, dataset.folder) for case in dataset.cases)
    lacking = {
        case.label: dataset.unlabelled[case.name]
        for case in dataset.cases
        if case.name in dataset.unlabelled
    }
    return References(volumes, dataset.labelling, source, dataset.rules, lacking)


def _in_table(path: Path) -> list[NamedVolume]:
    """The column `label` of a table, called by the column `id`. Raises DatasetError."""
    rows, columns = read_csv(path)
    for column in (ID, LABEL):
        if column not in columns:
            raise DatasetError(
                f"{path}: expected a column {column}, found {', '.join(columns) or 'none'}"
            )
    absent = [row[LABEL] for row in rows if not (path.parent / row[LABEL]).is_file()]
    if absent:
        raise DatasetError(
            f"{path}: names {absent[0] or 'nothing'} as {LABEL}, which is no file in {path.parent}"
        )
    return [
        NamedVolume(path.parent / row[LABEL], row[ID], ((_normal(row[ID]),), parts))
        for row in rows
        for parts in [_parts(path.parent / row[LABEL], path.parent)]
    ]


def _in_bids(folder: Path, labels: Mapping[str, Path]) -> References:
    """The labels of a BIDS folder, and what they mean if a table says so."""
    volumes = tuple(
        NamedVolume(path, name, ((_normal(name),), _parts(path, folder)))
        for name, path in labels.items()
    )
    names = bids_label_names(folder)
    labelling = None if names is None else labelling_of(str(folder), names, None, {})
    return References(volumes, labelling)


def pair_with(predictions: Path, references: References, where: Path) -> Pairing:
    """As `find_pairs`, with references that are known; errors name them by `where`."""
    if not predictions.exists():
        raise VolumeError(f"{predictions}: no such file or folder; check the path")
    only = references.volumes[0] if references.volumes else None
    if predictions.is_file() and only is not None and only.path == where:
        return Pairing(((only.case, predictions, only.path),))
    found = volumes_in(predictions, but=where)
    pairing = pair_by_name(found, references.volumes)
    if not pairing.pairs:
        raise VolumeError(
            f"{predictions}: holds no volume named as one in {where}; it holds "
            f"{first_few([volume.case for volume in found], 3) or 'none'}, and references are "
            f"{first_few([volume.case for volume in references.volumes], 3) or 'none'}"
        )
    # Of one prediction that is named, nobody asks for the other references.
    return pairing if predictions.is_dir() else Pairing(pairing.pairs)


def volumes_in(path: Path, *, but: Path | None = None) -> list[NamedVolume]:
    """The volume at a path, or those in a folder and in the folders below it, by rising path.

    Hidden files and folders (`.x`, `._x.nii.gz`) are left out, and the folder `but`, if it lies
    inside, and pictures beside volumes that are none. Raises OSError for a folder that cannot
    be listed.
    """
    if path.is_file():
        return [called(path, stem_of(path))]
    inner = but.resolve() if but and path.resolve() in but.resolve().parents else None
    paths = volumes_among(
        each for each in _walk(path) if not inner or inner not in each.resolve().parents
    )
    stems = Counter(stem_of(each) for each in paths)
    return [
        NamedVolume(each, stem_of(each) if stems[stem_of(each)] == 1 else "/".join(parts), (parts,))
        for each in paths
        for parts in [_parts(each, path)]
    ]


def called(path: Path, name: str) -> NamedVolume:
    """A volume that has one name, whatever folder it lies in."""
    return NamedVolume(path, name, ((_normal(name),),))


def pair_by_name(predictions: Sequence[NamedVolume], references: Sequence[NamedVolume]) -> Pairing:
    """Partners by the rule of this module. Raises VolumeError where it is unclear."""
    mine, theirs = _Side(predictions), _Side(references)
    partner: dict[int, int] = {}
    """By the place of a reference, that of its prediction."""
    loose: set[int] = set()
    """References that found their partner by their name, whatever the folder."""
    deepest = max((len(name) for side in (mine, theirs) for name in side.all_names), default=1)
    for bare in (False, True):
        rounds: list[int | None] = [None, *range(deepest, 0, -1)]  # None: the whole path
        for depth in rounds:
            for found, reference in _matches(mine, theirs, bare, depth, partner):
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
    """All predictions, or all references, with their names in each form."""

    def __init__(self, volumes: Sequence[NamedVolume]) -> None:
        self.volumes = volumes
        self.names = [volume.names for volume in volumes]
        self.all_names = [name for names in self.names for name in names]
        # Names at one place, such as those of all labels or of all first channels, are of a kind.
        kinds: dict[int, list[str]] = defaultdict(list)
        for names in self.names:
            for kind, name in enumerate(names):
                kinds[kind].append(name[-1])
        self.shared = {kind: Counter(stems) for kind, stems in kinds.items()}

    def keys(self, place: int, bare: bool, depth: int | None) -> set[Parts]:
        """What a volume is called by its last `depth` parts, or by its whole path if None."""
        found = set()
        for kind, name in enumerate(self.names[place]):
            for parts in self._without_words(kind, name) if bare else (name,):
                if depth is None or len(parts) >= depth:
                    found.add(parts if depth is None else parts[-depth:])
        if depth == 1 and not bare:  # a name of many, or of none, is no name of a case
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
    """Predictions and references without a partner that fit each other and no other volume."""
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
    """Raise VolumeError if a volume without a partner might be that of a case with one."""
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
            continue  # whole paths tell the cases apart
        if len(founds) > 1 and left:
            troubles[_told("predictions", key, [mine.volumes[each] for each in founds])] = None
        elif len(references) > 1:
            several = [theirs.volumes[each] for each in references]
            troubles[_told("references", key, several)] = None
    if troubles:
        raise VolumeError(first_few(list(troubles), 3, between="; "))


def _told(what: str, key: Parts, volumes: Sequence[NamedVolume]) -> str:
    first, *_, last = sorted(volumes, key=lambda volume: str(volume.path))
    same = first.path.parent == last.path.parent
    return (
        f"{last.path}: is the same case as {first.path.name if same else first.path}; move one "
        f"away, as {len(volumes)} {what} are called {'/'.join(key)}"
    )


def _of_case(case: CaseFiles, folder: Path) -> NamedVolume:
    """A case's label: it is called by the case, by its own file and by the files of its images."""
    files = [case.label, *case.images]
    return NamedVolume(
        case.label, case.name, ((_normal(case.name),), *(_parts(file, folder) for file in files))
    )


def _parts(path: Path, folder: Path) -> Parts:
    inside = path.relative_to(folder) if path.is_relative_to(folder) else path
    return tuple(map(_normal, (*inside.parts[:-1], case_name_of(path))))


def _normal(name: str) -> str:
    """One form of a name: systems write an é as one character or as two."""
    return unicodedata.normalize("NFC", name)


def _without_endings(stem: str) -> str:
    while (shorter := ENDING.sub("", stem)) != stem:
        stem = shorter
    return stem


def _at_top(folder: Path) -> bool:
    """Whether a folder holds volumes itself; pictures beside `labelsTr` are illustrations."""
    found = volumes_among(path for path in folder.iterdir() if not path.name.startswith("."))
    return bool(found) and not (is_picture(found[0]) and (folder / "labelsTr").is_dir())


def _is_volume(name: str) -> bool:
    return name.lower().endswith(SUFFIXES) and not name.startswith(".")


def _walk(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> None:
        raise error

    for inner, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(inner, name) for name in files if _is_volume(name))
