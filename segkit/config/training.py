"""Settings of one training run: data, network, optimiser and what is handed to Lightning.

Nothing in this room imports torch, and no setting names a Python class. `segkit.config.load` reads
them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from segkit.config.base import Positive, Section
from segkit.config.data import DataConfig
from segkit.config.loss import LossConfig
from segkit.config.network import NetworkConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that a step keeps."""


LEAST_STEPS = 20
"""A run by the clock takes so many steps even if preparing took all of its time."""
MOST_FOR_SCORING = 0.25
"""The largest share of `minutes` that the final scores take: beyond it, fewer cases are scored."""


class AdamWConfig(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    highest_momentum: Decay = 0.95
    """The decay of the mean gradient at the lowest learning rate of a one-cycle schedule, and at
    every learning rate of the others."""
    lowest_momentum: Decay = 0.85
    """The decay of the mean gradient at the highest learning rate of a one-cycle schedule."""
    square_decay: Decay = 0.999
    """The decay of the mean squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the root of the mean squared gradient."""


class SgdConfig(Section):
    """Stochastic gradient descent, with nnU-Net's values."""

    momentum: Decay = 0.99
    nesterov: bool = True
    """Whether the gradient is taken a step ahead (Sutskever et al. 2013); it needs a momentum."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs a momentum above 0; set nesterov to false")
        return self


class MuonConfig(Section):
    """Muon (Jordan 2024) for kernels over more than one voxel; AdamW for all other weights."""

    momentum: Decay = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """Of Newton and Schulz, which make a step's matrix orthogonal."""


class OneCycleConfig(Section):
    """The learning rate rises, then falls to almost nothing (Smith and Topin 2019)."""

    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The share of the steps over which the learning rate rises."""
    rise_factor: Annotated[float, Field(ge=1)] = 25.0
    """The highest learning rate over the first."""
    fall_factor: Annotated[float, Field(ge=1)] = 1e4
    """The first learning rate over the last."""


class PolynomialConfig(Section):
    """The learning rate falls from the first step on, as in nnU-Net."""

    power: Annotated[float, Field(gt=0)] = 0.9
    """The learning rate is the highest one times (1 - step / steps) to this power."""


class CosineConfig(Section):
    """The learning rate rises in a line, then falls as a cosine (Loshchilov and Hutter 2017)."""

    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps over which the learning rate rises."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The last learning rate over the highest."""


OptimiserName = Literal["adamw", "sgd", "muon"]
ScheduleName = Literal["one_cycle", "polynomial", "cosine"]
SCHEDULE_OF: dict[OptimiserName, ScheduleName] = {
    "adamw": "one_cycle",
    "sgd": "polynomial",
    "muon": "one_cycle",
}
"""The schedule of each optimiser, if none is given."""
MOVED = {
    ("adamw", "rise"): "one_cycle",
    ("adamw", "rise_factor"): "one_cycle",
    ("adamw", "fall_factor"): "one_cycle",
    ("sgd", "power"): "polynomial",
}
"""Where settings of `train` are now that were elsewhere before schedules had their own sections."""


def with_schedules(train: Any) -> Any:
    """The tree of `train`, with settings of schedules where they are now; others stay."""
    if not isinstance(train, Mapping):
        return train
    tree = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in train.items()
    }
    for (before, name), now in MOVED.items():
        section = tree.get(before)
        if isinstance(section, dict) and name in section:
            value, target = section.pop(name), tree.setdefault(now, {})
            if isinstance(target, dict):
                target.setdefault(name, value)
    return tree


class TrainConfig(Section):
    """How the weights are found."""

    steps: Positive = 1000
    optimiser: OptimiserName = "adamw"
    """AdamW, SGD with momentum, or Muon."""
    adamw: AdamWConfig = AdamWConfig()
    """Used only if `optimiser` is adamw, or muon for weights that are no kernels."""
    sgd: SgdConfig = SgdConfig()
    """Used only if `optimiser` is sgd."""
    muon: MuonConfig = MuonConfig()
    """Used only if `optimiser` is muon."""
    schedule: ScheduleName | None = None
    """How the learning rate follows the steps; if not given, `polynomial` for SGD and `one_cycle`
    for the others."""
    one_cycle: OneCycleConfig = OneCycleConfig()
    """Used only if `schedule` is one_cycle."""
    polynomial: PolynomialConfig = PolynomialConfig()
    """Used only if `schedule` is polynomial."""
    cosine: CosineConfig = CosineConfig()
    """Used only if `schedule` is cosine."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The highest of the schedule; if not given, 0.003 for AdamW and Muon, 0.01 for SGD."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's and Muon's decoupled decay (Loshchilov and Hutter 2019), 0.05 if not given, or SGD's,
    3e-5."""
    gradient_clip: Annotated[float, Field(gt=0)] = 12.0
    """The largest norm of a step's gradient."""
    loss: LossConfig = LossConfig()
    batch_dice: bool = False
    """Whether the Dice loss, and any other of overlap, pools the whole batch or averages over its
    samples."""
    validate_every: Positive = 200
    """Steps between validations on whole volumes, each with a checkpoint to resume from."""
    validation_cases: Positive | None = None
    """Held-out cases, the first by name, that are looked at at each validation; all where not
    given. The final scores are those of all."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of the whole run, from preparing the cases to the final scores; no limit where not
    given. The learning rate then follows the time and not the steps: `steps` are those that the
    schedule was planned for, and the run takes as many as fit. So it cannot be repeated bit for
    bit."""
    pictures: Annotated[int, Field(ge=0)] = 3
    """Held-out cases whose slices are drawn at each validation, where Pillow is installed."""
    patience: Positive | None = None
    """Validations without a better Dice after which training ends; never where not given."""
    averaging: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay, such as 0.999, of a running average of the weights, which is then validated and saved
    in their stead; none where not given."""
    start_from: Path | None = None
    """A run or model folder whose weights to begin with, wherever name and shape are the same."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @model_validator(mode="before")
    @classmethod
    def _schedules_have_sections(cls, tree: Any) -> Any:
        return with_schedules(tree)


class TrainerConfig(Section):
    """What is handed to Lightning."""

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    precision: str | int = "auto"
    """`auto` is bf16-mixed or 16-mixed on a GPU; on a CPU bf16-mixed where it has matrix units for
    that (AMX), else 32-true."""
    strategy: str = "auto"
    num_nodes: Positive = 1
    max_time: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None = None
    """DD:HH:MM:SS after which training ends, trained or not. The learning rate follows train.steps
    alone, so give it as many as fit; after twenty of them training says how many do."""
    accumulate_grad_batches: Positive = 1
    """Batches whose gradients are averaged into one step. Normalisation by batches, and
    `train.batch_dice`, see each batch on its own."""
    deterministic: bool | Literal["warn"] = False
    """Whether only operations are used that give the same bits each time, which is slower on a GPU.
    An operation that has no such form ends training, or with `warn` is used and told."""
    loggers: list[Literal["wandb", "mlflow"]] = Field([])
    """Where training is followed beside its folder, which always has metrics.csv, and TensorBoard's
    events where that is installed. They obey WANDB_MODE and MLFLOW_TRACKING_URI."""


class Config(Section):
    """One training run, whole."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][\w.-]*$")
    """The run is written to `runs/<name>`."""
    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    trainer: TrainerConfig = TrainerConfig()
    replaced: list[str] = Field([])
    """Parts of training that were replaced from Python, in the config of a run. Only Python can
    train by such a config, given the same parts."""

    @model_validator(mode="after")
    def _patch_fits_network(self) -> Self:
        patch, total = self.data.patch_size, self.network.total_stride
        self.network.check_patch(patch, "data.patch_size")
        coarsest = [size // stride for size, stride in zip(patch, total, strict=True)]
        normalised = self.network.given is None and self.network.normalisation == "instance"
        if normalised and set(coarsest) == {1}:
            raise ValueError(
                f"data.patch_size {patch} leaves one voxel at the coarsest level, which instance "
                f"normalisation cannot normalise; double an axis or take fewer network.channels"
            )
        return self
