"""Which files are one volume, and which volumes are to be predicted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import ConfigError, SegkitError, VolumeError, sentence_of
from segkit.io.dicom import SUFFIX as DICOM_SUFFIX
from segkit.io.dicom import choose_series, holds_series, read_series
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import (
    AS_IT_SAYS,
    NOT_PICTURES,
    SUFFIXES,
    Volume,
    channels_in_picture,
    is_picture,
    read_volume,
    result_suffix,
    stem_of,
    suffix_of,
    volumes_among,
)

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
RESULT_ENDINGS = ("_seg", "_prob", "_entropy", "_variance", "_preview")
"""Of the names of volumes that are written beside an input."""
FIRST_CHANNEL = re.compile(rf"_0000(?=({'|'.join(RESULT_ENDINGS)})?$)")


@dataclass(frozen=True)
class Input:
    """The files of one volume, one per channel or all channels in one, and its name.

    Of a DICOM series, the folder that it lies in.
    """

    name: str
    files: tuple[Path, ...]
    of_folder: bool = field(default=False, compare=False)
    """Whether a folder was named rather than the volume, so that a result is no reason to stop."""
    series: str | None = None
    """The UID of a DICOM series, where its folder holds several."""
    rules: PictureRules = field(default=AS_IT_SAYS, compare=False)
    """How it is read, if it is a picture."""

    @property
    def is_series(self) -> bool:
        """Whether it is a DICOM series."""
        return self.files[0].is_dir()

    @property
    def suffix(self) -> str:
        """The suffix of volumes made of it, such as '.nii.gz', which it is for a DICOM series."""
        return ".nii.gz" if self.is_series else result_suffix(self.files[0])


def find_inputs(
    paths: Sequence[Path],
    num_channels: int,
    *,
    series: str | None = None,
    rules: PictureRules = AS_IT_SAYS,
) -> list[Input]:
    """The volumes among files and folders.

    For a model of several channels, `CASE_0000`, `CASE_0001`, … are one volume; for a model of one,
    a folder in which all are called `CASE_0000`, as nnU-Net has them, holds the volumes `CASE`. In
    a folder, results that lie beside their inputs, such as `CASE_seg` beside `CASE`, are no inputs.

    A picture that holds all channels, such as red, green and blue, is one volume whatever its name;
    pictures are read by the `rules`. Beside volumes that are no pictures, pictures are no inputs.

    A folder of DICOM files is one volume: the `series` of that UID, or the only one; a folder of
    such folders holds one each.
    """
    inputs: dict[tuple[Path, str], Input] = {}
    alone: list[Input] = []
    for path in paths:
        of_folder = path.is_dir()
        if of_folder and (folders := _series_in(path, series)):
            for folder in folders:
                alone.append(Input(folder.resolve().name, (folder,), folder != path, series))
                inputs[folder, ""] = alone[-1]
            continue
        if series is not None:
            raise VolumeError(f"{path}: expected the folder of the DICOM series {series}")
        if path.name.lower().endswith(DICOM_SUFFIX):
            raise VolumeError(f"{path}: is one file of a DICOM series; name the folder of them all")
        inside = _volumes_in(path) if of_folder else [path]
        holds_all = {
            file
            for file in inside
            if num_channels > 1 and is_picture(file) and _channels_in(file, rules) == num_channels
        }
        alike = num_channels == 1 or len(holds_all) == len(inside)
        single = alike and of_folder and _all_numbered(inside)
        for file in inside:
            name, suffix = stem_of(file), suffix_of(file)
            if single:
                name = FIRST_CHANNEL.sub("", name)
            whole = num_channels == 1 or file in holds_all
            numbered = None if whole else CHANNEL_NUMBER.search(name)
            if numbered is None:
                alone.append(Input(name, (file,), of_folder, rules=rules))
                inputs[file.parent, name] = alone[-1]
                continue
            name = name[: numbered.start()]
            parts = (f"{name}_{channel:04d}{suffix}" for channel in range(num_channels))
            files = tuple(file.parent / part for part in parts)
            inputs[file.parent, name] = Input(name, files, of_folder, rules=rules)
    found = alone if num_channels == 1 else inputs.values()
    return [source for source in found if not _is_result(source, inputs)]


def _volumes_in(folder: Path) -> list[Path]:
    inside = volumes_among(file for file in folder.iterdir() if not file.name.startswith("."))
    if not inside:
        raise VolumeError(f"{folder}: expected volumes (*{', *'.join(SUFFIXES)}), found none")
    return inside


def _series_in(path: Path, series: str | None) -> list[Path]:
    """The folder itself if it holds a DICOM series, or those folders in it that do."""
    if series is not None or holds_series(path):
        return [path]
    inside = sorted(path.iterdir())
    if any(file.name.lower().endswith(NOT_PICTURES) for file in inside):
        return []
    return [folder for folder in inside if folder.is_dir() and holds_series(folder)]


def _channels_in(file: Path, rules: PictureRules) -> int | None:
    """How many channels a picture has; None if it cannot be read, which is told in its turn."""
    try:
        return channels_in_picture(file, rules=rules)
    except VolumeError:
        return None


def _all_numbered(files: Sequence[Path]) -> bool:
    """Whether all volumes are a case's first channel, but for results that lie beside them."""
    return all(stem_of(file).endswith(("_0000", *RESULT_ENDINGS)) for file in files)


def _is_result(source: Input, inputs: Mapping[tuple[Path, str], Input]) -> bool:
    folder = source.files[0].parent
    return source.of_folder and any(
        source.name.endswith(ending) and (folder, source.name.removesuffix(ending)) in inputs
        for ending in RESULT_ENDINGS
    )


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of 'I/N', the I-th of N parts. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {text}: expected I/N with I from 1 to N, such as 2/8")
    return int(found[1]), int(found[2])


def read_input(source: Input) -> Volume:
    """The volume of an input, its channels put together. Raises VolumeError."""
    if source.is_series:
        return read_series(choose_series(source.files[0], source.series))
    first = read_volume(source.files[0], rules=source.rules)
    if len(source.files) == 1:
        return first
    others = [
        read_volume(file, rules=source.rules)
        .sized_as(first)
        .onto(first.grid, what=f"{file}:", whose=source.files[0].name)
        for file in source.files[1:]
    ]
    channels = [part.data.reshape(*first.grid.shape, -1) for part in (first, *others)]
    return first.like(np.concatenate(channels, axis=3))


def failure(source: Input, error: SegkitError | OSError) -> str:
    """Why an input has no result, in a sentence that names its file."""
    file = str(source.files[0])
    if isinstance(error, OSError):
        return f"{file}: cannot write its result: {sentence_of(error)}"
    return str(error) if file in str(error) else f"{file}: {error}"
