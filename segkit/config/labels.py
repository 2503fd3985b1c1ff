"""The classes or regions of a label map, their numbers in files, and voxels without a label."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Labelling:
    """Classes, of which every voxel has exactly one, or regions, which may overlap.

        classes    {"background": 0, "kidney": 1, "tumour": 2}      an output each, the largest wins
        regions    {"whole": (1, 2), "tumour": (2,)}                an output each, yes or no

    Regions are written one after the other, each with its own number. A later region overwrites an
    earlier one, so a region inside another must come later. Voxels of no region are background.

    In memory the numbers are 0 (background), 1, 2, … without gaps. Files may have other numbers,
    which `in_files` lists; `segkit.data.label_numbers` translates between the two.
    """

    numbers: Mapping[str, int]
    """The number of each name; the background, 0, is first."""
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The numbers that belong to each region, in the order of writing; empty for classes."""
    ignore: int | None = None
    """The number of voxels that nobody labelled, which is the highest; None if there is none."""
    in_files: tuple[tuple[int, ...], ...] = ()
    """For each number 0, 1, …, the numbers in label files that mean it. The first of them is the
    one that is written. Empty if files have the same numbers as memory."""
    others: int | None = None
    """The number for all numbers in files that `in_files` does not list: the background's or
    `ignore`. None if files must not have any others."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the network's outputs: all classes, or all regions without the background."""
        return tuple(self.regions or self.numbers)

    @property
    def members(self) -> dict[str, tuple[int, ...]]:
        """The numbers that belong to each class or region, without the background.

        Evaluation scores these classes or regions.
        """
        if self.regions:
            return dict(self.regions)
        return {name: (number,) for name, number in self.numbers.items() if number != 0}

    @property
    def written(self) -> tuple[int, ...] | None:
        """The number of each region, in order; None for classes."""
        return tuple(self.numbers[name] for name in self.regions) if self.regions else None

    def absent(self, present: Collection[int]) -> tuple[str, ...]:
        """Classes or regions of which no number is in `present`, the numbers in label files."""
        return tuple(
            name for name, numbers in self.members.items() if not set(numbers) & set(present)
        )

    @property
    def value_names(self) -> tuple[str, ...]:
        """A name for each number 0, 1, ….

        If no class or region is written as a number, its name is the number in files, such as "2".
        """
        names = {number: name for name, number in self.numbers.items()}
        if self.ignore is not None:
            names[self.ignore] = "ignore"
        highest = max(*names, *(number for group in self.regions.values() for number in group), 0)
        return tuple(
            names.get(number) or str(self.in_file(number)) for number in range(highest + 1)
        )

    def in_file(self, number: int) -> int:
        """The number that is written to files for a number in memory.

        If only other numbers mean it (`ignore: others`), it is the smallest without a name.
        """
        if not self.in_files:
            return number
        if self.in_files[number]:
            return self.in_files[number][0]
        named = {each for group in self.in_files for each in group}
        return next(each for each in range(len(named) + 1) if each not in named)

    @property
    def numbers_in_files(self) -> dict[str, int]:
        """The number in files of each class or region, by name."""
        return {name: self.in_file(number) for name, number in self.numbers.items()}
