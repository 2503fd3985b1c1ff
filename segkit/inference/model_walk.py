"""Run one model over a volume: lay out its windows, run them, and yield rows of the volume."""

import itertools
import logging
import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from segkit.inference.engines.choose import EngineName, choose_engine, is_converted
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, Engine, windows_at_once
from segkit.inference.finite_watch import FiniteWatch
from segkit.inference.mirrors import SPREAD, Mirrored, mirrored_map
from segkit.inference.source_rows import WALK_AXIS, SourceRows, to_source_rows
from segkit.inference.windows import Slab, WindowFunction, WindowLayout, WindowPlace, stream
from segkit.io.volume import Volume
from segkit.model.build import check_windows
from segkit.model.folder import Model
from segkit.nn.map_tap import MapInfo
from segkit.nn.network import SegmentationNetwork
from segkit.system.resources import choose_device, free_memory_of, limit_threads

SLICES_PER_WINDOW = 8
"""Slices of a window of a 2D network, if the image has as many."""
BYTES_PREPARED = 4
SHARE_FOR_IMAGE = 0.25
"""Share of a GPU's free memory that an image may use, on the volume's and the network's grid."""
UNLIKELY = -30.0
"""Logit of each class but the background, or of each region, at voxels without any window."""

logger = logging.getLogger(__name__)

TrackSlabs = Callable[[Iterable[Slab], int], Iterable[Slab]]


def untracked_slabs(slabs: Iterable[Slab], count: int) -> Iterable[Slab]:
    """The same slabs, without showing progress."""
    return slabs


class PredictionOptions(TypedDict, total=False):
    """Settings of prediction as keyword arguments; `PredictionSettings` has their defaults."""

    device: str
    overlap: float
    batch_size: int | None
    precision: torch.dtype | None
    tta: bool
    skip_empty: bool
    engine: EngineName


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """Settings of prediction, defaults included. `Predictor` explains each."""

    device: str = "auto"
    overlap: float = 0.5
    batch_size: int | None = None
    precision: torch.dtype | None = None
    tta: bool = False
    skip_empty: bool = True
    engine: EngineName = "auto"

    @property
    def on_gpu(self) -> bool:
        """True if a GPU runs the network."""
        converted = self.engine in ("openvino", "onnx")
        return not converted and choose_device(self.device).type == "cuda"

    def with_precision(self) -> "PredictionSettings":
        """The same settings, with the precision of the device if none is set.

        It is float16 on a GPU and float32 on a CPU. (Maps of gates need float16: its steps below 1
        are 0.0005, finer than those of bfloat16.)
        """
        usual = torch.float16 if self.on_gpu else torch.float32
        return replace(self, precision=self.precision or usual)

    def to_json(self) -> dict[str, object]:
        """The settings on which labels depend, as written to the sidecar file of a result."""
        return {
            "overlap": self.overlap,
            "precision": str(self.precision).removeprefix("torch."),
            "tta": self.tta,
            "skip_empty": self.skip_empty,
            "engine": self.engine,
        }


class Float16OverflowError(ModelError):
    """A network's output contains NaN or infinity, but its arithmetic was in float16.

    Args:
        message: the error in words.
        walk: the model whose network it is.
    """

    def __init__(self, message: str, walk: "ModelWalk") -> None:
        super().__init__(message)
        self.walk = walk


class ModelWalk:
    """One model of a predictor, with its engine and its layout of windows."""

    def __init__(self, model: Model, settings: PredictionSettings) -> None:
        limit_threads()
        settings = settings.with_precision()
        assert settings.precision is not None
        self.model = model
        self.settings = settings
        self.device = choose_device(settings.device)
        self.precision = settings.precision
        self.engine = self._engine(self.precision)
        self.layout = layout_of(model, settings.overlap)
        if self.device.type == "cpu":
            check_windows(model.description, self.layout.patch_size)
        self.batch_size = settings.batch_size or self._windows_at_once()
        self.skip_empty = settings.skip_empty
        self.normalisers = build_normalisers(model.description.normalisation)
        self.mirror_axes = model.description.mirror_axes if settings.tta else ()
        # Recording changes the network, which several threads may share.
        self.lock = threading.RLock()

    def _engine(self, precision: torch.dtype) -> Engine:
        settings = self.settings
        return choose_engine(
            settings.engine, self.model, device=settings.device, precision=precision
        )

    def _windows_at_once(self) -> int:
        """The batch size that is fastest. Converted engines gain nothing from several windows."""
        if is_converted(self.engine):
            return 1
        patch_size = self.model.description.volume_patch
        return windows_at_once(self.model.network, self.device, patch_size, self.precision)

    def use_float32(self) -> None:
        """Compute in float32 from now on, because outputs overflow float16."""
        with self.lock:
            if self.precision == torch.float32:  # another thread was first
                return
            logger.warning(
                "the outputs of %s overflow float16; it is computed in float32 from now on",
                self.model.description.run,
            )
            self.engine = self._engine(torch.float32)
            self.precision = torch.float32

    def logits(self, windows: Tensor) -> Tensor:
        """Logits of windows; in float32 if they overflow float16. A GPU makes the host wait."""
        with self.lock:
            logits = self.engine(windows, ())[LOGITS]
            if self.precision == torch.float16 and not bool(logits.isfinite().all()):
                self.use_float32()
                logits = self.engine(windows, ())[LOGITS]
        return logits

    @property
    def preparation(self) -> str:
        """Key of the settings that change the prepared image; models with equal keys share it."""
        settings = {"spacing", "normalisation", "interpolation"}
        key = self.model.description.model_dump_json(include=settings)
        # Labels of a first stage are a channel of the image, and each model has its own stages.
        return f"{key} {id(self.model)}" if self.model.first else key

    def prepare(
        self, volume: Volume, first_labels: Volume | None, *, on_device: bool = False
    ) -> Prepared:
        """The image that the network gets for a volume.

        Args:
            volume: the volume.
            first_labels: labels of the first stage, if the model has one; they become a channel.
            on_device: put the image on the GPU if there is room for it, else in host memory.
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
        """True if the device is a GPU with room for a volume's image and copies of it."""
        if self.device.type != "cuda":
            return False
        return self.image_bytes(volume) < SHARE_FOR_IMAGE * free_memory_of(self.device)

    def has_room_for_next(self, volume: Volume) -> bool:
        """True if this volume's image can be prepared while the network runs on another volume.

        Twice its bytes must fit into the memory into which `prepare` puts it.
        """
        free = free_memory_of(self.device)
        return 2 * self.image_bytes(volume) < SHARE_FOR_IMAGE * free

    def image_bytes(self, volume: Volume) -> float:
        """About the largest number of bytes that a volume's image needs while it is prepared."""
        source, wanted = volume.grid.spacing, self.model.description.spacing
        voxels = math.prod(
            size * (old / new + 1)
            for size, old, new in zip(volume.grid.shape, source, wanted, strict=True)
        )
        return BYTES_PREPARED * len(self.normalisers) * voxels

    def skipped(self, volume: Volume, prepared: Prepared) -> frozenset[WindowPlace]:
        """Positions of empty windows, on which the network is not run; none if it runs on all."""
        if not self.skip_empty:
            return frozenset()
        return empty_windows(volume, prepared, self.layout_for(prepared.grid.shape))

    def layout_for(self, size: Sequence[int]) -> WindowLayout:
        """The layout of windows over an image of `size` voxels, as `window_layout` describes it."""
        patch_size = self.model.description.volume_patch
        return self.layout._replace(patch_size=window_size(patch_size, size))

    def maps(self) -> dict[str, MapInfo]:
        """The maps that `walk` can collect, by key."""
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
        """Run the network over a volume and yield rows of the volume as soon as they are complete.

        Args:
            volume: the volume.
            prepared: the image that `prepare` made from it.
            maps: collects attention maps in the same pass.
            presence: a list to which the presence logits of each batch are added.
            uncertainty: compute the variance between mirror images too.
            track: called with the slabs and their number; returns the same slabs.

        Yields:
            The first row, and the rows.

        Raises:
            Float16OverflowError: an output contains NaN or infinity in float16.
            ModelError: an output contains NaN or infinity in another precision.
        """
        spreads = uncertainty and len(self.mirror_axes) > 0
        layout = self.layout_for(prepared.grid.shape)
        starts = layout.starts(prepared.grid.shape)
        empty = self.skipped(volume, prepared)
        if maps.spread is not None:
            places = (place for place in itertools.product(*starts) if place not in empty)
            maps.spread.set_windows(places, layout.patch_size)
        with self.lock:
            engine, precision = self.engine, self.precision
        finite = FiniteWatch()
        slabs = stream(
            prepared.image,
            self._function(engine, precision, maps, presence, spreads, finite),
            layout,
            axis=WALK_AXIS,
            batch_size=self.batch_size,
            skip=empty,
            unseen={LOGITS: self.background(spreads=spreads), **maps.unseen()},
        )
        return to_source_rows(
            self._logits_of(track(slabs, len(starts[WALK_AXIS])), maps, finite, precision),
            prepared,
            written=self.model.description.labelling.written,
            with_spread=spreads,
        )

    def _function(
        self,
        engine: Engine,
        precision: torch.dtype,
        maps: MapCollector,
        presence: list[Tensor],
        spreads: bool,
        finite: FiniteWatch,
    ) -> WindowFunction:
        """Function from a batch of windows to logits and maps that have a position.

        With `spreads`, the variance between mirror images is the last channel of the logits.

        Args:
            engine: runs the network.
            precision: data type of its arithmetic.
            maps: takes the maps over channels.
            presence: a list to which the presence logits of each batch are added.
            spreads: whether the variance between mirror images is computed.
            finite: looks at presence logits, and at maps in float16, which they may overflow.
        """
        keys = [
            *maps.infos,
            *([PRESENCE] if self.model.network.presence is not None else []),
            *([SPREAD] if spreads else []),
        ]
        in_half = precision == torch.float16
        looked_at = [key for key in keys if key == PRESENCE or (in_half and key in maps.infos)]
        if self.mirror_axes:
            regions = self.model.description.labelling.written is not None
            engine = Mirrored(engine, self.mirror_axes, batch_size=self.batch_size, regions=regions)

        def run(windows: Tensor) -> dict[str, Tensor]:
            with self.lock:
                outputs = engine(windows, keys)
            for key in looked_at:
                finite.add(outputs[key])
            maps.take_vectors(outputs)
            if PRESENCE in outputs:
                presence.append(outputs.pop(PRESENCE).amax(dim=0))
            if spreads:
                outputs[LOGITS] = torch.cat([outputs[LOGITS], outputs.pop(SPREAD)], dim=1)
            return outputs

        return run

    def background(self, *, spreads: bool = False) -> Tensor:
        """Outputs at a voxel that no window covers: the background, or no region; variance 0."""
        labelling = self.model.description.labelling
        background = torch.full((len(labelling.outputs),), UNLIKELY)
        if labelling.written is None:
            background[0] = 0
        return torch.cat([background, torch.zeros(1)]) if spreads else background

    def _logits_of(
        self,
        slabs: Iterable[Slab],
        maps: MapCollector,
        finite: FiniteWatch,
        precision: torch.dtype,
    ) -> Iterator[Tensor]:
        """The logits of each slab; `maps` collects its maps.

        A slab is checked for NaN when the next one has been queued for the device.
        """
        for slab in slabs:
            self._check(finite.so_far(), precision)
            finite.add(slab.rows[LOGITS])
            finite.send()
            maps.take_rows(slab)
            # Not kept in a variable, which would keep its memory while the next slab is made.
            yield slab.rows.pop(LOGITS)
        self._check(finite.at_end(), precision)

    def _check(self, finite: bool, precision: torch.dtype) -> None:
        if finite:
            return
        told = (
            f"{self.model.description.run}: the network's output contains NaN or infinity; predict "
            f"in float32, or train it again"
        )
        if precision == torch.float16:
            raise Float16OverflowError(told, self)
        raise ModelError(told)


def window_layout(
    network: SegmentationNetwork,
    patch_size: tuple[int, int, int],
    overlap: float,
    image_size: Sequence[int] | None = None,
) -> WindowLayout:
    """The layout of a network's windows over a volume.

    A window of a 2D network has several slices, which need no overlap, but no more slices than the
    image, if its size is given.
    """
    patch = window_size(patch_size, image_size)
    overlaps = tuple(0.0 if size == 1 else overlap for size in patch_size)
    return WindowLayout(patch, overlaps, network.total_stride)


def window_size(
    patch_size: Sequence[int], image_size: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Size of a window in voxels: that of a patch, but with several slices for a 2D network."""
    slices = [SLICES_PER_WINDOW] * len(patch_size)
    if image_size is not None:
        slices = [min(SLICES_PER_WINDOW, size) for size in image_size]
    return tuple(
        several if size == 1 else size for size, several in zip(patch_size, slices, strict=True)
    )


def layout_of(model: Model, overlap: float = 0.5) -> WindowLayout:
    """The layout of a model's windows over a volume."""
    return window_layout(model.network, model.description.volume_patch, overlap)
