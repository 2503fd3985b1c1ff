"""Settings of one training run: data, network, optimiser and options of Lightning.

No module in this folder imports torch, and no setting names a Python class. `segkit.config.load`
reads settings from YAML.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from segkit.config.base import Positive, Section
from segkit.config.data import DataConfig
from segkit.config.loss import LossConfig
from segkit.config.network import NetworkConfig
from segkit.io.file_names import is_file_name

Decay = Annotated[float, Field(ge=0, lt=1)]
"""The share of a running mean that each step keeps."""


LEAST_STEPS = 20
"""A run with `train.minutes` takes at least this many steps, even if no time is left for them."""
RUN_NAME = r"^[A-Za-z0-9][\w.-]*$"
"""The form of the name of a run."""
SHARE_OF_PREPARING = 0.05
"""Plans reserve this share of `minutes` for preparing; a run measures the real time."""


class AdamWConfig(Section):
    """AdamW (Loshchilov and Hutter 2019)."""

    highest_momentum: Decay = 0.95
    """The decay of the mean gradient while the learning rate of a one-cycle schedule is lowest, and
    always in other schedules and with Muon."""
    lowest_momentum: Decay = 0.85
    """The decay of the mean gradient while the learning rate of a one-cycle schedule is highest."""
    square_decay: Decay = 0.999
    """The decay of the mean squared gradient."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """This small number is added to the root of the mean squared gradient."""


class SgdConfig(Section):
    """Stochastic gradient descent. The defaults are those of nnU-Net."""

    momentum: Decay = 0.99
    nesterov: bool = True
    """Whether the momentum is Nesterov's (Sutskever et al. 2013); it needs a momentum above 0."""

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0:
            raise ValueError(
                "nesterov needs a momentum above 0; raise momentum, or set nesterov to false"
            )
        return self


class MuonConfig(Section):
    """Muon (Jordan 2024) for kernels over more than one voxel; AdamW for all other weights."""

    momentum: Decay = 0.95
    nesterov: bool = True
    iterations: Annotated[int, Field(ge=1, le=20)] = 5
    """Number of iterations of Newton and Schulz, which make the matrix of a step orthogonal."""


class OneCycleConfig(Section):
    """The learning rate rises, then falls to almost nothing (Smith and Topin 2019)."""

    rise: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """The share of the steps over which the learning rate rises."""
    rise_factor: Annotated[float, Field(ge=1)] = 25.0
    """The highest learning rate divided by the first."""
    fall_factor: Annotated[float, Field(ge=1)] = 1e4
    """The first learning rate divided by the last."""


class PolynomialConfig(Section):
    """The learning rate falls from the first step on, as in nnU-Net."""

    power: Annotated[float, Field(gt=0)] = 0.9
    """The learning rate is the highest one times (1 - step / steps), raised to this power."""


class CosineConfig(Section):
    """The learning rate rises linearly, then falls as a cosine (Loshchilov and Hutter 2017)."""

    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The share of the steps over which the learning rate rises."""
    lowest: Annotated[float, Field(ge=0, le=1)] = 0.0
    """The last learning rate divided by the highest."""


OptimiserName = Literal["adamw", "sgd", "muon"]
OtherChannels = Literal["mean", "copied", "zero", "anew"]
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
"""The new section of settings that were in `adamw` and `sgd` before schedules had sections."""


def with_schedules(train: Any) -> Any:
    """The tree of `train`, with old settings of schedules moved to their new sections."""
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
    """Settings of training: optimiser, schedule, loss and validation."""

    steps: Positive = 1000
    optimiser: OptimiserName = "adamw"
    """AdamW, SGD with momentum, or Muon."""
    adamw: AdamWConfig = AdamWConfig()
    """Used only if `optimiser` is adamw, or muon (for weights that are not kernels)."""
    sgd: SgdConfig = SgdConfig()
    """Used only if `optimiser` is sgd."""
    muon: MuonConfig = MuonConfig()
    """Used only if `optimiser` is muon."""
    schedule: ScheduleName | None = None
    """The schedule of the learning rate. Default: `polynomial` for SGD and `one_cycle` for others.
    """
    one_cycle: OneCycleConfig = OneCycleConfig()
    """Used only if `schedule` is one_cycle."""
    polynomial: PolynomialConfig = PolynomialConfig()
    """Used only if `schedule` is polynomial."""
    cosine: CosineConfig = CosineConfig()
    """Used only if `schedule` is cosine."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The highest learning rate of the schedule. Default: 0.003 for AdamW, 0.006 for Muon, 0.01 for
    SGD."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """Decoupled weight decay for AdamW and Muon (Loshchilov and Hutter 2019), L2 penalty for SGD.
    Default: 0.05 for AdamW and Muon, 3e-5 for SGD."""
    gradient_clip: Annotated[float, Field(gt=0)] = 12.0
    """The largest norm of a gradient; a longer one is scaled down to it."""
    loss: LossConfig = LossConfig()
    batch_dice: bool = False
    """If true, the Dice loss and other overlap losses pool all samples of a batch; if false, they
    average over the samples."""
    validate_every: Positive = 200
    """Steps between validations on whole volumes. Each validation also writes a checkpoint from
    which training can resume."""
    validation_cases: Annotated[int, Field(ge=0)] | None = None
    """Number of held-out cases, the first by name, that each validation uses. Default: all. With 0
    there is no validation, only a checkpoint. The final scores do not depend on this."""
    minutes: Annotated[float, Field(gt=0)] | None = None
    """Wall time of the whole run, from preparing the cases to the final scores. Default: no limit.
    With a limit, the learning rate follows the time instead of the steps: the schedule was planned
    for `steps`, and the run takes as many steps as fit. Such a run cannot be repeated bit for bit.
    """
    pictures: Annotated[int, Field(ge=0)] = 3
    """Number of held-out cases whose slices are drawn at each validation, if Pillow is installed.
    """
    patience: Positive | None = None
    """Training ends after this many validations without a better Dice. Default: never."""
    averaging: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay, such as 0.999, of a running average of the weights. The averaged weights are then
    validated and saved instead of the last ones. Default: no average."""
    start_from: Path | None = None
    """A run or model folder, or an address such as `hf:OWNER/NAME`. Training starts from its
    weights, for each weight that has the same name and shape in the new network."""
    other_channels: OtherChannels = "mean"
    """Used only with `start_from`: kernels of the first layer for each channel whose name the other
    model does not have: the `mean` of its kernels, those of its channels in turn (`copied`),
    `zero`, or new ones (`anew`)."""
    freeze: dict[str, Positive | None] = Field({})
    """Weights that are not trained, by patterns of their names such as `encoder.*`, and the step
    from which on they are; null if never. A list of patterns means never. The last pattern that
    fits a weight counts."""
    keep_held_out: Literal["nothing", "labels", "probabilities"] = "nothing"
    """Predictions of held-out cases by the final weights that the run keeps in its folder
    `held_out`: labels, or labels and probabilities."""
    calibrate: bool = False
    """If true, one temperature for all probabilities is fitted on the held-out cases at the end
    (Guo et al. 2017) and kept with the model. Labels do not change."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0

    @field_validator("freeze", mode="before")
    @classmethod
    def _listed_patterns_stay_frozen(cls, given: Any) -> Any:
        if isinstance(given, list) and all(isinstance(each, str) for each in given):
            return dict.fromkeys(given)
        return given

    @model_validator(mode="after")
    def _patience_needs_validations(self) -> Self:
        if self.patience is not None and self.validation_cases == 0:
            raise ValueError(
                f"patience is {self.patience}, but with validation_cases 0 there is no validation "
                f"that it could count; remove one of the two"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _schedules_have_sections(cls, tree: Any) -> Any:
        return with_schedules(tree)


class TrainerConfig(Section):
    """Options that are passed to Lightning's Trainer."""

    accelerator: str = "auto"
    devices: int | str | list[int] = 1
    precision: str | int = "auto"
    """`auto` means bf16-mixed or 16-mixed on a GPU. On a CPU it means bf16-mixed if the CPU has
    instructions for it (AMX or AVX512-BF16), and 32-true if not."""
    strategy: str = "auto"
    num_nodes: Positive = 1
    max_time: Annotated[str, Field(pattern=r"^\d+:\d\d:\d\d:\d\d$")] | None = None
    """Training ends after this time (DD:HH:MM:SS), finished or not. The learning rate follows only
    train.steps, so choose as many steps as fit. After twenty steps training reports how many do."""
    accumulate_grad_batches: Positive = 1
    """Number of batches whose gradients are averaged into one step. Batch normalisation and
    `train.batch_dice` work on each batch separately."""
    deterministic: bool | Literal["warn"] = False
    """If true, PyTorch uses only deterministic operations, which are slower on a GPU, and training
    ends at an operation that has none. With `warn` it uses that operation and warns."""
    compile: bool | Literal["auto"] = False
    """If true, `torch.compile` compiles network and loss, which takes about a minute. With `auto`
    both ways are measured during the first steps, if ten minutes or more are left, and the faster
    is kept. A compiled step may differ from others in the last digits."""
    loggers: list[Literal["wandb", "mlflow"]] = Field([])
    """Services that also record the training; they obey WANDB_MODE and MLFLOW_TRACKING_URI. The
    run's folder always holds metrics.csv, and TensorBoard events if TensorBoard is installed."""


def _possible_name(name: str) -> str:
    if not is_file_name(name):
        raise ValueError(
            f"name must be a possible name of a folder, also on Windows, found {name!r}; change it"
        )
    return name


class Config(Section):
    """All settings of one training run.

    Example:
        config = segkit.load_config("my_dataset.yaml")
        config.train.steps, config.data.patch_size
    """

    name: str = Field("run", pattern=RUN_NAME)
    """The run is written to `runs/<name>`."""
    _name_of_folder = field_validator("name")(_possible_name)
    data: DataConfig
    network: NetworkConfig = NetworkConfig()
    train: TrainConfig = TrainConfig()
    trainer: TrainerConfig = TrainerConfig()
    replaced: list[str] = Field([])
    """Parts of training that were replaced from Python. segkit writes this into the config of a
    run. Such a config can be trained only from Python, with the same parts."""

    @model_validator(mode="after")
    def _patch_fits_network(self) -> Self:
        patch, total = self.data.patch_size, self.network.total_stride
        self.network.check_patch(patch, "data.patch_size")
        coarsest = [size // stride for size, stride in zip(patch, total, strict=True)]
        normalised = self.network.given is None and self.network.normalisation == "instance"
        if normalised and set(coarsest) == {1}:
            raise ValueError(
                f"data.patch_size {patch} leaves one voxel at the coarsest level, which instance "
                f"normalisation cannot normalise; double an axis or use fewer network.channels"
            )
        return self
