"""Checks of pairs of a scan and its reference, as they are passed from Python."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sized

from segkit.config.labels import Labelling
from segkit.errors import VolumeError, counted
from segkit.io.volume import Volume


def cases_to_judge(
    cases: Iterable[object], unlabelled: Mapping[int, Collection[str]], labelling: Labelling
) -> Iterator[tuple[str, Volume, Volume | None, Collection[str]]]:
    """The name of each pair, its scan, its reference, and what nobody labelled in it.

    Args:
        cases: the pairs.
        unlabelled: for the index of a pair, the classes or regions that nobody labelled.
        labelling: the classes and regions that the model knows.

    Raises:
        VolumeError: if there are no pairs, or other values, or if `unlabelled` names an unknown
            class or pair. It is raised before the first pair is used, if it is known by then.
    """
    if isinstance(cases, Sized):
        check_pairs(len(cases), unlabelled)
    count = 0
    for scan, reference in pairs_of(cases):
        name, lacking = f"case {count}", unlabelled.get(count, ())
        check_unlabelled(name, lacking, labelling)
        yield name, scan, reference, lacking
        count += 1
    check_pairs(count, unlabelled)


def check_pairs(num_pairs: int, unlabelled: Mapping[int, Collection[str]]) -> None:
    """Raise VolumeError if there are no pairs, or if `unlabelled` names one that is missing."""
    if num_pairs == 0:
        raise VolumeError("expected pairs of a scan and its reference, found none; pass some")
    if beyond := [number for number in unlabelled if number not in range(num_pairs)]:
        raise VolumeError(
            f"unlabelled has the index {beyond[0]}, but there are only "
            f"{counted(num_pairs, 'pair')}; use indices from 0 to {num_pairs - 1}"
        )


def pairs_of(cases: object) -> Iterator[tuple[Volume, Volume | None]]:
    """The pairs of a scan and its reference. Those of a list are checked before the first is used.

    Raises:
        VolumeError: if one of the cases is not such a pair, or if there are no cases to go through.
    """
    if not isinstance(cases, Iterable):
        raise VolumeError(
            f"expected pairs of a scan and its reference, found {_in_words(cases)}; pass "
            "[(scan, reference), …]"
        )
    pairs = (_pair_of(number, case) for number, case in enumerate(cases))
    return iter(list(pairs)) if isinstance(cases, list | tuple) else pairs


def _pair_of(number: int, case: object) -> tuple[Volume, Volume | None]:
    match case:
        case (Volume() as scan, (Volume() | None) as reference):
            return scan, reference
        case _:
            raise VolumeError(
                f"case {number}: expected a pair of a scan and its reference (two Volumes, or a "
                f"Volume and None), found {_in_words(case)}; pass [(scan, reference), …]"
            )


def _in_words(case: object) -> str:
    if isinstance(case, tuple | list):
        return f"{counted(len(case), 'value')} ({', '.join(type(part).__name__ for part in case)})"
    return f"{type(case).__name__}"


def check_unlabelled(case: str, unlabelled: Collection[str], labelling: Labelling) -> None:
    """Raise VolumeError if the model does not know one of these classes or regions."""
    if isinstance(unlabelled, str):
        raise VolumeError(
            f"{case}: expected a list of classes in unlabelled, found the string {unlabelled!r}; "
            f"use [{unlabelled!r}]"
        )
    if unknown := [each for each in unlabelled if each not in labelling.members]:
        raise VolumeError(
            f"{case}: unlabelled has {unknown[0]!r}, which is not one of "
            f"{', '.join(labelling.members)}; correct the name"
        )
