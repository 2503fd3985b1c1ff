"""`segkit predict`: files in, files out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from segkit.config.model import ModelDescription
from segkit.errors import SegkitError, VolumeError
from segkit.inference.dicom_seg import write_dicom_segmentation
from segkit.inference.label_statistics import label_statistics
from segkit.inference.map_files import write_maps
from segkit.inference.model_walk import TrackSlabs
from segkit.inference.predictor import Prediction, Predictor
from segkit.io.atomic import begin, finish, left_behind, refuse_existing, sweep, write_json
from segkit.io.dicom import SUFFIX as DICOM_SUFFIX
from segkit.io.dicom import choose_series
from segkit.io.disk_arrays import OnDisk
from segkit.io.inputs import Input, failure, read_input
from segkit.io.montage import write_montage
from segkit.io.volume import SUFFIXES, Volume, stem_of, suffix_of, write_volume
from segkit.provenance import PROVENANCE, asked_of, check_asked, made_by


@dataclass(frozen=True)
class Outcome:
    """What came of one input: the files that were written, or why there are none."""

    input: Input
    written: tuple[Path, ...]
    error: str | None = None
    presence: Mapping[str, float] | None = None
    """The probability that the volume holds each class, where the model says so."""
    kept: Path | None = None
    """Labels that were there already, with all else that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dicts, lists and strings; the labels are the first that was written."""
        return {
            "input": [str(file) for file in self.input.files],
            "written": [str(file) for file in self.written],
            "kept": None if self.kept is None else str(self.kept),
            "error": self.error,
            "presence": None if self.presence is None else dict(self.presence),
        }


@dataclass(frozen=True)
class Targets:
    """Where the results of one input go; None for what is not asked for."""

    labels: Path
    probabilities: Path | None = None
    entropy: Path | None = None
    variance: Path | None = None
    presence: Path | None = None
    figures: Path | None = None
    """Of the attention maps; the maps lie beside it."""
    statistics: Path | None = None
    preview: Path | None = None

    @property
    def all(self) -> list[Path]:
        """Those that are asked for, the labels first, and what tells how volumes were made."""
        asked = [path for path in vars(self).values() if path is not None]
        volumes = (self.labels, self.probabilities, self.entropy, self.variance)
        return [*asked, *(sidecar_of(path) for path in volumes if path is not None)]


def sidecar_of(volume: Path) -> Path:
    """The JSON file beside a volume that is written, which tells how it was made."""
    return volume.with_name(f"{_stem(volume)}.json")


def _stem(path: Path) -> str:
    return path.name[: -len(DICOM_SUFFIX)] if _is_dicom(path) else stem_of(path)


def output_path(source: Input, *, out: Path | None, alone: bool, as_dicom: bool = False) -> Path:
    """Where the labels of an input go.

    Beside the input as `NAME_seg` where nothing is said; to `out` itself where it names a volume;
    else into the folder `out` under the input's name, so that predictions pair with references.
    A name in .dcm is that of a DICOM segmentation, which is had of a DICOM series alone.
    """
    suffix = DICOM_SUFFIX if as_dicom else source.suffix
    if out is None:
        beside = source.files[0].resolve() if source.is_series else source.files[0]
        path = beside.parent / f"{source.name}_seg{suffix}"
    elif out.name.lower().endswith((*SUFFIXES, DICOM_SUFFIX)):
        if not alone:
            raise VolumeError(f"{out}: one file cannot hold several predictions; name a folder")
        path = out
    else:
        path = out / f"{source.name}{suffix}"
    if as_dicom and not _is_dicom(path):
        raise VolumeError(f"{path}: expected a name in {DICOM_SUFFIX} for a DICOM segmentation")
    if _is_dicom(path) and not source.is_series:
        raise VolumeError(
            f"{source.files[0]}: is no DICOM series, to which a DICOM segmentation must refer; "
            f"name a NIfTI file or a folder as --out"
        )
    return path


def _is_dicom(path: Path) -> bool:
    return path.name.lower().endswith(DICOM_SUFFIX)


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    *,
    out: Path | None = None,
    maps: Path | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    statistics: bool = False,
    preview: bool = False,
    as_dicom: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] = (1, 1),
    track: TrackSlabs = lambda slabs, count: slabs,
) -> Iterator[Outcome]:
    """Segment each input and write what was asked for; one bad input does not stop the others.

    Of `shard` (I, N), every N-th input is segmented, from the I-th on. The next volume is read and
    the last result written while the network works, so that three volumes are held at most.

    Nothing is overwritten unless it may be, or a stopped run left it. For an input of a folder that
    is no failure: where all results are there it is left alone, and where the labels are missing,
    which come last, the rest is what a stopped run left and is made anew.

    `statistics` are those of `label_statistics`, `preview` a picture of three planes, and labels
    are written `as_dicom` as DICOM segmentations. Raises SegkitError where what these need is not
    installed.
    """
    if preview:
        _check_installed("matplotlib", "report", "--preview")
    if as_dicom or (out is not None and _is_dicom(out)):
        _check_installed("highdicom", "dicom", "a DICOM segmentation")
    description = predictor.model.description
    number, count = shard
    planned: list[tuple[Input, Targets | Outcome]] = []
    owners: dict[Path, Input] = {}
    for source in inputs:
        try:
            labels = output_path(source, out=out, alone=len(inputs) == 1, as_dicom=as_dicom)
        except VolumeError as error:
            planned.append((source, _failed(source, error)))
            continue
        owner = owners.setdefault(sidecar_of(labels.resolve()), source)
        if owner is not source:
            twice = VolumeError(f"{labels}: is the result of {owner.files[0]} as well; rename one")
            planned.append((source, _failed(source, twice)))
            continue
        targets = _targets(
            source,
            labels,
            maps=maps,
            probabilities=probabilities,
            uncertainty=uncertainty,
            presence=predictor.classifies,
            statistics=statistics,
            preview=preview,
        )
        planned.append((source, targets))
    for folder in {told.labels.parent for _, told in planned if isinstance(told, Targets)}:
        sweep(folder)
    files = {file.resolve() for source in inputs for file in source.files}
    asked = asked_of(predictor)

    def checked(source: Input, targets: Targets | Outcome) -> Targets | Outcome:
        if isinstance(targets, Outcome):
            return targets
        finished = source.of_folder and not overwrite and targets.labels.exists()
        try:
            _refuse(source, targets, files, overwrite=overwrite)
            if finished:
                check_asked(targets.labels, sidecar_of(targets.labels), asked)
        except VolumeError as error:
            return _failed(source, error)
        return Outcome(source, (), kept=targets.labels) if finished else targets

    def segment(source: Input, targets: Targets, volume: Future[Volume]) -> Callable[[], Outcome]:
        image = volume.result()
        prediction = predictor(
            image,
            maps=maps is not None,
            probabilities=probabilities,
            uncertainty=uncertainty,
            allocate=OnDisk(targets.labels.parent),
            track=track,
        )

        def write() -> Outcome:
            made = {PROVENANCE: made_by(predictor, asked, source.files)}
            return _write(source, targets, prediction, image, description, made)

        return write

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        mine = ((source, checked(source, told)) for source, told in planned[number - 1 :: count])
        writing: Future[Outcome] | None = None
        for source, told, volume in _read_ahead(mine, reader):
            following: Future[Outcome] = Future()
            if isinstance(told, Outcome) or volume is None:
                assert isinstance(told, Outcome)
                following.set_result(told)
            else:
                try:
                    following = writer.submit(_guarded, source, segment(source, told, volume))
                except (SegkitError, OSError) as error:
                    following.set_result(_failed(source, error))
            if writing is not None:
                yield writing.result()
            writing = following
        if writing is not None:
            yield writing.result()


def _read_ahead(
    planned: Iterable[tuple[Input, Targets | Outcome]], reader: ThreadPoolExecutor
) -> Iterator[tuple[Input, Targets | Outcome, Future[Volume] | None]]:
    """Each input with its volume to come; that of the next is read while one is worked on."""
    ahead: tuple[Input, Targets | Outcome, Future[Volume] | None] | None = None
    for source, told in planned:
        needed = not isinstance(told, Outcome)
        following = (source, told, reader.submit(read_input, source) if needed else None)
        if ahead is not None:
            yield ahead
        ahead = following
    if ahead is not None:
        yield ahead


def _targets(
    source: Input,
    labels: Path,
    *,
    maps: Path | None,
    probabilities: bool,
    uncertainty: bool,
    presence: bool,
    statistics: bool,
    preview: bool,
) -> Targets:
    """Results beside the labels are named after them, and after the input where its name is."""
    dicom = _is_dicom(labels)
    stem = _stem(labels)
    suffix = source.suffix if dicom else suffix_of(labels)
    if stem != source.name:
        stem = stem.removesuffix("_seg")

    def beside(ending: str) -> Path:
        return labels.with_name(f"{stem}_{ending}{suffix}")

    return Targets(
        labels,
        beside("prob") if probabilities else None,
        beside("entropy") if uncertainty else None,
        beside("variance") if uncertainty else None,
        labels.with_name(f"{stem}_presence.json") if presence else None,
        maps / f"{source.name}_maps.json" if maps else None,
        labels.with_name(f"{stem}_statistics.json") if statistics else None,
        labels.with_name(f"{stem}_preview.png") if preview else None,
    )


def _refuse(source: Input, targets: Targets, inputs: set[Path], *, overwrite: bool) -> None:
    """Raise VolumeError where a result would take the place of what must stay."""
    for path in targets.all:
        if path.resolve() in inputs:
            which = "the" if path in source.files else "an"
            raise VolumeError(f"{path}: is {which} input itself; name another --out")
    if not source.of_folder:
        left = left_behind(targets.labels)
        refuse_existing(targets.all, overwrite=overwrite, left=left)
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
    begin(targets.labels, targets.all)
    written = []
    labels, labelling = prediction.labels, description.labelling
    if targets.figures is not None:
        maps = targets.figures.parent
        written += write_maps(maps, source.name, prediction.maps, image, made=made)
    for path, volume in (
        (targets.probabilities, prediction.probabilities),
        (targets.entropy, prediction.entropy),
        (targets.variance, prediction.variance),
    ):
        if path is not None and volume is not None:
            write_volume(path, volume)
            write_json(sidecar_of(path), made)
            written += [path, sidecar_of(path)]
    if targets.presence is not None and prediction.presence is not None:
        write_json(targets.presence, {"presence": prediction.presence, **made})
        written.append(targets.presence)
    if targets.statistics is not None:
        figures = label_statistics(labels, image, labelling, description.channels)
        write_json(targets.statistics, {"case": source.name, **figures, **made})
        written.append(targets.statistics)
    if targets.preview is not None:
        write_montage(
            targets.preview,
            image.data if image.data.ndim == 3 else image.data[..., 0],
            image.grid,
            [(source.name, None, "labels"), ("segmentation", labels.data, "labels")],
            label_names={
                number: name
                for name, number in labelling.numbers.items()
                if (labels.data == number).any()
            },
            through=labels.data,
        )
        written.append(targets.preview)
    write_json(sidecar_of(targets.labels), {"labels": description.labels, **made})
    written.append(sidecar_of(targets.labels))
    # The labels come last: where they are, everything is.
    if _is_dicom(targets.labels):
        write_dicom_segmentation(
            targets.labels,
            labels,
            choose_series(source.files[0], source.series),
            labelling,
            codes=description.codes,
            algorithm=description.run,
        )
    else:
        write_volume(targets.labels, labels)
    finish(targets.labels)
    return Outcome(source, (targets.labels, *written), presence=prediction.presence)


def _check_installed(package: str, extra: str, what: str) -> None:
    if find_spec(package) is None:
        raise SegkitError(f"{what} needs {package}; run pip install 'segkit[{extra}]'")


def _guarded(source: Input, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except (SegkitError, OSError) as error:
        return _failed(source, error)


def _failed(source: Input, error: SegkitError | OSError) -> Outcome:
    return Outcome(source, (), failure(source, error))
