"""`segkit predict`: predict files and write the results to files."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Any, Literal, TypeVar

from segkit.config.model import ModelDescription
from segkit.data.label_numbers import within
from segkit.data.preprocess import Prepared
from segkit.errors import SegkitError, VolumeError, counted
from segkit.inference.bids_layout import bids_path, bids_stem, told_of_sources, write_bids_root
from segkit.inference.dicom_seg import write_dicom_segmentation
from segkit.inference.label_statistics import label_statistics
from segkit.inference.made_by import made_by, models_and_settings
from segkit.inference.map_files import write_maps
from segkit.inference.model_walk import TrackSlabs, untracked_slabs
from segkit.inference.predictor import Prediction, Predictor
from segkit.io.atomic import (
    mark_finished,
    mark_unfinished,
    refuse_existing,
    remove_leftovers,
    unfinished_files,
    write_json,
)
from segkit.io.dicom_headers import DICOM_SUFFIX
from segkit.io.disk_arrays import OnDisk
from segkit.io.file_names import tell_changed_names
from segkit.io.inputs import Input, failure, read_input, series_of
from segkit.io.pictures import PAGES, PLANES, label_colour, write_montage
from segkit.io.volume import Volume, write_volume
from segkit.io.volume_names import SUFFIXES, check_writable, numbers_suffix, stem_of, suffix_of
from segkit.provenance import PROVENANCE, check_asked, check_made_of

T = TypeVar("T")
_Read = tuple[Volume, Sequence[Prepared] | None]
ResultLayout = Literal["flat", "bids"]
"""Names of results after the inputs, or as BIDS derivatives."""


@dataclass(frozen=True)
class Outcome:
    """Result of one input: the files that were written, and an error if a result is missing."""

    input: Input
    written: tuple[Path, ...]
    error: str | None = None
    presence: Mapping[str, float] | None = None
    """Probability that the volume contains each class; None without a presence head."""
    kept: Path | None = None
    """The labels, if all results existed already and nothing was written."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain dicts, lists and strings; the labels are first in `written`."""
        return {
            "input": [str(file) for file in self.input.files],
            "written": [str(file) for file in self.written],
            "kept": None if self.kept is None else str(self.kept),
            "error": self.error,
            "presence": None if self.presence is None else dict(self.presence),
        }


@dataclass(frozen=True)
class Targets:
    """Paths of the results of one input; None for each result that is not requested."""

    labels: Path
    probabilities: Path | None = None
    entropy: Path | None = None
    variance: Path | None = None
    presence: Path | None = None
    figures: Path | None = None
    """The JSON file of the attention maps; the maps are written beside it."""
    statistics: Path | None = None
    preview: Path | None = None

    @property
    def all(self) -> list[Path]:
        """The requested results, the labels first, and the sidecar files of the volumes."""
        requested = [path for path in vars(self).values() if path is not None]
        volumes = (self.labels, self.probabilities, self.entropy, self.variance)
        return [*requested, *(sidecar_of(path) for path in volumes if path is not None)]

    @property
    def sidecars(self) -> list[Path]:
        """The JSON files; each holds the provenance of itself or of the volume beside it."""
        return [path for path in self.all if path.suffix == ".json"]


def sidecar_of(volume: Path) -> Path:
    """The JSON file beside a result volume, which holds its provenance."""
    return volume.with_name(f"{_stem(volume)}.json")


def _stem(path: Path) -> str:
    return path.name[: -len(DICOM_SUFFIX)] if _is_dicom(path) else stem_of(path)


def output_path(source: Input, *, out: Path | None, single: bool, as_dicom: bool = False) -> Path:
    """The path of the labels of an input.

    Args:
        source: the input.
        out: a file for the labels, or a folder, in which the labels get the name of the input, so
            that predictions pair with references. If not given, the labels go beside the input as
            `NAME_seg`.
        single: True if there is only one input.
        as_dicom: write a DICOM segmentation, which is possible only for a DICOM series. A name in
            .dcm means the same.

    Raises:
        VolumeError: the name does not fit.
    """
    suffix = DICOM_SUFFIX if as_dicom else source.suffix
    if out is None:
        path = source.folder / f"{source.file_name}_seg{suffix}"
    elif out.name.lower().endswith((*SUFFIXES, DICOM_SUFFIX)):
        if not single:
            raise VolumeError(
                f"{out}: one file cannot hold several predictions; pass a folder as --out"
            )
        path = out
    else:
        path = out / f"{source.file_name}{suffix}"
    if as_dicom and not _is_dicom(path):
        raise VolumeError(
            f"{path}: expected a name ending in {DICOM_SUFFIX} for a DICOM segmentation; choose "
            "another --out, or a folder"
        )
    if _is_dicom(path) and not source.is_series:
        raise VolumeError(
            f"{source.files[0]}: a DICOM segmentation needs a DICOM series as input, found another "
            "format; choose a NIfTI file or a folder as --out"
        )
    if not _is_dicom(path):
        check_writable(path)
    return path


def _is_dicom(path: Path) -> bool:
    return path.name.lower().endswith(DICOM_SUFFIX)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    *,
    out: str | Path | None = None,
    maps: str | Path | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    statistics: bool = False,
    preview: bool = False,
    as_dicom: bool = False,
    layout: ResultLayout = "flat",
    overwrite: bool = False,
    shard: tuple[int, int] = (1, 1),
    track: TrackSlabs = untracked_slabs,
) -> Generator[Outcome, None, None]:
    """Segment each input and write the results. A bad input does not stop the others.

    While the network runs, the next volume is read and prepared and the last result is written, so
    that at most three volumes are in memory. The next is prepared only if there is room for it.

    Existing results are not overwritten unless `overwrite` is set. If all results of an input exist
    and come from the same models, settings and files, the input is skipped (`Outcome.kept`). If
    they come from others, for example from a scan that was replaced since, this is an error. It is
    also an error if `out` names an existing file for the labels of one volume. Incomplete results
    of a stopped run are always written again.

    Labels are written first. If another result cannot be written, such as a picture, the outcome
    has an error, but lists the labels as written.

    Args:
        predictor: the models and their settings.
        inputs: the volumes, for example from `find_inputs`.
        out: a file for the labels of one volume, or a folder; beside each input if not given.
        maps: a folder for attention maps; no maps are written if not given.
        probabilities, uncertainty: write these too; `Predictor` explains them.
        statistics: write the statistics of `label_statistics` too.
        preview: write a picture of three planes too.
        as_dicom: write labels as DICOM segmentations.
        layout: `flat` names files after the inputs, `bids` writes BIDS derivatives into `out`.
        overwrite: replace existing results.
        shard: (I, N): segment every N-th input, beginning with the I-th.
        track: shows progress, as for `Predictor`.

    Yields:
        For each input, in order, the files that were written, or the error.

    Raises:
        SegkitError: a package that `preview` or `as_dicom` needs is not installed.
    """
    out, maps = (None if path is None else Path(path) for path in (out, maps))
    if preview:
        _check_installed("PIL", "report", "--preview")
    if as_dicom or (out and _is_dicom(out)):
        _check_installed("highdicom", "dicom", "a DICOM segmentation")

    if layout == "bids" and as_dicom:
        raise VolumeError(
            "BIDS derivatives are NIfTI files, but --dicom-seg writes DICOM; leave out one of the "
            "two"
        )

    def targets_of(source: Input) -> Targets:
        prob = "prob"
        if layout == "bids":
            labels, prob = bids_path(source, out), "probseg"
            stem, suffix = bids_stem(labels), ".nii.gz"
        else:
            labels = output_path(source, out=out, single=len(inputs) == 1, as_dicom=as_dicom)
            stem, suffix = _beside(source, labels)
            suffix = numbers_suffix(suffix)
        return Targets(
            labels,
            labels.with_name(f"{stem}_{prob}{suffix}") if probabilities else None,
            labels.with_name(f"{stem}_entropy{suffix}") if uncertainty else None,
            labels.with_name(f"{stem}_variance{suffix}") if uncertainty else None,
            labels.with_name(f"{stem}_presence.json") if predictor.classifies else None,
            maps / f"{source.file_name}_maps.json" if maps else None,
            labels.with_name(f"{stem}_statistics.json") if statistics else None,
            labels.with_name(f"{stem}_preview.png") if preview else None,
        )

    planned = _planned(inputs, targets_of)
    files = {file.resolve() for source in inputs for file in source.files}
    asked = models_and_settings(predictor)
    number, count = shard
    if layout == "bids" and out is not None:
        models = [member.model.description for member in predictor.members]
        write_bids_root(out, models[0].labelling, models=[each.run for each in models])

    def read(
        source: Input, plan: Targets | Outcome
    ) -> tuple[Input, Targets | Outcome, Future[_Read] | None]:
        if isinstance(plan, Targets):
            plan = _checked(source, plan, files, asked, out=out, overwrite=overwrite)
        reading = (
            reader.submit(_read, predictor, source, stopped) if isinstance(plan, Targets) else None
        )
        return source, plan, reading

    def segment(
        source: Input, plan: Targets | Outcome, reading: Future[_Read] | None
    ) -> Outcome | Future[Outcome]:
        if isinstance(plan, Outcome):
            return plan
        assert reading is not None
        try:
            image, prepared = reading.result()
            prediction = predictor(
                image,
                images=prepared,
                maps=maps is not None,
                probabilities=probabilities,
                uncertainty=uncertainty,
                allocate=OnDisk(plan.labels.parent),
                track=track,
            )
        except (SegkitError, OSError) as error:
            return _failed(source, error)
        made = {PROVENANCE: made_by(predictor, _asked_for(source, asked), source.files)}
        made |= told_of_sources(source) if layout == "bids" else {}
        description = predictor.model.description
        work = partial(_write, source, plan, prediction, image, description, made)
        return writer.submit(_guarded, source, work)

    with ThreadPoolExecutor(1) as writer, _reading_ahead() as (reader, stopped):
        reading = (read(source, plan) for source, plan in planned[number - 1 :: count])
        writing = (segment(*plan) for plan in _one_ahead(reading))
        for outcome in _one_ahead(writing):
            yield outcome if isinstance(outcome, Outcome) else outcome.result()


@contextmanager
def _reading_ahead() -> Iterator[tuple[ThreadPoolExecutor, Event]]:
    """A thread for `_read`, and the event that tells it to stop.

    The block may end early, for example by Ctrl-C. Then only the file that is being read is read to
    its end; it is not prepared, and the next is not begun.
    """
    stopped = Event()
    with ThreadPoolExecutor(1) as reader:
        try:
            yield reader, stopped
        finally:
            stopped.set()
            reader.shutdown(wait=False, cancel_futures=True)


def _read(predictor: Predictor, source: Input, stopped: Event) -> _Read:
    """The volume of an input, and its images if they may be prepared already."""
    volume = predictor.with_numbers(read_input(source))
    return volume, None if stopped.is_set() else predictor.prepare_next(volume)


def _one_ahead(items: Iterable[T]) -> Iterator[T]:
    """The same items, each after the next item has been requested."""
    held: list[T] = []
    for item in items:
        held.append(item)
        del item
        if len(held) > 1:
            yield held.pop(0)
    yield from held


def _planned(
    inputs: Sequence[Input], targets_of: Callable[[Input], Targets]
) -> list[tuple[Input, Targets | Outcome]]:
    """Each input with the paths of its results, or with an error if two inputs share a path."""
    tell_changed_names(source.name for source in inputs)
    planned: list[tuple[Input, Targets | Outcome]] = []
    owners: dict[Path, Input] = {}
    for source in inputs:
        try:
            targets = targets_of(source)
            owner = owners.setdefault(sidecar_of(targets.labels.resolve()), source)
            if owner is not source:
                raise VolumeError(
                    f"{targets.labels}: would also be the prediction of {owner.files[0]}; give "
                    f"one of them another --out"
                )
            planned.append((source, targets))
        except VolumeError as error:
            planned.append((source, _failed(source, error)))
    for folder in {plan.labels.parent for _, plan in planned if isinstance(plan, Targets)}:
        remove_leftovers(folder)
    return planned


def _checked(
    source: Input,
    targets: Targets,
    inputs: set[Path],
    asked: Mapping[str, Any],
    *,
    out: Path | None,
    overwrite: bool,
) -> Targets | Outcome:
    """The targets; or the outcome, if the results exist already or must not be written."""
    stopped = targets.labels.absolute() in unfinished_files(targets.labels)
    kept = source.of_folder or targets.labels != out
    there = kept and not (overwrite or stopped) and all(path.exists() for path in targets.all)
    try:
        _refuse(source, targets, inputs, overwrite=overwrite or there)
        for sidecar in targets.sidecars if there else ():
            check_asked(targets.labels, sidecar, _asked_for(source, asked))
        if there:
            check_made_of(targets.labels, targets.sidecars, source.files)
    except VolumeError as error:
        return _failed(source, error)
    return Outcome(source, (), kept=targets.labels) if there else targets


def _asked_for(source: Input, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Models and settings for one input, with the DICOM series, if one was named."""
    return {**asked, "series": source.series} if source.series else dict(asked)


def _beside(source: Input, labels: Path) -> tuple[str, str]:
    """Stem and suffix of the other results, which are named after the labels."""
    stem, suffix = _stem(labels), source.suffix if _is_dicom(labels) else suffix_of(labels)
    return stem if stem == source.file_name else stem.removesuffix("_seg"), suffix


def _refuse(source: Input, targets: Targets, inputs: set[Path], *, overwrite: bool) -> None:
    """Raise VolumeError if a result would overwrite a file that must stay."""
    for path in targets.all:
        if path.resolve() in inputs:
            which = "the" if path in source.files else "an"
            raise VolumeError(
                f"{path}: the prediction would overwrite {which} input; choose another --out"
            )
    left = unfinished_files(targets.labels)
    if not source.of_folder:
        refuse_existing(targets.all, overwrite=overwrite, left=left)
    elif targets.labels.absolute() in left:
        return
    elif targets.labels.exists() and not all(path.exists() for path in targets.all):
        refuse_existing([targets.labels], overwrite=overwrite)


def _write(
    source: Input,
    targets: Targets,
    prediction: Prediction,
    image: Volume,
    description: ModelDescription,
    made: Mapping[str, Any],
) -> Outcome:
    mark_unfinished(targets.labels, targets.all)
    labels = prediction.labels
    # Labels are written first, so that they exist even if another result fails.
    write_json(sidecar_of(targets.labels), {**_told_of_labels(description), **made})
    if _is_dicom(targets.labels):
        write_dicom_segmentation(
            targets.labels,
            labels,
            series_of(source),
            description.labelling,
            codes=description.codes,
            algorithm=description.run,
        )
    else:
        write_volume(targets.labels, labels)
    written = [targets.labels]
    failures = []
    for part in _others(source, targets, prediction, image, description, made):
        try:
            written += part()
        except (SegkitError, OSError) as error:
            failures.append(failure(source, error))
    written.append(sidecar_of(targets.labels))
    if failures:  # left marked as unfinished, so that the next run writes the rest
        more = f" (and {counted(len(failures) - 1, 'more result')})" if len(failures) > 1 else ""
        reason = f"{failures[0]}{more}; its labels are written: {targets.labels}"
        return Outcome(source, tuple(written), reason, prediction.presence)
    mark_finished(targets.labels)
    return Outcome(source, tuple(written), presence=prediction.presence)


def _told_of_labels(description: ModelDescription) -> dict[str, Any]:
    """Number in the file, colour and, if the model has one, coded concept of each label."""
    labelling = description.labelling
    numbers = labelling.numbers_in_files
    named = {name: description.codes[name] for name in numbers if name in description.codes}
    return {
        "labels": numbers,
        "colours": {name: label_colour(numbers[name]) for name in labelling.members},
        "codes": {name: code.model_dump(mode="json") for name, code in named.items()},
    }


def _others(
    source: Input,
    targets: Targets,
    prediction: Prediction,
    image: Volume,
    description: ModelDescription,
    made: Mapping[str, Any],
) -> list[Callable[[], Sequence[Path]]]:
    """Functions that write each requested result but the labels, and return its files."""
    labels, labelling = prediction.labels, description.labelling

    def write_values(path: Path, volume: Volume) -> Sequence[Path]:
        write_volume(path, volume)
        write_json(sidecar_of(path), made)
        return path, sidecar_of(path)

    def write_presence(path: Path) -> Sequence[Path]:
        write_json(path, {"presence": prediction.presence, **made})
        return (path,)

    def write_statistics(path: Path) -> Sequence[Path]:
        figures = label_statistics(labels, image, labelling, description.channels)
        write_json(path, {"case": source.name, **figures, **made})
        return (path,)

    def write_preview(path: Path) -> Sequence[Path]:
        shown = within(labels.data, labelling)  # numbered so that 0 is the background
        write_montage(
            path,
            image.data if image.data.ndim == 3 else image.data[..., 0],
            image.grid,
            [(source.name, None, "labels"), ("segmentation", shown, "labels")],
            label_names={
                number: name
                for name, number in labelling.numbers.items()
                if (shown == number).any()
            },
            through=shown,
            planes=PAGES if image.picture else PLANES,
        )
        return (path,)

    parts: list[Callable[[], Sequence[Path]]] = []
    for path, volume in (
        (targets.probabilities, prediction.probabilities),
        (targets.entropy, prediction.entropy),
        (targets.variance, prediction.variance),
    ):
        if path is not None and volume is not None:
            parts.append(partial(write_values, path, volume))
    if targets.presence is not None and prediction.presence is not None:
        parts.append(partial(write_presence, targets.presence))
    if targets.statistics is not None:
        parts.append(partial(write_statistics, targets.statistics))
    if targets.figures is not None:
        folder = targets.figures.parent
        parts.append(
            partial(write_maps, folder, source.file_name, prediction.maps, image, made=made)
        )
    if targets.preview is not None:
        parts.append(partial(write_preview, targets.preview))
    return parts


def _check_installed(package: str, extra: str, what: str) -> None:
    if find_spec(package) is None:
        raise SegkitError(
            f"{what} needs {package}, which is not installed; run pip install 'segkit[{extra}]'"
        )


def _guarded(source: Input, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except (SegkitError, OSError) as error:
        return _failed(source, error)


def _failed(source: Input, error: SegkitError | OSError) -> Outcome:
    return Outcome(source, (), failure(source, error))
