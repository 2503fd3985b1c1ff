"""`segkit train --dry-run`: a description of a training, with time and memory of one step.

Real steps run on the device, with the whole config and its way of loading patches, but on two
cases. They write to a folder that is removed afterwards. The first steps, which initialise the
libraries, do not count. Then at least ten are measured, or fewer if they take longer than a minute.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, Timer
from torch import nn

from segkit.config.model import ModelDescription
from segkit.config.training import LEAST_STEPS, SHARE_OF_PREPARING, Config
from segkit.data.datamodule import SegmentationData
from segkit.data.dataset import CaseFiles, Dataset, dataset_of, grid_of_case, read_case_label
from segkit.data.preprocess import median_spacing
from segkit.data.resident import bytes_of
from segkit.data.split import ALL_TRAIN, split_of
from segkit.errors import counted
from segkit.geometry.grid import Orientation
from segkit.inference.window_seconds import seconds_of_case
from segkit.model.folder import Model
from segkit.system.memory import in_words
from segkit.system.only_errors import only_errors
from segkit.system.progress import Track, untracked
from segkit.system.resources import peak_of_process
from segkit.system.signals import advice_on_stop
from segkit.training.fit import train
from segkit.training.lightning_private import set_last_step
from segkit.training.module import SegmentationModule
from segkit.training.resolve import check_images, check_precision, computed_in, precision
from segkit.training.time_budget import TimeBudget
from segkit.training.time_limit import too_slow, wait_for_device
from segkit.training.trackers import check_installed

WARM_UP, MEASURED = 5, 10
MOST_SECONDS = 60.0
"""After so many seconds of steps, no more steps are taken."""
CASES = 2
READ = 20
"""Number of held-out cases whose headers are read to estimate a validation."""


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
    """Mean time of one step, in seconds, including the cutting of its patches."""
    measured_steps: int
    """Number of steps that were measured, after those that warm up."""
    per_case: float
    """Estimated time of a held-out case in a validation, in seconds; 0 if none is held out."""
    per_score: float
    """The same in the final scores."""
    loss: float
    notes: tuple[str, ...] = ()
    """Sentences on weights that come from another model, and on frozen weights."""

    @property
    def fitting(self) -> int | None:
        """Number of steps that fit into `trainer.max_time` without validations; None if not set."""
        if self.config.trainer.max_time is None:
            return None
        limit = Timer(duration=self.config.trainer.max_time).time_remaining()
        assert limit is not None
        return max(int(limit / self.seconds), 1)

    @property
    def in_minutes(self) -> int | None:
        """Number of steps that fit into `train.minutes`, as the run counts; None if not set."""
        schedule = self.config.train
        if schedule.minutes is None:
            return None
        total = 60 * schedule.minutes
        every = min(schedule.validate_every, schedule.steps)
        before = SHARE_OF_PREPARING * total
        budget = TimeBudget(
            total, before, schedule.steps, self.held_out, self.validations[1], every, clock=float
        )
        budget.per_case, budget.trained, budget.steps = self.per_case, self.seconds, 1
        budget.scoring_factor = self.per_score / self.per_case if self.held_out else 1.0
        return max(round(budget.left / self.seconds), LEAST_STEPS)

    @property
    def validations(self) -> tuple[int, int]:
        """Number of validations, and of held-out cases in each."""
        schedule, most = self.config.train, self.config.train.validation_cases
        cases = self.held_out if most is None else min(most, self.held_out)
        count = schedule.steps // min(schedule.validate_every, schedule.steps)
        return (count if cases else 0, cases)

    @property
    def whole(self) -> float:
        """Estimated seconds of the whole run after preparing: steps, validations, final scores."""
        count, cases = self.validations
        validating = count * cases * self.per_case
        return self.config.train.steps * self.seconds + validating + self.held_out * self.per_score

    def lines(self) -> list[str]:
        """The description as lines of text."""
        data, schedule = self.config.data, self.config.train
        patch = self.description.volume_patch
        cut = "" if self.cut_size == patch else f", cut as {_size(self.cut_size)} for rotation"
        looked = self.validations[1]
        every = f"validated every {schedule.validate_every}" if looked else "not validated"
        measured = "the peak is not measured on this system"
        if self.peak is not None and self.before:
            measured = (
                f"peak memory of the process {in_words(self.peak)}, of which "
                f"{in_words(self.before)} before the first step"
            )
        elif self.peak is not None:
            measured = f"peak memory of the GPU {in_words(self.peak)}"
        lines = [
            f"{self.config.name}: {counted(self.training_cases, 'training case')} of "
            f"{data.folder}, "
            f"{self.held_out} held out; labels {', '.join(self.description.labels)}",
            f"spacing {_size(self.description.spacing)} mm; patches of {_size(patch)} voxels{cut}; "
            f"batches of {data.batch_size}",
            f"network: {self.parameters:,} parameters, channels "
            f"{', '.join(map(str, self.description.network.channels))}",
            f"{counted(schedule.steps, 'step')} of {schedule.optimiser}, {every}; "
            f"{self.precision} on "
            f"{self.device}",
            f"one step: {_duration(self.seconds)} (mean of {self.measured_steps}), loss "
            f"{self.loss:.3f}; {measured}",
            self._in_all(),
        ]
        lines += self.notes
        if self.fitting is not None and self.fitting < schedule.steps:
            lines.append(too_slow(self.seconds, self.fitting, schedule.steps))
        return lines

    def _in_all(self) -> str:
        """A line with the time of the steps and of the whole run."""
        schedule, (count, cases) = self.config.train, self.validations
        steps = timedelta(seconds=round(self.seconds * schedule.steps))
        line = f"{counted(schedule.steps, 'step')} would take {steps}"
        if self.held_out:
            rest = timedelta(seconds=round(self.whole - self.seconds * schedule.steps))
            each = f"{counted(count, 'validation')} of {counted(cases, 'case')}"
            line += f", {each} and the final scores" if cases else ", the final scores"
            line += f" about {rest}"
        line += f"; {timedelta(seconds=round(self.whole))} in all, without preparing"
        if (fitting := self.in_minutes) is not None:
            line += f"; train.minutes={schedule.minutes:g} limits it, in which about {fitting} "
            line += "steps fit"
        return line


class Stopwatch(Callback):
    """A callback that measures the time of steps, and the peak memory after them.

    Args:
        stands_for: number of cases of the dataset that each trained case represents. It decides
            whether all cases would fit into the memory of a GPU.
    """

    def __init__(self, stands_for: float = 1.0) -> None:
        self.stands_for = stands_for
        self.ends: list[float] = []
        self.loss = float("nan")
        self.device = torch.device("cpu")
        self.before = 0
        self.peak: int | None = None
        self.cut_size: tuple[int, ...] = ()

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Load patches as the whole training would."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SegmentationData)
        data.stands_for = self.stands_for

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
        """Record the end of a step. Only the first and the last measured step wait for a GPU."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        done = trainer.global_step
        if done in (1, WARM_UP, WARM_UP + MEASURED):
            wait_for_device(self.device)
        self.ends.append(time.perf_counter())
        self.cut_size = tuple(batch["label"].shape[1:])
        if done > 1 and self.ends[-1] - self.ends[0] > MOST_SECONDS:
            set_last_step(trainer, done)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Record the loss of the last step and the peak memory."""
        wait_for_device(self.device)
        # Not the logged one: a GPU logs only some of the steps.
        assert isinstance(pl_module, SegmentationModule)
        self.loss = float(torch.stack(pl_module.losses_of_step).mean())
        if self.device.type != "cuda":
            self.peak = peak_of_process()
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, SegmentationData)
        # All that PyTorch holds, also for the recorded step; and the cases that were not loaded.
        self.peak = torch.cuda.max_memory_reserved(self.device)
        if data.resident:
            held = bytes_of([*data.patches.cases, *data.held_out])
            self.peak += int((self.stands_for - 1) * held)

    @property
    def measured_steps(self) -> int:
        """Number of steps after those that warm up, or after the first if there are few."""
        return len(self.ends) - self._first

    @property
    def seconds(self) -> float:
        """Mean seconds of the measured steps."""
        return (self.ends[-1] - self.ends[self._first - 1]) / self.measured_steps

    @property
    def _first(self) -> int:
        return WARM_UP if len(self.ends) > WARM_UP else 1


def dry_run(config: Config, *, track: Track = untracked) -> DryRun:
    """Train some steps on two cases, measure them, and leave no files.

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
    watch = Stopwatch((len(train_cases) + len(held_out)) / min(CASES, len(train_cases)))
    with (
        tempfile.TemporaryDirectory(prefix="segkit-") as folder,
        advice_on_stop("nothing is left of it"),
        only_errors("segkit.data.split"),  # its split is not the run's, on which hints were given
    ):
        run = train(
            shortened(config, spacing, Path(folder) / "cache"),
            runs=Path(folder),
            callbacks=[watch],
            track=track,
            dataset=replace(dataset, cases=_with_foreground(train_cases, dataset)),
        )
    trained_in = computed_in(precision(config))
    per_case, per_score = _seconds_of_case(run.model, watch.device, held_out, dataset, trained_in)
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
        measured_steps=watch.measured_steps,
        per_case=per_case,
        per_score=per_score,
        loss=watch.loss,
        notes=tuple(
            run.summary[name]["told"] for name in ("start_from", "freeze") if name in run.summary
        ),
    )


def _seconds_of_case(
    model: Model,
    device: torch.device,
    cases: Sequence[CaseFiles],
    dataset: Dataset,
    trained_in: torch.dtype,
) -> tuple[float, float]:
    """Estimated seconds of a held-out case in a validation, in the training's precision, and in
    the final scores; 0 if none is held out."""
    if not cases:
        return 0.0, 0.0
    description, network = model.description, model.network
    assert isinstance(network, nn.Module)
    sizes = []
    for case in cases[:READ]:
        grid = grid_of_case(case, dataset)
        grid = Orientation.of(grid.affine).turn_grid(grid)
        sizes.append(
            [
                max(round(n * own / wanted), 1)
                for n, own, wanted in zip(
                    grid.shape, grid.spacing, description.spacing, strict=True
                )
            ]
        )
    network.to(device)
    seconds = seconds_of_case(network, description, sizes, trained_in)
    network.to("cpu")
    return seconds


def _with_foreground(cases: Sequence[CaseFiles], dataset: Dataset) -> tuple[CaseFiles, ...]:
    """The first two cases that have foreground; others only if there are too few.

    Without foreground there is nothing to learn, and no CT window can be measured.
    """
    chosen: list[CaseFiles] = []
    for case in cases:
        if dataset.foreground(read_case_label(case, dataset).data).any():
            chosen.append(case)
        if len(chosen) == CASES:
            return tuple(chosen)
    return (*chosen, *(case for case in cases if case not in chosen))[:CASES]


def shortened(config: Config, spacing: tuple[float, float, float], cache: Path) -> Config:
    """The config reduced to the measured steps, without validation, pictures or time limits."""
    steps = WARM_UP + MEASURED
    few: dict[str, Any] = {"steps": steps, "validate_every": steps}
    few |= {"patience": None, "minutes": None}
    data: dict[str, Any] = {**ALL_TRAIN, "spacing": spacing, "cache": cache}
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "train": config.train.model_copy(update={**few, "pictures": 0}),
            "trainer": config.trainer.model_copy(update={"max_time": None, "loggers": []}),
        }
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1000 * seconds:.3g} ms"


def _size(numbers: tuple[float, ...] | list[int]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
