"""Which files are one volume, and which volumes are to be predicted."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from segkit.errors import ConfigError, VolumeError
from segkit.volume import SUFFIXES, Volume, read_volume, stem_of, suffix_of

CHANNEL_NUMBER = re.compile(r"_(\d{4})$")
ENDINGS = ("_seg", "_prob", "_entropy", "_variance")
"""Of the names of volumes that are written beside an input."""


@dataclass(frozen=True)
class Input:
    """The files of one volume, one per channel or all channels in one, and its name."""

    name: str
    files: tuple[Path, ...]
    of_folder: bool = field(default=False, compare=False)
    """Whether a folder was named rather than the volume, so that a result is no reason to stop."""


def find_inputs(paths: Sequence[Path], num_channels: int) -> list[Input]:
    """The volumes among files and folders.

    For a model of several channels, `CASE_0000`, `CASE_0001`, … are one volume. In a folder,
    results that lie beside their inputs, such as `CASE_seg` beside `CASE`, are no inputs.
    """
    inputs: dict[tuple[Path, str], Input] = {}
    alone: list[Input] = []
    for path in paths:
        of_folder = path.is_dir()
        for file in _volumes_in(path) if of_folder else [path]:
            name, suffix = stem_of(file), suffix_of(file)
            numbered = CHANNEL_NUMBER.search(name) if num_channels > 1 else None
            if numbered is None:
                alone.append(Input(name, (file,), of_folder))
                inputs[file.parent, name] = alone[-1]
                continue
            name = name[: numbered.start()]
            parts = (f"{name}_{channel:04d}{suffix}" for channel in range(num_channels))
            files = tuple(file.parent / part for part in parts)
            inputs[file.parent, name] = Input(name, files, of_folder)
    found = alone if num_channels == 1 else inputs.values()
    return [source for source in found if not _is_result(source, inputs)]


def _volumes_in(folder: Path) -> list[Path]:
    inside = sorted(
        file
        for file in folder.iterdir()
        if file.name.lower().endswith(SUFFIXES) and not file.name.startswith(".")
    )
    if not inside:
        raise VolumeError(f"{folder}: expected volumes (*{', *'.join(SUFFIXES)}), found none")
    return inside


def _is_result(source: Input, inputs: Mapping[tuple[Path, str], Input]) -> bool:
    folder = source.files[0].parent
    return source.of_folder and any(
        source.name.endswith(ending) and (folder, source.name.removesuffix(ending)) in inputs
        for ending in ENDINGS
    )


def parse_shard(text: str) -> tuple[int, int]:
    """I and N of 'I/N', the I-th of N parts. Raises ConfigError for anything else."""
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard {text}: expected I/N with I from 1 to N, such as 2/8")
    return int(found[1]), int(found[2])


def about(source: Input, error: Exception) -> str:
    """The error's sentence, which begins with the input's file where it does not name it."""
    file = str(source.files[0])
    return str(error) if file in str(error) else f"{file}: {error}"


def read_input(source: Input) -> Volume:
    """The volume of an input, its channels put together. Raises VolumeError."""
    parts = [read_volume(file) for file in source.files]
    for file, part in zip(source.files, parts, strict=True):
        if not part.grid.agrees_with(parts[0].grid):
            raise VolumeError(f"{file}: lies on another grid than {source.files[0].name}")
    if len(parts) == 1:
        return parts[0]
    return parts[0].like(np.stack([part.data for part in parts], axis=3))
