"""Rules that assign structures of DICOM structure sets and segmentations to classes."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from segkit.errors import VolumeError
from segkit.io.name_patterns import is_exactly, matches_any

AbsentRule = Literal["refuse", "background", "unlabelled"]
"""How a case without a structure of some class is treated."""
IGNORED = "ignore"
"""The class of voxels that nobody labelled. A case need not have any."""


@dataclass(frozen=True)
class StructureRules:
    """The structures of each class, by patterns of their names, and the numbers of classes.

    Example:
        >>> rules = StructureRules({"tumour": ("GTV*", "gross tumour")}, {"tumour": 1})
        >>> rules.chosen(["Body", "GTV 1", "gtv 2"])
        {'tumour': [1, 2]}
    """

    patterns: Mapping[str, tuple[str, ...]]
    """Patterns of each class, in the order of painting."""
    numbers: Mapping[str, int]
    """The number of each class in the labels."""
    background: int = 0
    """The number of all other voxels."""
    absent: AbsentRule = "refuse"
    overlap: bool = False
    """Whether a structure may belong to several classes, as for regions."""
    image: Path | None = None
    """The image on whose grid the labels are painted. Several images may share a file of
    structures, so the rules of a case name its own."""

    def chosen(self, names: Sequence[str]) -> dict[str, list[int]]:
        """The indices of each class's structures in a list of names.

        A name without wildcards counts more than a pattern.

        Raises:
            VolumeError: a structure would belong to two classes.
        """
        found: dict[str, list[int]] = {name: [] for name in self.patterns}
        for place, own in enumerate(names):
            claims = [name for name, listed in self.patterns.items() if matches_any(own, listed)]
            exact = [name for name in claims if is_exactly(own, self.patterns[name])]
            owners = claims if self.overlap else exact or claims
            if len(owners) > 1 and not self.overlap:
                raise VolumeError(
                    f"data.dicom.structures: the patterns of {owners[0]} and {owners[1]} both "
                    f"match the structure {own}; make a pattern narrower, or give one of the two "
                    "the whole name"
                )
            for name in owners:
                found[name].append(place)
        return found

    def lacking(self, names: Sequence[str], undrawn: Collection[int] = ()) -> list[str]:
        """The classes without a structure in a list of names.

        Args:
            names: the names of structures.
            undrawn: indices of structures that nobody drew, so that they do not count.

        Raises:
            VolumeError: a structure would belong to two classes.
        """
        chosen = self.chosen(names)
        return [
            name
            for name, found in chosen.items()
            if name != IGNORED and not set(found).difference(undrawn)
        ]

    def refuses(self, lacking: Sequence[str]) -> bool:
        """Whether a case without these classes is refused; a case without any class always is."""
        every = len(set(self.patterns) - {IGNORED})
        return bool(lacking) and (self.absent == "refuse" or len(lacking) == every)

    def told(self) -> str:
        """The rules as text, for the digests of caches."""
        return repr((dict(self.patterns), dict(self.numbers), self.background, self.absent))
