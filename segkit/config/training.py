"""Every setting and its one default, and what must hold between settings.

Nothing here imports torch, and no setting names a Python class. `segkit.config.load` reads them.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from segkit.config.attention import (
    AttentionConfig,
    CrossAttention,
    SelfAttention,
    UTransformerGate,
)
from segkit.config.base import Few, Millimetres, Name, Positive, Section, Share, Width, kind_alone
from segkit.config.dataset_files import FilesConfig, LabelCode
from segkit.config.labels import Labelling

MOST_VOXELS = 2**27
"""Of a patch: 512 x 512 x 512."""
MOST_IN_BATCH = 2**31
MOST_TOKENS = 2**16
"""Of a window of attention."""


class GivenModule(Section):
    """A network that Python gives: `train(config, network=module)`. No file holds or names it."""

    multiple: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """What the sizes of its input must be multiples of, along each axis."""
    name: str = ""
    """A note for those who must find the module again, such as its class."""


class NetworkConfig(Section):
    """A U-Net in two or three dimensions, and the attention in it."""

    spatial_dims: Literal[2, 3] = 3
    channels: list[Width] = Field([16, 32, 64, 128], min_length=2, max_length=16)
    """Feature channels of each level, finest first."""
    strides: list[list[Few]] | None = None
    """Per step down, the stride along each axis; 2 everywhere where not given."""
    kernels: list[list[Few]] | None = None
    """Per level, the convolution size along each axis (odd); 3 everywhere where not given."""
    normalisation: Literal["instance", "batch", "group", "none"] = "instance"
    downsampling: Literal["stride", "pool"] = "stride"
    """A strided convolution, as nnU-Net, or max-pooling, as the first U-Nets."""
    deep_supervision: bool = True
    """Whether coarser decoder levels are trained against the label as well."""
    attention: AttentionConfig = AttentionConfig()
    given: GivenModule | None = None
    """A module from elsewhere in the U-Net's stead, of which only spatial_dims is set beside it."""

    @property
    def step_strides(self) -> list[list[int]]:
        """The stride of each step down, along each axis."""
        return self.strides or [[2] * self.spatial_dims for _ in self.channels[1:]]

    @property
    def level_kernels(self) -> list[list[int]]:
        """The convolution size of each level, along each axis."""
        return self.kernels or [[3] * self.spatial_dims for _ in self.channels]

    @property
    def total_stride(self) -> list[int]:
        """The factor between the finest and the coarsest level, along each axis."""
        if self.given is not None:
            return self.given.multiple
        total = [1] * self.spatial_dims
        for step in self.step_strides:
            total = [product * factor for product, factor in zip(total, step, strict=True)]
        return total

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.given is not None:
            return self._given_alone(self.given)
        for name, rows, wanted in (
            ("strides", self.step_strides, len(self.channels) - 1),
            ("kernels", self.level_kernels, len(self.channels)),
        ):
            if len(rows) != wanted or any(len(row) != self.spatial_dims for row in rows):
                raise ValueError(
                    f"network.{name} must hold {wanted} lists of {self.spatial_dims} numbers "
                    f"for {len(self.channels)} levels"
                )
        if any(size % 2 == 0 for row in self.level_kernels for size in row):
            raise ValueError("network.kernels must be odd, so that a convolution keeps its grid")
        self._attention_fits()
        return self

    def _given_alone(self, given: GivenModule) -> Self:
        if len(given.multiple) != self.spatial_dims:
            raise ValueError(
                f"network.given.multiple must hold {self.spatial_dims} numbers, as "
                f"network.spatial_dims is {self.spatial_dims}"
            )
        fields = type(self).model_fields.items()
        if others := [
            name
            for name, setting in fields
            if name not in ("spatial_dims", "given") and getattr(self, name) != setting.default
        ]:
            raise ValueError(
                f"network.{others[0]} is of a U-Net, and network.given has a module in its stead; "
                f"take one of them away"
            )
        return self

    def _attention_fits(self) -> None:
        deepest_skip = len(self.channels) - 2
        levels = self.attention.skip_levels(len(self.channels))
        if max(levels, default=0) > deepest_skip:
            raise ValueError(f"network.attention.skip.levels must lie in 0 … {deepest_skip}")
        heads = getattr(self.attention.skip, "heads", None)
        if isinstance(heads, list) and len(heads) != len(levels):
            raise ValueError(
                f"network.attention.skip.heads must be a number or hold {len(levels)}, "
                f"one for each of the levels {levels}"
            )
        skip = self.attention.skip
        if skip is not None and skip.levels is None and not levels:
            raise ValueError(
                "network.attention.skip leaves out level 0, which is the only skip of two "
                "network.channels; give it levels: [0]"
            )
        placed: list[int] = []
        if isinstance(skip, CrossAttention):
            placed = [*levels, *(level + 1 for level in levels)]
        elif isinstance(skip, UTransformerGate):
            placed = [level + 1 for level in levels]
        narrowest = min((self.channels[level] for level in placed), default=2 * self.spatial_dims)
        if narrowest < 2 * self.spatial_dims:
            raise ValueError(
                f"network.attention.skip needs network.channels of {2 * self.spatial_dims} or "
                f"more to tell positions, found {narrowest}"
            )
        bottleneck = self.attention.bottleneck
        if isinstance(bottleneck, SelfAttention):
            told_by = {"rotary": bottleneck.head_channels, "sincos": self.channels[-1]}
            if told_by.get(bottleneck.positions, 2 * self.spatial_dims) < 2 * self.spatial_dims:
                raise ValueError(
                    f"network.attention.bottleneck.positions: {bottleneck.positions} needs "
                    f"{2 * self.spatial_dims} channels or more (of each head, for rotary), "
                    f"found {told_by[bottleneck.positions]}"
                )
        window = getattr(bottleneck, "window", None)
        if window is not None and len(window) != self.spatial_dims:
            raise ValueError(
                f"network.attention.bottleneck.window must hold {self.spatial_dims} numbers, "
                f"as network.spatial_dims is {self.spatial_dims}"
            )
        if math.prod(window or ()) > MOST_TOKENS:
            raise ValueError(
                f"network.attention.bottleneck.window {window} holds more than {MOST_TOKENS:,} "
                f"voxels; give it fewer"
            )

    def check_patch(self, patch: Sequence[int], name: str) -> None:
        """Raise ValueError unless the network can work on such a patch."""
        total = self.total_stride
        if len(patch) != len(total):
            raise ValueError(
                f"{name} {patch} must have {len(total)} numbers, "
                f"as network.spatial_dims is {len(total)}"
            )
        if any(size % stride for size, stride in zip(patch, total, strict=True)):
            raise ValueError(
                f"{name} {patch} must be multiples of {total}, the product of network.strides"
            )
        if math.prod(patch) > MOST_VOXELS:
            raise ValueError(
                f"{name} {patch} holds more than {MOST_VOXELS:,} voxels; make it smaller"
            )


class ZScore(Section):
    """Each image minus its mean, over its standard deviation."""

    kind: Literal["zscore"] = "zscore"
    nonzero: bool = False
    """Whether mean and deviation are those of voxels other than 0 alone (skull-stripped heads)."""


class CtWindow(Section):
    """Intensities clipped to a window in HU, minus a mean, over a standard deviation.

    Whatever is not given is read off the foreground of the training cases: percentiles 0.5 and
    99.5, mean and standard deviation.
    """

    kind: Literal["ct"] = "ct"
    lower: float | None = None
    upper: float | None = None
    mean: float | None = None
    std: Annotated[float, Field(gt=0)] | None = None


Normalisation = Annotated[
    Annotated[ZScore | CtWindow, Field(discriminator="kind")], BeforeValidator(kind_alone)
]


class SynthesisConfig(Section):
    """Train on images drawn from the label maps instead of on the scans (Billot et al. 2023)."""

    intensities: dict[str, tuple[float, float]] | None = None
    """Per label name, the range its mean intensity is drawn from; wholly random where not given."""
    deformation: Annotated[float, Field(ge=0)] = 2.0
    """Standard deviation, in voxels, of the smooth displacement at points 16 voxels apart."""


class DataConfig(Section):
    """Which volumes, how they are brought to one form, and how patches are drawn from them."""

    folder: Path
    """A folder with a dataset.json, in the Decathlon's form or nnU-Net's, or any with `files`."""
    files: FilesConfig | None = None
    """Where the files of each case lie, in place of a dataset.json."""
    validation: Share | list[str] = 0.2
    """The share of cases held out, chosen by the seed, or a list of their names."""
    fold: Annotated[int, Field(ge=0, le=4)] | None = None
    """A fold of nnU-Net's five, 0 to 4, held out instead."""
    spacing: tuple[Millimetres, Millimetres, Millimetres] | None = None
    """Voxel size in mm along right-left, back-front and foot-head; the cases' median by default."""
    interpolation: Literal["linear", "cubic"] = "cubic"
    """How images are brought to that spacing: by cubic splines, as nnU-Net, or linearly. Between
    slices over three times as far apart as their pixels, the nearest is taken instead."""
    normalisation: Normalisation | None = None
    """Of every channel; `ct` for channels named CT and `zscore` for others where not given."""
    slices: Literal["sagittal", "coronal", "axial"] = "axial"
    """The plane that a 2D network sees."""
    patch_size: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """In voxels of the network's spacing, one number per axis of the network."""
    batch_size: Positive = 2
    foreground_share: Share = 0.33
    """The share of patches that are centred on a voxel of a class drawn at random."""
    augment: bool = True
    """Whether patches are turned, scaled and mirrored, and their intensities varied."""
    elastic: bool = False
    """Whether a fifth of the patches is also bent, smoothly, by 2 mm or so (not in nnU-Net)."""
    mirror: list[Literal["x", "y", "z"]] | None = None
    """World axes along which patches may be mirrored: x runs from left to right, y from back to
    front, z from foot to head. Where not given, x alone, or none where labels tell left from right
    by their names. (nnU-Net mirrors along all three; what has a front and a top is learned far
    faster without.)"""
    synthesis: SynthesisConfig | None = None
    first_stage: Annotated[list[Path], Field(min_length=1)] | None = None
    """Runs or model folders, of lower resolution say, whose labels the network is given beside the
    image. Labels of a case come from the runs that held it out, or else from all of them. A model
    does better on cases that it was trained on than on new ones, so that the five folds of a
    cross-validation (`data.fold`) teach a second stage best how far to trust a first."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that cut patches."""
    cache: Path | None = None
    """Where prepared cases are kept; the folder `.cache` beside the runs by default."""

    @model_validator(mode="after")
    def _parts_go_together(self) -> Self:
        if self.first_stage and self.synthesis:
            raise ValueError(
                "data.first_stage labels scans, and data.synthesis draws images that are none; "
                "take one of them"
            )
        if self.elastic and not self.augment and self.synthesis is None:
            raise ValueError("data.elastic is part of data.augment, which is false; set it to true")
        if self.batch_size * math.prod(self.patch_size) > MOST_IN_BATCH:
            raise ValueError(
                f"data.batch_size {self.batch_size} of data.patch_size {self.patch_size} comes to "
                f"more than {MOST_IN_BATCH:,} voxels; make either smaller"
            )
        return self


class TrainConfig(Section):
    """How the weights are found."""

    steps: Positive = 1000
    optimiser: Literal["adamw", "sgd"] = "adamw"
    """AdamW on a one-cycle schedule, or SGD with Nesterov momentum on a polynomial one."""
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    """The highest of the schedule; 0.003 for AdamW and 0.01 for SGD where not given."""
    weight_decay: Annotated[float, Field(ge=0)] | None = None
    """AdamW's decoupled decay (Loshchilov and Hutter 2019) or SGD's; 0.05 and 3e-5 where not given.
    """
    gradient_clip: Annotated[float, Field(gt=0)] = 12.0
    """The largest norm of a step's gradient."""
    batch_dice: bool = False
    """Whether the Dice loss pools the whole batch or averages over its samples."""
    validate_every: Positive = 200
    """Steps between validations on whole volumes, each with a checkpoint to resume from."""
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


class FirstStage(Section):
    """Models whose labels a network is given beside the image."""

    models: Positive
    """How many there are; they lie in `first/0`, `first/1`, … of the model folder."""
    classes: Annotated[list[str], Field(min_length=1)]
    """Names of their labels 1, 2, …; the network makes a channel of 0 and 1 of each."""


class Postprocessing(Section):
    """What is done to predicted labels, adopted by cross-validation alone; nothing by default."""

    largest_foreground: bool = False
    """Whether of all that is not background only the largest component stays."""
    largest_of: tuple[Positive, ...] = ()
    """The numbers of the labels of which, after that, only the largest component stays."""


LabelNumber = Annotated[int, Field(ge=0, lt=2**16)]


class ModelDescription(Section):
    """All that prediction needs beside the weights; the content of `model.json`."""

    format: Literal[1] = 1
    segkit: str
    """The version that wrote it."""
    run: Name
    channels: list[Name]
    """Names of the input's channels, in order."""
    labels: Annotated[dict[Name, LabelNumber], Field(min_length=2)]
    """Names of the classes or regions and the numbers they are written as, 0 the background."""
    regions: dict[str, Annotated[list[LabelNumber], Field(min_length=1)]] = Field({})
    """In the order they are written, the numbers in label files of each region; classes if none."""
    ignore: LabelNumber | None = None
    """The number in label files of voxels that nobody labelled."""
    codes: dict[str, LabelCode] = Field({})
    """Of labels by name, the concept of a terminology that DICOM segmentations give."""
    network: NetworkConfig
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    interpolation: Literal["linear", "cubic"] = "linear"
    """Linear in models from before there was another."""
    normalisation: list[Normalisation]
    """One per channel."""
    slices: Literal["sagittal", "coronal", "axial"]
    patch_size: list[Positive]
    mirror: list[Literal["x", "y", "z"]] = Field([])
    """World axes along which it was trained on mirror images as well."""
    first_stage: FirstStage | None = None
    """Whose labels, where there is one, are one more channel of the input behind the image's."""
    postprocessing: Postprocessing = Postprocessing()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if unknown := [name for name in self.regions if name not in self.labels]:
            raise ValueError(f"regions holds {unknown[0]!r}, for which labels has no number")
        numbers = list(self.labels.values())
        if not self.regions and numbers != list(range(len(numbers))):
            raise ValueError(f"labels must be numbered 0, 1, 2, … in order, found {numbers}")
        named = list(self.labels)
        if self.regions and (numbers[0] != 0 or named[1:] != list(self.regions)):
            raise ValueError(f"labels must be the background, 0, and the regions, found {named}")
        self.network.check_patch(self.patch_size, "patch_size")
        return self

    @property
    def labelling(self) -> Labelling:
        """What the model tells apart."""
        regions = {name: tuple(numbers) for name, numbers in self.regions.items()}
        return Labelling(self.labels, regions, self.ignore)
