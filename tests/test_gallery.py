"""docs/gallery.md shows the verdicts that benchmarks/gallery.py wrote."""

import json
import re
from typing import Any

import pytest

from benchmarks.gallery import SHOWN, judged_once
from benchmarks.planted_gallery import GALLERY
from tests.conftest import ROOT

PICTURES = ROOT / "docs" / "pictures"
ROWS: list[dict[str, Any]] = json.loads((PICTURES / "gallery.json").read_text())["rows"]


def test_the_page_gives_each_gate_the_word_of_the_rule() -> None:
    assert [(row["gate"], row["scans"]) for row in ROWS] == list(SHOWN)
    page = (ROOT / "docs" / "gallery.md").read_text().partition("## Gates that were trained")[0]
    told = re.findall(r"segkit: \*\*([a-z ]+)\*\*", " ".join(page.split()))
    by_place = sorted(ROWS, key=lambda row: (page.find(row["picture"]), row["scans"] == 3))
    assert told == [row["word"] for row in by_place]


def test_pictures_of_pages_are_there_and_small() -> None:
    for page in (ROOT / "docs").glob("*.md"):
        for name in re.findall(r"!\[[^\]]*\]\((pictures/[^)]+)\)", page.read_text()):
            path = ROOT / "docs" / name
            assert path.is_file() and path.stat().st_size < 200_000, (page, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "mask"])
def test_the_rule_gives_these_words_again(name: str) -> None:
    (planted,) = [one for one in GALLERY if one.name == name]
    (row,) = [row for row in ROWS if row["gate"] == name and row["scans"] == 12]
    assert judged_once(planted, 12)["word"] == row["word"]
