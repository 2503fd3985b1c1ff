"""Inputs of a prediction: which files make up one volume, and which volumes a folder holds."""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import ConfigError, SegkitError, VolumeError, first_few, printable, sentence_of
from segkit.io.dicom import read_series
from segkit.io.dicom_headers import DICOM_SUFFIX, holds_frames
from segkit.io.dicom_listing import (
    Series,
    choose_series,
    find_folders,
    holds_series,
    is_only_image,
    series_at,
)
from segkit.io.dicom_tree import name_in, path_of, read_tree
from segkit.io.file_names import safe_name
from segkit.io.picture_rules import PictureRules
from segkit.io.series_rules import SeriesRule
from segkit.io.volume import (
    AS_IT_SAYS,
    BYTES_OF_IMAGE,
    Volume,
    is_dicom_path,
    read_num_channels,
    read_volume,
)
from segkit.io.volume_names import (
    SUFFIXES,
    has_volume_suffix,
    is_picture,
    result_suffix,
    stem_of,
    suffix_of,
    volumes_among,
)

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
RESULT_ENDINGS = ("_seg", "_prob", "_entropy", "_variance", "_preview")
"""Endings of the names of result volumes that are written beside an input."""
FIRST_CHANNEL = re.compile(rf"_0000(?=({'|'.join(RESULT_ENDINGS)})?$)")


@dataclass(frozen=True)
class Input:
    """The name and files of one volume: one file per channel, or one with all channels.

    For a DICOM series, an entry of `files` is its folder, or one of its files if the folder holds
    several series.
    """

    name: str
    files: tuple[Path, ...]
    of_folder: bool = field(default=False, compare=False)
    """Whether the user named a folder and not this volume; results may lie among its files."""
    series: str | None = None
    """UID of the DICOM series; None if its folder holds only one."""
    rules: PictureRules = field(default=AS_IT_SAYS, compare=False)
    """Settings for reading it if it is a picture."""

    @property
    def file_name(self) -> str:
        """The name in names of result files; another only if no file can be called so."""
        return safe_name(self.name)

    @property
    def is_series(self) -> bool:
        """Whether the volume is a DICOM series."""
        return self.files[0].is_dir() or not has_volume_suffix(self.files[0])

    @property
    def folder(self) -> Path:
        """The folder for results beside it: that of its file, or the parent of its DICOM folder."""
        if not self.is_series:
            return self.files[0].parent
        first = self.files[0].resolve()
        return first.parent if first.is_dir() else first.parent.parent

    @property
    def suffix(self) -> str:
        """Suffix of result volumes, such as '.mha'; '.nii.gz' for a DICOM series."""
        return ".nii.gz" if self.is_series else result_suffix(self.files[0])


def find_inputs(
    paths: Sequence[Path],
    num_channels: int,
    *,
    series: str | SeriesRule | None = None,
    rules: PictureRules = AS_IT_SAYS,
    but: Path | None = None,
) -> list[Input]:
    """The volumes among files and folders.

    If the model takes several channels, the files `CASE_0000`, `CASE_0001`, … are one volume. But
    if each of them holds all channels, each is a volume, and the number is part of its name. A file
    with all channels beside a file with fewer is one channel of their case.

    If the model takes one channel, and all files of a folder are named `CASE_0000`, as in nnU-Net's
    layout, their volumes are named `CASE`. In a folder, results beside their inputs, such as
    `CASE_seg` beside `CASE`, are not inputs. A volume has the same name whether the user names the
    file or its folder.

    A picture that holds all channels, such as red, green and blue, is one volume, whatever its
    name. Pictures in a folder with other volumes are not inputs.

    A folder of DICOM files is one volume. If a folder holds none, the folders below it are searched
    to any depth: each that holds a series is a volume, named by its path. With a rule as `series`,
    each series that it admits is a volume. If a folder holds neither volumes nor series, the
    volumes in the folders below it are taken. Hidden files are skipped.

    Args:
        paths: files and folders.
        num_channels: number of channels that the model takes.
        series: UID of a DICOM series, if its folder holds several, or a rule for series.
        rules: settings for reading pictures.
        but: a folder inside, such as that of results, which is skipped.

    Raises:
        VolumeError: a folder holds no volumes, or both a DICOM series and volumes.
    """
    inputs: dict[tuple[Path, str], Input] = {}
    alone: list[Input] = []
    single: dict[Path, bool] = {}
    by_stem: dict[Path, dict[str, Path]] = {}
    for path in paths:
        of_folder = path.is_dir()
        if of_folder and (found_series := _series_in(path, series)):
            for source in found_series:
                alone.append(source)
                inputs[source.files[0], ""] = source
            continue
        if series is not None:
            raise VolumeError(
                f"{path}: expected the folder of the DICOM series {series}, found a file; pass the "
                f"folder"
            )
        if not of_folder and (path.name.lower().endswith(DICOM_SUFFIX) or is_dicom_path(path)):
            alone.append(_of_one_file(path))
            inputs[path, ""] = alone[-1]
            continue
        volumes = _volumes_in(path, but) if of_folder else [path]
        unlike = len({stem_of(file) for file in volumes}) == len(volumes)
        for file in volumes:
            name, suffix = stem_of(file), suffix_of(file)
            if not unlike:
                name = "_".join((*file.relative_to(path).parent.parts, name))
            numbered = CHANNEL_NUMBER.search(name) if num_channels > 1 else None
            whole = numbered is None or _holds_all(file, int(numbered[1]), num_channels, rules)
            # nnU-Net stores red, green and blue in one file CASE_0000.
            if FIRST_CHANNEL.search(name) and (num_channels == 1 or (whole and is_picture(file))):
                if file.parent not in single:
                    single[file.parent] = _all_numbered(_volumes_at(file.parent))
                name = FIRST_CHANNEL.sub("", name) if single[file.parent] else name
            if numbered is None or whole:
                alone.append(Input(name, (file,), of_folder, rules=rules))
                inputs[file.parent, name] = alone[-1]
                continue
            name = name[: numbered.start()]
            files = tuple(
                _called(file.parent, f"{name}_{channel:04d}", suffix, by_stem)
                for channel in range(num_channels)
            )
            inputs[file.parent, name] = Input(name, files, of_folder, rules=rules)
    found = alone if num_channels == 1 else inputs.values()
    return without_results(list(found))


def _called(folder: Path, stem: str, suffix: str, by_stem: dict[Path, dict[str, Path]]) -> Path:
    """The volume of a stem, also if its suffix differs from that of the other channels.

    Channels of one case may end in `.nii`, `.nii.gz` and `.NII.GZ`. If there is none, the path that
    it would have with the same suffix. `by_stem` keeps the volumes of folders between calls.
    """
    expected = folder / f"{stem}{suffix}"
    if expected.exists():
        return expected
    if folder not in by_stem:
        by_stem[folder] = {stem_of(file): file for file in _volumes_at(folder)}
    return by_stem[folder].get(stem, expected)


def _holds_all(file: Path, number: int, num_channels: int, rules: PictureRules) -> bool:
    """Whether a file named like channel `number` of a case holds all channels itself.

    The answer is no if a file of the same case and another number holds fewer channels: then all
    are channels of one case. An unreadable file counts as a channel if its number is in range.
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


def _volumes_in(folder: Path, but: Path | None) -> list[Path]:
    """The volumes in a folder or, if there are none, in the folders below it."""
    inside = _volumes_at(folder)
    if not inside:
        left_out = but.resolve() if but and but.resolve() != folder.resolve() else None
        below = [
            each
            for each in find_folders(folder)
            if left_out is None or left_out not in (each.resolve(), *each.resolve().parents)
        ]
        inside = [file for each in below for file in _volumes_at(each)]
    if not inside:
        raise VolumeError(
            f"{folder}: expected volumes (*{', *'.join(SUFFIXES)}), found none; pass another folder"
        )
    return inside


def _volumes_at(folder: Path) -> list[Path]:
    inside = folder.iterdir() if folder.is_dir() else ()
    return volumes_among(file for file in inside if not file.name.startswith("."))


def _scans_at(folder: Path) -> list[Path]:
    """The volumes in a folder that are not pictures."""
    return [file for file in _volumes_at(folder) if not is_picture(file)]


def _series_in(path: Path, series: str | SeriesRule | None) -> list[Input]:
    """The series of a folder, or those of the folders below it that hold one."""
    name = path.resolve().name
    if isinstance(series, str):
        return [Input(name, (path,), series=series)]
    if isinstance(series, SeriesRule):
        return _admitted(path, series)
    if holds_series(path):
        refuse_volumes_beside_series(path)
        return [Input(name, (path,))]
    if _volumes_at(path):
        return []
    found = [folder for folder in find_folders(path) if holds_series(folder)]
    for folder in found:
        refuse_volumes_beside_series(folder)
    return [Input(name_in(path, folder), (folder,), of_folder=True) for folder in found]


def _admitted(path: Path, rule: SeriesRule) -> list[Input]:
    """The series in a folder, to any depth, that a rule admits, and folders that are damaged.

    The latter are told of when their turn comes. Raises VolumeError if no series is admitted.
    """
    tree = read_tree(path, structures=False)
    chosen = [series for series in tree.series if rule.admits(series, path)]
    if not chosen and not tree.failures:
        listing = first_few([str(series) for series in tree.series], between="; ")
        raise VolumeError(
            f"{path}: no DICOM series in it is {rule}; it holds {listing or 'none'}; "
            f"change --series"
        )
    found = []
    for series in chosen:
        several = sum(other.folder == series.folder for other in chosen) > 1
        name = name_in(path, series.folder, series.uid if several else None)
        place = path_of(series, tree.series)
        found.append(Input(name, (place,), of_folder=place != path))
    damaged = [Input(name_in(path, folder), (folder,), of_folder=True) for folder in tree.failures]
    return sorted([*found, *damaged], key=lambda source: source.name)


def _of_one_file(path: Path) -> Input:
    """A DICOM file that holds all of its series. Raises VolumeError for one of several."""
    if not path.is_file():
        raise VolumeError(f"{path}: no such file; check the path")
    if not is_only_image(path) and not (holds_frames(path) and len(series_at(path).files) == 1):
        raise VolumeError(f"{path}: is one file of a DICOM series; pass the folder of the series")
    is_named = path.name.lower().endswith(DICOM_SUFFIX)
    return Input(path.name[: -len(DICOM_SUFFIX)] if is_named else path.name, (path,))


def series_of(source: Input) -> Series:
    """The DICOM series of an input, of several channels the first. Raises VolumeError."""
    if source.series is not None:
        return choose_series(source.files[0], source.series)
    return series_at(source.files[0])


def refuse_volumes_beside_series(folder: Path) -> None:
    """Raise VolumeError if a folder with a DICOM series also holds volumes of another format."""
    if volumes := _scans_at(folder):
        raise VolumeError(
            f"{folder}: holds a DICOM series and {first_few([file.name for file in volumes], 3)}; "
            "pass one of these files, pass the UID of the series as --series, or move one away"
        )


def _all_numbered(files: Sequence[Path]) -> bool:
    """Whether each volume is the first channel of a case or a result beside its input."""
    return all(stem_of(file).endswith(("_0000", *RESULT_ENDINGS)) for file in files)


def without_results(inputs: Sequence[Input]) -> list[Input]:
    """The inputs of folders without results beside their inputs, such as `a_seg` beside `a`."""
    own = {(each.files[0].parent, each.file_name) for each in inputs if not each.is_series}
    return [source for source in inputs if not _is_result(source, own)]


def _is_result(source: Input, names: Collection[tuple[Path, str]]) -> bool:
    folder = source.files[0].parent
    return source.of_folder and any(
        source.name.endswith(ending) and (folder, source.name.removesuffix(ending)) in names
        for ending in RESULT_ENDINGS
    )


def parse_shard(text: str) -> tuple[int, int]:
    """The numbers I and N of 'I/N', the I-th of N parts. Raises ConfigError for other texts."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(
            f"--shard {text}: expected I/N with I from 1 to N, such as 2/8; correct it"
        )
    return int(found[1]), int(found[2])


def read_input(source: Input) -> Volume:
    """The volume of an input, with its channels combined.

    Raises VolumeError if a file cannot be read or the channels lie on different grids.
    """
    if source.series is not None:
        return read_series(series_of(source), working=BYTES_OF_IMAGE)
    first = read_volume(source.files[0], rules=source.rules, working=BYTES_OF_IMAGE)
    if len(source.files) == 1:
        return first
    # Memory holds each channel, and all of them once more when they are combined.
    together = BYTES_OF_IMAGE + len(source.files) * first.data.itemsize
    others = [
        read_volume(file, rules=source.rules, working=together)
        .measured_as(first)
        .onto(first.grid, what=f"{file}:", whose=source.files[0].name)
        for file in source.files[1:]
    ]
    channels = [part.data.reshape(*first.grid.shape, -1) for part in (first, *others)]
    return first.like(np.concatenate(channels, axis=3))


def failure(source: Input, error: SegkitError | OSError) -> str:
    """One sentence that names the input's file and says why it has no result."""
    file = str(source.files[0])
    if isinstance(error, OSError):
        return f"{file}: cannot write its result: {sentence_of(error)}"
    # The text of an error shows control characters in names as text.
    return str(error) if printable(file) in str(error) else f"{file}: {error}"
