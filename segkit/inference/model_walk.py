"""One model at work: how its windows are laid out, run and walked over."""

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.data.first_stage_labels import with_labels
from segkit.data.preprocess import Prepared, prepare_image
from segkit.errors import ModelError
from segkit.inference.attention_maps import MapCollector
from segkit.inference.empty_windows import empty_windows
from segkit.inference.engines.choose import EngineName, choose_engine
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, Engine, choose_device
from segkit.inference.mirrors import SPREAD, Mirrored, mirrored_map
from segkit.inference.source_rows import WALK_AXIS, SourceRows, to_source_rows
from segkit.inference.windows import Slab, stream, window_starts
from segkit.io.volume import Volume
from segkit.model.build import (
    ACROSS,
    WORLD_AXES,
    build_normalisers,
    check_windows,
    interpolation_order,
    volume_patch,
)
from segkit.model.folder import Model
from segkit.nn.map_tap import MapInfo
from segkit.nn.slicewise import SegmentationNetwork

PLANES_PER_WINDOW = 8
UNLIKELY = -30.0
"""The logit of every class but the background, or of every region, where no window was asked."""

TrackSlabs = Callable[[Iterable[Slab], int], Iterable[Slab]]


class ModelWalk:
    """One model of those that predict together; arguments as for the predictor."""

    def __init__(
        self,
        model: Model,
        *,
        device: str,
        overlap: float,
        batch_size: int,
        precision: torch.dtype,
        tta: bool,
        skip_empty: bool,
        engine: EngineName,
    ) -> None:
        self.model = model
        self.engine: Engine = choose_engine(engine, model, device=device, precision=precision)
        self.layout = window_layout(model.network, volume_patch(model.description), overlap)
        if choose_device(device).type == "cpu":
            check_windows(model.description, self.layout[0])
        self.batch_size = batch_size
        self.skip_empty = skip_empty
        self.normalisers = build_normalisers(model.description.normalisation)
        self.mirror_axes = mirror_axes(model.description) if tta else ()
        # Maps are recorded on the network itself, which several threads may share.
        self.lock = threading.Lock()

    @property
    def preparation(self) -> str:
        """What the prepared image depends on, beside the volume: where equal, it may be shared."""
        settings = {"spacing", "normalisation", "interpolation"}
        told = self.model.description.model_dump_json(include=settings)
        # Labels of a first stage are a channel of the image, and each model has stages of its own.
        return f"{told} {id(self.model)}" if self.model.first else told

    def prepare(self, volume: Volume, first_labels: Volume | None) -> Prepared:
        """The volume as the network sees it, with the labels of the first stage if it has one."""
        prepared = prepare_image(
            volume,
            spacing=self.model.description.spacing,
            normalisers=self.normalisers,
            order=interpolation_order(self.model.description),
        )
        return prepared if first_labels is None else with_labels(prepared, first_labels)

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
        keys = [
            *maps.infos,
            *([PRESENCE] if self.model.network.presence is not None else []),
            *([SPREAD] if spreads else []),
        ]
        engine = self.engine
        if self.mirror_axes:
            engine = Mirrored(
                engine,
                self.mirror_axes,
                batch_size=self.batch_size,
                regions=self.model.description.labelling.written is not None,
            )

        def run(windows: Tensor) -> dict[str, Tensor]:
            with self.lock:
                outputs = engine(windows, keys)
            maps.take_vectors(outputs)
            if PRESENCE in outputs:
                presence.append(outputs.pop(PRESENCE).amax(dim=0).cpu())
            if spreads:
                outputs[LOGITS] = torch.cat([outputs[LOGITS], outputs.pop(SPREAD)], dim=1)
            return outputs

        patch, overlap, multiple = self.layout
        starts = [
            window_starts(*numbers)
            for numbers in zip(prepared.grid.shape, patch, overlap, multiple, strict=True)
        ]
        empty = (
            empty_windows(volume, prepared, patch_size=patch, starts=starts)
            if self.skip_empty
            else frozenset()
        )
        if maps.spread is not None:
            asked = (place for place in itertools.product(*starts) if place not in empty)
            maps.spread.will_see(asked, patch)
        labelling = self.model.description.labelling
        background = torch.full((len(labelling.outputs),), UNLIKELY)
        if labelling.written is None:
            background[0] = 0
        if spreads:
            background = torch.cat([background, torch.zeros(1)])
        slabs = stream(
            prepared.image,
            run,
            patch_size=patch,
            overlap=overlap,
            multiple=multiple,
            axis=WALK_AXIS,
            batch_size=self.batch_size,
            skip=empty,
            unseen={LOGITS: background},
        )

        def logits_of(slabs: Iterable[Slab]) -> Iterator[Tensor]:
            for slab in slabs:
                maps.take_rows(slab)
                # By no name of its own, or it would live on beside the next.
                yield self._checked(slab.rows.pop(LOGITS))

        tracked = track(slabs, len(starts[WALK_AXIS]))
        return to_source_rows(
            logits_of(tracked), prepared, written=labelling.written, with_spread=spreads
        )

    def _checked(self, logits: Tensor) -> Tensor:
        """The same logits. Raises ModelError where one is no number."""
        # A sum reads them once and copies nothing. That of huge numbers may be none itself, so only
        # then is each looked at, a row at a time, as that copies.
        if not bool(logits.sum().isfinite()) and not all(
            bool(row.isfinite().all()) for row in logits.movedim(-1, 0)
        ):
            raise ModelError(
                f"the network of {self.model.description.run} answers with what is no number; "
                f"predict in float32, or train it again"
            )
        return logits


def window_layout(
    network: SegmentationNetwork, patch_size: tuple[int, int, int], overlap: float
) -> tuple[tuple[int, ...], tuple[float, ...], tuple[int, ...]]:
    """Patch, overlap and multiple of windows, per axis of a volume.

    Planes of a 2D network need no overlap; several go into one window.
    """
    patch = tuple(PLANES_PER_WINDOW if size == 1 else size for size in patch_size)
    overlaps = tuple(0.0 if size == 1 else overlap for size in patch_size)
    return patch, overlaps, network.total_stride


def mirror_axes(description: ModelDescription) -> Sequence[int]:
    """The axes of a volume along which a model was trained on mirror images.

    Across the planes of a 2D network there is nothing to mirror.
    """
    flat = ACROSS[description.slices] if description.network.spatial_dims == 2 else None
    axes = [WORLD_AXES[name] for name in description.mirror]
    return tuple(axis for axis in axes if axis != flat)
