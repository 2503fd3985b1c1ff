"""`segkit predict`: files in, files out."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from segkit.errors import SegkitError, VolumeError, sentence_of
from segkit.explain.maps import write_maps
from segkit.files import begin, finish, left_behind, refuse_existing, sweep, write_json
from segkit.inference.predictor import Prediction, Predictor, Track
from segkit.inputs import Input, find_inputs, parse_shard, read_input
from segkit.scratch import OnDisk
from segkit.volume import SUFFIXES, Volume, stem_of, suffix_of, write_volume

__all__ = [
    "Input",
    "Outcome",
    "find_inputs",
    "output_path",
    "parse_shard",
    "predict_files",
    "read_input",
]


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

    @property
    def all(self) -> list[Path]:
        """Those that are asked for, the labels first."""
        return [path for path in vars(self).values() if path is not None]


def output_path(source: Input, *, out: Path | None, alone: bool) -> Path:
    """Where the labels of an input go.

    Beside the input as `NAME_seg` where nothing is said; to `out` itself where it names a volume;
    else into the folder `out` under the input's name, so that predictions pair with references.
    """
    suffix = suffix_of(source.files[0])
    if out is None:
        return source.files[0].parent / f"{source.name}_seg{suffix}"
    if out.name.lower().endswith(SUFFIXES):
        if not alone:
            raise VolumeError(f"{out}: one file cannot hold several predictions; name a folder")
        return out
    return out / f"{source.name}{suffix}"


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    *,
    out: Path | None = None,
    maps: Path | None = None,
    probabilities: bool = False,
    uncertainty: bool = False,
    overwrite: bool = False,
    shard: tuple[int, int] = (1, 1),
    track: Track = lambda slabs, count: slabs,
) -> Iterator[Outcome]:
    """Segment each input and write what was asked for; one bad input does not stop the others.

    Of `shard` (I, N), every N-th input is segmented, from the I-th on. The next volume is read and
    the last result written while the network works, so that three volumes are held at most.

    Nothing is overwritten unless it may be, or a stopped run left it. For an input of a folder that
    is no failure: where all results are there it is left alone, and where the labels are missing,
    which come last, the rest is what a stopped run left and is made anew.
    """
    number, count = shard
    planned: list[tuple[Input, Targets | Outcome]] = []
    owners: dict[Path, Input] = {}
    for source in inputs:
        try:
            labels = output_path(source, out=out, alone=len(inputs) == 1)
        except VolumeError as error:
            planned.append((source, _failed(source, error)))
            continue
        owner = owners.setdefault(labels.resolve(), source)
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
        )
        planned.append((source, targets))
    for folder in {told.labels.parent for _, told in planned if isinstance(told, Targets)}:
        sweep(folder)
    files = {file.resolve() for source in inputs for file in source.files}

    def checked(source: Input, targets: Targets | Outcome) -> Targets | Outcome:
        if isinstance(targets, Outcome):
            return targets
        try:
            _refuse(source, targets, files, overwrite=overwrite)
        except VolumeError as error:
            return _failed(source, error)
        finished = source.of_folder and not overwrite and targets.labels.exists()
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
        return partial(_write, source, targets, prediction, image)

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
) -> Targets:
    """Results beside the labels are named after them, and after the input where its name is."""
    stem = stem_of(labels)
    if stem != source.name:
        stem = stem.removesuffix("_seg")

    def beside(ending: str) -> Path:
        return labels.with_name(f"{stem}_{ending}{suffix_of(labels)}")

    return Targets(
        labels,
        beside("prob") if probabilities else None,
        beside("entropy") if uncertainty else None,
        beside("variance") if uncertainty else None,
        labels.with_name(f"{stem}_presence.json") if presence else None,
        maps / f"{source.name}_maps.json" if maps else None,
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


def _write(source: Input, targets: Targets, prediction: Prediction, image: Volume) -> Outcome:
    if len(targets.all) > 1:
        begin(targets.labels, targets.all)
    written = []
    if targets.figures is not None:
        written += write_maps(targets.figures.parent, source.name, prediction.maps, image)
    for path, volume in (
        (targets.probabilities, prediction.probabilities),
        (targets.entropy, prediction.entropy),
        (targets.variance, prediction.variance),
    ):
        if path is not None and volume is not None:
            write_volume(path, volume)
            written.append(path)
    if targets.presence is not None and prediction.presence is not None:
        write_json(targets.presence, {"presence": prediction.presence})
        written.append(targets.presence)
    # The labels come last: where they are, everything is.
    write_volume(targets.labels, prediction.labels)
    finish(targets.labels)
    return Outcome(source, (targets.labels, *written), presence=prediction.presence)


def _guarded(source: Input, work: Callable[[], Outcome]) -> Outcome:
    try:
        return work()
    except (SegkitError, OSError) as error:
        return _failed(source, error)


def _failed(source: Input, error: SegkitError | OSError) -> Outcome:
    file = str(source.files[0])
    if isinstance(error, OSError):
        return Outcome(source, (), f"{file}: cannot write its result: {sentence_of(error)}")
    return Outcome(source, (), str(error) if file in str(error) else f"{file}: {error}")
