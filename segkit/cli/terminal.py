"""How the command line speaks: news on stdout, one sentence on stderr, JSON where a script reads.

Colours and bars appear on a terminal alone, and no colour where the variable NO_COLOR is set: Rich
sees to both. `--quiet` and `--verbose` may stand before a command or after it.
"""

import itertools
import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup, TyperOption

from segkit.errors import ConfigError, SegkitError, abridged, printable
from segkit.io.atomic import json_text

console = Console()

QUIET_LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "nibabel.global")
"""Loggers of others that speak unasked."""
MOST_PROBLEMS = 200
"""Lines of one command about what is wrong."""
OURS = logging.getLogger("segkit")


class Commands(TyperGroup):
    """Commands that each take the options of `EVERYWHERE`, which their group declares."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of that name, or None."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            known = {option.name for option in command.params}
            shared = [option for option in self.params if option.name in EVERYWHERE]
            command.params += [option for option in shared if option.name not in known]
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """Name, command and its words. Raises ConfigError where an option lacks its value.

        Left to itself the parser would take the option that follows as the value: `--maps --tta`
        would write to a folder called --tta.
        """
        name, command, words = super().resolve_command(ctx, args)
        # While a shell completes a line, ends of it are missing.
        if command is None or ctx.resilient_parsing:
            return name, command, words
        options = {
            option: not (parameter.is_flag or parameter.count)
            for parameter in command.params
            if isinstance(parameter, TyperOption)
            for option in (*parameter.opts, *parameter.secondary_opts)
        }
        for word, following in itertools.pairwise(itertools.takewhile("--".__ne__, words)):
            if options.get(word) and following in options:
                raise ConfigError(
                    f"{word} needs a value, found {following}; give it one or leave it out"
                )
        return name, command, words


@dataclass
class Answer:
    """Whether a script waits for JSON: each command prints one answer, if it fails too."""

    expected: bool = False


answer = Answer()


def start() -> None:
    """Speak as usual: a process may run several commands, and none inherits another's options."""
    console.quiet = False
    answer.expected = False
    OURS.setLevel(logging.NOTSET)
    for handler in OURS.handlers[:]:
        OURS.removeHandler(handler)


def _quieten(asked: bool) -> bool:
    console.quiet = console.quiet or asked
    return asked


def _explain_more(asked: bool) -> None:
    if asked and not is_verbose():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        OURS.addHandler(handler)
        OURS.setLevel(logging.INFO)


def is_verbose() -> bool:
    """Whether more was asked for."""
    return OURS.level == logging.INFO


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Say nothing but errors, and JSON where asked.",
        callback=_quieten,
        expose_value=False,
        is_eager=True,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        "-v",
        help="Say on stderr what happens inside.",
        callback=_explain_more,
        expose_value=False,
        is_eager=True,
    ),
]


def _answer_in_json(asked: bool) -> bool:
    answer.expected = asked
    return _quieten(asked)


JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", help="Print the result as JSON and nothing else.", callback=_answer_in_json
    ),
]
EVERYWHERE = ("quiet", "verbose")


def say(text: str) -> None:
    """Lines of news. Names of files cannot make the terminal do anything."""
    lines = "\n".join(map(printable, text.split("\n")))
    console.print(lines, highlight=False, markup=False, soft_wrap=True)


def say_json(content: Mapping[str, Any]) -> None:
    """The result, for a script."""
    sys.stdout.write(json_text(content))
    answer.expected = False


def say_failure(sentence: str, problems: Sequence[str] = ()) -> None:
    """Why there is no result, for a script that waits for one."""
    if answer.expected:
        say_json({"error": sentence, "problems": [*problems] or [sentence]})


def complain(sentence: str) -> None:
    """Why a command stops, or what it leaves out."""
    print(f"segkit: {printable(abridged(sentence))}", file=sys.stderr)


def complain_of(error: SegkitError) -> None:
    """Why a command stops: the error, or a line for each of its problems, and how many they are."""
    for problem in error.problems[:MOST_PROBLEMS]:
        complain(problem)
    count = len(error.problems)
    if count > MOST_PROBLEMS:
        complain(f"and {count - MOST_PROBLEMS:,} more problems, which --json lists in segkit check")
    complain(
        f"{count:,} problems, as told above; mend them all and run again" if count else str(error)
    )


def raise_failures(failures: Sequence[str], count: int, *, alone: bool) -> None:
    """Raise SegkitError if any of `count` volumes failed: its own sentence for a volume alone."""
    if failures and alone:
        raise SegkitError(failures[0])
    if failures:
        raise SegkitError(f"{len(failures)} of {count} volumes failed, as told above")


def hush() -> None:
    """Leave the terminal to segkit, once lightning has set up its own logging."""
    if is_verbose():
        return
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
