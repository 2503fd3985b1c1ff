"""Prepared cases on disk, memory-mapped: what training holds in memory is one batch.

Each case is a folder of three arrays: `image.npy` (float32, channel x y z), `label.npy` (the
smallest unsigned type), and `voxels.npz`, positions of each class to centre patches on. The
folder's name is a digest of everything they depend on, so a changed setting or file never meets an
old array.
"""

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Integer
from numpy import ndarray

from segkit.data.cases import Case, Dataset, read_case
from segkit.data.first_stage import with_labels
from segkit.data.preprocess import Normaliser, prepare, prepare_label
from segkit.volume import read_volume

FORMAT = 2
POSITIONS_PER_CLASS = 10_000


@dataclass(frozen=True)
class StoredCase:
    """A prepared case; its arrays are mapped when they are first asked for."""

    name: str
    folder: Path

    @cached_property
    def image(self) -> Float[ndarray, "channel x y z"]:
        """Normalised intensities."""
        array: ndarray = np.load(self.folder / "image.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def label(self) -> Integer[ndarray, "x y z"]:
        """Labels on the image's grid."""
        array: ndarray = np.load(self.folder / "label.npy", mmap_mode="r", allow_pickle=False)
        return array

    @cached_property
    def positions(self) -> dict[int, Integer[ndarray, "voxels 3"]]:
        """For each foreground class that is present, voxels of it (all, or 10,000 drawn evenly)."""
        with np.load(self.folder / "voxels.npz", allow_pickle=False) as file:
            return {int(name): file[name] for name in file.files}


def store_cases(
    cases: Sequence[Case],
    dataset: Dataset,
    *,
    folder: Path,
    spacing: Sequence[float],
    normalisers: Sequence[Normaliser],
    settings: Any,
    first_labels: Mapping[str, Path] | None = None,
    track: Callable[[Iterable[Case]], Iterable[Case]] = iter,
) -> tuple[StoredCase, ...]:
    """Prepare each case that is not in `folder` yet.

    `settings` is whatever JSON-able value names the normalisers; it goes into the digest beside the
    spacing and the files' sizes and times. `first_labels` are files with a first stage's labels of
    each case by its name, which become the last channel of its image. `track` may show progress.
    """
    stored = []
    for case in track(cases):
        first = first_labels[case.name] if first_labels else None
        target = folder / f"{case.name}-{_digest(case, dataset, spacing, settings, first)}"
        if not target.is_dir():
            _store(case, dataset, target, spacing, normalisers, first)
        stored.append(StoredCase(case.name, target))
    return tuple(stored)


def _store(
    case: Case,
    dataset: Dataset,
    target: Path,
    spacing: Sequence[float],
    normalisers: Sequence[Normaliser],
    first: Path | None,
) -> None:
    volume, label_volume = read_case(case, dataset)
    # A case without an image has its background in its label; its own image stays blank.
    labels = label_volume.data[..., None].repeat(len(normalisers), axis=3)
    body = volume if case.images else volume.like(labels)
    prepared = prepare(body, spacing=spacing, normalisers=normalisers)
    image = prepared.image.numpy() if case.images else np.zeros_like(prepared.image.numpy())
    if first is not None:
        image = with_labels(prepared, read_volume(first)).image.numpy()
    label = prepare_label(label_volume, prepared).numpy()
    target.parent.mkdir(parents=True, exist_ok=True)
    # A folder appears whole: it is filled under another name and then renamed.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as partial:
        inside = Path(partial) / "case"
        inside.mkdir()
        np.save(inside / "image.npy", image)
        np.save(inside / "label.npy", label)
        np.savez(inside / "voxels.npz", **_positions(label))
        try:
            inside.rename(target)
        except OSError:  # another run stored the same case in the meantime
            if not target.is_dir():
                raise


def _positions(label: Integer[ndarray, "x y z"]) -> dict[str, Any]:
    found = {}
    for number in np.unique(label[label > 0]).tolist():
        voxels = np.argwhere(label == number).astype(np.int32)
        if len(voxels) > POSITIONS_PER_CLASS:
            chosen = np.linspace(0, len(voxels) - 1, POSITIONS_PER_CLASS).round().astype(int)
            voxels = voxels[chosen]
        found[str(number)] = voxels
    return found


def _digest(
    case: Case, dataset: Dataset, spacing: Sequence[float], settings: Any, first: Path | None
) -> str:
    paths = [*case.images, case.label, *([first] if first else [])]
    files = [(str(path.resolve()), path.stat()) for path in paths]
    content = {
        "format": FORMAT,
        "channels": dataset.channels,
        "labels": dataset.labels,
        "spacing": list(spacing),
        "settings": settings,
        "files": [(name, state.st_size, state.st_mtime_ns) for name, state in files],
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
