"""The documentation builds without a warning, needs no network, and leaves nothing out."""

import ast
import importlib.util
import inspect
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import pytest
from pydantic import BaseModel

pytest.importorskip("latex2mathml", reason="equations are made by it: install segkit[docs]")
pytest.importorskip("mkdocs", reason="the documentation is built by mkdocs: install segkit[docs]")
pytest.importorskip("material", reason="its theme is mkdocs-material: install segkit[docs]")
pytest.importorskip("mkdocstrings", reason="docstrings come by mkdocstrings: install segkit[docs]")

from typer.main import get_command

import segkit
from segkit.cli.main import app
from segkit.config.training import Config
from tests.browser import CHROMIUM, show
from tests.conftest import ROOT


def loaded(name: str) -> ModuleType:
    """A file of docs/, as MkDocs loads it."""
    specification = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    return loaded("reference")


@pytest.fixture(scope="module")
def page_html() -> ModuleType:
    return loaded("page_html")


@pytest.fixture(scope="module")
def examples() -> ModuleType:
    return loaded("examples_as_code")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The documentation, built."""
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(
        words,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr, done.stderr
    return folder


class Fetched(HTMLParser):
    """What a browser fetches on its own to show a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object"):
            self.addresses += [named[key] or "" for key in ("src", "data") if key in named]
        if tag == "link" and named.get("rel") not in ("canonical", "next", "prev"):
            self.addresses.append(named.get("href") or "")


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        seen = Fetched()
        seen.feed(page.read_text(encoding="utf-8"))
        assert seen.addresses
        assert not [one for one in seen.addresses if re.match(r"(https?:)?//", one)], page
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\W{0,2}(https?:)?//", sheet.read_text()), sheet


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_search_finds_pages_that_are_opened_from_disk(site: Path, tmp_path: Path) -> None:
    shown = show(site / "index.html", tmp_path, query="?q=intersection-union")
    assert re.search(r'search-result__meta">\s*[1-9]\d* matching document', shown.dom)
    assert 'href="verdicts.html' in shown.dom.partition("md-search-result__list")[2]
    assert shown.console == []


def test_every_equation_of_a_page_is_drawn_as_an_equation(site: Path) -> None:
    equations = 0
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.search(r"arithmatex|\\operatorname|\\frac", text), page
        equations += text.count("<math ")
    assert equations == sum(
        len(re.findall(r"\$\$.*?\$\$|\$[^$\n]+\$", page.read_text(), flags=re.DOTALL))
        for page in (ROOT / "docs").glob("*.md")
        if page.stem in ("attention", "attributions", "explain", "foreign", "verdicts")
    )


def test_a_subscript_is_below_the_line_without_a_font_for_mathematics(
    page_html: ModuleType,
) -> None:
    page = r'<span class="arithmatex">\(\operatorname{norm} x_{ij} &lt; \frac{1}{2}\)</span>.'
    shown = page_html.with_equations(page)
    assert shown.endswith("</math>.") and "&lt;" in shown and 'display="inline"' in shown
    assert (
        '<mi>norm</mi><mspace width="0.17em" /><mrow><mi>x</mi><mpadded voffset="-0.25em">' in shown
    )
    assert (
        "<msub>" not in shown and "<mfrac><mrow><mn>1</mn></mrow><mrow><mn>2</mn></mrow>" in shown
    )


@pytest.mark.parametrize(
    ("code", "parts"),
    [
        ("additive_same_level", ["additive_", "same_", "level"]),
        ("u_transformer", ["u_transformer"]),
        ("dataset.json", ["dataset.json"]),
        ("data.normalisation", ["data.", "normalisation"]),
        (
            "tests/io/test_dicom.py::test_a_slice",
            ["tests/io/", "test_", "dicom.py::test_a_", "slice"],
        ),
        ("--save_probabilities", ["--save_", "probabilities"]),
        ("data.fold=0", ["data.fold=0"]),
    ],
)
def test_names_break_between_their_words(
    page_html: ModuleType, code: str, parts: list[str]
) -> None:
    shown = page_html.with_breaks(f"<td><code>{code}</code></td>")
    assert re.sub(r"<(?!wbr)[^>]*>", "", shown).split("<wbr>") == parts
    # The hyphens of an option stay with its name, and blocks of code are kept as they are.
    assert ('<span class="whole">--save</span>' in shown) == code.startswith("--")
    block = f"<pre><code>{code}</code></pre>"
    assert page_html.with_breaks(block) == block


def test_every_page_of_docs_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / f"{page.stem}.html").is_file(), page
    assert not list(site.rglob("*.py"))


def test_the_reference_holds_every_public_name(site: Path) -> None:
    text = (site / "reference" / "api.html").read_text(encoding="utf-8")
    for name in segkit.__all__:
        assert f'id="segkit.{name}"' in text, name


def test_the_reference_holds_every_command_and_option(reference: ModuleType) -> None:
    text = reference.command_line()
    group: Any = get_command(app)
    for name, command in group.commands.items():
        section = text.partition(f"## segkit {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            shown = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.name
            if parameter.name not in ("quiet", "verbose"):
                assert shown in section or (parameter.metavar or "?") in section, (name, shown)


def sections(model: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """The sections inside one, and itself."""
    yield model
    pending: list[Any] = [field.annotation for field in model.model_fields.values()]
    while pending:
        annotation = pending.pop()
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            yield from sections(annotation)
        pending += get_args(annotation)


def test_the_reference_holds_every_setting_its_default_and_its_words(reference: ModuleType) -> None:
    text = reference.settings()
    for section in sections(Config):
        heading = f"{{ #{section.__name__} }}"
        table = text if section is Config else text.partition(heading)[2].partition("\n#")[0]
        for name, field in section.model_fields.items():
            if name == "kind":
                continue
            (row,) = [line for line in table.splitlines() if line.startswith(f"| `{name}` |")][:1]
            if field.is_required():
                assert "must be given" in row
            elif field.default is None:
                assert "`null`" in row
            elif not isinstance(field.default, BaseModel):
                default = field.default
                shown = str(default).lower() if isinstance(default, bool) else str(default)
                assert f"| `{shown}` |" in row
            words = " ".join((field.description or "").split())
            assert words.partition("|")[0] in row


def test_the_sentence_of_an_error_is_shown_with_braces_for_what_it_fills_in(
    reference: ModuleType,
) -> None:
    source = (
        "raise VolumeError(f'{path}: {len(a)} channels, expected {count}')\n"
        "error = ConfigError('give * steps' if steps else 'give no steps')\n"
        "raise KeyError('no user sees it')\n"
        "raise SegkitError(failures[0])\n"
    )
    assert list(reference.messages(source)) == [
        "`{path}`: `{…}` channels, expected `{count}`",
        "give \\* steps",
        "give no steps",
    ]


def test_the_reference_holds_the_sentence_of_every_error_once_in_each_folder(
    reference: ModuleType,
) -> None:
    text = reference.errors()
    rows = [line for line in text.splitlines() if line.startswith("| ") and "segkit/" in line]
    assert len(rows) > 300
    for folder in ("config", "data", "io", "model", "training"):
        section = text.partition(f"\n## {folder}\n")[2].partition("\n## ")[0]
        inside = [line.rpartition(" | ")[0] for line in section.splitlines()[3:] if line]
        assert inside and len(set(inside)) == len(inside)
    for path in (ROOT / "segkit").rglob("*.py"):
        for sentence in reference.messages(path.read_text(encoding="utf-8")):
            assert reference._cell(sentence) in text, (path, sentence)


def test_types_are_told_in_words(reference: ModuleType) -> None:
    text = reference.settings()
    assert "| `batch_size` | integer > 0 | `2` |" in text
    assert "| `slices` | `sagittal`, `coronal`, `axial` | `axial` |" in text
    assert "| `spacing` | 3 of: number > 0 ≤ 1000 or null | `null` |" in text
    assert "[additive_grid](#AdditiveGridGateConfig) or [additive_same_level]" in text


@pytest.mark.parametrize("name", segkit.__all__)
def test_a_public_name_has_an_example_that_is_shown_as_python(
    name: str, examples: ModuleType
) -> None:
    shown = examples.with_code(inspect.cleandoc(getattr(segkit, name).__doc__))
    (code,) = re.findall(r"^Example:\n    ```python\n(.*?)    ```", shown, re.DOTALL | re.MULTILINE)
    assert ast.parse(textwrap.dedent(code)).body


def test_an_example_loses_the_prompts_of_a_session_and_keeps_what_follows(
    examples: ModuleType,
) -> None:
    session = (
        "Sum.\n\nExample:\n    >>> for x in y:\n    ...     f(x)\n    3\n\nRaises:\n    E: no.\n"
    )
    assert examples.with_code(session) == (
        "Sum.\n\nExample:\n    ```python\n    for x in y:\n        f(x)\n    # 3\n    ```\n\n"
        "Raises:\n    E: no.\n"
    )
    assert examples.with_code("Sum.\n\nExample:\n    f(x)\n") == (
        "Sum.\n\nExample:\n    ```python\n    f(x)\n    ```\n"
    )
    assert examples.with_code("Sum.") == "Sum."


def test_parameters_stand_in_tables(site: Path) -> None:
    text = (site / "reference/api.html").read_text(encoding="utf-8")
    assert text.count("<table>") > 60 and "print(segkit.check" not in text  # coloured, so in parts
