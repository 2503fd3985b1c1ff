"""From a volume to labels, probabilities and attention maps on the volume's own grid, in one walk.

    volume ─▶ prepared ─▶ windows ─▶ engine ─▶ blended slab ─▶ the volume's rows ─▶ labels
                                        └────▶ maps, each on one coarse grid of its own

A slab of logits is resampled to the volume's grid, a few rows at a time, reduced to labels and let
go. Several models each walk so, and what they say of the same rows is averaged.
Post-processing, where a model has it, comes last: a component may span every slab, so it needs the
labels of the whole volume in memory.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.config.model import PostprocessingConfig
from segkit.data.first_stage_labels import majority
from segkit.data.label_numbers import as_in_files, volume_within
from segkit.data.preprocess import Prepared
from segkit.errors import ModelError, VolumeError
from segkit.inference import postprocess as components
from segkit.inference.attention_maps import AttentionMap, MapCollector
from segkit.inference.engines.out_of_memory import SparingCouncil
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.ensemble import MergedRows, merge
from segkit.inference.model_walk import (
    WINDOWS_ON_GPU,
    ModelWalk,
    PredictionOptions,
    PredictionSettings,
    TrackSlabs,
    untracked_slabs,
    window_layout,
)
from segkit.inference.output_arrays import Results
from segkit.inference.source_rows import SourceRows, labels_of, pieces
from segkit.inference.windows import stream
from segkit.io.disk_arrays import Allocate, in_memory
from segkit.io.nan_values import nan_as_zero
from segkit.io.volume import Volume, trouble_with
from segkit.model.folder import Model, load_model, model_folders
from segkit.nn.network import SegmentationNetwork

PIECE_OF_SOURCE = 2**22
"""Numbers, one for each voxel and class, that a slab is resampled to at once …"""
VOXELS = 2**18
"""… or voxels, if only labels are asked for."""


WINDOWS_IN_TRAINING = 2
"""Windows per call on a CPU. For one small window alone PyTorch (2.13) takes a convolution that is
four times as slow: 0.35 s for 32 x 40 x 32 voxels, where each of two takes 0.10 s."""


TIMES_ON_GPU = 64
"""A GPU resamples so many times as much at once: it has no cache to fill, and each call costs."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model, or several, make of a volume: all but the maps lie on the volume's own grid.

    Example:
        prediction = segkit.Predictor.load("runs/mine")(scan, probabilities=True)
        segkit.write_volume("scan_seg.nii.gz", prediction.labels)
    """

    labels: Volume
    """A number for each voxel (x, y, z), in the smallest unsigned type that holds them."""
    probabilities: Volume | None
    """Float32 (x, y, z, class or region), from 0 to 1; without post-processing. Those of classes
    add up to 1, and the largest is that of the label. None unless asked for, as `entropy` and
    `variance`."""
    maps: dict[str, AttentionMap]
    """The first model's, by keys such as 'skip.1/gate', each on its own coarser grid; empty unless
    asked for."""
    presence: dict[str, float] | None = None
    """The probability that the volume holds each class: the highest of its windows', and the mean
    of the models that have a presence head. None if no model has one."""
    entropy: Volume | None = None
    """Entropy of the probabilities over that of equal classes: float32 (x, y, z), from 0 to 1."""
    variance: Volume | None = None
    """Variance of the probabilities between models and between mirror images, mean over classes:
    float32 (x, y, z)."""


class Predictor:
    """Segments volumes with a model, or with several that share labels and channels.

    One predictor may be called from several threads at once.

    Example:
        predictor = segkit.Predictor.load("runs/mine", tta=True, device="cuda")
        prediction = predictor(segkit.read_volume("scan.nii.gz"), maps=True)

    Args:
        models: a trained model, or several: their probabilities are averaged.
        device: 'auto' (the default: a GPU if there is one), 'cpu', 'cuda' or any name of torch's.
        overlap: share of a window that neighbours have in common, from 0 to below 1; 0.5 by
            default.
        batch_size: windows, and mirror images of them, per call of the network; by default 1, and 4
            on a GPU.
        precision: of the network's arithmetic, such as `torch.float32`, which is the default on a
            CPU; on a GPU it is `torch.float16`. Sums over windows are always float32.
        tta: whether the logits of each window are averaged over its mirror images along the axes
            that the model was trained to mirror; False by default.
        skip_empty: whether windows under which the volume is 0 throughout are background, without
            asking the network; True by default. Maps are NaN where only such windows look.
        engine: 'torch', 'compile', 'openvino' or 'onnx'; 'auto', the default, is the fastest that
            `choose_engine` knows here.

    Raises:
        ModelError: there is no model, models do not share labels and channels, or the engine is not
            installed or cannot run so.
        ConfigError: a window's features need more memory than is free.
    """

    def __init__(
        self, models: Model | Sequence[Model], **options: Unpack[PredictionOptions]
    ) -> None:
        models = [models] if isinstance(models, Model) else models
        _check_alike(models)
        self.settings = PredictionSettings(**options).settled()
        self.members = [ModelWalk(model, self.settings) for model in models]
        self.model = models[0]
        """The first, and its layout of windows."""
        self.layout = self.members[0].layout
        self.first_stages = [
            [Predictor(first, **options) for first in model.first] for model in models
        ]

    @classmethod
    def load(
        cls,
        *paths: str | Path,
        network: nn.Module | None = None,
        checkpoint: str | None = None,
        **options: Unpack[PredictionOptions],
    ) -> "Predictor":
        """A predictor from files.

        Args:
            paths: runs, model folders, or cross-validations, of which every fold's model is taken.
            network: the module of a model that was trained with one; there must be one model.
            checkpoint: `best` or `last`, to take the weights from that checkpoint of each run; if
                not given, they are those that the run ended with.
            options: those of `Predictor`, such as `precision` and `tta`.

        Returns:
            A predictor of all these models together.

        Raises:
            ModelError: there is no model at a path, or models do not fit together.
        """
        folders = [folder for path in paths for folder in model_folders(Path(path), checkpoint)]
        if network is not None and len(folders) > 1:
            raise ModelError(
                f"one module cannot hold the weights of {len(folders)} models; load each with a "
                f"module of its own: Predictor([load_model(path, network=module), …])"
            )
        models = [load_model(folder, network=network, checkpoint=checkpoint) for folder in folders]
        return cls(models, **options)

    @property
    def classifies(self) -> bool:
        """Whether predictions tell which classes a volume holds."""
        return any(member.model.network.presence is not None for member in self.members)

    @property
    def mirrors(self) -> bool:
        """Whether any model is asked about mirror images."""
        return any(member.mirror_axes for member in self.members)

    def __call__(
        self,
        volume: Volume,
        *,
        first_labels: Volume | None = None,
        maps: bool = False,
        disagreement: bool = False,
        probabilities: bool = False,
        uncertainty: bool = False,
        allocate: Allocate = in_memory,
        track: TrackSlabs = untracked_slabs,
    ) -> Prediction:
        """Labels of every voxel, and what else is asked for, on the volume's own grid.

        Args:
            volume: (x, y, z), or (x, y, z, channel), of the channels that the model has learned.
            first_labels: labels of the first stage, if they are known; else a model with a first
                stage finds them itself.
            maps: whether to give attention maps, from the same pass.
            disagreement: whether each map tells how far windows disagree about it.
            probabilities: whether to give probabilities.
            uncertainty: whether to give entropy and variance.
            allocate: makes the arrays of all but the labels, such as `OnDisk(folder)`.
            track: `track(slabs, count)` gives the same slabs and may show progress. It is called
                once for a volume; a first stage is not tracked.

        Returns:
            The prediction; what was not asked for is None, or no maps.

        Raises:
            ModelError: the channels do not fit, or the network's output is not finite.
            VolumeError: voxels are not finite numbers, and a model was not trained with
                `data.nan: background`; or a channel holds no number at all.
        """
        volume = self.with_numbers(volume)
        images = self._prepare_all(volume, first_labels, on_device=True)
        first = images[0]
        infos = self.members[0].maps() if maps else {}
        collectors = [
            MapCollector(wanted, prepared, allocate=allocate, disagreement=disagreement)
            for wanted, prepared in zip([infos, *[{}] * (len(images) - 1)], images, strict=True)
        ]
        presence: list[list[Tensor]] = [[] for _ in self.members]
        walks = [
            member.walk(
                volume,
                prepared,
                maps=collector,
                presence=seen,
                uncertainty=uncertainty,
                # The others keep pace with the first.
                track=track if number == 0 else untracked_slabs,
            )
            for number, (member, prepared, collector, seen) in enumerate(
                zip(self.members, images, collectors, presence, strict=True)
            )
        ]
        labelling = self.model.description.labelling
        kind = np.min_scalar_type(max(labelling.numbers.values()))
        labels = np.zeros(volume.grid.shape, kind, order="F")
        results = Results(volume, first, allocate)
        if probabilities:
            # What the network never sees is background, which has no place among regions.
            beyond = [0.0] * len(labelling.outputs)
            beyond[0] = float(labelling.written is None)
            results.add("probabilities", np.dtype(np.float32), beyond)
        if uncertainty:
            results.add("entropy", np.dtype(np.float32), [0.0])
            results.add("variance", np.dtype(np.float32), [0.0])
        turned = first.orientation.turn(labels)[first.box]
        for start, verdict in self._verdicts(walks, probabilities, uncertainty):
            rows = slice(start, start + verdict.labels.shape[-1])
            turned[:, :, rows] = as_small(verdict.labels, kind).cpu().numpy()
            for name, values in (
                ("probabilities", verdict.probabilities),
                ("entropy", verdict.entropy),
                ("variance", verdict.variance),
            ):
                if values is not None:
                    results.put(name, rows, values if values.ndim == 4 else values[None])
            del verdict, values
        adopted = self.postprocessing
        labels = components.apply(labels, adopted.largest_foreground, adopted.largest_of)
        return Prediction(
            volume.like(as_in_files(labels, labelling)),
            results.volume("probabilities"),
            collectors[0].result(volume),
            _present(presence, list(labelling.members)),
            results.volume("entropy"),
            results.volume("variance"),
        )

    def numbers_of(self, volume: Volume, track: TrackSlabs = untracked_slabs) -> Volume:
        """The labels in segkit's numbers 0, 1, 2, …, whatever files hold. Raises as a call."""
        return volume_within(self(volume, track=track).labels, self.model.description.labelling)

    @property
    def postprocessing(self) -> PostprocessingConfig:
        """What is done to the labels: what all models adopted, nothing if they differ."""
        adopted = [member.model.description.postprocessing for member in self.members]
        return adopted[0] if all(one == adopted[0] for one in adopted) else PostprocessingConfig()

    @property
    def temperature(self) -> float | None:
        """By what logits are divided for probabilities: the geometric mean of the models' own.

        A model without one counts as 1; None if no model has one.
        """
        given = [member.model.description.temperature for member in self.members]
        if not any(given):
            return None
        return math.exp(sum(math.log(each or 1.0) for each in given) / len(given))

    def prepare(
        self,
        volume: Volume,
        first_labels: Volume | None = None,
    ) -> Prepared:
        """The volume as the first network sees it. Raises ModelError and VolumeError as a call."""
        return self._prepare_all(self.with_numbers(volume), first_labels)[0]

    def with_numbers(self, volume: Volume) -> Volume:
        """The volume as every model reads it.

        If all were trained with `data.nan: background`, NaN and infinite values are 0; else it is
        the volume itself, and a call refuses such values.
        """
        if any(member.model.description.nan != "background" for member in self.members):
            return volume
        return volume.like(nan_as_zero(volume.data))

    def _prepare_all(
        self,
        volume: Volume,
        first_labels: Volume | None,
        *,
        on_device: bool = False,
    ) -> list[Prepared]:
        """The volume as each network sees it; those that see it alike share one image."""
        self._check(volume)
        images: dict[str, Prepared] = {}
        for member, stages in zip(self.members, self.first_stages, strict=True):
            if member.preparation in images:
                continue
            said = None
            if stages:
                said = (
                    majority([one.numbers_of(volume) for one in stages])
                    if first_labels is None
                    else volume_within(first_labels, stages[0].model.description.labelling)
                )
            images[member.preparation] = member.prepare(volume, said, on_device=on_device)
        return [images[member.preparation] for member in self.members]

    def _verdicts(
        self, walks: Sequence[Iterator[tuple[int, SourceRows]]], shares: bool, uncertainty: bool
    ) -> Iterator[tuple[int, MergedRows]]:
        """What is said of a few rows at a time, and the first of these rows."""
        voxels = PIECE_OF_SOURCE // len(self.model.description.labelling.outputs)
        if len(walks) == 1 and not shares and not uncertainty:
            voxels = VOXELS
        if self.members[0].device.type == "cuda":
            voxels *= TIMES_ON_GPU
        consult = SparingCouncil(
            shares=shares, uncertainty=uncertainty, temperature=self.temperature
        )
        for start, rows in merge(walks):
            for first, few in pieces(rows, voxels=voxels):
                yield start + first, consult(few)
            del rows, few  # or the slab would live on beside the next

    def _check(self, volume: Volume) -> None:
        expected = self.model.description.channels
        found = volume.data.shape[3] if volume.data.ndim == 4 else 1
        if found != len(expected):
            raise ModelError(
                f"the model expects {len(expected)} channels ({', '.join(expected)}), the volume "
                f"has {found}; give it the volumes it was trained on"
            )
        if trouble := trouble_with(volume.data):
            raise VolumeError(f"the volume {trouble}")
        unit = self.model.description.unit
        if volume.picture and volume.picture.sized != (unit != "pixel"):
            has = "a pixel size" if volume.picture.sized else "no pixel size"
            learned = "from pictures in pixels" if unit == "pixel" else f"at a scale in {unit}"
            raise VolumeError(
                f"the picture has {has}, and the model learned {learned}; give its pixel size as "
                f"--pixel-size, such as '{'pixel' if unit == 'pixel' else '0.5 µm'}'"
            )


def segment_prepared(
    network: SegmentationNetwork,
    image: Float[Tensor, "channel x y z"],
    *,
    patch_size: tuple[int, int, int],
    overlap: float = 0.5,
    written: Sequence[int] | None = None,
) -> Tensor:
    """Labels of a prepared image on its own grid: what validation during training looks at.

    `written` are the numbers of regions, in order, where the network's outputs are regions.
    """
    device = next(network.parameters()).device
    on_gpu = device.type == "cuda"
    # On a GPU in the precision that training is in.
    half = on_gpu and torch.is_autocast_enabled("cuda")
    precision = torch.get_autocast_dtype("cuda") if half else torch.float32
    engine = TorchEngine(network, device=device, precision=precision)
    layout = window_layout(network, patch_size, overlap)
    batch_size = WINDOWS_ON_GPU if on_gpu else WINDOWS_IN_TRAINING
    slabs = stream(image, lambda windows: engine(windows, ()), layout, batch_size=batch_size)
    return torch.cat([labels_of(slab.rows.pop(LOGITS), written) for slab in slabs])


def as_small(labels: Tensor, kind: np.dtype[Any]) -> Tensor:
    """Labels of a GPU in a small type, so that less has to be copied to the host."""
    if labels.device.type == "cpu":
        return labels
    return labels.to(torch.uint8 if kind.itemsize == 1 else torch.int32)


def _check_alike(models: Sequence[Model]) -> None:
    if not models:
        raise ModelError("expected a model, or several, found none")
    first = models[0].description
    for other in (model.description for model in models[1:]):
        for what in ("labels", "regions", "in_files", "channels"):
            expected, found = list(getattr(first, what)), list(getattr(other, what))
            if getattr(first, what) != getattr(other, what):
                raise ModelError(
                    f"models that predict together share labels and channels, but {first.run} has "
                    f"the {what} {', '.join(expected)} and {other.run} has {', '.join(found)}; "
                    f"name models of one task"
                )


def _present(members: Sequence[list[Tensor]], names: list[str]) -> dict[str, float] | None:
    told = [
        torch.stack([window.cpu() for window in windows]).amax(dim=0).float().sigmoid()
        for windows in members
        if windows
    ]
    if not told:
        return None
    return dict(zip(names, torch.stack(told).mean(dim=0).tolist(), strict=True))
