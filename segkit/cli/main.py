"""The `segkit` command. Each command imports what it needs when it runs, so that help is quick."""

import sys
import traceback
from importlib.metadata import version as installed_version
from typing import Annotated, NoReturn

import typer

from segkit.cli import predict as cli_prediction
from segkit.cli import train as cli_training
from segkit.cli.terminal import Commands, Quiet, Verbose, complain, is_verbose, start
from segkit.errors import SegkitError, Stopped, sentence_of
from segkit.system.signals import handling

app = typer.Typer(
    cls=Commands,
    help="Segment medical images with attention U-Nets, and see where their gates look.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(shown: bool) -> None:
    if shown:
        print(f"segkit {installed_version('segkit')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment medical images with attention U-Nets, and see where their gates look."""


for command in (
    cli_training.demo,
    cli_training.fetch,
    cli_training.plan,
    cli_training.train,
    cli_prediction.predict,
    cli_prediction.explain,
    cli_prediction.evaluate,
    cli_prediction.check,
    cli_prediction.export,
):
    app.command()(command)


def main() -> NoReturn:
    """Run the command; what a user can cause is one line on stderr and exit code 2.

    Stopped by a signal, the exit code is the shell's for it: 130 for Ctrl-C, 143 for SIGTERM.
    """
    start()
    try:
        with handling():
            app()
    except SegkitError as error:
        if is_verbose():
            traceback.print_exc()
        complain(str(error))
        sys.exit(2)
    except OSError as error:
        complain(sentence_of(error))
        sys.exit(2)
    except Stopped as stopped:
        complain(str(stopped))
        sys.exit(128 + stopped.signum)
    sys.exit(0)
