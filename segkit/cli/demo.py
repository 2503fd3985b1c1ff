"""`segkit demo`: from synthesised scans to the gate maps of a real one."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from segkit.cli.options import Overwrite
from segkit.cli.terminal import console, hush, say


def demo_command(
    out: Annotated[Path, Option(help="A folder for what it writes.")] = Path("segkit_demo"),
    contrast: Annotated[
        Literal["t1", "random"],
        Option(help="Training contrasts: drawn about those of a T1 scan, or wholly random."),
    ] = "t1",
    steps: Annotated[int, Option(min=1, help="Training steps.")] = 300,
    overwrite: Overwrite = False,
) -> None:
    """Train on synthesised scans, segment a real one, and write its gate maps; a few minutes."""
    from segkit.demo.demo import run_demo
    from segkit.system.progress import Tracker
    from segkit.training.progress_bar import TrainingProgress

    hush()
    run_demo(
        out,
        contrast=contrast,
        steps=steps,
        overwrite=overwrite,
        say=say,
        callbacks=[TrainingProgress(console)],
        track=Tracker(console),
    )
