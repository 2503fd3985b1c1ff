"""Labels, probabilities and attention maps of a volume on its own grid, in one pass.

    volume ─▶ prepared ─▶ windows ─▶ engine ─▶ blended slab ─▶ the volume's rows ─▶ labels
                                        └────▶ maps, each on its own coarse grid

A slab of logits is resampled to the volume's grid, a few rows at once, reduced to labels and freed.
If there are several models, each does this, and the probabilities of the same rows are averaged.
Post-processing comes last and needs the labels of the whole volume in memory, because a connected
component may span all slabs.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from segkit.config.model import PostprocessingConfig
from segkit.data.first_stage_labels import majority
from segkit.data.label_numbers import as_in_files, volume_within
from segkit.data.preprocess import Prepared
from segkit.errors import ModelError, SegkitError, VolumeError, counted
from segkit.inference import postprocess as components
from segkit.inference.attention_maps import AttentionMap, MapCollector
from segkit.inference.engines.out_of_memory import RowCombiner
from segkit.inference.ensemble import MergedRows, merge
from segkit.inference.model_walk import (
    Float16OverflowError,
    ModelWalk,
    PredictionOptions,
    PredictionSettings,
    TrackSlabs,
    untracked_slabs,
)
from segkit.inference.output_arrays import LateLabels, Results
from segkit.inference.source_rows import SourceRows, pieces
from segkit.io.disk_arrays import Allocate, in_memory
from segkit.io.nan_values import nan_as_zero, value_problem
from segkit.io.volume import Volume
from segkit.model.folder import Model, load_model, model_folders

PIECE_OF_SOURCE = 2**22
"""Number of probabilities (voxels times classes) that are resampled at once."""
VOXELS = 2**18
"""Number of voxels that are resampled at once if only labels are requested."""


TIMES_ON_GPU = 64
"""A GPU resamples this many times more at once, because it uses no cache and each call is slow."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """Prediction of one or several models for a volume; all but the maps are on the volume's grid.

    Example:
        prediction = segkit.Predictor.load("runs/mine")(scan, probabilities=True)
        segkit.write_volume("scan_seg.nii.gz", prediction.labels)
    """

    labels: Volume
    """Label of each voxel (x, y, z), in the smallest unsigned type that holds all labels."""
    probabilities: Volume | None
    """Float32 (x, y, z, class or region), in [0, 1], before post-processing. Those of classes sum
    to 1, and the label has the largest. None if not requested."""
    maps: dict[str, AttentionMap]
    """Attention maps of the first model, by keys such as 'skip.1/gate', each on its own coarser
    grid. Empty if not requested."""
    presence: dict[str, float] | None = None
    """Probability that the volume contains each class: the maximum over windows, and then the mean
    over models with a presence head. None if no model has one."""
    entropy: Volume | None = None
    """Entropy of the probabilities, divided by that of equal probabilities: float32 (x, y, z), in
    [0, 1]. None if not requested."""
    variance: Volume | None = None
    """Variance of the probabilities between models and between mirror images, mean over classes:
    float32 (x, y, z). NaN for one model without mirror images, which has no variance. None if not
    requested."""


class Predictor:
    """Segments volumes with one model, or with several models of the same labels and channels.

    Several threads may call a predictor at the same time.

    Example:
        predictor = segkit.Predictor.load("runs/mine", tta=True, device="cuda")
        prediction = predictor(segkit.read_volume("scan.nii.gz"), maps=True)

    Args:
        models: a trained model, or several, whose probabilities are averaged.
        device: 'auto' (the default: a GPU if there is one), 'cpu', 'cuda' or another name of
            PyTorch's.
        overlap: share of a window that neighbours have in common, in [0, 1); 0.5 by default.
        batch_size: number of windows and mirror images in each call of the network; by default 4 on
            a GPU, and 1 on a CPU (2 if PyTorch runs the network and windows are small).
        precision: data type of the network's arithmetic; by default `torch.float32` on a CPU and
            `torch.float16` on a GPU. Sums over windows are always float32.
        tta: average the logits of each window over its mirror images, along the axes that were
            mirrored in training; False by default.
        skip_empty: do not run the network on windows in which every voxel of the volume is 0; these
            become background. True by default. Maps are NaN at cells that only such windows cover.
        engine: 'torch', 'compile', 'openvino' or 'onnx'; 'auto', the default, chooses the fastest
            by the rule of `choose_engine`.

    Raises:
        ModelError: there is no model, the models have different labels or channels, or the engine
            is not installed or does not support the device or the precision.
        ConfigError: the features of a window need more memory than is free.
    """

    def __init__(
        self, models: Model | Sequence[Model], **options: Unpack[PredictionOptions]
    ) -> None:
        models = [models] if isinstance(models, Model) else models
        _check_alike(models)
        self.settings = PredictionSettings(**options).with_precision()
        self.members = [ModelWalk(model, self.settings) for model in models]
        self.model = models[0]
        """The first model. `layout` is its layout of windows."""
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
            paths: runs, model folders, or cross-validations; the latter give the model of each
                fold. Addresses such as `hf:OWNER/NAME` are fetched (see `fetch_model`).
            network: the Python module with which the model was trained, if any; only for one model.
            checkpoint: `best` or `last`: take the weights from this checkpoint of each run. If not
                given, take the weights at the end of the run.
            options: options of `Predictor`, such as `precision` and `tta`.

        Returns:
            A predictor of all these models together.

        Raises:
            ModelError: a path has no model, the models have different labels or channels, `network`
                is given for several models, or `Predictor` raises it.
            ConfigError: the features of a window need more memory than is free.
        """
        folders = [folder for path in paths for folder in model_folders(path, checkpoint)]
        if network is not None and len(folders) > 1:
            raise ModelError(
                f"network: one module cannot hold the weights of {len(folders)} models; load each "
                f"model with its own module: Predictor([load_model(path, network=module), …])"
            )
        models = [load_model(folder, network=network, checkpoint=checkpoint) for folder in folders]
        return cls(models, **options)

    @property
    def classifies(self) -> bool:
        """True if predictions have `presence`."""
        return any(member.model.network.presence is not None for member in self.members)

    @property
    def mirrors(self) -> bool:
        """True if any model runs on mirror images."""
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
        images: Sequence[Prepared] | None = None,
    ) -> Prediction:
        """Labels of every voxel on the volume's own grid, and other results if requested.

        Args:
            volume: (x, y, z) or (x, y, z, channel), with the channels of the training data.
            first_labels: labels of the first stage, if they are known. Otherwise a model with a
                first stage predicts them.
            maps: return attention maps, from the same pass.
            disagreement: compute how much windows disagree about each map.
            probabilities: return probabilities.
            uncertainty: return entropy and variance.
            allocate: makes the arrays of all results but the labels, such as `OnDisk(folder)`.
            track: `track(slabs, count)` returns the same slabs and may show progress. It is called
                once for each volume, but not for a first stage. (If outputs overflow float16, the
                volume is predicted again in float32, and `track` is called again.)
            images: the result of `prepare_next` for the same volume, if there is one.

        Returns:
            The prediction. Results that were not requested are None; `maps` is then empty.

        Raises:
            ModelError: the channels do not fit, or the network's output contains NaN or infinity.
            VolumeError: the volume contains NaN or infinity, and a model was not trained with
                `data.nan: background`; a channel contains no finite number; or a picture has a
                pixel size and the pictures in training had none, or the reverse.
        """
        if images is None:
            volume = self.with_numbers(volume)
            images = self._prepare_all(volume, first_labels, on_device=True)
        predict = partial(
            self._predict,
            volume,
            images,
            maps=maps,
            disagreement=disagreement,
            probabilities=probabilities,
            uncertainty=uncertainty,
            allocate=allocate,
            track=track,
        )
        while True:
            try:
                return predict()
            except Float16OverflowError as error:
                overflowing = error.walk
            # When that block has ended, the memory of the failed call is free. Each model can fail
            # so only once.
            overflowing.use_float32()

    def _predict(
        self,
        volume: Volume,
        images: Sequence[Prepared],
        *,
        maps: bool,
        disagreement: bool,
        probabilities: bool,
        uncertainty: bool,
        allocate: Allocate,
        track: TrackSlabs,
    ) -> Prediction:
        """The prediction from prepared images; `__call__` explains the arguments.

        Raises:
            Float16OverflowError: a network that runs in float16 gives NaN or infinity.
            ModelError: another network does.
        """
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
                # All models finish the same rows at about the same time.
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
            # Voxels that the network does not see are background: class 0, or none of the regions.
            beyond = [0.0] * len(labelling.outputs)
            beyond[0] = float(labelling.written is None)
            results.add("probabilities", np.dtype(np.float32), beyond)
        if uncertainty:
            results.add("entropy", np.dtype(np.float32), [0.0])
            alone = len(self.members) == 1 and not self.members[0].mirror_axes
            results.add("variance", np.dtype(np.float32), [np.nan if alone else 0.0])
        turned = first.orientation.turn(labels)[first.box]
        late = LateLabels(turned)
        for start, merged in self._merged_rows(walks, probabilities, uncertainty):
            rows = slice(start, start + merged.labels.shape[-1])
            late.put(rows, merged.labels)
            for name, values in (
                ("probabilities", merged.probabilities),
                ("entropy", merged.entropy),
                ("variance", merged.variance),
            ):
                if values is not None:
                    results.put(name, rows, values if values.ndim == 4 else values[None])
            del merged, values
        late.finish()
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
        """Labels in segkit's numbers 0, 1, 2, …. It raises the same errors as a prediction.

        Args:
            volume: (x, y, z) or (x, y, z, channel), with the channels of the training data.
            track: shows the progress, as in a call of the predictor.
        """
        return volume_within(self(volume, track=track).labels, self.model.description.labelling)

    @property
    def postprocessing(self) -> PostprocessingConfig:
        """Post-processing of the labels, if it is the same for all models; otherwise none."""
        adopted = [member.model.description.postprocessing for member in self.members]
        return adopted[0] if all(one == adopted[0] for one in adopted) else PostprocessingConfig()

    @property
    def temperature(self) -> float | None:
        """The divisor of logits before they become probabilities: the geometric mean over models.

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
        """The image that the first network gets. It raises the same errors as a prediction.

        Args:
            volume: (x, y, z) or (x, y, z, channel), with the channels of the training data.
            first_labels: labels of the first stage, if they are known.
        """
        return self._prepare_all(self.with_numbers(volume), first_labels)[0]

    def prepare_next(self, volume: Volume) -> list[Prepared] | None:
        """The image of each network, prepared while the predictor works on another volume.

        Another thread may call this. Predictions are the same bit for bit as without it.

        Args:
            volume: the next volume, as `with_numbers` returns it.

        Returns:
            The argument `images` of a later call with this volume. None if the networks of a first
            stage must run before, if memory is short, or if the volume cannot be prepared; the
            call then prepares it, and raises the error if there is one.
        """
        if any(self.first_stages):
            return None
        if not all(member.has_room_for_next(volume) for member in self.members):
            return None
        try:
            return self._prepare_all(volume, None, on_device=True)
        except (SegkitError, torch.OutOfMemoryError):
            return None

    def with_numbers(self, volume: Volume) -> Volume:
        """The volume, with 0 for NaN and infinity if all models have `data.nan: background`.

        Otherwise it is the volume itself, and prediction raises an error if it has such values.

        Args:
            volume: (x, y, z) or (x, y, z, channel).
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
        """The image that each network gets; networks with equal preparation share one image."""
        self._check(volume)
        images: dict[str, Prepared] = {}
        for member, stages in zip(self.members, self.first_stages, strict=True):
            if member.preparation in images:
                continue
            labels = None
            if stages:
                labels = (
                    majority([one.numbers_of(volume) for one in stages])
                    if first_labels is None
                    else volume_within(first_labels, stages[0].model.description.labelling)
                )
            images[member.preparation] = member.prepare(volume, labels, on_device=on_device)
        return [images[member.preparation] for member in self.members]

    def _merged_rows(
        self,
        walks: Sequence[Iterator[tuple[int, SourceRows]]],
        probabilities: bool,
        uncertainty: bool,
    ) -> Iterator[tuple[int, MergedRows]]:
        """The first row and the combined outputs of a few rows at once."""
        voxels = PIECE_OF_SOURCE // len(self.model.description.labelling.outputs)
        if len(walks) == 1 and not probabilities and not uncertainty:
            voxels = VOXELS
        if self.members[0].device.type == "cuda":
            voxels *= TIMES_ON_GPU
        combine = RowCombiner(
            probabilities=probabilities, uncertainty=uncertainty, temperature=self.temperature
        )
        for start, rows in merge(walks):
            for first, few in pieces(rows, voxels=voxels):
                yield start + first, combine(few)
            del rows, few  # frees the slab's memory before the next slab is made

    def _check(self, volume: Volume) -> None:
        expected = self.model.description.channels
        found = volume.data.shape[3] if volume.data.ndim == 4 else 1
        if found != len(expected):
            advice = (
                "use the channels of the training data"
                if found > len(expected)
                else "stack the channels in one volume, name their files CASE_0000, CASE_0001 and "
                "so on, or pass a YAML file or a table that names the file of each channel"
            )
            raise ModelError(
                f"the model expects {counted(len(expected), 'channel')} ({', '.join(expected)}), "
                f"found {found} in the volume; {advice}"
            )
        if trouble := value_problem(volume.data):
            raise VolumeError(f"the volume {trouble}")
        unit = self.model.description.unit
        if volume.picture and volume.picture.sized != (unit != "pixel"):
            found_size = "a pixel size" if volume.picture.sized else "no pixel size"
            wanted = "without a pixel size" if unit == "pixel" else f"with a pixel size in {unit}"
            raise VolumeError(
                f"the picture has {found_size}, but the model was trained on pictures {wanted}; "
                f"set --pixel-size, such as '{'pixel' if unit == 'pixel' else '0.5 µm'}'"
            )


def _check_alike(models: Sequence[Model]) -> None:
    if not models:
        raise ModelError("expected at least one model, found none; pass models to Predictor")
    first = models[0].description
    for other in (model.description for model in models[1:]):
        for name in ("labels", "regions", "in_files", "channels"):
            expected, found = list(getattr(first, name)), list(getattr(other, name))
            if getattr(first, name) != getattr(other, name):
                raise ModelError(
                    "models that predict together must have the same labels and channels, but "
                    f"{first.run} has the {name} {', '.join(expected)} and {other.run} has "
                    f"{', '.join(found)}; use models of the same task"
                )


def _present(members: Sequence[list[Tensor]], names: list[str]) -> dict[str, float] | None:
    probabilities = [
        torch.stack([window.cpu() for window in windows]).amax(dim=0).float().sigmoid()
        for windows in members
        if windows
    ]
    if not probabilities:
        return None
    return dict(zip(names, torch.stack(probabilities).mean(dim=0).tolist(), strict=True))
