"""From names and their numbers in label files to what is told apart."""

from collections.abc import Mapping, Sequence
from typing import Any

from segkit.config.dataset_files import OTHERS
from segkit.config.labels import Labelling
from segkit.errors import DatasetError, first_few

IGNORE = "ignore"
"""The name of voxels that nobody labelled."""
BACKGROUND = "background"
LARGEST_WRITTEN = 2**16 - 1
"""Numbers from 0 to this are written to label files."""

Groups = Mapping[str, Sequence[int | str]]
"""By name, its numbers in label files; `OTHERS` stands for all that no name has."""


def labelling_from(source: str, groups: Groups, order: Sequence[int] | None) -> Labelling:
    """What names with their numbers in label files come to.

    Groups are regions if there is an `order`, the number that each of them is written as, and if
    one of them has several numbers; else several numbers mean one class. The background is the
    class of that name, or else that of number 0. Classes follow by the number they are written as.

    Args:
        source: where the names stand, for errors.
        groups: by name, its numbers.
        order: nnU-Net's regions_class_order.

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
            f"{source}: labels must name a class beside the background, found {_listing(named)}"
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
        f"{source}: expected a label that is 0 or called {BACKGROUND}, found "
        f"{_listing(groups)}; name what is no structure"
    )


def _others(
    source: str, groups: Groups, ignored: Sequence[int | str], background: str
) -> str | None:
    """The name that stands for all numbers that no name has, if there is one."""
    found = [name for name, numbers in {**groups, IGNORE: ignored}.items() if OTHERS in numbers]
    if len(found) > 1 or (found and found[0] not in (background, IGNORE)):
        raise DatasetError(
            f"{source}: {OTHERS} must be {background} or {IGNORE}, found it in {_listing(found)}"
        )
    return found[0] if found else None


def _written_first(source: str, name: str, group: Sequence[int]) -> tuple[int, ...]:
    """The numbers, that which is written first."""
    for number in group:
        if 0 <= number <= LARGEST_WRITTEN:
            return (number, *(other for other in group if other != number))
    raise DatasetError(
        f"{source}: {name} needs a number from 0 to {LARGEST_WRITTEN} that it is written as, found "
        f"{_listing(group) or 'none'}; add one to its list"
    )


def _check_shared(
    source: str,
    named: Mapping[str, Sequence[int]],
    ignored: Sequence[int],
    background: str,
    *,
    regions: bool,
) -> None:
    """Raise DatasetError if a number has two names that are not both regions."""
    owners: dict[int, str] = {}
    for name, numbers in {**named, IGNORE: ignored}.items():
        for number in numbers:
            other = owners.setdefault(number, name)
            if other == name or (regions and not {name, other} & {background, IGNORE}):
                continue
            if not {name, other} & {background, IGNORE} and any(
                len(named[each]) > 1 for each in (name, other)
            ):
                told = _listing(each for each in named if each != background)
                raise DatasetError(
                    f"{source}: {other} and {name} overlap at {number}, and such regions need "
                    f"regions_class_order, the number that each of {told} is written as, found none"
                )
            raise DatasetError(
                f"{source}: {other} and {name} share the number {number}; give each its own"
            )


def _check_regions(
    source: str, named: Mapping[str, Sequence[int]], order: Sequence[int], background: str
) -> None:
    regions = {name: group for name, group in named.items() if name != background}
    if len(order) != len(regions) or len(set(order)) != len(order):
        raise DatasetError(
            f"{source}: regions_class_order must hold {len(regions)} different numbers, one for "
            f"each of {_listing(regions)}, found {list(order)}"
        )
    for (name, group), number in zip(regions.items(), order, strict=True):
        if number not in group:
            raise DatasetError(
                f"{source}: regions_class_order writes {name} as {number}, which is none of its "
                f"numbers {_listing(group)}"
            )
    names = list(regions)
    for place, name in enumerate(names):
        for later in names[place + 1 :]:
            if set(regions[name]) < set(regions[later]):
                raise DatasetError(
                    f"{source}: {later} would be written over all of {name}, which lies within it; "
                    f"name {name} after {later} in labels"
                )


def _listing(items: Any) -> str:
    return first_few(items)
