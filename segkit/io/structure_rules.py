"""Which structures of DICOM structure sets and segmentations make which class."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from segkit.errors import VolumeError
from segkit.io.name_patterns import is_exactly, matches_any

AbsentRule = Literal["refuse", "background", "unlabelled"]
"""What a case is that has no structure of a class."""
IGNORED = "ignore"
"""The class of voxels that nobody labelled, of which a case need not have any."""


@dataclass(frozen=True)
class StructureRules:
    """The structures of each class, by patterns of their names, and the numbers of classes.

    Example:
        >>> rules = StructureRules({"tumour": ("GTV*", "gross tumour")}, {"tumour": 1})
        >>> rules.chosen(["Body", "GTV 1", "gtv 2"])
        {'tumour': [1, 2]}
    """

    patterns: Mapping[str, tuple[str, ...]]
    """By class, in the order that they are painted in."""
    numbers: Mapping[str, int]
    """The number that each class is painted as."""
    background: int = 0
    """That of all other voxels."""
    absent: AbsentRule = "refuse"
    overlap: bool = False
    """Whether a structure may be of several classes, as those of regions are."""
    images: Mapping[Path, Path] = field(default_factory=dict)
    """By the file of structures, the series whose grid they are painted on."""

    def chosen(self, names: Sequence[str]) -> dict[str, list[int]]:
        """For each class, the places of its structures among names.

        A name that is written out wins over a pattern. Raises VolumeError if a structure would be
        of two classes.
        """
        found: dict[str, list[int]] = {name: [] for name in self.patterns}
        for place, own in enumerate(names):
            claims = [name for name, listed in self.patterns.items() if matches_any(own, listed)]
            exact = [name for name in claims if is_exactly(own, self.patterns[name])]
            owners = claims if self.overlap else exact or claims
            if len(owners) > 1 and not self.overlap:
                raise VolumeError(
                    f"data.dicom.structures: the structure {own} would be of {owners[0]} and of "
                    f"{owners[1]}; write its name out for one of them, or make patterns narrower"
                )
            for name in owners:
                found[name].append(place)
        return found

    def lacking(self, names: Sequence[str]) -> list[str]:
        """The classes that have no structure among names. Raises VolumeError as `chosen` does."""
        chosen = self.chosen(names)
        return [name for name, found in chosen.items() if not found and name != IGNORED]

    def refuses(self, lacking: Sequence[str]) -> bool:
        """Whether a case that lacks structures of classes is refused, as is one that lacks all."""
        every = len(set(self.patterns) - {IGNORED})
        return bool(lacking) and (self.absent == "refuse" or len(lacking) == every)

    def told(self) -> str:
        """What decides labels, but for the files, by which caches know it."""
        return repr((dict(self.patterns), dict(self.numbers), self.background, self.absent))
