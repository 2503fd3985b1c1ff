"""Lines that a command prints about the pictures that it is going to read."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from segkit.errors import VolumeError, counted
from segkit.io.picture_rules import PictureRules, size_in_words
from segkit.io.volume import read_picture_facts
from segkit.io.volume_names import is_picture


def picture_lines(files: Iterable[tuple[Path, PictureRules]]) -> list[str]:
    """Lines on the pixel sizes of pictures, their sources, and the notes on how they are read.

    Each line counts the pictures that it applies to. Files that are not pictures or cannot be read
    are skipped.

    Args:
        files: the first file of each volume, and the settings for reading it.
    """
    sizes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for file, rules in files:
        if not is_picture(file):
            continue
        try:
            grid, facts = read_picture_facts(file, rules=rules)
        except VolumeError:  # reported when the file itself is read
            continue
        sizes[f"{size_in_words(grid.spacing[:2], facts.unit)} ({facts.source})"] += 1
        notes.update(facts.notes)
    return [
        *(f"pixel size of {counted(count, 'picture')}: {size}" for size, count in sizes.items()),
        *(f"note on {counted(count, 'picture')}: {note}" for note, count in notes.items()),
    ]
