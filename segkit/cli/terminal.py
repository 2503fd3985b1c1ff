"""Output of the command line: messages on stdout, errors as one sentence on stderr, and JSON.

Colours and progress bars appear only on a terminal, and no colours if the variable NO_COLOR is set
(both by Rich). `--quiet` and `--verbose` may be given before or after a command.
"""

import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperArgument, TyperGroup, TyperOption

from segkit.errors import ConfigError, SegkitError, abridged, counted, printable
from segkit.io.atomic import json_text
from segkit.system.listing import show_listing

console = Console()

QUIET_LIBRARIES = ("lightning", "lightning.pytorch", "lightning.fabric", "nibabel.global")
"""Loggers of other libraries that `hush` silences."""
MOST_PROBLEMS = 200
"""Largest number of problems that one command prints."""
OURS = logging.getLogger("segkit")


class Commands(TyperGroup):
    """A group of commands that all accept the options in `EVERYWHERE`."""

    def get_params(self, ctx: Any) -> Any:
        """The options before a command."""
        parameters = super().get_params(ctx)
        simplify_help(parameters)
        return parameters

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command with this name, or None."""
        command = super().get_command(ctx, cmd_name)
        if command is not None:
            known = {option.name for option in command.params}
            shared = [option for option in self.params if option.name in EVERYWHERE]
            command.params += [option for option in shared if option.name not in known]
            # Without a context, as in the documentation, there is no option --help yet.
            simplify_help(command.params if ctx is None else command.get_params(ctx))
        return command

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The name, the command and its arguments.

        By default the parser would take the next option as a value: `--maps --tta` would write to a
        folder called --tta.

        Raises:
            ConfigError: if an option has no value.
        """
        name, command, words = super().resolve_command(ctx, args)
        # While a shell completes a line, the line is not complete.
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
                    f"{word} needs a value, found {following}; give it a value or leave it out"
                )
        return name, command, words


def simplify_help(parameters: Iterable[Any]) -> None:
    """Leave types of Python out of the help: flags take no value, and arguments have a name.

    By default `--json` is shown as `--json <bool>`, and `INPUT` as `INPUT <list[Path]>`.
    """
    for parameter in parameters:
        if isinstance(parameter, TyperArgument):
            parameter.display_type_rich = lambda ctx: None  # type: ignore[method-assign]
        elif isinstance(parameter, TyperOption) and parameter.is_flag:
            parameter.metavar = parameter.metavar or ""


@dataclass
class Answer:
    """Whether a script expects JSON. Each command then prints one object, even if it fails."""

    expected: bool = False


answer = Answer()


class NoRepetition(logging.Filter):
    """Lets each warning pass once, because a command may read a dataset several times."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the message is new."""
        # Of two configs, one may have the absolute path of a dataset and the other a relative one.
        told = record.getMessage().replace(f"{Path.cwd()}{os.sep}", "")
        is_new = told not in self.seen
        self.seen.add(told)
        return is_new


FILTERS: list[NoRepetition] = []
"""The filter of the command that runs."""


def last_resort() -> logging.Handler:
    """The handler of Python that prints warnings if no other handler is set up."""
    assert logging.lastResort is not None
    return logging.lastResort


def start() -> None:
    """Reset the output, because a process may run several commands with different options."""
    console.quiet = False
    answer.expected = False
    for earlier in FILTERS:
        last_resort().removeFilter(earlier)
    FILTERS[:] = [NoRepetition()]
    last_resort().addFilter(FILTERS[0])
    show_listing(_shown_on_console)
    OURS.setLevel(logging.NOTSET)
    for handler in OURS.handlers[:]:
        OURS.removeHandler(handler)


def _shown_on_console(items: Iterable[Any], what: str, count: int) -> Iterable[Any]:
    """The items, with their progress on the console."""
    from segkit.system.progress import Tracker

    return Tracker(console)(items, what, count)


def _quieten(asked: bool) -> bool:
    console.quiet = console.quiet or asked
    return asked


def _explain_more(asked: bool) -> None:
    if asked and not is_verbose():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        handler.addFilter(NoRepetition())
        OURS.addHandler(handler)
        OURS.setLevel(logging.INFO)


def is_verbose() -> bool:
    """Whether --verbose was given."""
    return OURS.level == logging.INFO


Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet",
        "-q",
        help="Print only errors, and JSON with --json.",
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
        help="Print details of the work to stderr.",
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
    """Print lines. Control characters, for example in file names, are shown as text."""
    lines = "\n".join(map(printable, text.split("\n")))
    console.print(lines, highlight=False, markup=False, soft_wrap=True)


def say_json(content: Mapping[str, Any]) -> None:
    """Print the result as JSON."""
    sys.stdout.write(json_text(content))
    answer.expected = False


def say_failure(sentence: str, problems: Sequence[str] = ()) -> None:
    """Print an error as JSON if a script expects JSON."""
    if answer.expected:
        say_json({"error": sentence, "problems": [*problems] or [sentence]})


def complain(sentence: str) -> None:
    """Print one sentence on stderr: an error, or something that was left out."""
    print(f"segkit: {printable(abridged(sentence))}", file=sys.stderr)


def complain_of(error: SegkitError) -> None:
    """Print an error on stderr, or a line for each of its problems and their number."""
    for problem in error.problems[:MOST_PROBLEMS]:
        complain(problem)
    count = len(error.problems)
    if count > MOST_PROBLEMS:
        more = counted(count - MOST_PROBLEMS, "more problem", form=",")
        complain(f"and {more}; segkit check --json lists all")
    listed = f"{counted(count, 'problem', form=',')}, listed above; correct "
    listed += f"{'it' if count == 1 else 'them'} and run again"
    complain(listed if count else str(error))


def raise_failures(failures: Sequence[str], count: int, *, alone: bool) -> None:
    """Raise SegkitError if any of `count` volumes failed.

    Args:
        failures: the error of each volume that failed.
        count: the number of volumes.
        alone: whether there is only one volume, whose own error is raised.
    """
    if failures and alone:
        raise SegkitError(failures[0])
    if failures:
        raise SegkitError(
            f"{len(failures)} of {counted(count, 'volume')} failed; see the messages above"
        )


def hush() -> None:
    """Silence warnings and logs of other libraries, except with --verbose.

    Call it after lightning is imported, because the import sets up logging.
    """
    if is_verbose():
        return
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
