"""`segkit predict`: files in, files out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from segkit.errors import SegkitError, VolumeError
from segkit.explain.maps import write_maps
from segkit.files import refuse_existing, write_json
from segkit.inference.predictor import Predictor, Track
from segkit.volume import SUFFIXES, Volume, read_volume, stem_of, suffix_of, write_volume

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")


@dataclass(frozen=True)
class Input:
    """The files of one volume, one per channel or all channels in one, and its name."""

    name: str
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Outcome:
    """What came of one input: the files that were written, or why there are none."""

    input: Input
    written: tuple[Path, ...]
    error: str | None = None
    presence: Mapping[str, float] | None = None
    """The probability that the volume holds each class, where the model says so."""


def find_inputs(paths: Sequence[Path], num_channels: int) -> list[Input]:
    """The volumes among files and folders.

    For a model of several channels, `CASE_0000`, `CASE_0001`, … are one volume.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(
                file
                for file in path.iterdir()
                if file.name.lower().endswith(SUFFIXES) and not file.name.startswith(".")
            )
            if not inside:
                raise VolumeError(f"{path}: expected volumes (*{', *'.join(SUFFIXES)}), found none")
            files += inside
        else:
            suffix_of(path)
            files.append(path)
    if num_channels == 1:
        return [Input(stem_of(file), (file,)) for file in files]
    inputs: dict[tuple[Path, str], Input] = {}
    for file in files:
        numbered = CHANNEL_NUMBER.search(stem_of(file))
        if numbered is None:
            inputs[file.parent, stem_of(file)] = Input(stem_of(file), (file,))
            continue
        name = stem_of(file)[: numbered.start()]
        parts = (f"{name}_{channel:04d}{suffix_of(file)}" for channel in range(num_channels))
        inputs[file.parent, name] = Input(name, tuple(file.parent / part for part in parts))
    return list(inputs.values())


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
    overwrite: bool = False,
    track: Track = lambda slabs, count: slabs,
) -> Iterator[Outcome]:
    """Segment each input and write what was asked for; one bad input does not stop the others."""
    for source in inputs:
        try:
            target = output_path(source, out=out, alone=len(inputs) == 1)
            written, presence = _predict_file(
                predictor, source, target, maps, probabilities, overwrite, track
            )
            yield Outcome(source, tuple(written), presence=presence)
        except SegkitError as error:
            file = str(source.files[0])
            sentence = str(error) if file in str(error) else f"{file}: {error}"
            yield Outcome(source, (), sentence)
        except OSError as error:
            yield Outcome(source, (), f"{source.files[0]}: cannot write its result: {error}")


def read_input(source: Input) -> Volume:
    """The volume of an input, its channels put together. Raises VolumeError."""
    parts = [read_volume(file) for file in source.files]
    for file, part in zip(source.files, parts, strict=True):
        if not part.grid.agrees_with(parts[0].grid):
            raise VolumeError(f"{file}: lies on another grid than {source.files[0].name}")
    if len(parts) == 1:
        return parts[0]
    return parts[0].like(np.stack([part.data for part in parts], axis=3))


def _predict_file(
    predictor: Predictor,
    source: Input,
    target: Path,
    maps: Path | None,
    probabilities: bool,
    overwrite: bool,
    track: Track,
) -> tuple[list[Path], dict[str, float] | None]:
    stem = stem_of(target)
    if stem != source.name:
        stem = stem.removesuffix("_seg")
    beside = target.with_name(f"{stem}_prob{suffix_of(target)}")
    told = target.with_name(f"{stem}_presence.json")
    classifies = predictor.model.network.presence is not None
    listed = [] if maps is None else [maps / f"{source.name}_maps.json"]
    for path in [
        target,
        *([beside] if probabilities else []),
        *([told] if classifies else []),
        *listed,
    ]:
        if path in source.files:
            raise VolumeError(f"{path}: is the input itself; name another --out")
        refuse_existing([path], overwrite=overwrite)
    volume = read_input(source)
    prediction = predictor(volume, maps=maps is not None, probabilities=probabilities, track=track)
    written = []
    if maps is not None:
        written += write_maps(maps, source.name, prediction.maps, volume)
    if prediction.probabilities is not None:
        # Neither NIfTI nor MetaImage knows the predictor's float16.
        shares = prediction.probabilities
        write_volume(beside, shares.like(shares.data.astype(np.float32)))
        written.append(beside)
    if prediction.presence is not None:
        write_json(told, {"presence": prediction.presence})
        written.append(told)
    # The labels come last: where they are, everything is.
    write_volume(target, prediction.labels)
    return [target, *written], prediction.presence
