"""The progress bar of a training."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, Timer
from rich.console import Console

from segkit.errors import printable
from segkit.system.progress import SECONDS_BETWEEN_LINES, bars, in_minutes, is_live


class TrainingProgress(Callback):
    """A bar of the steps, and a line of text for each validation."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.display = bars(console)
        self.task: Any = None
        self.started = self.last = time.monotonic()
        self.first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the bar, at the step at which the run continues."""
        if not trainer.is_global_zero:
            return
        self.started = self.last = time.monotonic()
        self.first_step = trainer.global_step
        if self.task is not None:  # the bar of the previous fold
            self.display.remove_task(self.task)
        for note in getattr(pl_module, "notes", ()):
            self.console.print(printable(note), highlight=False, markup=False, soft_wrap=True)
        self.display.start()
        self.task = self.display.add_task(
            "training", total=trainer.max_steps, completed=self.first_step
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Advance the bar by one step."""
        if self.task is None:
            return
        now = time.monotonic()
        self.display.update(self.task, completed=trainer.global_step, total=trainer.max_steps)
        if now - self.last > SECONDS_BETWEEN_LINES:
            self.last = now
            loss = float(trainer.callback_metrics.get("train/loss", float("nan")))
            self.display.update(self.task, description=f"training, loss {loss:.3f}")
            if not is_live(self.console):
                self._line(trainer, f"loss {loss:.3f}")

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the number of the validation and the time that is left."""
        self.last = time.monotonic()
        if self.task is None:
            return
        every = getattr(trainer.datamodule, "steps_per_epoch", trainer.max_steps)  # type: ignore[attr-defined]
        number, count = trainer.global_step // every, max(trainer.max_steps // every, 1)
        text = f"validating {number} of {max(number, count)}"
        seconds = self._seconds_left(trainer)
        if seconds is not None:
            text += f", {in_minutes(seconds)} left"
        self._line(trainer, text)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Print how many cases are validated, if the last line is some time ago."""
        now = time.monotonic()
        if self.task is None or now - self.last < SECONDS_BETWEEN_LINES:
            return
        self.last = now
        self._line(trainer, f"{batch_idx + 1} of {trainer.num_val_batches[0]} cases validated")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the mean Dice of the held-out cases."""
        dice = trainer.callback_metrics.get("validation/dice")
        if self.task is not None and dice is not None:
            self._line(
                trainer, f"mean Dice of held-out cases on the network's grid {float(dice):.3f}"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remove the bar."""
        self.display.stop()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Remove the bar, so that the error message is readable."""
        self.display.stop()

    def _seconds_left(self, trainer: L.Trainer) -> float | None:
        """Time until the last step at the speed since the start; None before the first step."""
        done = trainer.global_step - self.first_step
        if done < 1:
            return None
        seconds = (trainer.max_steps - trainer.global_step) * self._elapsed / done
        timers = [each for each in trainer.callbacks if isinstance(each, Timer)]  # type: ignore[attr-defined]
        limits = [limit for timer in timers if (limit := timer.time_remaining()) is not None]
        return max(min([seconds, *limits]), 0.0)

    @property
    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _line(self, trainer: L.Trainer, text: str) -> None:
        since = f" since step {self.first_step}" if self.first_step else ""
        self.console.print(
            f"step {trainer.global_step} of {trainer.max_steps}, {self._elapsed:.0f} s{since}: "
            f"{text}",
            highlight=False,
        )
