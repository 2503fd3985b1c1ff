"""Translation between any numbers in label files and the numbers 0, 1, 2, … in memory.

    in files   0  17  53  255          `Labelling.in_files` is ((0,), (17, 53), (255,))
    within     0   1   1    2          the numbers of the network's outputs

If files use 0, 1, 2, … themselves, nothing is copied.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Integer, Shaped
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.io.volume import Volume
from segkit.io.whole_numbers import in_full

MOST_TOLD = 5
WIDEST_TABLE = 2**17
"""If the numbers in a file lie within so many, one table translates them."""


def within(values: Integer[ndarray, "*space"], labelling: Labelling) -> Integer[ndarray, "*space"]:
    """The numbers 0, 1, 2, … for the whole numbers in a label file.

    If both are the same, the array itself is returned.

    Args:
        values: numbers as in the file.
        labelling: the classes or regions and their numbers.

    Raises:
        ValueError: a number belongs to no name, and the labelling has no `others`.
    """
    if labelling.others is None and (strange := other_numbers(values, labelling)):
        raise ValueError(strange_numbers(strange, labelling))
    if not labelling.in_files:
        return values
    known = _table(labelling)
    kind = np.min_scalar_type(len(labelling.in_files) - 1)
    other = 0 if labelling.others is None else labelling.others
    if not values.size:
        return values.astype(kind)
    lowest, highest = int(values.min()), int(values.max())
    if highest - lowest < WIDEST_TABLE:
        table = np.full(highest - lowest + 1, other, kind)
        for number, place in known.items():
            if lowest <= number <= highest:
                table[number - lowest] = place
        shifted = values if lowest == 0 else values.astype(np.int64) - lowest
        found: ndarray = table[shifted]
        return found
    result = np.full(values.shape, other, kind)
    for number, place in known.items():
        result[values == number] = place
    return result


def as_in_files(
    numbers: Integer[ndarray, "*space"], labelling: Labelling
) -> Integer[ndarray, "*space"]:
    """The numbers that are written to files for 0, 1, 2, …; the reverse of `within`.

    If several numbers mean one class, the first is written. If the numbers in files are 0, 1, 2, …
    too, the array itself is returned.
    """
    if not labelling.in_files:
        return numbers
    writable = {*labelling.numbers.values()}
    written = [
        group[0] if place in writable else max(0, *group, 0)
        for place, group in enumerate(labelling.in_files)
    ]
    kind = np.min_scalar_type(max(written[place] for place in writable))
    table = np.array([number if place in writable else 0 for place, number in enumerate(written)])
    found: ndarray = table.astype(kind)[numbers]
    # Indexing returns an array in C order; in volumes, the first axis runs fastest.
    return np.asfortranarray(found) if numbers.flags.f_contiguous else found


def volume_within(labels: Volume, labelling: Labelling) -> Volume:
    """A label volume with the numbers 0, 1, 2, …, as `within` gives them."""
    return labels.like(within(labels.data, labelling)) if labelling.in_files else labels


def volume_as_in_files(labels: Volume, labelling: Labelling) -> Volume:
    """A label volume with the numbers of files, as `as_in_files` gives them."""
    return labels.like(as_in_files(labels.data, labelling)) if labelling.in_files else labels


def other_numbers(values: Shaped[ndarray, "*space"], labelling: Labelling) -> dict[int, int]:
    """Numbers in a label file that belong to no name, each with its count of voxels."""
    present, counts = np.unique(values, return_counts=True)
    known = _table(labelling)
    pairs = zip(present.tolist(), counts.tolist(), strict=True)
    return {number: count for number, count in pairs if number not in known}


def strange_numbers(found: Mapping[int, int], labelling: Labelling) -> str:
    """An error message about numbers that belong to no name, without the name of the file."""
    numbers = [in_full(number) for number in list(found)[:MOST_TOLD]]
    more = f" and {len(found) - MOST_TOLD} more" if len(found) > MOST_TOLD else ""
    return (
        f"holds label {', '.join(numbers)}{more}, which the dataset does not declare (it has "
        f"{declared(labelling)}); name it in data.labels, or add others to a class or to ignore "
        f"there"
    )


def declared(labelling: Labelling) -> str:
    """The numbers in files that belong to a name, as text: "0 to 2", or "0, 17, 53"."""
    numbers = sorted(_table(labelling))
    if len(numbers) == numbers[-1] - numbers[0] + 1:
        return f"{numbers[0]} to {numbers[-1]}"
    return ", ".join(map(str, numbers))


def _table(labelling: Labelling) -> dict[int, int]:
    """The number in memory for each number in files."""
    if not labelling.in_files:
        return {number: number for number in range(len(labelling.value_names))}
    return {number: place for place, group in enumerate(labelling.in_files) for number in group}
