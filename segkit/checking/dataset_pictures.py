"""Facts and notes of the pictures of a dataset."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy import ndarray

from segkit.errors import counted
from segkit.io.picture_rules import MM_OF, WORD_OF, PictureFacts


class PictureSummary:
    """Collects the facts and notes of a dataset's pictures; each note is listed once."""

    def __init__(self) -> None:
        self.facts: list[PictureFacts] = []
        self.all = True
        """Whether all cases are pictures."""
        self.first_with: dict[str, str] = {}

    def add(self, case: str, picture: PictureFacts | None) -> None:
        """Add the facts of a case's image; None if it is not a picture."""
        if picture is None:
            self.all = False
            return
        self.facts.append(picture)
        for note in picture.notes:
            self.first_with.setdefault(note, case)

    def notes(self) -> list[str]:
        """Each note, with the number of its cases and the first of them."""
        counts = Counter(note for facts in self.facts for note in facts.notes)
        return [
            f"{note} (in {count} of {counted(len(self.facts), 'case')}, the first "
            f"{self.first_with[note]})"
            for note, count in counts.items()
        ]

    def lines(
        self,
        shapes: list[tuple[int, int, int]],
        spacings: list[tuple[float, float, float]],
    ) -> list[str]:
        """Lines on sizes, pixel sizes and notes."""
        unit = self.facts[0].unit
        axes = 3 if max(shape[2] for shape in shapes) > 1 else 2
        sources = Counter(facts.source for facts in self.facts)
        scaled = [tuple(step / MM_OF[unit] for step in steps[:axes]) for steps in spacings]
        return [
            f"size in pixels (columns, rows{', slices' * (axes == 3)}): "
            f"{range_of([shape[:axes] for shape in shapes], 'd')}",
            f"pixel size in {WORD_OF[unit]}: {range_of(scaled, '.3g')}; "
            + "; ".join(
                f"{source} ({counted(count, 'case')})" for source, count in sources.items()
            ),
            *self.notes(),
        ]


def range_of(rows: Sequence[tuple[float, ...]], form: str) -> str:
    """The least, the largest and the median number of each column, formatted by `form`.

    If all numbers of a column look alike, it is given once.
    """
    return ", ".join(_range_of(column, form) for column in np.array(rows).T)


def _range_of(column: ndarray, form: str) -> str:
    low, high = f"{column.min().item():{form}}", f"{column.max().item():{form}}"
    return low if low == high else f"{low} to {high} (median {np.median(column):.3g})"
