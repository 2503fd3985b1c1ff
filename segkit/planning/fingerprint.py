"""The fingerprint of a dataset: sizes, spacings, classes and intensities of its cases.

A plan is made from it, as in nnU-Net (Isensee et al. 2021). Each case is measured once, and its
measurement is stored in a small file. The name of the file has a digest of the paths, sizes and
times of the case's files. So interrupted work continues later, and a changed file is measured
again.

Intensities are measured in the foreground, and all cases have the same weight, no matter how large
their foreground is. nnU-Net draws values at random. Here each case keeps its mean, variance and
range, and at most 4,000 sorted values, evenly spaced by rank. So results do not depend on chance or
order. Means and deviations are exact; percentiles are exact to 1/8,000 of the values of each case.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Float, Shaped
from numpy import ndarray
from pydantic import Field, TypeAdapter

from segkit.data.case_processes import reading_processes
from segkit.data.dataset import CaseFiles, Dataset, check_headers, read_case
from segkit.data.preprocess import body_box
from segkit.errors import DatasetError, Problems
from segkit.geometry.grid import Orientation, rounded_spacing
from segkit.io.atomic import write_json
from segkit.io.checksums import file_states
from segkit.io.safe_text import read_json
from segkit.io.volume_names import is_picture
from segkit.planning.nnunet_rules import Intensities, Numbers
from segkit.system.progress import Track, untracked
from segkit.system.workers import attempted, in_processes

FINGERPRINT_FORMAT = 1
VALUES_PER_CASE = 4_000


@dataclass(frozen=True)
class Sample:
    """The foreground intensities of one channel in one case."""

    mean: float
    variance: float
    minimum: float
    maximum: float
    values: Annotated[tuple[float, ...], Field(min_length=1, max_length=VALUES_PER_CASE)]
    """At most 4,000 values, in ascending order."""


@dataclass(frozen=True)
class CaseSize:
    """The size of a case, and its classes."""

    name: str
    spacing: tuple[float, float, float]
    """Voxel size in mm along x, y and z (RAS+)."""
    shape: tuple[int, int, int]
    """Size of the body's box in voxels along x, y and z."""
    box_share: float
    """The share of the volume's voxels that lie in the body's box."""
    classes: tuple[int, ...]
    """The labels in the case, without the background."""


@dataclass(frozen=True)
class Measurement:
    """The measurement of one case."""

    size: CaseSize
    samples: tuple[Sample | None, ...]
    """A sample for each channel; None if the case has no image or no foreground."""


MEASUREMENT = TypeAdapter(Measurement)


@dataclass(frozen=True)
class Fingerprint:
    """Sizes, spacings, classes and intensities of a dataset."""

    channels: tuple[str, ...]
    labels: dict[str, int]
    num_outputs: int
    """Number of outputs of a network: one for each class, or for each region."""
    cases: tuple[CaseSize, ...]
    """The size of each case, and its classes."""
    intensities: tuple[Intensities | None, ...]
    """Foreground intensities of all cases, for each channel; None if no case has foreground."""

    def numbers(self) -> Numbers:
        """The numbers that a plan is made from."""
        return Numbers(
            spacings=tuple(case.spacing for case in self.cases),
            shapes=tuple(case.shape for case in self.cases),
            box_shares=tuple(case.box_share for case in self.cases),
            channels=self.channels,
            intensities=self.intensities,
            num_classes=self.num_outputs,
        )


def fingerprint(
    dataset: Dataset,
    *,
    cache: Path,
    workers: int | None = None,
    track: Track = untracked,
) -> Fingerprint:
    """Measure each case that is not in the cache yet, and combine all measurements.

    Args:
        dataset: the dataset to measure.
        cache: the folder with the measurements.
        workers: number of processes. Default: as many as cores, memory and work allow.
        track: shows the progress over cases.

    Raises:
        DatasetError, VolumeError: cases cannot be read; `problems` lists all of them.
        WorkerError: a process was killed.
    """
    paths = {case.name: _path(case, dataset, cache) for case in dataset.cases}
    pending = [case for case in dataset.cases if not paths[case.name].is_file()]
    measure = partial(_measured, dataset=replace(dataset, cases=()), cache=cache)
    check_headers(pending, dataset, track)
    if workers is None:
        workers = reading_processes(pending, dataset)
    fresh = in_processes(partial(attempted, measure), pending, min(workers, len(pending)))
    new: dict[str, Measurement] = {}
    problems = Problems()
    for measurement in problems.results(track(fresh, "measuring cases", len(pending))):
        new[measurement.size.name] = measurement
    problems.refuse()
    measurements = [
        new.get(case.name) or _read(paths[case.name], case, len(dataset.channels))
        for case in dataset.cases
    ]
    return Fingerprint(
        dataset.channels,
        dataset.labels,
        len(dataset.labelling.outputs),
        tuple(measurement.size for measurement in measurements),
        tuple(
            _merged([m.samples[channel] for m in measurements])
            for channel in range(len(dataset.channels))
        ),
    )


def _measured(case: CaseFiles, dataset: Dataset, cache: Path) -> Measurement:
    path = _path(case, dataset, cache)  # before reading, so that it has the time of the old file
    image, label = read_case(case, dataset)
    orientation = Orientation.of(image.grid.affine)
    labels = orientation.turn(label.data)
    # Without an image, the label decides which part is background, as in preprocessing.
    values = orientation.turn(image.data) if case.images else labels[..., None]
    box = body_box(values)
    foreground = dataset.foreground(labels)
    inside = foreground[box]
    spacing = orientation.turn_grid(image.grid).spacing
    size = CaseSize(
        case.name,
        rounded_spacing(spacing),
        inside.shape,
        inside.size / labels.size,
        tuple(np.unique(labels[foreground]).tolist()),
    )
    intensities = values[box][inside].T if case.images else np.empty((len(dataset.channels), 0))
    measurement = Measurement(size, tuple(_sample(channel) for channel in intensities))
    write_json(path, asdict(measurement))
    return measurement


def _sample(values: Shaped[ndarray, " voxels"]) -> Sample | None:
    if not len(values):
        return None
    ordered = np.sort(values).astype(float)
    kept = ordered[_ranks(len(ordered))] if len(ordered) > VALUES_PER_CASE else ordered
    return Sample(
        mean=float(ordered.mean()),
        variance=float(ordered.var()),
        minimum=float(ordered[0]),
        maximum=float(ordered[-1]),
        values=tuple(kept.tolist()),
    )


def _ranks(count: int) -> ndarray:
    """The middle rank of each of 4,000 equal parts of `count` sorted values."""
    return ((np.arange(VALUES_PER_CASE) + 0.5) / VALUES_PER_CASE * count).astype(int)


def _merged(samples: Sequence[Sample | None]) -> Intensities | None:
    """The statistics of the values of all cases, with the same weight for each case."""
    found = [sample for sample in samples if sample is not None]
    if not found:
        return None
    # If a case has fewer values, they are repeated, so that all cases have the same weight.
    values: Float[ndarray, " values"] = np.concatenate(
        [np.array(sample.values)[_ranks(len(sample.values))] for sample in found]
    )
    lower, median, upper = np.percentile(values, [0.5, 50, 99.5])
    means = np.array([sample.mean for sample in found])
    variance = np.mean([sample.variance for sample in found]) + means.var()
    return Intensities(
        mean=float(means.mean()),
        std=float(np.sqrt(variance)),
        median=float(median),
        minimum=min(sample.minimum for sample in found),
        maximum=max(sample.maximum for sample in found),
        lower=float(lower),
        upper=float(upper),
    )


def _path(case: CaseFiles, dataset: Dataset, cache: Path) -> Path:
    structures = dataset.rules.structures
    content = {
        "format": FINGERPRINT_FORMAT,
        # A case is checked against these settings when it is read.
        "channels": dataset.channels,
        "labels": dataset.labels,
        "regions": dataset.regions,
        "ignore": dataset.ignore,
        **({"in_files": dataset.in_files, "others": dataset.others} if dataset.in_files else {}),
        "num_images": len(case.images),
        **({"pictures": repr(dataset.rules)} if is_picture(case.label) else {}),
        **({"structures": structures.told()} if structures else {}),
        "files": file_states((*case.images, case.label)),
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
    return cache / f"{case.file_name}-{digest}.json"


def _read(path: Path, case: CaseFiles, num_channels: int) -> Measurement:
    try:
        found = MEASUREMENT.validate_python(read_json(path))
    except (OSError, ValueError):
        found = None
    if found is None or found.size.name != case.name or len(found.samples) != num_channels:
        raise DatasetError(
            f"{path}: cannot be read as the stored measurement of {case.name}; delete the file to "
            "measure the case again"
        )
    return found
