"""Code blocks of the documentation, and what may stand in them.

A block is run unless a comment before it says why not: `<!-- not run: needs a cluster -->`. What is
not run is still parsed: every option must exist and every setting must be one.
"""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from typer.main import get_command

from segkit.cli import terminal
from segkit.cli.main import app
from segkit.config.load import load_config, read_yaml, validated
from segkit.config.training import Config
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = ("python", "sh", "yaml", "json", "text")
REASON = re.compile(r"<!-- not run: (\S.*) -->")
LAUNCHERS = ("srun", "torchrun")
BASE = ROOT / "configs" / "attention_unet_3d.yaml"
ELSEWHERE = ("--verdicts", "--heads", "--dry-run", "--folds", "--resume", "--device", "--precision")
"""Options of commands that take minutes or another machine; they are parsed alone."""


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str | None
    """Why it is not run, where it is not."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page. Raises where one is indented or has no language that we know."""
    found, comment = [], ""
    for token in MarkdownIt().parse(page.read_text(encoding="utf-8")):
        assert token.type != "code_block", f"{page.name}: fence this block: {token.content}"
        if token.type == "fence":
            assert token.map is not None
            language = token.info.split(" ")[0]
            where = f"{page.name}:{token.map[0] + 1}"
            assert language in LANGUAGES, f"{where}: {language or 'no language'}; have {LANGUAGES}"
            told = REASON.fullmatch(comment.strip())
            assert told or "not run" not in comment, f"{where}: expected <!-- not run: REASON -->"
            block = Block(page, token.map[0] + 1, language, token.content, told and told[1])
            found.append(block)
        comment = token.content if token.type == "html_block" else ""
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell block, without comments and variables set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            del words[0]
        if words:
            yield words


def segkit_words(words: list[str]) -> list[str] | None:
    """What `segkit` is given, whoever launches it; None for other commands."""
    if words[0] in LAUNCHERS:
        for start in (["segkit"], ["-m", "segkit"]):
            for place in range(1, len(words)):
                if words[place : place + len(start)] == start:
                    return words[place + len(start) :]
        return None
    return words[1:] if words[0] == "segkit" else None


def parsed(words: list[str]) -> dict[str, Any]:
    """What a command understands of its words. Raises where an option or a setting is none."""
    group: Any = get_command(app)
    if words[0].startswith("--"):
        assert has_option("", words[0]), f"segkit has no option {words[0]}"
        return {}
    command = group.get_command(None, words[0])
    assert command is not None, f"segkit {words[0]} is no command"
    try:
        context = command.make_context(f"segkit {words[0]}", words[1:])
    finally:
        terminal.start()
    found: dict[str, Any] = context.params
    if "overrides" in found:
        load_config(BASE, found["overrides"] or ())
    return found


def named_options(page: Path) -> Iterator[tuple[str, str]]:
    """Commands and options that sentences and tables name together: ("train", "--folds")."""
    for token in MarkdownIt().enable("table").parse(page.read_text(encoding="utf-8")):
        for inside in token.children or ():
            if inside.type == "code_inline" and inside.content.startswith("segkit "):
                command, *rest = inside.content.removeprefix("segkit ").split(" ")
                yield from ((command, word) for word in rest if word.startswith("--"))


def has_option(command: str, option: str) -> bool:
    """Whether a command of segkit, or segkit itself, has an option of this name."""
    group: Any = get_command(app)
    known = group.get_command(None, command) or group
    return any(option in (*one.opts, *one.secondary_opts) for one in known.params)


def is_slow(words: list[str]) -> bool:
    """Whether a command is parsed rather than run."""
    return words[0] in ("demo", "train") or any(word in ELSEWHERE for word in words)


def check_other_command(words: list[str]) -> None:
    """Hold a command that is not segkit's against the repository. Raises where it is unknown."""
    program, *rest = words
    program = program.removeprefix(".venv/bin/")
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert all(word in targets or "=" in word for word in rest), words
    elif program == "python":
        assert (ROOT / rest[0]).is_file(), words
    elif program == "pytest":
        paths = [word.partition("::")[0] for word in rest if word.startswith("tests/")]
        assert all((ROOT / path).exists() for path in paths), words
    elif program == "pip":
        text = (ROOT / "pyproject.toml").read_text()
        for word in rest:
            for extra in re.findall(r"\[(.*)\]", word):
                for name in extra.split(","):
                    assert re.search(rf"^{name} = \[", text, flags=re.MULTILINE), words
    else:
        raise AssertionError(f"{program} is not known here; say why it is not run: {words}")


FILES = {"table": "cases.csv", "labels": {"background": 0, "lesion": 1}}
"""Where a block of `data.files` says only what it is about."""


def check_yaml(text: str, folder: Path) -> None:
    """Raise unless this is part of a config, of which BASE gives what is left out."""
    path = folder / "block.yaml"
    path.write_text(text, encoding="utf-8")
    part = read_yaml(path)
    if "codes" in part.get("data", {}).get("files", {}):
        part = merged({"data": {"files": FILES}}, part)
    validated(Config, merged(read_yaml(BASE), part), "the block")


def merged(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A tree with the leaves of another in it."""
    both = dict(base)
    for key, value in change.items():
        inside = both.get(key)
        if isinstance(value, dict) and isinstance(inside, dict):
            value = merged(inside, value)
        both[key] = value
    return both
