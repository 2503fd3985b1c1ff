"""The `segkit` command. Commands import large libraries only when they run; help stays fast."""

import sys
import traceback
from importlib.metadata import version as installed_version
from platform import python_version
from typing import Annotated, NoReturn

import typer

from segkit.cli.check import check_command
from segkit.cli.compare import compare_command
from segkit.cli.demo import demo_command
from segkit.cli.evaluate import evaluate_command
from segkit.cli.explain import explain_command
from segkit.cli.export import export_command
from segkit.cli.fetch import fetch_command
from segkit.cli.plan import plan_command
from segkit.cli.pool import pool_command
from segkit.cli.predict import predict_command
from segkit.cli.push import push_command
from segkit.cli.terminal import (
    Commands,
    Quiet,
    Verbose,
    complain,
    complain_of,
    is_verbose,
    say_failure,
    start,
)
from segkit.cli.train import train_command
from segkit.errors import SegkitError, Stopped, sentence_of
from segkit.system.signals import handling_signals

app = typer.Typer(
    cls=Commands,
    help="Segment medical images with attention U-Nets, and inspect their attention maps.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(shown: bool) -> None:
    if not shown:
        return
    from segkit.system.libraries import installed_runtimes, slow_convolutions, torch_libraries

    print(f"segkit {installed_version('segkit')}")
    print(f"Python {python_version()}")
    found = torch_libraries()
    names = {"cuda": "CUDA", "cudnn": "cuDNN"}
    for name, number in {**found, **installed_runtimes()}.items():
        print(f"{names.get(name, name)} {number or 'not installed'}")
    if (warning := slow_convolutions()) is not None:
        print(warning)
    raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Segment medical images with attention U-Nets, and inspect their attention maps."""


app.command("demo")(demo_command)
app.command("fetch")(fetch_command)
app.command("plan")(plan_command)
app.command("train")(train_command)
app.command("pool")(pool_command)
app.command("predict")(predict_command)
app.command("explain")(explain_command)
app.command("evaluate")(evaluate_command)
app.command("compare")(compare_command)
app.command("check")(check_command)
app.command("export")(export_command)
app.command("push")(push_command)


def main() -> NoReturn:
    """Run a command and exit.

    The exit code is 0 after success, and 2 with one line on stderr after an error that the user can
    mend. If a signal stops the command, it is 130 for Ctrl-C and 143 for SIGTERM.
    """
    start()
    try:
        with handling_signals():
            app(prog_name="segkit")
    except SegkitError as error:
        if is_verbose():
            traceback.print_exc()
        say_failure(str(error), error.problems)
        complain_of(error)
        sys.exit(2)
    except OSError as error:
        say_failure(sentence_of(error))
        complain(sentence_of(error))
        sys.exit(2)
    except Stopped as stopped:
        say_failure(str(stopped))
        complain(str(stopped))
        sys.exit(128 + stopped.signum)
    sys.exit(0)
