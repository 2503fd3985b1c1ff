"""From a volume to labels, probabilities and attention maps on the volume's own grid, in one walk.

    volume ─▶ prepared ─▶ windows ─▶ engine ─▶ blended slab ─▶ the volume's rows ─▶ labels
                                        └────▶ maps, each on one coarse grid of its own

A slab of logits is resampled to the volume's grid, a few rows at a time, reduced to labels and let
go. Several models each walk so, and what they say of the same rows is averaged.
Post-processing, where a model has it, comes last: a component may span every slab, so it needs the
labels of the whole volume in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.config.model import PostprocessingConfig
from segkit.data.first_stage_labels import majority
from segkit.data.preprocess import Prepared
from segkit.errors import ModelError, VolumeError
from segkit.inference import postprocess as components
from segkit.inference.attention_maps import AttentionMap, MapCollector, map_on_source
from segkit.inference.engines.choose import EngineName
from segkit.inference.engines.out_of_memory import SparingCouncil
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.ensemble import MergedRows, merge
from segkit.inference.model_walk import ModelWalk, TrackSlabs, window_layout
from segkit.inference.output_arrays import Results
from segkit.inference.source_rows import (
    WALK_AXIS,
    SourceRows,
    pieces,
    to_source_rows,
    written_regions,
)
from segkit.inference.windows import stream
from segkit.io.disk_arrays import Allocate, in_memory
from segkit.io.volume import Volume, trouble_with
from segkit.model.folder import Model, load_model, model_folders
from segkit.nn.network import SegmentationNetwork

__all__ = [
    "WALK_AXIS",
    "AttentionMap",
    "Prediction",
    "Predictor",
    "SourceRows",
    "TrackSlabs",
    "map_on_source",
    "segment_prepared",
    "to_source_rows",
    "window_layout",
]

PIECE_OF_SOURCE = 2**22
"""Numbers, one for each voxel and class, that a slab is resampled to at once …"""
VOXELS = 2**18
"""… or voxels, where labels are all that is asked for."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model, or several, make of a volume: all but maps on the volume's own grid."""

    labels: Volume
    """A number for each voxel (x, y, z), in the smallest unsigned type that holds them."""
    probabilities: Volume | None
    """Float16 (x, y, z, class or region); post-processing leaves them as they are."""
    maps: dict[str, AttentionMap]
    """The first model's, by keys such as 'skip.1/gate', each on its own coarser grid."""
    presence: dict[str, float] | None = None
    """Of networks with a head for it, the probability that the volume holds any of each class: the
    highest of its windows', and the mean of the models that have such a head."""
    entropy: Volume | None = None
    """Of the probabilities, over that of classes all alike: from 0 to 1, float32."""
    variance: Volume | None = None
    """Of the probabilities between models and between mirror images, mean over classes, float32."""


class Predictor:
    """Segments volumes with a model, or with several that share labels and channels.

    One predictor may be called from several threads at once.

    Args:
        models: a trained model, or several: their probabilities are averaged.
        device: 'auto', 'cpu', 'cuda' or any name that torch knows.
        overlap: share of a window that neighbours have in common.
        batch_size: windows, and mirror images of them, per call of the network.
        precision: of the network's arithmetic; sums over windows are always float32.
        tta: whether the logits of each window are averaged over its mirror images along the axes
            that the model was trained to mirror.
        skip_empty: whether windows under which the volume is 0 throughout are background unasked.
        engine: what runs the network; 'auto' is the fastest that `choose_engine` knows here.
    """

    def __init__(
        self,
        models: Model | Sequence[Model],
        *,
        device: str = "auto",
        overlap: float = 0.5,
        batch_size: int = 1,
        precision: torch.dtype = torch.float32,
        tta: bool = False,
        skip_empty: bool = True,
        engine: EngineName = "auto",
    ) -> None:
        models = [models] if isinstance(models, Model) else models
        _check_alike(models)
        self.settings: Mapping[str, object] = {
            "overlap": overlap,
            "precision": str(precision).removeprefix("torch."),
            "tta": tta,
            "skip_empty": skip_empty,
            "engine": engine,
        }
        """What decides what is said, beside the models."""
        self.members = [
            ModelWalk(
                model,
                device=device,
                overlap=overlap,
                batch_size=batch_size,
                precision=precision,
                tta=tta,
                skip_empty=skip_empty,
                engine=engine,
            )
            for model in models
        ]
        self.model = models[0]
        """The first, and its layout of windows."""
        self.layout = self.members[0].layout
        self.first_stages: list[list[Predictor]] = [
            [
                Predictor(
                    first,
                    device=device,
                    overlap=overlap,
                    batch_size=batch_size,
                    precision=precision,
                    tta=tta,
                    skip_empty=skip_empty,
                    engine=engine,
                )
                for first in model.first
            ]
            for model in models
        ]

    @classmethod
    def load(
        cls,
        *paths: Path | str,
        device: str = "auto",
        overlap: float = 0.5,
        batch_size: int = 1,
        tta: bool = False,
        skip_empty: bool = True,
        engine: EngineName = "auto",
        network: nn.Module | None = None,
    ) -> "Predictor":
        """A predictor from runs or model folders. Raises ModelError where there is none.

        `network` is the module of a model that was trained with one.
        """
        folders = [folder for path in paths for folder in model_folders(Path(path))]
        if network is not None and len(folders) > 1:
            raise ModelError(
                f"one module cannot hold the weights of {len(folders)} models; load each with a "
                f"module of its own: Predictor([load_model(path, network=module), …])"
            )
        return cls(
            [load_model(folder, network=network) for folder in folders],
            device=device,
            overlap=overlap,
            batch_size=batch_size,
            tta=tta,
            skip_empty=skip_empty,
            engine=engine,
        )

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
        track: TrackSlabs = lambda slabs, count: slabs,
    ) -> Prediction:
        """Labels of every voxel of `volume`, and what else is asked for: probabilities, attention
        maps, with how far windows disagree about them, and uncertainty, which is entropy and
        variance.

        `first_labels` are those of the first stage where they are known already; a model with one
        finds them itself. `allocate` gives the arrays for all but labels; `track(slabs, count)` may
        show progress. Raises ModelError where the channels do not fit, VolumeError for voxels that
        are not numbers.
        """
        images = self._prepare_all(volume, first_labels, track)
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
                track=track if number == 0 else lambda slabs, count: slabs,
            )
            for number, (member, prepared, collector, seen) in enumerate(
                zip(self.members, images, collectors, presence, strict=True)
            )
        ]
        labelling = self.model.description.labelling
        kind = np.min_scalar_type(max(labelling.numbers.values()))
        labels = np.zeros(volume.grid.shape, kind, order="F")
        results = Results(volume, first, allocate=allocate)
        if probabilities:
            # What the network never sees is background, which has no place among regions.
            beyond = [0.0] * len(labelling.outputs)
            beyond[0] = float(labelling.written is None)
            results.add("probabilities", np.dtype(np.float16), beyond)
        if uncertainty:
            results.add("entropy", np.dtype(np.float32), [0.0])
            results.add("variance", np.dtype(np.float32), [0.0])
        turned = first.orientation.turn(labels)[first.box]
        for start, verdict in self._verdicts(walks, probabilities, uncertainty):
            rows = slice(start, start + verdict.labels.shape[-1])
            turned[:, :, rows] = verdict.labels.cpu().numpy()
            if verdict.probabilities is not None:
                results.put("probabilities", rows, verdict.probabilities)
            if verdict.entropy is not None and verdict.variance is not None:
                results.put("entropy", rows, verdict.entropy[None])
                results.put("variance", rows, verdict.variance[None])
            del verdict
        adopted = self.postprocessing
        labels = components.apply(labels, adopted.largest_foreground, adopted.largest_of)
        return Prediction(
            volume.like(labels),
            results.volume("probabilities"),
            collectors[0].result(volume),
            _present(presence, list(labelling.members)),
            results.volume("entropy"),
            results.volume("variance"),
        )

    @property
    def postprocessing(self) -> PostprocessingConfig:
        """What is done to the labels: what all models adopted, nothing where they differ."""
        adopted = [member.model.description.postprocessing for member in self.members]
        return adopted[0] if all(one == adopted[0] for one in adopted) else PostprocessingConfig()

    def prepare(
        self,
        volume: Volume,
        first_labels: Volume | None = None,
        track: TrackSlabs = lambda slabs, count: slabs,
    ) -> Prepared:
        """The volume as the first network sees it. Raises ModelError and VolumeError as a call."""
        return self._prepare_all(volume, first_labels, track)[0]

    def _prepare_all(
        self, volume: Volume, first_labels: Volume | None, track: TrackSlabs
    ) -> list[Prepared]:
        """The volume as each network sees it; those that see it alike share one image."""
        self._check(volume)
        images: dict[str, Prepared] = {}
        for member, stages in zip(self.members, self.first_stages, strict=True):
            if member.preparation in images:
                continue
            said = None
            if stages:
                said = first_labels or majority([one(volume, track=track).labels for one in stages])
            images[member.preparation] = member.prepare(volume, said)
        return [images[member.preparation] for member in self.members]

    def _verdicts(
        self, walks: Sequence[Iterator[tuple[int, SourceRows]]], shares: bool, uncertainty: bool
    ) -> Iterator[tuple[int, MergedRows]]:
        """What is said of a few rows at a time, and the first of these rows."""
        voxels = PIECE_OF_SOURCE // len(self.model.description.labelling.outputs)
        if len(walks) == 1 and not shares and not uncertainty:
            voxels = VOXELS
        consult = SparingCouncil(shares=shares, uncertainty=uncertainty)
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
    engine = TorchEngine(network, device=device)
    patch, overlaps, multiple = window_layout(network, patch_size, overlap)
    slabs = stream(
        image,
        lambda windows: engine(windows, ()),
        patch_size=patch,
        overlap=overlaps,
        multiple=multiple,
    )
    parts = []
    for slab in slabs:
        logits = slab.rows.pop(LOGITS)
        if written is None:
            parts.append(logits.max(dim=0).indices)
        else:
            parts.append(written_regions(logits, written))
    return torch.cat(parts)


def _check_alike(models: Sequence[Model]) -> None:
    if not models:
        raise ModelError("expected a model, or several, found none")
    first = models[0].description
    for other in (model.description for model in models[1:]):
        for what in ("labels", "regions", "channels"):
            expected, found = list(getattr(first, what)), list(getattr(other, what))
            if getattr(first, what) != getattr(other, what):
                raise ModelError(
                    f"models that predict together share labels and channels, but {first.run} has "
                    f"the {what} {', '.join(expected)} and {other.run} has {', '.join(found)}; "
                    f"name models of one task"
                )


def _present(members: Sequence[list[Tensor]], names: list[str]) -> dict[str, float] | None:
    told = [torch.stack(windows).amax(dim=0).float().sigmoid() for windows in members if windows]
    if not told:
        return None
    return dict(zip(names, torch.stack(told).mean(dim=0).tolist(), strict=True))
