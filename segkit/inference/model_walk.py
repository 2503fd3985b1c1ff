"""One model at work: how its windows are laid out, run and walked over."""

import itertools
import math
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor

from segkit.data.first_stage_labels import with_labels
from segkit.data.normalise import build_normalisers
from segkit.data.preprocess import Prepared, prepare_image
from segkit.errors import ModelError
from segkit.inference.attention_maps import MapCollector
from segkit.inference.empty_windows import empty_windows
from segkit.inference.engines.choose import EngineName, choose_engine
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, Engine
from segkit.inference.mirrors import SPREAD, Mirrored, mirrored_map
from segkit.inference.source_rows import WALK_AXIS, SourceRows, to_source_rows
from segkit.inference.windows import Slab, WindowFunction, WindowLayout, WindowPlace, stream
from segkit.io.volume import Volume
from segkit.model.build import check_windows
from segkit.model.folder import Model
from segkit.nn.map_tap import MapInfo
from segkit.nn.network import SegmentationNetwork
from segkit.system.resources import choose_device, free_memory_of

PLANES_PER_WINDOW = 8
WINDOWS_ON_GPU = 4
"""That a GPU is asked about at once."""
BYTES_PREPARED = 4
SHARE_FOR_IMAGE = 0.25
"""Of a GPU's free memory, what an image on both grids may take."""
UNLIKELY = -30.0
"""The logit of every class but the background, or of every region, where no window was asked."""

TrackSlabs = Callable[[Iterable[Slab], int], Iterable[Slab]]


def untracked_slabs(slabs: Iterable[Slab], count: int) -> Iterable[Slab]:
    """The same slabs, with no progress shown."""
    return slabs


class PredictionOptions(TypedDict, total=False):
    """The settings of prediction as keyword arguments; `PredictionSettings` has their defaults."""

    device: str
    overlap: float
    batch_size: int | None
    precision: torch.dtype | None
    tta: bool
    skip_empty: bool
    engine: EngineName


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How models predict, defaults included; `Predictor` explains each."""

    device: str = "auto"
    overlap: float = 0.5
    batch_size: int | None = None
    precision: torch.dtype | None = None
    tta: bool = False
    skip_empty: bool = True
    engine: EngineName = "auto"

    def settled(self) -> "PredictionSettings":
        """The same, with what a device is fastest with where nothing is asked for.

        A GPU computes in float16, four windows at once; a CPU in float32, one at a time. (Of the
        half types float16 has the finer steps, 0.0005 below 1, which maps of gates need.)
        """
        converted = self.engine in ("openvino", "onnx")
        on_gpu = not converted and choose_device(self.device).type == "cuda"
        return replace(
            self,
            batch_size=self.batch_size or (WINDOWS_ON_GPU if on_gpu else 1),
            precision=self.precision or (torch.float16 if on_gpu else torch.float32),
        )

    def told(self) -> dict[str, object]:
        """The settings that the labels depend on, as the file beside a result has them."""
        return {
            "overlap": self.overlap,
            "precision": str(self.precision).removeprefix("torch."),
            "tta": self.tta,
            "skip_empty": self.skip_empty,
            "engine": self.engine,
        }


class ModelWalk:
    """One model of those that predict together."""

    def __init__(self, model: Model, settings: PredictionSettings) -> None:
        settings = settings.settled()
        assert settings.batch_size is not None and settings.precision is not None
        self.model = model
        self.device = choose_device(settings.device)
        self.engine: Engine = choose_engine(
            settings.engine, model, device=settings.device, precision=settings.precision
        )
        self.layout = layout_of(model, settings.overlap)
        if self.device.type == "cpu":
            check_windows(model.description, self.layout.patch_size)
        self.batch_size = settings.batch_size
        self.skip_empty = settings.skip_empty
        self.normalisers = build_normalisers(model.description.normalisation)
        self.mirror_axes = model.description.mirror_axes if settings.tta else ()
        # Maps are recorded on the network itself, which several threads may share.
        self.lock = threading.Lock()

    @property
    def preparation(self) -> str:
        """What the prepared image depends on, beside the volume: where equal, it may be shared."""
        settings = {"spacing", "normalisation", "interpolation"}
        told = self.model.description.model_dump_json(include=settings)
        # Labels of a first stage are a channel of the image, and each model has stages of its own.
        return f"{told} {id(self.model)}" if self.model.first else told

    def prepare(
        self, volume: Volume, first_labels: Volume | None, *, on_device: bool = False
    ) -> Prepared:
        """The volume as the network sees it, with the labels of the first stage if it has one.

        The image lies in the host's memory, or `on_device` on a GPU that has room for it.
        """
        prepared = prepare_image(
            volume,
            spacing=self.model.description.spacing,
            normalisers=self.normalisers,
            order=self.model.description.interpolation_order,
            device=self.device if on_device and self._holds(volume) else None,
        )
        return prepared if first_labels is None else with_labels(prepared, first_labels)

    def _holds(self, volume: Volume) -> bool:
        """Whether the device is a GPU with room for a volume's image and copies of it."""
        if self.device.type != "cuda":
            return False
        source, wanted = volume.grid.spacing, self.model.description.spacing
        voxels = math.prod(
            size * (old / new + 1)
            for size, old, new in zip(volume.grid.shape, source, wanted, strict=True)
        )
        needed = BYTES_PREPARED * len(self.normalisers) * voxels
        return needed < SHARE_FOR_IMAGE * free_memory_of(self.device)

    def maps(self) -> dict[str, MapInfo]:
        """The maps that a walk gives, by key."""
        infos = self.model.network.maps()
        return {key: mirrored_map(info, self.mirror_axes) for key, info in infos.items()}

    def walk(
        self,
        volume: Volume,
        prepared: Prepared,
        *,
        maps: MapCollector,
        presence: list[Tensor],
        uncertainty: bool,
        track: TrackSlabs,
    ) -> Iterator[tuple[int, SourceRows]]:
        """Rows of the volume, with their first, as soon as they are known.

        On the way `maps` gathers those of its keys, and `presence` gets the logits of each batch.
        """
        spreads = uncertainty and len(self.mirror_axes) > 0
        starts = self.layout.starts(prepared.grid.shape)
        empty: frozenset[WindowPlace] = frozenset()
        if self.skip_empty:
            empty = empty_windows(volume, prepared, self.layout)
        if maps.spread is not None:
            asked = (place for place in itertools.product(*starts) if place not in empty)
            maps.spread.will_see(asked, self.layout.patch_size)
        slabs = stream(
            prepared.image,
            self._function(maps, presence, spreads),
            self.layout,
            axis=WALK_AXIS,
            batch_size=self.batch_size,
            skip=empty,
            unseen={LOGITS: self.background(spreads=spreads), **maps.unseen()},
        )
        return to_source_rows(
            self._logits_of(track(slabs, len(starts[WALK_AXIS])), maps),
            prepared,
            written=self.model.description.labelling.written,
            with_spread=spreads,
        )

    def _function(
        self, maps: MapCollector, presence: list[Tensor], spreads: bool
    ) -> WindowFunction:
        """What is asked about each batch of windows: logits, with their spread, and placed maps."""
        keys = [
            *maps.infos,
            *([PRESENCE] if self.model.network.presence is not None else []),
            *([SPREAD] if spreads else []),
        ]
        engine = self.engine
        if self.mirror_axes:
            regions = self.model.description.labelling.written is not None
            engine = Mirrored(engine, self.mirror_axes, batch_size=self.batch_size, regions=regions)

        def run(windows: Tensor) -> dict[str, Tensor]:
            with self.lock:
                outputs = engine(windows, keys)
            maps.take_vectors(outputs)
            if PRESENCE in outputs:
                presence.append(outputs.pop(PRESENCE).amax(dim=0))
            if spreads:
                outputs[LOGITS] = torch.cat([outputs[LOGITS], outputs.pop(SPREAD)], dim=1)
            return outputs

        return run

    def background(self, *, spreads: bool = False) -> Tensor:
        """The outputs at a voxel that no window covers: background, or no region; no spread."""
        labelling = self.model.description.labelling
        background = torch.full((len(labelling.outputs),), UNLIKELY)
        if labelling.written is None:
            background[0] = 0
        return torch.cat([background, torch.zeros(1)]) if spreads else background

    def _logits_of(self, slabs: Iterable[Slab], maps: MapCollector) -> Iterator[Tensor]:
        """The logits of each slab, whose maps are taken out."""
        for slab in slabs:
            maps.take_rows(slab)
            # By no name of its own, or it would live on beside the next.
            yield self._checked(slab.rows.pop(LOGITS))

    def _checked(self, logits: Tensor) -> Tensor:
        """The same logits. Raises ModelError if one is NaN or infinite."""
        # A sum reads them once and copies nothing. That of huge numbers may be none itself, so only
        # then is each looked at, a row at a time, as that copies.
        if not bool(logits.sum().isfinite()) and not all(
            bool(row.isfinite().all()) for row in logits.movedim(-1, 0)
        ):
            raise ModelError(
                f"the output of the network of {self.model.description.run} contains NaN or "
                f"infinity; predict in float32, or train it again"
            )
        return logits


def window_layout(
    network: SegmentationNetwork, patch_size: tuple[int, int, int], overlap: float
) -> WindowLayout:
    """The windows of a network over a volume.

    Planes of a 2D network need no overlap; several go into one window.
    """
    patch = tuple(PLANES_PER_WINDOW if size == 1 else size for size in patch_size)
    overlaps = tuple(0.0 if size == 1 else overlap for size in patch_size)
    return WindowLayout(patch, overlaps, network.total_stride)


def layout_of(model: Model, overlap: float = 0.5) -> WindowLayout:
    """The windows of a model over a volume."""
    return window_layout(model.network, model.description.volume_patch, overlap)
