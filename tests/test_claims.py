"""docs/claims.md names a test or a benchmark for each claim, and each of these exists."""

import ast
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGE = ROOT / "docs" / "claims.md"
HELD_BY = re.compile(r"`((?:tests|benchmarks)/[\w/]+\.(?:py|json)(?:::\w+)*)`")


def rows(text: str) -> list[tuple[str, list[str]]]:
    """The claims of a page's tables, each with the tests and benchmarks that its row names."""
    cells = (line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| "))
    return [(claim, HELD_BY.findall(names)) for claim, names in cells if claim != "claim"]


def missing(name: str, root: Path) -> str | None:
    """What is missing of `file` or `file::test`, or None if it exists."""
    path, *parts = name.split("::")
    if not (root / path).is_file():
        return f"no file {path}"
    scope = ast.parse((root / path).read_text(encoding="utf-8")).body if parts else []
    for part in parts:
        found = [
            node
            for node in scope
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == part
        ]
        if not found:
            return f"no {part} in {path}"
        scope = found[0].body
    return None


def test_each_claim_names_a_test_or_a_benchmark_that_exists() -> None:
    claims = rows(PAGE.read_text(encoding="utf-8"))
    assert len(claims) > 40
    assert not [claim for claim, names in claims if not names]
    problems = [missing(name, ROOT) for _, names in claims for name in names]
    assert not [problem for problem in problems if problem]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("tests/test_a.py::test_it", None),
        ("tests/test_a.py::TestAll::test_inside", None),
        ("tests/test_a.py::test_other", "no test_other in tests/test_a.py"),
        ("tests/test_a.py::TestAll::test_it", "no test_it in tests/test_a.py"),
        ("tests/test_b.py::test_it", "no file tests/test_b.py"),
    ],
)
def test_a_name_that_does_not_exist_is_found(
    name: str, problem: str | None, tmp_path: Path
) -> None:
    (tmp_path / "tests").mkdir()
    text = "def test_it(): ...\n\n\nclass TestAll:\n    def test_inside(self): ...\n"
    (tmp_path / "tests" / "test_a.py").write_text(text)
    assert missing(name, tmp_path) == problem
