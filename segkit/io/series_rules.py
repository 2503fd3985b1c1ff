"""The choice of one DICOM series by modality, description, number of slices or folder."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import VolumeError, counted
from segkit.io.dicom_listing import Series
from segkit.io.name_patterns import matches_any

UID = re.compile(r"[0-9]+(\.[0-9]+)+")
SLICES = re.compile(r"([0-9]*)\.\.([0-9]*)|([0-9]+)")
FORMS = (
    "a UID, modality=CT, description=*thorax*, folder=*/CT or slices=20..400 (also 20.., ..400, 64)"
)


@dataclass(frozen=True)
class SeriesRule:
    """Conditions of a series. One pattern of `descriptions` and one of `folders` must match.

    In patterns `*` stands for any characters and `?` for one. Upper and lower case are the same.

    Example:
        >>> rule = SeriesRule(modality="CT", descriptions=("*thorax*",), min_slices=20)
    """

    modality: str | None = None
    descriptions: tuple[str, ...] = ()
    min_slices: int = 1
    max_slices: int | None = None
    folders: tuple[str, ...] = ()
    """Patterns of the folder's path, relative to the folder that the user named."""

    def admits(self, series: Series, root: Path) -> bool:
        """Whether a series fulfils all conditions; `root` is the folder that the user named."""
        count = len(series.slices)
        inside = series.folder.relative_to(root).as_posix()
        return (
            (self.modality is None or self.modality.lower() == series.modality.lower())
            and matches_any(series.description, self.descriptions)
            and matches_any(inside, self.folders)
            and self.min_slices <= count
            and (self.max_slices is None or count <= self.max_slices)
        )

    def __str__(self) -> str:
        parts = [
            *([f"modality {self.modality}"] if self.modality else []),
            *([f"description {' or '.join(self.descriptions)}"] if self.descriptions else []),
            *([f"folder {' or '.join(self.folders)}"] if self.folders else []),
            *([f"{self.min_slices} slices or more"] if self.min_slices > 1 else []),
            *(
                [f"at most {counted(self.max_slices, 'slice')}"]
                if self.max_slices is not None
                else []
            ),
        ]
        return ", ".join(parts) or "any series"


def parse_series(words: Iterable[str] | None) -> str | SeriesRule | None:
    """The UID or the rule in the words of `--series`, such as `modality=CT` or `slices=20..`.

    Words of one kind are alternatives, such as two descriptions. Conditions of different kinds must
    all hold.

    Raises:
        VolumeError: a word is neither a UID nor a condition.
    """
    words = list(words or ())
    if not words:
        return None
    if len(words) == 1 and UID.fullmatch(words[0]):
        return words[0]
    modality, fewest, most = None, 1, None
    patterns: dict[str, list[str]] = {"description": [], "folder": []}
    for word in words:
        key, _, value = word.partition("=")
        if key in patterns and value:
            patterns[key].append(value)
        elif key == "modality" and value and modality is None:
            modality = value
        elif key == "slices" and (found := SLICES.fullmatch(value)):
            fewest = int(found[1] or found[3] or 1)
            most = int(found[2] or found[3]) if found[2] or found[3] else None
        else:
            raise VolumeError(f"--series {word}: expected {FORMS}; give it once for each condition")
    return SeriesRule(
        modality, tuple(patterns["description"]), fewest, most, tuple(patterns["folder"])
    )
