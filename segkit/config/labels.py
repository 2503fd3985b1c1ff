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

    Within segkit numbers are 0 (background), 1, 2, … without gaps. Files may hold any others:
    `in_files` tells which. `segkit.data.label_numbers` translates.
    """

    numbers: Mapping[str, int]
    """Names and the number of each, the background first: 0."""
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """In the order they are written, the numbers that belong to each; or none."""
    ignore: int | None = None
    """The number of voxels that nobody labelled, the highest; or none."""
    in_files: tuple[tuple[int, ...], ...] = ()
    """For each number 0, 1, …, the numbers in label files that mean it, the one that is written
    first; empty if files hold the numbers themselves."""
    others: int | None = None
    """The number that stands for all numbers in files that `in_files` does not hold: the
    background's or `ignore`; None if there must be no others."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of a network's outputs: all classes, or all regions without the background."""
        return tuple(self.regions or self.numbers)

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The numbers that belong to each class or region, the background left out.

        This is what is scored.
        """
        if self.regions:
            return dict(self.regions)
        return {name: (number,) for name, number in self.numbers.items() if number != 0}

    @property
    def written(self) -> tuple[int, ...] | None:
        """The number of each region, in order; None for classes."""
        return tuple(self.numbers[name] for name in self.regions) if self.regions else None

    def absent(self, present: Collection[int]) -> tuple[str, ...]:
        """The classes or regions of which no number is among those that label files hold."""
        return tuple(
            name for name, numbers in self.members.items() if not set(numbers) & set(present)
        )

    @property
    def value_names(self) -> tuple[str, ...]:
        """A name for each number 0, 1, ….

        A number that no class or region is written as goes by the number in files: "2".
        """
        names = {number: name for name, number in self.numbers.items()}
        if self.ignore is not None:
            names[self.ignore] = "ignore"
        highest = max(*names, *(number for group in self.regions.values() for number in group), 0)
        return tuple(names.get(number, str(self.in_file(number))) for number in range(highest + 1))

    def in_file(self, number: int) -> int:
        """The number in files that stands for a number of segkit's."""
        return self.in_files[number][0] if self.in_files else number

    @property
    def numbers_in_files(self) -> dict[str, int]:
        """Names of classes or regions and the number that each is written as."""
        return {name: self.in_file(number) for name, number in self.numbers.items()}
