"""What is told apart in a label map, how it stands in files, and what is left out."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Labelling:
    """Classes, of which every voxel has exactly one, or regions, which may overlap.

        classes    {"background": 0, "kidney": 1, "tumour": 2}      an output each, the largest wins
        regions    {"whole": (1, 2), "tumour": (2,)}                an output each, yes or no

    Regions are written one after the other, each by its own number, later over earlier, so that
    those that lie within others come last; what is in none is background.
    """

    numbers: Mapping[str, int]
    """Names and the number each is written as, the background first: 0."""
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """In the order they are written, the numbers in label files that belong to each; or none."""
    ignore: int | None = None
    """The number in label files of voxels that nobody labelled, the highest; or none."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a network's outputs: all classes, or all regions without the background."""
        return tuple(self.regions or self.numbers)

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The numbers in label files that belong to each class or region, the background left out.

        This is what is scored.
        """
        if self.regions:
            return dict(self.regions)
        return {name: (number,) for name, number in self.numbers.items() if number != 0}

    @property
    def written(self) -> tuple[int, ...] | None:
        """The number each region is written as, in order; None for classes."""
        return tuple(self.numbers[name] for name in self.regions) if self.regions else None

    def absent(self, present: Collection[int]) -> tuple[str, ...]:
        """The classes or regions of which no number is among those that label files hold."""
        return tuple(
            name for name, numbers in self.members.items() if not set(numbers) & set(present)
        )

    @property
    def value_names(self) -> tuple[str, ...]:
        """A name for each number 0, 1, … that a label file may hold.

        A number that no class or region is written as goes by itself: "2".
        """
        names = {number: name for name, number in self.numbers.items()}
        if self.ignore is not None:
            names[self.ignore] = "ignore"
        highest = max(*names, *(number for group in self.regions.values() for number in group), 0)
        return tuple(names.get(number, str(number)) for number in range(highest + 1))
