"""Facts of each case: size, spacing, and the voxels of each label, from reading the whole case.

Facts are stored in one file while cases are read, if this takes long. So stopped work
continues, and only files that changed are read again.
"""

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from segkit.data.case_processes import reading_processes
from segkit.data.dataset import CaseFiles, Dataset, read_case, read_case_label
from segkit.data.label_numbers import other_numbers
from segkit.errors import DatasetError, Problems, SegkitError
from segkit.geometry.grid import Orientation
from segkit.io.atomic import write_json
from segkit.io.checksums import file_states
from segkit.io.picture_rules import PictureFacts
from segkit.io.safe_text import read_json
from segkit.io.whole_numbers import noting_rounded_labels
from segkit.system.progress import Track, untracked
from segkit.system.workers import in_processes

logger = logging.getLogger(__name__)

FACTS_FORMAT = 2
SECONDS_BEFORE_STORING = 10.0
"""Facts are stored each time that so many seconds have passed; a quick check leaves no file."""


@dataclass(frozen=True)
class CaseFacts:
    """Facts of a case that fits its dataset."""

    name: str
    shape: tuple[int, int, int]
    """Size in voxels along x, y and z (RAS+)."""
    spacing: tuple[float, float, float]
    """Voxel size in mm along x, y and z."""
    orientation: str
    voxels: tuple[int, ...]
    """Number of voxels of each label number 0, 1, …."""
    others: dict[int, int]
    """Numbers in its label file that belong to no name, with their voxels."""
    picture: PictureFacts | None
    """Facts about its image if it is a picture."""
    rounded: Mapping[str, float] = field(default_factory=dict)
    """Largest difference of its labels from whole numbers, by file, if they were rounded."""


@dataclass(frozen=True)
class Examined:
    """The facts of a case, or its errors."""

    facts: CaseFacts | None
    error: SegkitError | None = None
    others: Mapping[int, int] | None = None
    """Numbers in the label of a wrong case that belong to no name."""


STORED = TypeAdapter(dict[str, CaseFacts])


def facts_of_cases(
    dataset: Dataset,
    problems: Problems,
    *,
    cache: Path | None = None,
    track: Track = untracked,
) -> Iterator[Examined]:
    """The facts of each case, in order; errors are added to `problems`.

    Args:
        dataset: the dataset.
        problems: collects one error for each wrong case.
        cache: the folder in which facts are stored; None stores nothing.
        track: shows the progress over cases.
    """
    keys = {case.name: _key(case) for case in dataset.cases}
    place = None if cache is None else cache / f"checked-{_digest(dataset)}.json"
    store = _Store(place, keys)
    pending = [case for case in dataset.cases if keys[case.name] not in store.known]
    examine = partial(_examined, dataset=replace(dataset, cases=()))
    workers = reading_processes(pending, dataset)
    if store.known and (before := len(dataset.cases) - len(pending)):
        logger.info("%d cases were checked before and have not changed", before)
    fresh = iter(track(in_processes(examine, pending, workers), "reading", len(pending)))
    with store.kept():
        for case in dataset.cases:
            known = store.known.get(keys[case.name])
            examined = next(fresh) if known is None else Examined(known)
            if examined.error is not None:
                with problems.noted():
                    raise examined.error
            elif known is None and examined.facts is not None:
                store.add(keys[case.name], examined.facts)
            yield examined


def _examined(case: CaseFiles, dataset: Dataset) -> Examined:
    labelling = dataset.labelling
    try:
        with noting_rounded_labels() as rounded:
            image, label = read_case(case, dataset)
    except SegkitError as error:
        return Examined(None, error, _other_numbers(case, dataset))
    others = _other_numbers(case, dataset) if labelling.others is not None else {}
    orientation = Orientation.of(image.grid.affine)
    turned = orientation.turn_grid(image.grid)
    voxels = np.zeros(len(labelling.value_names), np.int64)
    for plane in np.moveaxis(label.data, 2, 0):  # bincount copies to eight bytes per voxel
        voxels += np.bincount(plane.ravel(), minlength=len(voxels))
    return Examined(
        CaseFacts(
            case.name,
            turned.shape,
            turned.spacing,
            orientation.code,
            tuple(voxels.tolist()),
            others,
            image.picture,
            rounded,
        )
    )


def _other_numbers(case: CaseFiles, dataset: Dataset) -> dict[int, int]:
    """Undeclared numbers in a label file; none if it cannot be read."""
    try:
        label = read_case_label(case, dataset)
    except SegkitError:  # reading the whole case has reported it already
        return {}
    return other_numbers(label.data, dataset.labelling)


class _Store:
    """Facts that are stored in a file, by the state of each case's files."""

    def __init__(self, path: Path | None, keys: Mapping[str, str]) -> None:
        self.path = path
        self.known: dict[str, CaseFacts] = {}
        if path is not None and path.is_file():
            try:
                found = STORED.validate_python(read_json(path))
            except (OSError, ValueError) as error:
                raise DatasetError(
                    f"{path}: cannot be read as the stored results of a check; delete the file to "
                    f"check all cases again ({' '.join(str(error).split())[:80]})"
                ) from None
            wanted = set(keys.values())
            self.known = {key: facts for key, facts in found.items() if key in wanted}
        self.all = dict(self.known)
        self.last = time.monotonic()
        self.stored = bool(self.known)

    def add(self, key: str, facts: CaseFacts) -> None:
        self.all[key] = facts
        if time.monotonic() - self.last > SECONDS_BEFORE_STORING:
            self.write()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Store the facts at the end as well, also if the work is stopped, if it took long."""
        try:
            yield
        finally:
            if self.stored:
                self.write()

    def write(self) -> None:
        self.last, self.stored = time.monotonic(), True
        if self.path is None:
            return
        try:
            write_json(self.path, {key: asdict(facts) for key, facts in self.all.items()})
        except OSError as error:
            logger.warning("%s: cannot store the results of the check: %s", self.path, error)
            self.path = None


def _key(case: CaseFiles) -> str:
    states = json.dumps([case.name, file_states((*case.images, case.label))])
    return hashlib.sha256(states.encode()).hexdigest()[:24]


def _digest(dataset: Dataset) -> str:
    """A digest of all settings of a dataset that decide which cases are valid."""
    labelling: Sequence[object] = (
        dataset.labels,
        dataset.regions,
        dataset.ignore,
        dataset.in_files,
        dataset.others,
    )
    structures = dataset.rules.structures
    content = [
        *(FACTS_FORMAT, str(dataset.folder.resolve()), dataset.channels, repr(labelling)),
        *(repr(dataset.rules), structures.told() if structures else None),
        *(dataset.unit, dataset.nan),
    ]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
