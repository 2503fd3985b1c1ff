"""The parts of a training. `prepare` makes them from a config, and each can be replaced.

config ──prepare──> TrainingParts ──fit──> runs/<name>/
                      └ dataclasses.replace(parts, loss=…)
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn

from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.augment_spatial import Vary
from segkit.data.dataset import CaseFiles, Dataset, dataset_of, unlabelled
from segkit.data.normalise import build_normalisers
from segkit.data.patches import PatchSampler
from segkit.data.prepared_cache import StoredCase, store_cases
from segkit.data.split import Split, split_of
from segkit.data.variation import build_variation
from segkit.errors import ConfigError, Problems, counted, printable
from segkit.inference.segment_prepared import segment_prepared
from segkit.model.build import build_network, check_windows, wrap_network
from segkit.model.start_from import TakenOver, start_from
from segkit.nn.external import try_out
from segkit.nn.losses import presence_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.partly_labelled import PartlyLabelled
from segkit.system.progress import Track, untracked
from segkit.system.resources import limit_threads
from segkit.training.cascade import FirstModel, described, first_models, label_cases
from segkit.training.make_loss import check_levels, make_loss
from segkit.training.make_sampler import make_sampler
from segkit.training.module import Loss, PresenceLoss
from segkit.training.optimisers import MakeOptimiser, MakeSchedule, make_optimiser, make_schedule
from segkit.training.resolve import (
    check_images,
    check_plane,
    check_precision,
    describe,
    first_gpu,
    in_bfloat16_on_cpu,
    resolve,
)
from segkit.training.trackers import check_installed
from segkit.training.validation import (
    PartlyLabelledScore,
    ScoreCase,
    Validation,
    dice_of_groups,
)

logger = logging.getLogger(__name__)

FIXED = (
    "config",
    "dataset",
    "description",
    "first_labels",
    "first_stage",
    "partly",
    "seconds",
    "split",
    "taken_over",
)
"""Parts from which others were made. They cannot be replaced; change the config instead."""


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of a batch of patches, on the training device."""

    vary: Vary
    """A function of images (batch, channel, x, y, z), labels (batch, x, y, z) and a generator. It
    receives patches with their margins and returns augmented patches without them."""
    margin: tuple[int, ...] = (0, 0, 0)
    """Number of voxels that are cut in addition at each end of a patch, along each axis."""


@dataclass(frozen=True, eq=False)
class TrainingParts:
    """All parts of a training.

    `dataclasses.replace(parts, loss=...)` replaces a part from `network` to `validation`; the run's
    config.yaml then names this part. The other parts cannot be replaced; change the config instead.

    Example:
        parts = segkit.prepare(segkit.load_config("my_dataset.yaml"))
        run = segkit.fit(dataclasses.replace(parts, loss=my_loss))
    """

    config: Config
    """The config with all values, defaults included."""
    dataset: Dataset
    """The dataset."""
    split: Split
    """The training cases and the held-out cases."""
    description: ModelDescription
    """Description of the model that is trained."""
    first_stage: tuple[FirstModel, ...]
    """First-stage models whose labels the network receives beside the image; usually none."""
    first_labels: Mapping[str, Path] | None
    """The file with first-stage labels of each case, by the case's name."""

    network: nn.Module
    """The network. `fit` trains a copy of it if `prepare` built it, and the module itself if it is
    your own."""
    loss: Loss
    """The loss of the logits of each supervised level, finest first, and the label."""
    presence_loss: PresenceLoss
    """The loss of the presence head's logits and the label; used only if there is such a head."""
    optimiser: MakeOptimiser
    """A function that makes the optimiser from the network's parameters."""
    schedule: MakeSchedule
    """A function that makes the schedule from the optimiser; it advances at each step."""
    cases: Sequence[StoredCase]
    """The prepared training cases, each with `image` (channel, x, y, z), `label` (x, y, z) and
    `positions` (voxels of each label)."""
    sampler: PatchSampler
    """A function that draws a patch, from the cases, the patch's number and a NumPy generator. It
    returns a case and the voxel at the centre of the patch."""
    augmentation: Augmentation
    """The augmentation of patches."""
    validation: Validation
    """The prepared held-out cases, and how they are segmented and scored."""

    partly: PartlyLabelled | None = None
    """The labelled classes of partly labelled cases; None if all cases are labelled completely."""
    taken_over: TakenOver | None = None
    """The weights of the network that were copied from `train.start_from`, if it is given."""
    seconds: float = 0.0
    """Seconds that `prepare` took; they count as part of `train.minutes`."""

    _made: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """Each part as `prepare` made it."""

    @property
    def replaced(self) -> list[str]:
        """Sorted names of the parts that were replaced."""
        names = [each.name for each in fields(self) if each.name != "_made"]
        return sorted(name for name in names if self._made.get(name) is not getattr(self, name))


def prepare(
    config: Config,
    *,
    runs: str | Path = "runs",
    dataset: Dataset | None = None,
    network: nn.Module | None = None,
    track: Track = untracked,
) -> TrainingParts:
    """Make all parts of a training from its config.

    Prepared cases are written to disk. The folder of a run is not made yet.

    Args:
        config: the config of the training.
        runs: the folder of runs. Prepared cases are kept in its `.cache`, unless `data.cache` names
            another folder.
        dataset: a dataset that replaces the one in the config.
        network: any module from (batch, channel, *space) to logits (batch, output, *space). It is
            trained instead of a U-Net; the config must have `network.given`.
        track: shows the progress over cases.

    Returns:
        The parts, for `segkit.fit`.

    Raises:
        ConfigError: the config does not fit the dataset or this machine.
        DatasetError: a case cannot be read or used.
        VolumeError: a file of a case is missing or damaged.
        ModelError: the network or a model that the config names cannot be used.
        WorkerError: a process that prepares cases was killed.

    Example:
        >>> parts = segkit.prepare(segkit.load_config("my_dataset.yaml"))
        >>> run = segkit.fit(dataclasses.replace(parts, loss=my_loss))
    """
    return make_parts(config, Path(runs), dataset=dataset, network=network, track=track)


def make_parts(
    config: Config,
    runs: Path,
    *,
    dataset: Dataset | None = None,
    network: nn.Module | None = None,
    track: Track = untracked,
    begun: bool = False,
    kept: Callable[[Dataset], Split] | None = None,
) -> TrainingParts:
    """Make all parts of a training, as `prepare` does, also for a run that is resumed.

    Args:
        config: the config of the training.
        runs: the folder of runs.
        dataset: a dataset that replaces the one in the config.
        network: a module from Python that is trained instead of a U-Net.
        track: shows the progress over cases.
        begun: whether the run has a checkpoint; if so, `train.start_from` is not used.
        kept: makes the split of a run that already has one; without it, the config decides.
    """
    started = time.monotonic()
    limit_threads()
    check_installed(config.trainer.loggers)
    check_precision(config)
    dataset = dataset or dataset_of(config.data)
    split = kept(dataset) if kept else split_of(dataset, config)
    check_images(config, dataset, split.train, split.held_out)
    check_plane(config, dataset, (*split.train, *split.held_out))
    first_stage = first_models(config.data.first_stage or (), dataset)
    config = resolve(config, dataset, split, runs=runs, track=track)
    description = described(describe(config, dataset), first_stage)
    built, taken_over = _network(config, description, network, begun)
    first_labels, cases, held_out = _stored(config, dataset, split, description, first_stage, track)
    present = {number for case in cases for number in case.labels}
    present = {number % len(dataset.labelling.value_names) for number in present}
    if warning := unlabelled(dataset, present, f"the {counted(len(cases), 'training case')}"):
        logger.warning("%s", printable(warning))
    patch_size, stage = description.volume_patch, description.first_stage
    groups = list(description.regions.values())
    partly = partly_labelled(dataset)
    score: ScoreCase = partial(
        dice_of_groups,
        groups=groups or [(number,) for number in range(1, len(description.labels))],
        ignore=description.ignore,
    )
    parts = TrainingParts(
        config=config,
        dataset=dataset,
        split=split,
        description=description,
        first_stage=first_stage,
        first_labels=first_labels,
        network=built,
        loss=make_loss(config.train.loss, description, pool_batch=config.train.batch_dice),
        presence_loss=partial(presence_cross_entropy, regions=groups, ignore=description.ignore),
        optimiser=make_optimiser(config.train),
        schedule=make_schedule(config.train),
        cases=cases,
        sampler=make_sampler(config.data, dataset, cases, patch_size),
        augmentation=Augmentation(
            *build_variation(
                config.data,
                patch_size,
                spacing=description.spacing,
                labels=dataset.labelling.value_names,
                first_classes=len(stage.classes) if stage else 0,
            )
        ),
        validation=Validation(
            held_out,
            segment=partial(
                segment_prepared, patch_size=patch_size, written=description.labelling.written
            ),
            score=score if partly is None else PartlyLabelledScore(score, partly),
        ),
        partly=partly,
        taken_over=taken_over,
        seconds=time.monotonic() - started,
    )
    made = {each.name: getattr(parts, each.name) for each in fields(parts) if each.name != "_made"}
    return replace(parts, _made=made)


def partly_labelled(dataset: Dataset) -> PartlyLabelled | None:
    """The labelled classes of a dataset's cases; None if all cases are labelled completely."""
    sets = dataset.unlabelled_sets
    if len(sets) == 1:
        return None
    labelling = dataset.labelling
    outputs = labelling.outputs
    return PartlyLabelled(
        len(labelling.value_names),
        tuple(tuple(outputs.index(name) for name in names) for names in sets),
        len(outputs),
        tuple(labelling.regions.values()),
    )


def check_replaced(parts: TrainingParts) -> None:
    """Check that only replaceable parts are replaced, and all those that the config names.

    Raises:
        ConfigError: a part was replaced from which others were made, or a part must be replaced.
    """
    replaced = parts.replaced
    if fixed := [name for name in FIXED if name in replaced]:
        raise ConfigError(
            f"parts.{fixed[0]} was replaced, but other parts were made from the old one; change "
            "the config instead, and call segkit.prepare again"
        )
    if "network" in replaced and parts.taken_over is not None:
        raise ConfigError(
            "parts.network was replaced, but train.start_from has copied weights into the old one; "
            "pass the module to segkit.prepare(config, network=...), or remove train.start_from "
            "and load the weights into the module"
        )
    refuse_replaced(parts.config, replaced)


def refuse_replaced(config: Config, given: Sequence[str] = ()) -> None:
    """Raise ConfigError if a config was trained with replaced parts that are not in `given`."""
    if missing := sorted(set(config.replaced) - set(given)):
        raise ConfigError(
            f"{config.name}: was trained with parts replaced from Python ({', '.join(missing)}), "
            f"which a config cannot hold; replace the same parts and pass them to segkit.fit or "
            f"segkit.resume"
        )


def _network(
    config: Config, description: ModelDescription, module: nn.Module | None, begun: bool
) -> tuple[SegmentationNetwork, TakenOver | None]:
    """The network that a training begins with, and which of its weights are another model's."""
    patch_size = description.volume_patch
    if config.trainer.accelerator == "cpu" or not torch.cuda.is_available():
        check_windows(description, (config.data.batch_size, *patch_size))
    L.seed_everything(config.train.seed, workers=True, verbose=False)
    if module is None:
        network = build_network(description)
    else:
        network = wrap_network(description, module).cpu()
        check_module(network, config, description)
    image = torch.zeros(1, description.channels_in, *patch_size)
    check_levels(config.train.loss, network, image)
    if config.train.start_from is None or begun:
        return network, None
    taken_over = start_from(
        network,
        config.train.start_from,
        description=description,
        other_channels=config.train.other_channels,
    )
    return network, taken_over


def check_module(
    network: SegmentationNetwork, config: Config, description: ModelDescription
) -> None:
    """Run a user's network once on a window, also in bfloat16 if a CPU trains it so.

    Raises:
        ModelError: it does not compute logits of the window.
    """
    window = torch.zeros(1, len(description.channels), *description.volume_patch)
    try_out(network, window, in_bfloat16=in_bfloat16_on_cpu(config))


def _stored(
    config: Config,
    dataset: Dataset,
    split: Split,
    description: ModelDescription,
    first_stage: Sequence[FirstModel],
    track: Track,
) -> tuple[Mapping[str, Path] | None, tuple[StoredCase, ...], tuple[StoredCase, ...]]:
    """Files with first-stage labels, prepared training cases, and prepared held-out cases."""
    cache, accelerator = config.data.cache, config.trainer.accelerator
    on_gpu = accelerator in ("gpu", "cuda")
    assert cache is not None, "a resolved config has one"
    first_labels = label_cases(
        (*split.train, *split.held_out),
        dataset,
        first_stage,
        cache=cache,
        device=str(first_gpu(config)) if on_gpu else accelerator,
        track=track,
    )

    def store(cases: Sequence[CaseFiles], task: str) -> tuple[StoredCase, ...]:
        return store_cases(
            cases,
            dataset,
            folder=cache,
            spacing=description.spacing,
            normalisers=build_normalisers(description.normalisation),
            order=description.interpolation_order,
            settings=[setting.model_dump() for setting in description.normalisation],
            first_labels=first_labels,
            track=lambda each: track(each, task, len(cases)),
        )

    problems = Problems()
    with problems.noted():
        cases = store(split.train, "preparing")
    with problems.noted():
        held_out = store(split.held_out, "held out")
    problems.refuse()
    return first_labels, cases, held_out
