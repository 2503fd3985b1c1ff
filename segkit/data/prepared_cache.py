"""Prepared cases on disk, so that training needs memory for only one batch.

Each case is a folder of four arrays, which are memory-mapped at each access:

    image.npy    channel x y z, float16 if that is enough (see `half_if_exact`), else float32
    label.npy    x y z, the smallest unsigned type
    voxels.npy   positions to centre patches on, one class after the other
    classes.npy  the label of each class, and the first and last index of its positions

The name of the folder contains a digest of everything that the arrays depend on. So an array is
never used with a changed setting or file.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

from segkit.data.case_processes import worthwhile_processes
from segkit.data.dataset import CaseFiles, Dataset, grid_of_case, read_case
from segkit.data.first_stage_labels import with_labels
from segkit.data.normalise import Normaliser
from segkit.data.preprocess import TooLargeError, prepare_image, prepare_label, spacing_for
from segkit.errors import DatasetError, Problems, SegkitError, VolumeError
from segkit.geometry.grid import ANISOTROPY, Orientation
from segkit.io.atomic import PARTIAL, naming, remove_leftovers
from segkit.io.checksums import file_states
from segkit.io.volume import read_volume
from segkit.io.volume_names import is_picture
from segkit.system.workers import attempted, in_processes

CACHE_FORMAT = 4
POSITIONS_PER_CLASS = 10_000
VOXELS_PER_PROCESS = 20_000_000
"""About so many voxels are prepared in the time that another process needs to start."""
BYTES_PER_VOXEL = 40
"""Peak memory of preparing a case, for each voxel and channel."""
HALF_NOISE = 2.0**-8
"""The largest rounding error of half precision, as a share of a channel's standard deviation."""


@dataclass(frozen=True)
class StoredCase:
    """A prepared case. Its arrays are memory-mapped from their files at each access."""

    name: str
    folder: Path

    @property
    def image(self) -> Float[ndarray, "channel x y z"]:
        """Normalised intensities, in half or single precision."""
        return _mapped(self.folder / "image.npy")

    @property
    def label(self) -> Integer[ndarray, "x y z"]:
        """Labels on the image's grid."""
        return _mapped(self.folder / "label.npy")

    @property
    def positions(self) -> dict[int, Integer[ndarray, "voxels 3"]]:
        """Voxels of each label in the case: all, or 10,000 at even distances in the list.

        Background and ignored voxels are left out. But if a case has ignored voxels, all other
        voxels are listed under 0.
        """
        voxels = _mapped(self.folder / "voxels.npy")
        classes = _mapped(self.folder / "classes.npy").tolist()
        return {number: voxels[first:end] for number, first, end in classes}

    @property
    def labels(self) -> set[int]:
        """The labels in the case, without the background."""
        return set(_mapped(self.folder / "classes.npy")[:, 0].tolist()) - {0}

    def check(self, num_channels: int) -> None:
        """Raise DatasetError unless the arrays have the form that `write_arrays` gives them."""
        image, label, voxels, classes = (
            _mapped(self.folder / f"{name}.npy") for name in ("image", "label", "voxels", "classes")
        )
        whole = (
            image.dtype in (np.float16, np.float32)
            and image.ndim == 4
            and image.shape == (num_channels, *label.shape)
            and all(array.dtype.kind in "ui" for array in (label, voxels, classes))
            and voxels.ndim == classes.ndim == 2
            and voxels.shape[1] == classes.shape[1] == 3
            and bool((np.diff(classes[:, 1:]) >= 0).all())
            and bool(((classes[:, 1:] >= 0) & (classes[:, 1:] <= len(voxels))).all())
            and bool(((voxels >= 0) & (voxels < label.shape)).all())
        )
        if not whole:
            raise _damaged(self.folder)


def store_cases(
    cases: Sequence[CaseFiles],
    dataset: Dataset,
    *,
    folder: Path,
    spacing: Sequence[float],
    normalisers: Sequence[Normaliser],
    order: Literal[1, 3] = 1,
    settings: Any,
    first_labels: Mapping[str, Path] | None = None,
    track: Callable[[Iterable[CaseFiles]], Iterable[CaseFiles]] = iter,
    num_processes: int | None = None,
) -> tuple[StoredCase, ...]:
    """Prepare each case that is not in `folder` yet, in several processes if this is faster.

    Args:
        cases: cases of the dataset.
        dataset: the dataset, with its channels and labels.
        folder: folder of the cache.
        spacing: target spacing in mm along x, y and z.
        normalisers: one function for each channel; several processes need functions that pickle.
        order: order of the interpolation of images.
        settings: JSON value that describes the normalisers; it is part of the digest.
        first_labels: file with first-stage labels of each case, by the case's name. The labels
            become the last channel of the image.
        track: shows the progress over cases.
        num_processes: number of processes. Default: as many as cores, memory and work allow.

    Returns:
        The stored cases, in the order of `cases`.

    Raises:
        DatasetError, VolumeError: cases cannot be read. The error is raised after all other cases
            are stored, and `problems` lists all such cases.
        WorkerError: a process was killed. Cases that are stored already are kept.
    """
    described = replace(dataset, cases=())
    firsts = {case.name: (first_labels or {}).get(case.name) for case in cases}
    stored = [
        StoredCase(case.name, folder / f"{case.file_name}-{digest}")
        for case in cases
        for digest in [_digest(case, dataset, spacing, order, settings, firsts[case.name])]
    ]
    pending = [
        (case, firsts[case.name], target.folder)
        for case, target in zip(cases, stored, strict=True)
        if not target.folder.is_dir()
    ]
    known = {target for _, _, target in pending}
    for case in stored:
        if case.folder not in known:
            case.check(len(normalisers) + bool(first_labels))
    if not pending:
        for _ in track(cases):
            pass
        return tuple(stored)
    if num_processes is None:
        num_processes = preparing_processes(
            [case for case, *_ in pending], dataset, spacing, len(normalisers)
        )
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    # Each folder is filled in here and then renamed, so that it is complete or does not exist. If
    # the process ends early, or is killed, the unfinished ones are removed.
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as partial_folder:
        store = partial(
            _store,
            dataset=described,
            partial_folder=Path(partial_folder),
            spacing=tuple(spacing),
            normalisers=tuple(normalisers),
            order=order,
        )
        attempt = partial(attempted, store)
        fresh = in_processes(attempt, pending, min(num_processes, len(pending)))
        names = {case.name for case, *_ in pending}
        problems = Problems()
        for _ in track(_as_stored(cases, names, fresh, problems)):
            pass
    problems.refuse()
    return tuple(stored)


def write_arrays(
    folder: Path,
    image: Float[ndarray, "channel x y z"],
    label: Integer[ndarray, "x y z"],
    *,
    ignore: int | None = None,
    marked: Callable[[ndarray], ndarray] = lambda label: label,
) -> None:
    """Write the arrays of a case into a new folder.

    Args:
        folder: the new folder.
        image: normalised intensities.
        label: labels on the same grid.
        ignore: the label of ignored voxels.
        marked: a function that changes the label before it is stored.
    """
    folder.mkdir()
    np.save(folder / "image.npy", half_if_exact(image))
    np.save(folder / "label.npy", marked(label))
    positions = _positions(label, ignore)
    ends = np.cumsum([len(voxels) for voxels in positions.values()], dtype=np.int64)
    classes = zip(positions, [0, *ends.tolist()], ends.tolist(), strict=False)
    np.save(folder / "classes.npy", np.array([*classes], np.int64).reshape(-1, 3))
    voxels = np.concatenate([np.empty((0, 3), np.int64), *positions.values()])
    np.save(folder / "voxels.npy", voxels.astype(np.min_scalar_type(max(label.shape))))


def _marked(name: str, dataset: Dataset, label: ndarray) -> ndarray:
    """A label that also encodes the case's unlabelled classes, as `PartlyLabelled` needs it.

    The labels of all cases of a dataset have the same type, because they share batches.

    Args:
        name: name of the case.
        dataset: the dataset, with the unlabelled classes of each case.
        label: the label of the case.
    """
    sets = dataset.unlabelled_sets
    if len(sets) == 1:
        return label
    count = len(dataset.labelling.value_names)
    kind = np.min_scalar_type(count * len(sets) - 1)
    return label.astype(kind) + kind.type(count * sets.index(dataset.unlabelled.get(name, ())))


def half_if_exact(image: Float[ndarray, "channel x y z"]) -> Float[ndarray, "channel x y z"]:
    """The image in half precision if this is exact enough, else the image itself.

    The error of a half-precision value is at most 2^-11 of the value (below 2^-14: at most 2^-25).
    This is exact enough if all values stay finite and the root mean square of the errors is at most
    1/256 of each channel's standard deviation. Z-scores and CT windows usually meet this.
    """
    with np.errstate(over="ignore"):
        half = image.astype(np.float16)
    for channel, rounded in zip(image, half, strict=True):
        if not np.isfinite(rounded).all():
            return image
        lost = float(np.sqrt(np.mean(np.square(channel - rounded), dtype=float)))
        if lost > HALF_NOISE * float(channel.std(dtype=float)):
            return image
    return half


def _as_stored(
    cases: Sequence[CaseFiles],
    pending: set[str],
    results: Iterator[SegkitError | None],
    problems: Problems,
) -> Iterator[CaseFiles]:
    """Each case, as soon as it is stored or its error is added to `problems`.

    Args:
        cases: all cases, in order.
        pending: names of the cases that are not stored yet.
        results: None or the error of each pending case, in order.
        problems: collects the errors.
    """
    for case in cases:
        error = next(results) if case.name in pending else None
        if isinstance(error, TooLargeError):  # other cases would fail for the same spacing
            raise DatasetError(str(error))
        with problems.noted():
            if error is not None:
                raise error
        yield case


def preparing_processes(
    cases: Sequence[CaseFiles], dataset: Dataset, spacing: Sequence[float], num_channels: int
) -> int:
    """The number of processes in which these cases are prepared fastest.

    Args:
        cases: cases of the dataset.
        dataset: the dataset.
        spacing: target spacing in mm along x, y and z.
        num_channels: number of channels of an image.
    """

    def voxels(case: CaseFiles) -> int:
        grid = grid_of_case(case, dataset)
        turned = Orientation.of(grid.affine).turn_grid(grid)
        prepared = turned.with_spacing(spacing_for(turned, spacing))
        return num_channels * max(math.prod(grid.shape), math.prod(prepared.shape))

    return worthwhile_processes(cases, voxels, VOXELS_PER_PROCESS, BYTES_PER_VOXEL)


def _store(
    task: tuple[CaseFiles, Path | None, Path],
    *,
    dataset: Dataset,
    partial_folder: Path,
    spacing: Sequence[float],
    normalisers: Sequence[Normaliser],
    order: Literal[1, 3],
) -> None:
    """Prepare a case and write its folder. Raises DatasetError or VolumeError.

    Args:
        task: the case, its file of first-stage labels or None, and the folder to write.
        dataset: the dataset, with its channels and labels.
        partial_folder: a folder for unfinished results.
        spacing: target spacing in mm along x, y and z.
        normalisers: one function for each channel.
        order: order of the interpolation of images.
    """
    case, first, target = task
    volume, label_volume = read_case(case, dataset)
    # Without an image, the label decides which part of the volume is background.
    labels = label_volume.data[..., None].repeat(len(normalisers), axis=3)
    body = volume if case.images else volume.like(labels)
    try:
        prepared = prepare_image(body, spacing=spacing, normalisers=normalisers, order=order)
    except VolumeError as error:
        kind = TooLargeError if isinstance(error, TooLargeError) else DatasetError
        raise kind(f"case {case.name}: {error}") from None
    image = prepared.image.numpy() if case.images else np.zeros_like(prepared.image.numpy())
    if first is not None:
        image = with_labels(prepared, read_volume(first)).image.numpy()
    label = prepare_label(label_volume, prepared).numpy()
    inside = partial_folder / target.name
    with naming(target):
        write_arrays(
            inside, image, label, ignore=dataset.ignore, marked=partial(_marked, case.name, dataset)
        )
    try:
        inside.rename(target)
    except OSError:  # another run stored the same case in the meantime
        if not target.is_dir():
            raise


def _mapped(path: Path) -> ndarray:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path.parent) from error
    if not isinstance(array, ndarray):  # a zip file of several arrays
        array.close()
        raise _damaged(path.parent)
    return array


def _damaged(folder: Path) -> DatasetError:
    return DatasetError(
        f"{folder}: expected a prepared case, found damaged or wrong arrays; delete the folder to "
        f"have the case prepared again"
    )


def _positions(
    label: Integer[ndarray, "x y z"], ignore: int | None
) -> dict[int, Integer[ndarray, "voxels 3"]]:
    present = np.unique(label).tolist()
    numbers = [number for number in present if number not in (0, ignore)]
    if ignore in present:
        numbers.append(0)
    found = {}
    for number in numbers:
        voxels = np.argwhere(label == number if number else label != ignore)
        if len(voxels) > POSITIONS_PER_CLASS:
            chosen = np.linspace(0, len(voxels) - 1, POSITIONS_PER_CLASS).round().astype(int)
            voxels = voxels[chosen]
        found[number] = voxels
    return found


def _digest(
    case: CaseFiles,
    dataset: Dataset,
    spacing: Sequence[float],
    order: int,
    settings: Any,
    first: Path | None,
) -> str:
    """A digest of everything on which the arrays of a case depend.

    Args:
        case: the case, with its files.
        dataset: the dataset, with its channels and labels.
        spacing: target spacing in mm along x, y and z.
        order: order of the interpolation of images.
        settings: JSON value that describes the normalisers.
        first: the file of first-stage labels, if there is one.
    """
    sets = dataset.unlabelled_sets[1:]
    structures = dataset.rules.structures
    content = {
        "format": CACHE_FORMAT,
        "channels": dataset.channels,
        "labels": dataset.labels,
        "ignore": dataset.ignore,
        **({"in_files": dataset.in_files, "others": dataset.others} if dataset.in_files else {}),
        **({"unlabelled": [*sets, dataset.unlabelled.get(case.name, ())]} if sets else {}),
        **({"pictures": repr(dataset.rules)} if is_picture(case.label) else {}),
        **({"structures": structures.told()} if structures else {}),
        **({"nan": dataset.nan} if dataset.nan != "refuse" else {}),
        "spacing": list(spacing),
        "order": order,
        "separate": ANISOTROPY,
        "settings": settings,
        "files": file_states([*case.images, case.label, *([first] if first else [])]),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
