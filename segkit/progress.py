"""How long work shows that it goes on: a bar on a terminal, plain lines elsewhere."""

import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Callback
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 15.0


def bars(console: Console) -> Progress:
    """A live display of bars, which shows nothing where the console is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


class Tracker:
    """Shows progress over any iterable, by name and count."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, items: Iterable[Item], what: str, count: int) -> Iterator[Item]:
        """The items, as they are."""
        with bars(self.console) as display:
            task = display.add_task(what, total=count)
            last = time.monotonic()
            for number, item in enumerate(items):
                yield item
                display.advance(task)
                if not self.console.is_terminal:
                    now = time.monotonic()
                    if now - last > SECONDS_BETWEEN_LINES:
                        self.console.print(f"{what}: {number + 1} of {count}")
                        last = now


class TrainingProgress(Callback):
    """Steps, loss, and a line for each validation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.display = bars(console)
        self.task: Any = None
        self.started = self.last = time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start counting."""
        if not trainer.is_global_zero:
            return
        self.started = self.last = time.monotonic()
        if self.task is not None:  # that of the fold before
            self.display.remove_task(self.task)
        self.display.start()
        self.task = self.display.add_task("training", total=trainer.max_steps)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """One step on."""
        if self.task is None:
            return
        now = time.monotonic()
        self.display.update(self.task, completed=trainer.global_step)
        if now - self.last > SECONDS_BETWEEN_LINES:
            self.last = now
            loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
            self.display.update(self.task, description=f"training, loss {loss:.3f}")
            if not self.console.is_terminal:
                self._line(trainer, f"loss {loss:.3f}")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What the held-out cases say."""
        dice = trainer.callback_metrics.get("validation/dice")
        if self.task is not None and dice is not None:
            self._line(trainer, f"mean Dice of held-out cases {float(dice):.3f}")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the bar away."""
        self.display.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Take the bar away, so that what is said next can be read."""
        self.display.stop()

    def _line(self, trainer: L.Trainer, text: str) -> None:
        seconds = time.monotonic() - self.started
        self.console.print(
            f"step {trainer.global_step} of {trainer.max_steps}, {seconds:.0f} s: {text}",
            highlight=False,
        )
