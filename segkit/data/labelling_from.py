"""Classes or regions, made from names and their numbers in label files."""

from collections.abc import Mapping, Sequence
from typing import Any

from segkit.config.dataset_files import OTHERS
from segkit.config.labels import Labelling
from segkit.errors import DatasetError, counted, first_few

IGNORE = "ignore"
"""The name of voxels that nobody labelled."""
BACKGROUND = "background"
LARGEST_WRITTEN = 2**16 - 1
"""The largest number that is written to label files."""

Groups = Mapping[str, Sequence[int | str]]
"""Numbers in label files, by name; `OTHERS` stands for all numbers that belong to no name."""


def labelling_from(source: str, groups: Groups, order: Sequence[int] | None) -> Labelling:
    """The classes or regions that are described by names and their numbers in label files.

    The names are regions if there is an `order` and one of them has several numbers. Otherwise,
    they are classes, and several numbers mean the same class. The background is the class of that
    name, or else the class of number 0. Other classes are sorted by the number that is written.

    Args:
        source: file or setting with the names, for messages.
        groups: numbers in label files, by name.
        order: the number that each region is written as (nnU-Net's regions_class_order).

    Raises:
        DatasetError: names and numbers do not fit together.
    """
    groups = {name: tuple(numbers) for name, numbers in groups.items()}
    ignored = groups.pop(IGNORE, ())
    background = _background(source, groups)
    others = _others(source, groups, ignored, background)
    named = {
        name: tuple(number for number in numbers if isinstance(number, int))
        for name, numbers in groups.items()
    }
    left_out = tuple(number for number in ignored if isinstance(number, int))
    if len(named) < 2:
        raise DatasetError(
            f"{source}: labels must have a class in addition to the background, found "
            f"{_listing(named)}; add one"
        )
    regions = order is not None and any(
        len(numbers) > 1 for name, numbers in named.items() if name != background
    )
    _check_shared(source, named, left_out, background, regions=regions)
    if regions:
        assert order is not None
        _check_regions(source, named, order, background)
        members = {name: numbers for name, numbers in named.items() if name != background}
        present = sorted({number for group in members.values() for number in group})
        in_files = [_written_first(source, background, named[background])]
        in_files += [(number,) for number in present]
        numbers = {background: 0}
        for name, number in zip(members, order, strict=True):
            _written_first(source, name, (number,))
            numbers[name] = present.index(number) + 1
        inside = {
            name: tuple(sorted(present.index(number) + 1 for number in group))
            for name, group in members.items()
        }
    else:
        written = {name: _written_first(source, name, group) for name, group in named.items()}
        names = sorted(written, key=lambda name: (name != background, written[name][0]))
        in_files = [written[name] for name in names]
        numbers, inside = {name: place for place, name in enumerate(names)}, {}
    ignore = len(in_files) if ignored else None
    if ignore is not None:
        in_files.append(left_out)
    same = others is None and in_files == [(place,) for place in range(len(in_files))]
    return Labelling(
        numbers,
        inside,
        ignore,
        () if same else tuple(in_files),
        None if others is None else ignore if others == IGNORE else 0,
    )


def _background(source: str, groups: Mapping[str, Sequence[int | str]]) -> str:
    for name in groups:
        if name.lower() == BACKGROUND:
            return name
    for name, numbers in groups.items():
        if 0 in numbers:
            return name
    raise DatasetError(
        f"{source}: expected a label with number 0 or name {BACKGROUND}, found "
        f"{_listing(groups)}; add the background"
    )


def _others(
    source: str, groups: Groups, ignored: Sequence[int | str], background: str
) -> str | None:
    """The name that has `others` among its numbers, if there is one."""
    found = [name for name, numbers in {**groups, IGNORE: ignored}.items() if OTHERS in numbers]
    if len(found) > 1 or (found and found[0] not in (background, IGNORE)):
        raise DatasetError(
            f"{source}: {OTHERS} may belong only to {background} or {IGNORE}, found it in "
            f"{_listing(found)}; move it to one of them"
        )
    return found[0] if found else None


def _written_first(source: str, name: str, group: Sequence[int]) -> tuple[int, ...]:
    """The numbers, beginning with the one that is written."""
    for number in group:
        if 0 <= number <= LARGEST_WRITTEN:
            return (number, *(other for other in group if other != number))
    raise DatasetError(
        f"{source}: {name} is written to files as a number from 0 to {LARGEST_WRITTEN}, but its "
        f"list has {_listing(group) or 'none'}; add such a number to the list"
    )


def _check_shared(
    source: str,
    named: Mapping[str, Sequence[int]],
    ignored: Sequence[int],
    background: str,
    *,
    regions: bool,
) -> None:
    """Raise DatasetError if a number belongs to two names that are not both regions.

    Args:
        source: file or setting with the names, for messages.
        named: numbers in files, by name.
        ignored: numbers of voxels that nobody labelled.
        background: name of the background.
        regions: whether the names are regions, which may overlap.
    """
    owners: dict[int, str] = {}
    for name, numbers in {**named, IGNORE: ignored}.items():
        for number in numbers:
            other = owners.setdefault(number, name)
            if other == name or (regions and not {name, other} & {background, IGNORE}):
                continue
            if not {name, other} & {background, IGNORE} and any(
                len(named[each]) > 1 for each in (name, other)
            ):
                regions_named = _listing(each for each in named if each != background)
                raise DatasetError(
                    f"{source}: {other} and {name} overlap at {number}; add regions_class_order, "
                    f"with the number to write for each of {regions_named}"
                )
            raise DatasetError(
                f"{source}: {other} and {name} share the number {number}; give each its own"
            )


def _check_regions(
    source: str, named: Mapping[str, Sequence[int]], order: Sequence[int], background: str
) -> None:
    """Raise DatasetError unless `order` has one number of each region, outer regions first.

    Args:
        source: file or setting with the names, for messages.
        named: numbers in files, by name.
        order: the number that each region is written as.
        background: name of the background.
    """
    regions = {name: group for name, group in named.items() if name != background}
    if len(order) != len(regions) or len(set(order)) != len(order):
        raise DatasetError(
            f"{source}: regions_class_order must have "
            f"{counted(len(regions), 'different number')}, one for each of {_listing(regions)}, "
            f"found {list(order)}"
            "; give one number for each region"
        )
    for (name, group), number in zip(regions.items(), order, strict=True):
        if number not in group:
            raise DatasetError(
                f"{source}: regions_class_order writes {name} as {number}, which is not one of its "
                f"numbers {_listing(group)}; choose one of them"
            )
    names = list(regions)
    for place, name in enumerate(names):
        for later in names[place + 1 :]:
            if set(regions[name]) < set(regions[later]):
                raise DatasetError(
                    f"{source}: {later} would overwrite all of {name}, which lies inside it; put "
                    f"{name} after {later} in labels"
                )


def _listing(items: Any) -> str:
    return first_few(items)
