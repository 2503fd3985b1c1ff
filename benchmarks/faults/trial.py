"""What a fault did to a job: whether it was survived, and how many bytes it cost."""

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file

from segkit.errors import SegkitError
from segkit.io.volume import read_volume
from segkit.io.volume_names import SUFFIXES

DAMAGES = (
    SegkitError,
    OSError,
    EOFError,
    ValueError,
    RuntimeError,
    SyntaxError,  # of a broken PNG
    SafetensorError,
    yaml.YAMLError,
)
"""What readers raise for half a file."""


@dataclass(frozen=True)
class Trial:
    """One fault, and what came of it."""

    job: str
    fault: str
    where: str
    """When or where it struck, in words."""
    lost: int
    """Bytes of what was there before, or of what a job that nothing strikes would have written."""
    problems: tuple[str, ...] = ()
    told: str = ""
    """What the job said of it."""
    seconds: float = 0.0
    """Until it had ended, where it was asked to."""

    @property
    def survived(self) -> bool:
        """Whether nothing was lost and nothing went otherwise than it should."""
        return not self.lost and not self.problems


@dataclass(frozen=True)
class Stored:
    """A file's content, as far as it is compared."""

    digest: str
    size: int


def stored(paths: Iterable[Path], folder: Path) -> dict[str, Stored]:
    """The files by their names within a folder."""
    return {
        str(path.relative_to(folder)): Stored(
            hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_size
        )
        for path in paths
    }


def visible(folder: Path) -> list[Path]:
    """All files in a folder, but those whose names, or folders' names, begin with a dot."""
    return sorted(
        path
        for path in folder.rglob("*")
        if path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )


def lost(expected: Mapping[str, Stored], found: Mapping[str, Stored]) -> int:
    """Bytes of files that are not there, or are there with another content."""
    return sum(file.size for name, file in expected.items() if found.get(name) != file)


def broken(paths: Iterable[Path]) -> list[Path]:
    """Files that are there, but are not whole."""
    return [path for path in paths if not is_whole(path)]


def is_whole(path: Path) -> bool:
    """Whether a file can be read to its end by what its name says it is."""
    try:
        match path.suffix:
            case ".json":
                json.loads(path.read_text())
            case ".yaml":
                yaml.safe_load(path.read_text())
            case ".csv":
                return is_table(path.read_text())
            case ".ckpt":
                torch.load(path, weights_only=True, map_location="cpu")
            case ".safetensors":
                load_file(path)
            case ".npy":
                np.load(path, allow_pickle=False)
            case ".png":
                with Image.open(path) as picture:
                    picture.load()
            case ".html":
                return path.read_text().rstrip().endswith("</html>")
            case _ if path.name.endswith(SUFFIXES):
                read_volume(path)
    except DAMAGES:
        return False
    return path.stat().st_size > 0


def is_table(text: str) -> bool:
    """Whether each row has as many cells as the first, and the last is ended."""
    rows = list(csv.reader(io.StringIO(text)))
    return text.endswith("\n") and len({len(row) for row in rows}) == 1
