"""README, docs and notebooks use the public names of segkit, and nothing behind them."""

import ast
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import segkit
from tests.conftest import ROOT
from tests.documents import blocks_of

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def python_of(path: Path) -> str:
    """All Python of a page or a notebook."""
    if path.suffix == ".md":
        return "\n".join(block.text for block in blocks_of(path) if block.language == "python")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


def names_used(code: str) -> Iterator[str]:
    """Every name of segkit that the code asks for, with the module if it is not segkit itself."""
    for node in ast.walk(ast.parse(code)):
        match node:
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] == "segkit":
                inside = module.removeprefix("segkit").removeprefix(".")
                yield from (f"{inside}.{one.name}".strip(".") for one in node.names)
            case ast.Import():
                yield from (one.name for one in node.names if one.name.startswith("segkit."))
            case ast.Attribute(value=ast.Name(id="segkit"), attr=name):
                yield name


def test_a_module_behind_segkit_is_found_however_it_is_imported() -> None:
    code = "import segkit.io\nfrom segkit.io.volume import Volume\nfrom segkit import Grid as G"
    found = set(names_used(f"{code}\nsegkit.train(segkit.demo)"))
    assert found == {"segkit.io", "io.volume.Volume", "Grid", "train", "demo"}


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.stem)
def test_a_page_uses_public_names_only(path: Path) -> None:
    assert set(names_used(python_of(path))) <= set(segkit.__all__)
