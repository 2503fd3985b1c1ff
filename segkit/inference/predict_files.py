"""`segkit predict`: predict files and write the results to files."""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from typing import Literal, TypeVar

from segkit.data.preprocess import Prepared
from segkit.errors import SegkitError, VolumeError
from segkit.inference.bids_layout import bids_path, bids_stem, told_of_sources, write_bids_root
from segkit.inference.made_by import made_by, models_and_settings
from segkit.inference.model_walk import TrackSlabs, untracked_slabs
from segkit.inference.predictor import Predictor
from segkit.inference.result_files import (
    Outcome,
    Targets,
    asked_for,
    checked_results,
    failed_outcome,
    is_dicom_name,
    name_beside,
    output_path,
    planned_results,
)
from segkit.inference.write_results import write_results
from segkit.io.disk_arrays import OnDisk
from segkit.io.inputs import Input, read_input
from segkit.io.volume import Volume
from segkit.io.volume_names import numbers_suffix
from segkit.provenance import PROVENANCE

T = TypeVar("T")
_Read = tuple[Volume, Sequence[Prepared] | None]
ResultLayout = Literal["flat", "bids"]
"""Names of results after the inputs, or as BIDS derivatives."""


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
    if as_dicom or (out and is_dicom_name(out)):
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
            stem, suffix = name_beside(source, labels)
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

    planned = planned_results(inputs, targets_of)
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
            plan = checked_results(source, plan, files, asked, out=out, overwrite=overwrite)
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
            return failed_outcome(source, error)
        made = {PROVENANCE: made_by(predictor, asked_for(source, asked), source.files)}
        made |= told_of_sources(source) if layout == "bids" else {}
        description = predictor.model.description
        work = partial(write_results, source, plan, prediction, image, description, made)
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


def _check_installed(package: str, extra: str, what: str) -> None:
    if find_spec(package) is None:
        raise SegkitError(
            f"{what} needs {package}, which is not installed; run pip install 'segkit[{extra}]'"
        )


def _guarded(source: Input, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except (SegkitError, OSError) as error:
        return failed_outcome(source, error)
