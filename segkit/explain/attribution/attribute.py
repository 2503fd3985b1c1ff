"""Attributions of a scan's segmentation, on the scan's own grid.

    scan ─▶ the network's image ─▶ attribution on the network's grid ─▶ the scan's voxels

An attribution is computed on the network's grid: of each voxel, or of each box of voxels. Its
affine is exact. `Attribution.on_scan` interpolates it linearly at the scan's voxels, as for an
attention map; sums such as completeness hold only on the network's grid.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.ndimage import gaussian_filter
from torch import Tensor

from segkit.data.label_numbers import volume_within
from segkit.data.preprocess import Prepared, prepare_label
from segkit.errors import ModelError, VolumeError, counted
from segkit.explain.attribution.gradients import integrated_gradients, smoothgrad
from segkit.explain.attribution.perturbations import kernel_shap, occlusion
from segkit.explain.attribution.supervoxels import Supervoxels
from segkit.explain.attribution.target import Quantity, SummedOutput
from segkit.explain.display import Table, rounded
from segkit.explain.verdicts.deletion import mean_of_channels
from segkit.geometry.grid import Placement
from segkit.geometry.resample import nearest
from segkit.inference.attention_maps import AttentionMap, map_on_source
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.nn.map_tap import MapInfo
from segkit.system.progress import Track, untracked

Method = Literal["integrated_gradients", "smoothgrad", "occlusion", "kernel_shap"]
Baseline = Literal["mean", "minimum", "blurred"]
METHODS: tuple[Method, ...] = get_args(Method)
BLURS_PER_WINDOW = 8
"""Standard deviations of the blurred baseline along each axis of a window."""
CELLS_PER_WINDOW = {"occlusion": 4, "kernel_shap": 2}
"""Boxes along each axis of a window, if no size is given."""


@dataclass(frozen=True, kw_only=True)
class AttributionSettings:
    """Settings of attributions. Each method uses those that it needs.

    A setting that is out of range raises a ModelError.

    Example:
        settings = segkit.AttributionSettings(quantity="probability", cell_mm=10.0)
        segkit.attribute(predictor, scan, "kernel_shap", settings=settings)
    """

    quantity: Quantity = "logit"
    """The output that is summed over the region: 'logit' or 'probability'."""
    baseline: Baseline | float | None = None
    """The values of replaced voxels, and of the baseline of integrated gradients, in the units of
    the image that the network gets: 'mean' or 'minimum' of each channel, 'blurred' for the image
    after a Gaussian of an eighth of a window, or a number. If None, 'blurred' for integrated
    gradients and 'mean' for the others."""
    steps: int = 16
    """Number of points at which integrated gradients sums the gradient."""
    draws: int = 16
    """Number of noisy copies for SmoothGrad."""
    noise: float = 0.15
    """Standard deviation of SmoothGrad's noise, as a share of each channel's range."""
    cell_mm: float | None = None
    """Edge of the boxes of occlusion and KernelSHAP in mm. If None, a quarter of a window for
    occlusion and half a window for KernelSHAP."""
    samples: int | None = None
    """Number of coalitions of KernelSHAP for each window, or for all windows together if
    probabilities are summed; at least twice the number of boxes. If None, 64 more than that."""
    seed: int = 0
    """Seed of noise and coalitions."""

    def __post_init__(self) -> None:
        for name, known in (("quantity", get_args(Quantity)), ("baseline", get_args(Baseline))):
            value = getattr(self, name)
            if isinstance(value, str) and value not in known:
                expected = ", ".join(known) + (", or a number" if name == "baseline" else "")
                raise ModelError(f"{name}: expected {expected}, found {value!r}; choose one")
        for name, lowest in (("steps", 1), ("draws", 1), ("samples", 1), ("seed", 0)):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, Integral) and int(value) >= lowest):
                raise ModelError(
                    f"{name}: expected a whole number from {lowest} on, found {value}; change it"
                )
        if isinstance(self.baseline, Real) and not math.isfinite(self.baseline):
            raise ModelError(
                f"baseline: expected a finite number, found {self.baseline}; change it"
            )
        if not 0 <= self.noise < math.inf:
            raise ModelError(f"noise: expected 0 or more, found {self.noise}; change it")
        if self.cell_mm is not None and not 0 < self.cell_mm < math.inf:
            raise ModelError(f"cell_mm: expected more than 0 mm, found {self.cell_mm}; change it")


@dataclass(frozen=True, eq=False)
class Attribution:
    """The part of each voxel or box of a scan in the segmentation of one structure.

    Example:
        found = segkit.attribute(predictor, scan, "occlusion")["liver"]
        segkit.write_volume("occlusion.nii.gz", found.on_scan())
    """

    method: Method
    structure: str
    map: AttentionMap
    """The attribution on the network's grid, or on the grid of its boxes: float32 (x, y, z), or
    (x, y, z, channel) for gradients of several channels. A box or supervoxel has one value, which
    is not divided by its size. NaN at voxels that the network did not process."""
    value: float
    """The sum of the structure's outputs over the region."""
    baseline_value: float
    """The same sum for the baseline; NaN for SmoothGrad, which has none."""
    total: float
    """The sum of the values of all voxels or parts. For KernelSHAP it equals `explained`; for
    integrated gradients it does if there are enough steps."""
    region_voxels: int
    """Number of voxels of the region, on the network's grid."""
    settings: AttributionSettings
    scan: Volume

    @property
    def key(self) -> str:
        """Its name among maps, such as 'occlusion/liver'."""
        return self.map.info.key

    @property
    def values(self) -> Volume:
        """The attribution on its own grid."""
        assert self.map.volume is not None
        return self.map.volume

    @property
    def explained(self) -> float:
        """The difference of the sums between the scan and the baseline."""
        return self.value - self.baseline_value

    def figures(self) -> dict[str, Any]:
        """Its sums and settings as plain data, for JSON."""
        return {
            "key": self.key,
            "method": self.method,
            "structure": self.structure,
            "value": self.value,
            "baseline_value": self.baseline_value,
            "explained": self.explained,
            "total": self.total,
            "region_voxels": self.region_voxels,
            **vars(self.settings),
        }

    def sentence(self) -> str:
        """Its sums in words."""
        about = f"{self.key}: the {self.settings.quantity} sums to {self.value:.4g} over "
        about += f"{counted(self.region_voxels, 'voxel')}"
        if self.method == "smoothgrad":
            return about
        base = f"{about}, and to {self.baseline_value:.4g} for the baseline"
        if self.method == "occlusion":
            return base
        return f"{base}; of the difference of {self.explained:.4g}, {self.total:.4g} is attributed"

    def on_scan(self) -> Volume:
        """The attribution, interpolated linearly at the scan's voxels; NaN if it is not known."""
        return map_on_source(self.map, self.scan)


def attribute(
    predictor: Predictor,
    volume: Volume,
    method: Method,
    *,
    structure: str | Sequence[str] | None = None,
    region: Volume | None = None,
    output: str | None = None,
    supervoxels: Volume | None = None,
    settings: AttributionSettings | None = None,
    track: Track = untracked,
) -> dict[str, Attribution]:
    """How much each part of a scan contributes to the segmentation of a structure.

    The number that is explained is the logit (or the probability) of the structure, summed over a
    region, by default the predicted structure. docs/attributions.md explains the methods and their
    limits. Only the first model of an ensemble is used, without mirror images.

    Args:
        predictor: runs the model.
        volume: the scan.
        method: 'integrated_gradients', 'smoothgrad', 'occlusion' or 'kernel_shap'.
        structure: a structure of the model, or several. If None, all that have a voxel in their
            region. Several cost little more than one.
        region: labels on the scan's grid, such as a reference. The region of a structure is all
            voxels with its label. If None, the predicted labels.
        output: the class or region whose output is summed, also 'background'. If None, the
            structure's own.
        supervoxels: the parts for occlusion and KernelSHAP: a number from 1 for each voxel of the
            scan, such as SLIC's; voxels of 0 are never replaced. If None, boxes.
        settings: settings of the methods.
        track: reports the progress.

    Returns:
        The attribution of each structure, by its name. It is empty if `structure` is None and no
        structure has a region.

    Raises:
        ModelError: a structure, an output or the method is unknown, or a setting is out of range.
        VolumeError: the region of a given structure is empty, the labels or the supervoxels lie on
            another grid, there is no supervoxel, or the volume does not fit the model.

    Example:
        predictor = segkit.Predictor.load("runs/mine")
        found = segkit.attribute(predictor, segkit.read_volume("scan.nii.gz"), "occlusion")
        found["liver"].on_scan()  # a volume on the scan's grid
    """
    chosen_methods([method])
    settings = settings or AttributionSettings()
    volume = predictor.with_numbers(volume)
    prepared = predictor.prepare(volume)
    asked = [structure] if isinstance(structure, str) else structure
    target = _target(predictor, volume, prepared, asked, region, output, settings.quantity)
    if asked and (missing := [name for name in asked if name not in target.structures]):
        raise VolumeError(
            f"expected at least one voxel of {', '.join(missing)} in the "
            f"{'prediction' if region is None else 'region'}, found none; give a region that "
            "contains one"
        )
    if not target.structures:
        return {}
    image, channels = prepared.image, len(predictor.model.description.channels)
    kind = settings.baseline
    if kind is None:
        # A constant image has no variance, by which instance normalisation divides: the gradient
        # on the way to it changes too fast for any number of steps.
        kind = "blurred" if method == "integrated_gradients" else "mean"
    baseline = baseline_image(image, channels, kind, patch_size=target.patch_size)
    if method in ("occlusion", "kernel_shap"):
        parts = _parts(predictor, method, volume, prepared, supervoxels, settings.cell_mm)
        placement, grid = parts.placement, parts.grid
        of_parts = _of_parts(method, target, image, baseline, parts, settings, track)
        totals = of_parts.sum(axis=1)
        arrays = [parts.placed(values, target.computed) for values in of_parts]
    else:
        placement, grid = Placement.identity(3), prepared.grid
        gradients = _gradients(method, target, image, baseline, channels, settings, track)
        totals = gradients.sum(axis=(1, 2, 3, 4), dtype=np.float64)
        gradients[:, :, ~target.computed.numpy()] = np.nan
        arrays = [each[0] if channels == 1 else np.moveaxis(each, 0, -1) for each in gradients]
    whole, nothing = target.value(image), np.full(len(arrays), np.nan)
    if method != "smoothgrad":
        nothing = target.value(baseline)
    found = {}
    for number, name in enumerate(target.structures):
        info = MapInfo(f"{method}/{name}", "attribution", 0, placement, -np.inf, np.inf)
        values = volume.on(grid, arrays[number].astype(np.float32, copy=False))
        found[name] = Attribution(
            method,
            name,
            AttentionMap(info, values, prepared.source),
            float(whole[number]),
            float(nothing[number]),
            float(totals[number]),
            int(target.inside[number].sum()),
            settings,
            volume,
        )
    return found


def chosen_methods(names: Sequence[str]) -> list[Method]:
    """The methods of these names, each once. Raises ModelError if there is no such method."""
    if unknown := [name for name in names if name not in METHODS]:
        raise ModelError(
            f"expected a method out of {', '.join(METHODS)}, found {unknown[0]!r}; choose one of "
            "these"
        )
    return [method for method in METHODS if method in names]


def attribution_table(found: Mapping[str, Attribution]) -> list[Table]:
    """The sums of attributions as a table of a page; none if there are no attributions."""
    if not found:
        return []
    rows = [
        [
            key,
            one.region_voxels,
            *map(rounded, (one.value, one.baseline_value, one.explained, one.total)),
        ]
        for key, one in found.items()
    ]
    columns = ["attribution", "voxels", "sum", "of the baseline", "difference", "attributed"]
    return [
        Table(
            "What is attributed",
            columns,
            rows,
            note="The sum is that of the structure's output over its predicted voxels. Integrated "
            "gradients and KernelSHAP attribute the difference between the scan and the baseline; "
            "occlusion and SmoothGrad do not add up to it.",
        )
    ]


def baseline_image(
    image: Float[Tensor, "channel x y z"],
    num_channels: int,
    values: Baseline | float,
    *,
    patch_size: Sequence[int],
) -> Float[Tensor, "channel x y z"]:
    """The image from which replaced voxels come; `AttributionSettings` has the values.

    Channels after the first `num_channels`, which come from a first stage, are kept.
    """
    if values == "mean":
        return mean_of_channels(image, num_channels)
    baseline = image.clone()
    for channel in baseline[:num_channels]:
        if values == "blurred":
            sigma = [size / BLURS_PER_WINDOW for size in patch_size]
            smooth = gaussian_filter(channel.numpy(), sigma, mode="nearest")
            channel.copy_(torch.from_numpy(smooth))
        else:
            channel.fill_(channel.min() if values == "minimum" else values)
    return baseline


def _target(
    predictor: Predictor,
    volume: Volume,
    prepared: Prepared,
    asked: Sequence[str] | None,
    region: Volume | None,
    output: str | None,
    quantity: Quantity,
) -> SummedOutput:
    """The sums that are explained. The arguments are those of `attribute`."""
    member = predictor.members[0]
    labelling = member.model.description.labelling
    for name, known in [
        *((name, list(labelling.members)) for name in asked or ()),
        *([(output, list(labelling.outputs))] if output is not None else []),
    ]:
        if name not in known:
            raise ModelError(f"expected one of {', '.join(known)}, found {name!r}; choose one")
    labels = predictor(volume).labels if region is None else region.measured_as(volume)
    labels = labels.onto(volume.grid, what="the region", whose="the scan")
    try:
        numbers = prepare_label(volume_within(labels, labelling), prepared)
    except ValueError as error:
        raise VolumeError(f"the region {error}") from None
    wanted = labelling.members if asked is None else asked
    return SummedOutput(
        member,
        prepared.grid.shape,
        {name: torch.isin(numbers, torch.tensor(labelling.members[name])) for name in wanted},
        outputs={name: labelling.outputs.index(output or name) for name in wanted},
        quantity=quantity,
        skip=member.skipped(volume, prepared),
    )


def _parts(
    predictor: Predictor,
    method: Method,
    volume: Volume,
    prepared: Prepared,
    supervoxels: Volume | None,
    cell_mm: float | None,
) -> Supervoxels:
    """The parts that are replaced: the given supervoxels, or boxes. Raises VolumeError."""
    if supervoxels is not None:
        given = supervoxels.onto(volume.grid, what="supervoxels", whose="the scan").data
        turned = prepared.orientation.turn(given)[prepared.box]
        x, y, z = (
            nearest(positions).clip(0, size - 1).astype(int)
            for positions, size in zip(
                prepared.source.positions_of(prepared.grid), prepared.source.shape, strict=True
            )
        )
        parts = Supervoxels.of(turned[np.ix_(x, y, z)], prepared.grid)
        if not len(parts):
            raise VolumeError(
                "supervoxels: expected the parts of the scan numbered from 1, found only 0; "
                "number the parts"
            )
        return parts
    patch = predictor.members[0].layout_for(prepared.grid.shape).patch_size
    if cell_mm is None:
        size = [max(one // CELLS_PER_WINDOW[method], 1) for one in patch]
    else:
        size = [max(round(cell_mm / step), 1) for step in prepared.grid.spacing]
    return Supervoxels.boxes_of(prepared.grid, size)


def _of_parts(
    method: Method,
    target: SummedOutput,
    image: Tensor,
    baseline: Tensor,
    parts: Supervoxels,
    settings: AttributionSettings,
    track: Track,
) -> Float[ndarray, "structure part"]:
    """The attribution of each part to each structure, by occlusion or KernelSHAP."""
    if method == "occlusion":
        return occlusion(target, image, baseline, parts, track=track)
    samples, seed = settings.samples, settings.seed
    return kernel_shap(target, image, baseline, parts, samples=samples, seed=seed, track=track)


def _gradients(
    method: Method,
    target: SummedOutput,
    image: Tensor,
    baseline: Tensor,
    channels: int,
    settings: AttributionSettings,
    track: Track,
) -> Float[ndarray, "structure channel x y z"]:
    """The attribution of each voxel of the scan's own channels."""
    if method == "integrated_gradients":
        found = integrated_gradients(target, image, baseline, steps=settings.steps, track=track)
    else:
        spread = settings.noise * (image.flatten(1).amax(dim=1) - image.flatten(1).amin(dim=1))
        spread[channels:] = 0  # the labels of a first stage
        draws, seed = settings.draws, settings.seed
        found = smoothgrad(target, image, spread, draws=draws, seed=seed, track=track)
    return found[:, :channels].numpy()
