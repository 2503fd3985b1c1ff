"""A config with every value that a training uses, given the dataset that it names.

A run's `config.yaml` is the result of `resolve`. It means the same even if defaults in the code
change later: a null in it says only that something is not used.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch

from segkit.config.attention import (
    CrossAttentionConfig,
    LargeKernelAttentionConfig,
    PairedAttentionConfig,
    SelfAttentionConfig,
    TransformerConfig,
    UTransformerGateConfig,
)
from segkit.config.data import (
    CtWindowConfig,
    DataConfig,
    NormalisationConfig,
    SynthesisConfig,
    ZScoreConfig,
    is_ct,
)
from segkit.config.model import ACROSS, ModelDescription, description_of
from segkit.config.network import NetworkConfig
from segkit.config.training import SCHEDULE_OF, Config, TrainConfig, TrainerConfig
from segkit.data.dataset import CaseFiles, Dataset, check_headers, grid_of_case
from segkit.data.preprocess import median_spacing
from segkit.data.single_slices import about_different_planes, flat_axes
from segkit.data.split import Split, split_of
from segkit.errors import ConfigError, DatasetError, Problems, counted
from segkit.geometry.grid import Orientation
from segkit.model.addresses import is_address
from segkit.model.build_attention import heads_that_fit
from segkit.system.progress import Track, untracked
from segkit.system.resources import bfloat16_is_fast, precision_of
from segkit.training.ct_window import with_windows

logger = logging.getLogger(__name__)

LEARNING_RATE = {"adamw": 3e-3, "sgd": 1e-2, "muon": 6e-3}
WEIGHT_DECAY = {"adamw": 0.05, "sgd": 3e-5, "muon": 0.05}
TRAINED_IN = ("auto", "32-true", "bf16-mixed", "16-mixed", "32", 32, "16", 16, "bf16")
"""Lightning's names of precisions that segkit can train in: single or mixed precision."""
ANY_INTENSITY = (0.0, 1.0)
"""The range of a label's mean intensity in synthesis, if the config has none."""


def resolve(
    config: Config,
    dataset: Dataset,
    split: Split | None = None,
    *,
    runs: Path = Path("runs"),
    track: Track = untracked,
) -> Config:
    """The config with a value for every setting; values that it has already are kept.

    Args:
        config: the config of a training.
        dataset: the dataset that it names.
        split: the training and held-out cases; by default, the config's split.
        runs: the folder of runs; by default, prepared cases are kept in its `.cache`.
        track: shows the progress over cases whose intensities are measured.

    Raises:
        ConfigError: a CT window must be measured, but no case has foreground.
        DatasetError: a case cannot be read, or no case is left to train on.
    """
    split = split or split_of(dataset, config)
    resolved = config.model_copy(
        update={
            "data": _data(config.data, dataset, split, runs, track),
            "network": _network(config.network, config.data.patch_size),
            "train": _train(config.train),
            "trainer": _trainer(config),
        }
    )
    return with_absolute_paths(resolved)


def describe(config: Config, dataset: Dataset) -> ModelDescription:
    """The description of the model that a resolved config will give."""
    data = config.data
    assert data.spacing is not None and isinstance(data.normalisation, list)
    return description_of(
        config,
        channels=dataset.channels,
        labelling=dataset.labelling,
        codes=dataset.codes,
        pictures=dataset.pictures,
        nan=dataset.nan,
        unit=dataset.unit,
        spacing=data.spacing,
        normalisation=data.normalisation,
    )


def check_images(
    config: Config,
    dataset: Dataset,
    train_cases: Sequence[CaseFiles],
    held_out: Sequence[CaseFiles],
) -> None:
    """Check that the files of each case fit together, by their headers, and that images exist.

    Training by synthesis needs no images, but scoring does.

    Raises:
        DatasetError: a case has no image, or a file does not fit; `problems` lists all cases.
        VolumeError: the header of a file cannot be read.
        ConfigError: `data.synthesis` does not fit the dataset.
    """
    needed = held_out if config.data.synthesis else (*train_cases, *held_out)
    problems = Problems()
    for case in needed:
        with problems.noted():
            if not case.images:
                raise DatasetError(
                    f"{dataset.folder}: case {case.name} has no image; add one, or train on its "
                    "labels with data.synthesis and hold out other cases with data.validation"
                )
    with problems.noted():
        check_headers((*train_cases, *held_out), dataset)
    problems.refuse()
    if config.data.synthesis and dataset.unlabelled:
        raise ConfigError(
            "data.synthesis needs complete label maps, but data.labelled says that some cases lack "
            "labels; remove one of the two settings"
        )
    if config.data.synthesis and len(dataset.channels) > 1:
        raise ConfigError(
            f"data.synthesis draws images of one channel, but {dataset.folder} has "
            f"{len(dataset.channels)}; remove data.synthesis"
        )


def check_plane(config: Config, dataset: Dataset, cases: Sequence[CaseFiles]) -> None:
    """Check that cases of one slice are trained in two dimensions, in the plane of the slice.

    Raises:
        ConfigError: all cases have one voxel along an axis, and the network is a 3D network, or a
            2D network of other planes; or these axes differ.
    """
    network, plane = config.network, config.data.slices
    shapes: list[tuple[int, int, int]] = []
    for case in cases:
        grid = grid_of_case(case, dataset)
        shapes.append(Orientation.of(grid.affine).turn_grid(grid).shape)
        if 1 not in shapes[-1]:
            return
    if not cases or network.given is not None:
        return
    flat = flat_axes(shapes)
    if not flat:
        raise ConfigError(f"{dataset.folder}: {about_different_planes(shapes)}")
    in_plane = {name for name, axis in ACROSS.items() if axis in flat}
    if network.spatial_dims == 2 and plane in in_plane:
        return
    found = "network.spatial_dims 3" if network.spatial_dims == 3 else f"data.slices {plane}"
    axes, names = (
        " and ".join(sorted(each)) for each in ({"xyz"[axis] for axis in flat}, in_plane)
    )
    raise ConfigError(
        f"every case of {dataset.folder} has one voxel along {axes} (RAS+), so expected "
        f"network.spatial_dims 2 and data.slices {names}, found {found}; set both, with a "
        f"data.patch_size of two numbers, or run segkit plan {dataset.folder}"
    )


def check_precision(config: Config) -> None:
    """Check that segkit can train in the config's precision.

    Weights in half precision (`bf16-true`, `16-true`) are refused, because changes of less than
    1/256 of a weight would be lost. `16-mixed` needs a GPU, because it scales the loss. A warning
    tells of a CPU that is slow in bfloat16, on which a run of another machine may go on.

    Raises:
        ConfigError: the precision is refused.
    """
    asked = config.trainer.precision
    if asked not in TRAINED_IN:
        raise ConfigError(
            f"trainer.precision is {asked}; choose auto, 32-true, bf16-mixed or 16-mixed, which "
            f"keep the weights in single precision"
        )
    if asked == "16-mixed" and accelerator(config) == "cpu":
        raise ConfigError(
            "trainer.precision is 16-mixed, with which PyTorch trains only on a GPU, but the "
            "device is the CPU; choose auto, 32-true or bf16-mixed"
        )
    if in_bfloat16_on_cpu(config) and not bfloat16_is_fast():
        logger.warning(
            "trainer.precision is bf16-mixed, but this CPU has no instructions for bfloat16, so a "
            "step can take 40 times as long as with trainer.precision=32-true"
        )


def in_bfloat16_on_cpu(config: Config) -> bool:
    """Whether a config asks for a training in bfloat16, and it runs on a CPU."""
    return config.trainer.precision == "bf16-mixed" and accelerator(config) == "cpu"


def precision(config: Config) -> str | int:
    """Lightning's precision. `auto` becomes mixed precision if the device is faster in it.

    On a CPU this needs instructions for bfloat16; without them, it is 40 times slower.
    """
    asked = config.trainer.precision
    if asked != "auto":
        return asked
    if config.trainer.accelerator not in ("auto", "gpu", "cuda") or not torch.cuda.is_available():
        return "bf16-mixed" if bfloat16_is_fast() else "32-true"
    half = precision_of(first_gpu(config))
    return "bf16-mixed" if half == torch.bfloat16 else "16-mixed"


def first_gpu(config: Config) -> torch.device:
    """The first of the GPUs that train, if a GPU trains."""
    devices = config.trainer.devices
    if isinstance(devices, str) and "," in devices:  # such as "1,3"; "3" is a number of GPUs
        devices = [int(each) for each in devices.split(",") if each.strip()]
    if isinstance(devices, list) and devices:
        return torch.device("cuda", devices[0])
    return torch.device("cuda")


def computed_in(precision: str | int) -> torch.dtype:
    """The data type in which a network trains with one of Lightning's precisions."""
    if str(precision).startswith("bf16"):
        return torch.bfloat16
    return torch.float16 if str(precision).startswith("16") else torch.float32


def accelerator(config: Config) -> str:
    """Lightning's accelerator. `auto` becomes a GPU if there is one, else the CPU."""
    asked = config.trainer.accelerator
    if asked != "auto":
        return asked
    if torch.cuda.is_available():
        return "gpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def on_this_machine(config: Config) -> Config:
    """A run's config, changed to `auto` if this machine lacks the GPU that the config names."""
    asked = config.trainer.accelerator
    here = {
        "gpu": torch.cuda.is_available() or torch.backends.mps.is_available(),
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if here.get(asked, True):
        return config
    logger.warning(
        "%s: trainer.accelerator is %s, but this machine has none; the run continues on another "
        "device, in a precision that suits it",
        config.name,
        asked,
    )
    changes = {"accelerator": "auto", "precision": "auto", "devices": 1}
    return config.model_copy(update={"trainer": config.trainer.model_copy(update=changes)})


def with_absolute_paths(config: Config) -> Config:
    """The config with absolute paths, so that it works from any working directory."""
    data = config.data.model_copy(
        update={
            "folder": config.data.folder.resolve(),
            "cache": config.data.cache and config.data.cache.resolve(),
            "first_stage": config.data.first_stage
            and [_absolute(path) for path in config.data.first_stage],
        }
    )
    train = config.train.model_copy(
        update={"start_from": config.train.start_from and _absolute(config.train.start_from)}
    )
    return config.model_copy(update={"data": data, "train": train})


def _absolute(model: Path) -> Path:
    """The absolute path of a model's folder; an address stays as it is."""
    return model if is_address(model) else model.resolve()


def _data(
    config: DataConfig, dataset: Dataset, split: Split, runs: Path, track: Track
) -> DataConfig:
    """The section `data` with a value for every setting."""
    spacing = config.spacing or median_spacing(
        [grid_of_case(case, dataset) for case in split.train]
    )
    changes: dict[str, Any] = {
        "spacing": spacing,
        "normalisation": with_windows(_asked(config, dataset), dataset, split.train, track),
        "mirror": config.mirrored(list(dataset.labels)),
        "cache": config.cache or runs / ".cache",
    }
    if config.splits is not None:
        changes["fold"] = config.fold or 0
    elif config.fold is None:
        changes["validation"] = [case.name for case in split.held_out]
    if config.synthesis is not None:
        names = dataset.labelling.value_names
        given = config.synthesis.intensities or {}
        every = {**dict.fromkeys(names, ANY_INTENSITY), **given}
        changes["synthesis"] = SynthesisConfig(
            intensities=every, deformation=config.synthesis.deformation
        )
    return config.model_copy(update=changes)


def _network(config: NetworkConfig, patch_size: Sequence[int]) -> NetworkConfig:
    if config.given is not None:
        return config
    attention, changes = config.attention, dict[str, Any]()
    skip, bottleneck = attention.skip, attention.bottleneck
    if skip is not None:
        levels = attention.skip_levels(len(config.channels))
        resolved: dict[str, Any] = {"levels": levels}
        if isinstance(skip, CrossAttentionConfig | UTransformerGateConfig) and skip.heads is None:
            resolved["heads"] = [
                heads_that_fit(config.channels[level], skip.head_channels) for level in levels
            ]
        changes["skip"] = skip.model_copy(update=resolved)
    grids = config.level_grids(patch_size)
    places: tuple[Literal["encoder", "decoder"], ...] = ("encoder", "decoder")
    for place in places:
        block = getattr(attention, place)
        if isinstance(block, LargeKernelAttentionConfig | PairedAttentionConfig):
            levels = attention.block_levels(place, grids)
            changes[place] = block.model_copy(update={"levels": levels})
    if isinstance(bottleneck, TransformerConfig):
        fitting = heads_that_fit(config.channels[-1], bottleneck.head_channels)
        changes["bottleneck"] = bottleneck.model_copy(update={"heads": bottleneck.heads or fitting})
    if isinstance(bottleneck, SelfAttentionConfig):
        coarsest = grids[-1]
        # Only relative positions have parameters for each voxel of a window, so that its size must
        # be fixed. For others, no window means the whole patch.
        window = coarsest if bottleneck.positions == "relative" else None
        changes["bottleneck"] = bottleneck.model_copy(
            update={
                "heads": bottleneck.heads
                or heads_that_fit(config.channels[-1], bottleneck.head_channels),
                "window": bottleneck.window or window,
            }
        )
    return config.model_copy(
        update={
            "strides": config.step_strides,
            "kernels": config.level_kernels,
            "attention": attention.model_copy(update=changes),
        }
    )


def _train(config: TrainConfig) -> TrainConfig:
    decay = config.weight_decay
    return config.model_copy(
        update={
            "learning_rate": config.learning_rate or LEARNING_RATE[config.optimiser],
            "weight_decay": WEIGHT_DECAY[config.optimiser] if decay is None else decay,
            "schedule": config.schedule or SCHEDULE_OF[config.optimiser],
        }
    )


def _trainer(config: Config) -> TrainerConfig:
    return config.trainer.model_copy(
        update={"precision": precision(config), "accelerator": accelerator(config)}
    )


def _asked(config: DataConfig, dataset: Dataset) -> list[NormalisationConfig]:
    """The normalisation of each channel, in which a CT window may still lack values."""
    asked = config.normalisation
    if isinstance(asked, list):
        if len(asked) != len(dataset.channels):
            raise ConfigError(
                f"data.normalisation: expected one for each of the "
                f"{counted(len(dataset.channels), 'channel')} of {dataset.folder}, found "
                f"{len(asked)}; give one for each, or one for "
                f"all"
            )
        return asked
    return [
        asked or (CtWindowConfig() if is_ct(name) else ZScoreConfig(nonzero=False))
        for name in dataset.channels
    ]
