"""`segkit demo`: train on synthetic scans, and segment a real scan."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from segkit.cli.options import Overwrite
from segkit.cli.terminal import console, hush, say


def demo_command(
    out: Annotated[Path, Option(help="The folder for all results.")] = Path("segkit_demo"),
    contrast: Annotated[
        Literal["t1", "random"],
        Option(help="Contrasts of training scans: similar to a T1 scan, or random."),
    ] = "t1",
    steps: Annotated[int, Option(min=1, help="Training steps.")] = 300,
    overwrite: Overwrite = False,
) -> None:
    """Train on synthetic scans, segment a real scan and write its gate maps, in a few minutes."""
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
