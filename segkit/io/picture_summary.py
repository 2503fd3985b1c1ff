"""What a command says of the pictures that it reads, before it works on them."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from segkit.errors import VolumeError
from segkit.io.picture_rules import PictureRules, size_in_words
from segkit.io.volume import is_picture, read_picture_facts


def told_of_pictures(files: Sequence[Path], rules: PictureRules) -> list[str]:
    """Pixel sizes, where they come from, and what of files is left out or turned; each thing once.

    Files that are no pictures, or cannot be read, are not told of.

    Args:
        files: the first of each volume.
        rules: how pictures are read.

    Returns:
        Lines, with the number of pictures that each holds for.
    """
    sizes: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    for file in files:
        if not is_picture(file):
            continue
        try:
            grid, facts = read_picture_facts(file, rules=rules)
        except VolumeError:  # told when its turn comes
            continue
        sizes[f"{size_in_words(grid.spacing[:2], facts.unit)} ({facts.source})"] += 1
        notes.update(facts.notes)
    return [
        *(f"pixel size of {count} pictures: {size}" for size, count in sizes.items()),
        *(f"of {count} pictures: {note}" for note, count in notes.items()),
    ]
