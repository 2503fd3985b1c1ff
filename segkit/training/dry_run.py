"""`segkit train --dry-run`: a description of a training, with time and memory of one step.

Two real steps run on the device, with the whole config, but on two cases. They write to a folder
that is removed afterwards. The first step initialises the libraries; the second is measured.
"""

import tempfile
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer

from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.dataset import dataset_of, grid_of_case
from segkit.data.preprocess import median_spacing
from segkit.system.memory import in_words
from segkit.system.progress import Track, untracked
from segkit.system.resources import peak_of_process
from segkit.system.signals import advice_on_stop
from segkit.training.fit import train
from segkit.training.resolve import check_images, check_precision, precision
from segkit.training.split import split_of
from segkit.training.time_limit import too_slow, wait_for_device
from segkit.training.trackers import check_installed

MEASURED_STEPS = 2
CASES = 2


@dataclass(frozen=True)
class DryRun:
    """A description of a training, with the measured time and memory of a step."""

    config: Config
    description: ModelDescription
    cut_size: tuple[int, ...]
    """Size in voxels of a patch as it is cut, with the margins that its rotation needs."""
    training_cases: int
    held_out: int
    parameters: int
    precision: str
    device: str
    peak: int | None
    """Peak memory in bytes: of the GPU, or of the process on a CPU. None if it is unknown."""
    before: int
    """Peak memory of the process before the first step, in bytes; 0 on a GPU."""
    seconds: float
    """Time of one step, in seconds."""
    loss: float
    notes: tuple[str, ...] = ()
    """Of weights that are another model's, and of those that are frozen."""

    @property
    def fitting(self) -> int | None:
        """Number of steps that fit into `trainer.max_time` without validations; None if not set."""
        if self.config.trainer.max_time is None:
            return None
        limit = Timer(duration=self.config.trainer.max_time).time_remaining()
        assert limit is not None
        return max(int(limit / self.seconds), 1)

    def lines(self) -> list[str]:
        """The description as lines of text."""
        data, schedule = self.config.data, self.config.train
        patch = self.description.volume_patch
        cut = "" if self.cut_size == patch else f", cut as {_size(self.cut_size)} for rotation"
        every = f"validated every {schedule.validate_every}" if self.held_out else "not validated"
        total = timedelta(seconds=round(self.seconds * schedule.steps))
        measured = "the peak is not measured on this system"
        if self.peak is not None and self.before:
            measured = (
                f"peak memory of the process {in_words(self.peak)}, of which "
                f"{in_words(self.before)} before the first step"
            )
        elif self.peak is not None:
            measured = f"peak memory of the GPU {in_words(self.peak)}"
        lines = [
            f"{self.config.name}: {self.training_cases} training cases of {data.folder}, "
            f"{self.held_out} held out; labels {', '.join(self.description.labels)}",
            f"spacing {_size(self.description.spacing)} mm; patches of {_size(patch)} voxels{cut}; "
            f"batches of {data.batch_size}",
            f"network: {self.parameters:,} parameters, channels "
            f"{', '.join(map(str, self.description.network.channels))}",
            f"{schedule.steps} steps of {schedule.optimiser}, {every}; {self.precision} on "
            f"{self.device}",
            f"one step: {self.seconds:.3g} s, loss {self.loss:.3f}; {measured}",
            f"{schedule.steps} steps would take {total}, without validations",
        ]
        lines += self.notes
        if self.fitting is not None and self.fitting < schedule.steps:
            lines.append(too_slow(self.seconds, self.fitting, schedule.steps))
        return lines


class Stopwatch(Callback):
    """A callback that measures the time of the last step and the peak memory after it."""

    def __init__(self) -> None:
        self.started = self.seconds = 0.0
        self.loss = float("nan")
        self.device = torch.device("cpu")
        self.before = 0
        self.peak: int | None = None
        self.cut_size: tuple[int, ...] = ()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the memory before the first step."""
        self.device = pl_module.device
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.before = peak_of_process() or 0

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Record the time of a step, including the cutting of its patches, and the peak memory."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        wait_for_device(self.device)
        now = time.perf_counter()
        self.seconds, self.started = now - self.started, now
        self.loss = float(trainer.callback_metrics["train/loss"])
        self.cut_size = tuple(batch["label"].shape[1:])
        self.peak = (
            torch.cuda.max_memory_allocated(self.device)
            if self.device.type == "cuda"
            else peak_of_process()
        )


def dry_run(config: Config, *, track: Track = untracked) -> DryRun:
    """Train two steps on two cases, measure them, and leave no files.

    Args:
        config: the config of the training.
        track: shows the progress over cases.

    Returns:
        The description of the training and the measurements.

    Raises:
        TrainingError: the GPU's memory is too small.
        SegkitError: the training is refused, as `train` describes.
    """
    check_installed(config.trainer.loggers)
    check_precision(config)
    dataset = dataset_of(config.data)
    train_cases, held_out = split_of(dataset, config)
    check_images(config, dataset, train_cases, held_out)
    spacing = config.data.spacing or median_spacing(
        [grid_of_case(case, dataset) for case in train_cases]
    )
    watch = Stopwatch()
    with (
        tempfile.TemporaryDirectory(prefix="segkit-") as folder,
        advice_on_stop("nothing is left of it"),
    ):
        run = train(
            shortened(config, spacing, Path(folder) / "cache"),
            runs=Path(folder),
            callbacks=[watch],
            track=track,
            dataset=replace(dataset, cases=train_cases[:CASES]),
        )
    return DryRun(
        config=config,
        description=run.model.description,
        cut_size=watch.cut_size,
        training_cases=len(train_cases),
        held_out=len(held_out),
        parameters=run.summary["parameters"],
        precision=str(precision(config)),
        device=str(watch.device),
        peak=watch.peak,
        before=watch.before,
        seconds=watch.seconds,
        loss=watch.loss,
        notes=tuple(
            run.summary[name]["told"] for name in ("start_from", "freeze") if name in run.summary
        ),
    )


def shortened(config: Config, spacing: tuple[float, float, float], cache: Path) -> Config:
    """The config reduced to the measured steps, without validation, pictures or time limits."""
    few: dict[str, Any] = {"steps": MEASURED_STEPS, "validate_every": MEASURED_STEPS}
    few |= {"patience": None, "minutes": None}
    data: dict[str, Any] = {"spacing": spacing, "validation": 0.0, "cache": cache, "workers": 0}
    data |= {"fold": None, "splits": None}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update={**few, "pictures": 0}),
            "trainer": config.trainer.model_copy(update={"max_time": None, "loggers": []}),
        }
    )


def _size(numbers: tuple[float, ...] | list[int]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
