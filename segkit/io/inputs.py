"""Which files are one volume, and which volumes are to be predicted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import ConfigError, SegkitError, VolumeError, first_few, sentence_of
from segkit.io.atomic import is_file_name
from segkit.io.dicom import SUFFIX as DICOM_SUFFIX
from segkit.io.dicom import choose_series, holds_series, read_series
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import (
    AS_IT_SAYS,
    BYTES_OF_IMAGE,
    SUFFIXES,
    Volume,
    is_picture,
    read_num_channels,
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
    """Whether a folder was named rather than the volume, so that parts of results may be there."""
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

    For a model of several channels, `CASE_0000`, `CASE_0001`, … are one volume, unless each of the
    files holds all channels: then the numbers are part of the cases' names. A file of all channels
    beside one of fewer is a channel of their case. For a model of one,
    files `CASE_0000` of a folder in which all are called so, as nnU-Net has them, are the volumes
    `CASE`. In a folder, results that lie beside their inputs, such as `CASE_seg` beside `CASE`, are
    no inputs. A volume has the same name whether it or its folder is asked for.

    A picture that holds all channels, such as red, green and blue, is one volume whatever its name;
    pictures are read by the `rules`. Beside volumes that are no pictures, pictures are no inputs.

    A folder of DICOM files is one volume: the `series` of that UID, or the only one; a folder of
    such folders holds one each. Hidden files are left out.

    Raises VolumeError for a folder without volumes, or with a DICOM series and volumes.
    """
    inputs: dict[tuple[Path, str], Input] = {}
    alone: list[Input] = []
    single: dict[Path, bool] = {}
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
        for file in _volumes_in(path) if of_folder else [path]:
            name, suffix = stem_of(file), suffix_of(file)
            numbered = CHANNEL_NUMBER.search(name) if num_channels > 1 else None
            whole = numbered is None or _holds_all(file, int(numbered[1]), num_channels, rules)
            # nnU-Net has one file of a picture for red, green and blue.
            if FIRST_CHANNEL.search(name) and (num_channels == 1 or (whole and is_picture(file))):
                if file.parent not in single:
                    single[file.parent] = _all_numbered(_volumes_at(file.parent))
                name = FIRST_CHANNEL.sub("", name) if single[file.parent] else name
            if numbered is None or whole:
                alone.append(Input(name, (file,), of_folder, rules=rules))
                inputs[file.parent, name] = alone[-1]
                continue
            name = name[: numbered.start()]
            parts = (f"{name}_{channel:04d}{suffix}" for channel in range(num_channels))
            files = tuple(file.parent / part for part in parts)
            inputs[file.parent, name] = Input(name, files, of_folder, rules=rules)
    found = alone if num_channels == 1 else inputs.values()
    return [source for source in found if not _is_result(source, inputs)]


def _holds_all(file: Path, number: int, num_channels: int, rules: PictureRules) -> bool:
    """Whether a file that may be a channel, by its number, holds all channels itself.

    It does not if the file of another channel, by its number, holds fewer: what stands together is
    one case. One that cannot be read may be a channel as well, unless there is none of its number.
    """

    def held(path: Path) -> int | None:
        try:
            return read_num_channels(path, rules=rules)
        except VolumeError:
            return None

    found = held(file)
    if found is None or number >= num_channels:
        return number >= num_channels and found != 1
    if found < num_channels or is_picture(file):
        return found >= num_channels
    stem, suffix = CHANNEL_NUMBER.sub("", stem_of(file)), suffix_of(file)
    others = (file.with_name(f"{stem}_{other:04d}{suffix}") for other in range(num_channels))
    counts = [held(other) for other in others if other.exists()]
    return all(count is None or count >= num_channels for count in counts)


def _volumes_in(folder: Path) -> list[Path]:
    inside = _volumes_at(folder)
    if not inside:
        raise VolumeError(f"{folder}: expected volumes (*{', *'.join(SUFFIXES)}), found none")
    return inside


def _volumes_at(folder: Path) -> list[Path]:
    return volumes_among(file for file in folder.iterdir() if not file.name.startswith("."))


def _scans_at(folder: Path) -> list[Path]:
    """The volumes in a folder that are no pictures."""
    return [file for file in _volumes_at(folder) if not is_picture(file)]


def _series_in(path: Path, series: str | None) -> list[Path]:
    """The folder itself if it holds a DICOM series, or those folders in it that do."""
    if series is not None:
        return [path]
    if holds_series(path):
        refuse_volumes_beside_series(path)
        return [path]
    if _volumes_at(path):
        return []
    found = [folder for folder in sorted(path.iterdir()) if folder.is_dir()]
    found = [folder for folder in found if holds_series(folder)]
    for folder in found:
        refuse_volumes_beside_series(folder)
    return found


def refuse_volumes_beside_series(folder: Path) -> None:
    """Raise VolumeError if a folder with a DICOM series also holds volumes of another format."""
    if volumes := _scans_at(folder):
        raise VolumeError(
            f"{folder}: holds a DICOM series and {first_few([file.name for file in volumes], 3)}; "
            f"name the file that is meant, give the UID of the series as --series, or move one away"
        )


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
        return read_series(choose_series(source.files[0], source.series), working=BYTES_OF_IMAGE)
    first = read_volume(source.files[0], rules=source.rules, working=BYTES_OF_IMAGE)
    if len(source.files) == 1:
        return first
    # The channels are held one by one, and once more together.
    together = BYTES_OF_IMAGE + len(source.files) * first.data.itemsize
    others = [
        read_volume(file, rules=source.rules, working=together)
        .sized_as(first)
        .onto(first.grid, what=f"{file}:", whose=source.files[0].name)
        for file in source.files[1:]
    ]
    channels = [part.data.reshape(*first.grid.shape, -1) for part in (first, *others)]
    return first.like(np.concatenate(channels, axis=3))


def check_name(name: str, whose: Path) -> None:
    """Raise VolumeError if a case's name is none for a file, or would lead out of its folder."""
    if not is_file_name(name):
        raise VolumeError(
            f"{whose}: expected a name that results can be called by, found {name!r}; rename it"
        )


def failure(source: Input, error: SegkitError | OSError) -> str:
    """Why an input has no result, in a sentence that names its file."""
    file = str(source.files[0])
    if isinstance(error, OSError):
        return f"{file}: cannot write its result: {sentence_of(error)}"
    return str(error) if file in str(error) else f"{file}: {error}"
