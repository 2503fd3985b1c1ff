"""A plan for a dataset within a budget of memory or time, with the reason for each value.

The budget of memory is nnU-Net's (see `nnunet_rules`). The budget of time is for training on this
machine. A 2D plan also has a spacing across its slices, which is that of the 3D plan.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from segkit.data.single_slices import about_different_planes, flat_axes
from segkit.errors import DatasetError, counted
from segkit.geometry.grid import ANISOTROPY, rounded_spacing, separate_axis
from segkit.planning import nnunet_rules as rules
from segkit.planning.budget_fit import Fit, Steps, fit_memory, fit_time, per_axis
from segkit.planning.nnunet_rules import ChannelNormalisation, Numbers, Setting, Size
from segkit.planning.step_work import StepWork, step_work


@dataclass(frozen=True)
class Plan:
    """The values of a plan: grid, patch, batch and network, with the reason for each."""

    spatial_dims: int
    spacing: tuple[float, float, float]
    """Voxel size in mm along x, y and z (RAS+)."""
    slices: Literal["sagittal", "coronal", "axial"]
    """The slices that a 2D network sees; usually perpendicular to the coarsest axis."""
    patch_size: Size
    """Size of a patch in voxels, along the axes of the network."""
    batch_size: int
    channels: tuple[int, ...]
    """Number of channels of each level, finest first."""
    strides: tuple[Size, ...]
    """Strides of each step down."""
    kernels: tuple[Size, ...]
    """Kernel sizes of each level."""
    normalisation: tuple[ChannelNormalisation, ...]
    """The normalisation of each channel."""
    batch_dice: bool
    """Whether the Dice loss pools the whole batch."""
    separate_z: bool
    """Whether one axis is resampled separately, by the nearest slice."""
    low_resolution: "Plan | None"
    """The plan of a first stage at low resolution; None if one stage is enough."""
    reasons: dict[str, str]
    """A sentence for each value."""

    def step_work(self, in_channels: int, num_classes: int) -> StepWork:
        """Numbers of multiply-adds in a training step of a batch."""
        return step_work(
            batch_size=self.batch_size,
            channels=self.channels,
            strides=self.strides,
            kernels=self.kernels,
            patch_size=self.patch_size,
            in_channels=in_channels,
            num_classes=num_classes,
        )


def plan_for_memory(numbers: Numbers, *, spatial_dims: int, gigabytes: float = 8.0) -> Plan:
    """nnU-Net's plan: the largest patch that the memory allows, and then the largest batch.

    Args:
        numbers: measurements of the dataset.
        spatial_dims: 2 or 3.
        gigabytes: memory of the device, in 10⁹ bytes.

    Raises:
        DatasetError: the cases have fewer axes than the plan.
    """

    def fit(setting: Setting) -> Fit:
        return fit_memory(setting, gigabytes)

    return _plan(numbers, spatial_dims, fit, fit)


def plan_for_time(
    numbers: Numbers,
    *,
    spatial_dims: int,
    minutes: float,
    steps: Steps,
    multiply_adds_per_second: float,
    gigabytes: float = 8.0,
    muon_cost: float | None = 1.0,
) -> Plan:
    """The plan for the memory, made smaller until enough training steps fit into the minutes.

    First the batch is made smaller, then the network narrower, then the patch smaller. If even the
    smallest plan takes longer, it is the result, and its reasons say so. Only the convolutions of
    training and the arithmetic of Muon are counted, not preparation, validation or augmentation.
    The patch that memory allows decides whether there are two stages, as in nnU-Net, not the patch
    that time allows.

    Args:
        numbers: measurements of the dataset.
        spatial_dims: 2 or 3.
        minutes: time for training steps.
        steps: the numbers of steps that must fit.
        multiply_adds_per_second: speed of the device in training.
        gigabytes: memory of the device, in 10⁹ bytes.
        muon_cost: how long one of Muon's multiply-adds takes, in those of the network; None if the
            device is not a CPU.

    Raises:
        DatasetError: the cases have fewer axes than the plan.
    """
    fit, fit_memory = _fits(minutes * 60 * multiply_adds_per_second, steps, gigabytes, muon_cost)
    return _plan(numbers, spatial_dims, fit, fit_memory)


def coarse_plan_for_time(
    numbers: Numbers,
    *,
    minutes: float,
    steps: Steps,
    multiply_adds_per_second: float,
    gigabytes: float = 8.0,
    muon_cost: float | None = 1.0,
) -> Plan | None:
    """A 3D plan of one stage at a coarser spacing, at which a patch covers a quarter of an image.

    The patch is the one that the time allows. The arguments are those of `plan_for_time`.

    Returns:
        None if a patch covers a quarter at full resolution already, or if the coarser grid would
        save less than half of the voxels, or if the cases are single slices.
    """
    fit, _ = _fits(minutes * 60 * multiply_adds_per_second, steps, gigabytes, muon_cost)
    if flat_axis(numbers) is not None:
        return None
    _, setting = _target(numbers, 3)
    plan, _ = _low_resolution(numbers, setting, fit(setting), fit, fit)
    return plan


def _fits(
    total: float, steps: Steps, gigabytes: float, muon_cost: float | None
) -> tuple[Callable[[Setting], Fit], Callable[[Setting], Fit]]:
    """The fit for a total of multiply-adds, and the fit for the memory.

    Args:
        total: number of multiply-adds in the whole training.
        steps: the numbers of steps that must fit.
        gigabytes: memory of the device, in 10⁹ bytes.
        muon_cost: how long one of Muon's multiply-adds takes, in those of the network.
    """
    return (
        lambda setting: fit_time(setting, gigabytes, total, steps, muon_cost=muon_cost),
        lambda setting: fit_memory(setting, gigabytes),
    )


def flat_axis(numbers: Numbers) -> int | None:
    """The axis along which the median image has less than 2 voxels, if there is one.

    The task is 2D then, as in nnU-Net: a 3D patch would have one voxel along this axis.

    Raises:
        DatasetError: most cases are single slices, but in different planes; or all are lines.
    """
    slices = [shape for shape in numbers.shapes if 1 in shape]
    if 2 * len(slices) > len(numbers.shapes) and not flat_axes(slices):
        raise DatasetError(about_different_planes(slices))
    if len(flat := flat_axes(numbers.shapes)) > 1:
        axes = " and ".join("xyz"[axis] for axis in flat)
        raise DatasetError(
            f"expected slices or volumes, found cases of one voxel along {axes}, which segkit "
            "cannot segment; use images of two or three dimensions"
        )
    spacing, shape = median_image(numbers)
    if min(shape) >= 2:
        return None

    def thinness(axis: int) -> tuple[float, int, float]:
        return shape[axis], -sum(each[axis] == 1 for each in slices), -spacing[axis]

    return min(range(3), key=thinness)


def median_image(
    numbers: Numbers,
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """The target spacing of all cases, and the shape of the median image at this spacing."""
    spacing = rules.target_spacing(numbers.spacings, numbers.shapes)
    return spacing, rules.median_shape(numbers.spacings, numbers.shapes, spacing)


def axis_of_slices(numbers: Numbers) -> int:
    """The axis perpendicular to the slices that a 2D network sees.

    It is the axis along which the median image has less than 2 voxels, or else the coarsest.
    """
    flat = flat_axis(numbers)
    return rules.coarsest_axis(median_image(numbers)[0]) if flat is None else flat


def _target(numbers: Numbers, spatial_dims: int) -> tuple[tuple[float, float, float], Setting]:
    """The target spacing of all cases, and the setting to which patch and network are fitted."""
    spacing, shape = median_image(numbers)
    left_out = axis_of_slices(numbers) if spatial_dims == 2 else None
    axes = [axis for axis in range(3) if axis != left_out]
    return spacing, Setting(
        spacing=tuple(spacing[axis] for axis in axes),
        # A slice of one line is padded, so that the patch of a 2D network always has two axes.
        median=tuple(max(shape[axis], 4 - spatial_dims) for axis in axes),
        dataset_voxels=math.prod(shape) * len(numbers.shapes),
        in_channels=len(numbers.channels),
        num_classes=numbers.num_classes,
        last_to_yield=rules.coarsest_axis(spacing) if spatial_dims == 3 else None,
    )


def _plan(
    numbers: Numbers,
    spatial_dims: int,
    fit: Callable[[Setting], Fit],
    fit_memory: Callable[[Setting], Fit],
) -> Plan:
    """The plan for a budget.

    Args:
        numbers: measurements of the dataset.
        spatial_dims: 2 or 3.
        fit: makes patch, network and batch within the budget.
        fit_memory: makes them by the memory only; its patch decides about two stages.
    """
    if spatial_dims == 3 and (flat := flat_axis(numbers)) is not None:
        raise DatasetError(
            f"expected volumes for a plan of 3 dimensions, found {_flatness(numbers, flat)}; plan "
            "for 2 dimensions"
        )
    spacing, setting = _target(numbers, spatial_dims)
    fitted = fit(setting)
    low, why_low = None, "A 2D network sees slices at one resolution."
    if spatial_dims == 3:
        low, why_low = _low_resolution(numbers, setting, fit_memory(setting), fit_memory, fit)
    pooled = spatial_dims == 2 or low is not None
    median = rules.median_spacing(numbers.spacings, numbers.shapes)
    why_spacing = f"{per_axis(median)} mm is the median of {counted(len(numbers.spacings), 'case')}"
    if spacing != median:
        coarsest = next(axis for axis in range(3) if spacing[axis] != median[axis])
        why_spacing += (
            f"; {'xyz'[coarsest]} is over {ANISOTROPY:g} times coarser with under a third of the "
            f"voxels, so it takes the 10th percentile, {spacing[coarsest]:.4g} mm"
        )
        if math.isclose(spacing[coarsest], sorted(spacing)[1], rel_tol=1e-3):
            why_spacing += ", raised to the spacing of the next axis"
    why_dice = "A patch covers enough of an image, so Dice is computed for each patch."
    if rules.needs_low_resolution(fitted.topology.patch_size, math.prod(setting.median)):
        why_dice = "There is one stage, so Dice is computed for each patch, as in nnU-Net."
    if spatial_dims == 2:
        why_dice = (
            "A slice may lack a class, so Dice is computed over the whole batch, which is more "
            "stable."
        )
    elif pooled:
        why_dice = (
            "A patch covers little of an image, so Dice is computed over the whole batch, which is "
            "more stable."
        )
    reasons = {
        "spacing": f"{why_spacing}.",
        "slices": _why_slices(numbers, spacing),
        "low_resolution": why_low,
        "batch_dice": why_dice,
    }
    return _assembled(numbers, spacing, fitted, pooled, low, reasons)


def _why_slices(numbers: Numbers, spacing: tuple[float, float, float]) -> str:
    flat = flat_axis(numbers)
    if flat is not None:
        return f"Slices, because there is {_flatness(numbers, flat)}."
    axis = "xyz"[axis_of_slices(numbers)]
    return f"No axis is coarser than {axis} at {per_axis(spacing)} mm."


def _flatness(numbers: Numbers, axis: int) -> str:
    """The number of voxels along the axis of slices, as part of a sentence."""
    if axis not in flat_axes(numbers.shapes):
        length = median_image(numbers)[1][axis]
        return f"a median of {counted(length, 'voxel', form='.3g')} along {'xyz'[axis]}"
    # A volume may be 0 outside one slice; its file has more voxels.
    cropped = any(share < 1 for share in numbers.box_shares)
    without = ", not counting zeros around the body" if cropped else ""
    return f"one voxel along {'xyz'[axis]} in every case{without}"


def _low_resolution(
    numbers: Numbers,
    full: Setting,
    fitted: Fit,
    holds: Callable[[Setting], Fit],
    fit: Callable[[Setting], Fit],
) -> tuple[Plan | None, str]:
    """The plan at the first coarser spacing whose patch covers enough of the median image.

    The patches of `fitted` and, at coarser spacings, of `holds` decide about this spacing; `fit`
    makes the plan there.

    Args:
        numbers: measurements of the dataset.
        full: the data at full resolution.
        fitted: the fit at full resolution.
        holds: the fit whose patch decides about a coarser spacing.
        fit: makes the plan at that spacing.

    Returns:
        The plan, or None if none is needed, and the reason.
    """
    whole = voxels = math.prod(full.median)
    setting = full
    share = math.prod(fitted.topology.patch_size) / whole
    seen = f"The patch covers {share:.3g} of the median image's voxels"
    spacing, coarse = full.spacing, fitted
    while rules.needs_low_resolution(coarse.topology.patch_size, voxels):
        spacing = rules.coarser(spacing)
        shape = [f / s * n for f, s, n in zip(full.spacing, spacing, full.median, strict=True)]
        voxels = math.prod(shape)
        if flat := [axis for axis, size in enumerate(shape) if round(size) < 2]:
            return None, f"{seen}; a coarser grid would have one voxel along {'xyz'[flat[0]]}."
        setting = replace(
            full,
            spacing=spacing,
            median=tuple(round(n) for n in shape),
            dataset_voxels=voxels * len(numbers.shapes),
        )
        coarse = holds(setting)
    if coarse is fitted:
        return None, f"{seen}, and {rules.LEAST_COVERED:g} is enough."
    enough = f"at {per_axis(spacing)} mm it covers enough"
    if whole / voxels < 2:
        return None, f"{seen}; {enough}, but that would save less than half of the voxels."
    reasons = {
        "spacing": f"{seen} at {per_axis(full.spacing)} mm; {enough}.",
        "slices": f"The same as at {per_axis(full.spacing)} mm.",
        "low_resolution": "This is the plan for low resolution.",
        "batch_dice": "A patch covers enough of an image, so Dice is computed for each patch.",
    }
    x, y, z = spacing
    low = _assembled(numbers, (x, y, z), fit(setting), False, None, reasons)
    return low, f"{seen}, less than {rules.LEAST_COVERED:g}; {enough}."


def _assembled(
    numbers: Numbers,
    spacing: tuple[float, float, float],
    fitted: Fit,
    batch_dice: bool,
    low_resolution: Plan | None,
    reasons: dict[str, str],
) -> Plan:
    """The plan, with the remaining values and their reasons."""
    chosen = fitted.topology
    current = rules.median_spacing(numbers.spacings, numbers.shapes)
    # Along an axis of one voxel, as in pictures, a spacing means nothing.
    thick = rules.thick_axes(numbers.shapes)
    ratios = [
        max(each[axis] for axis in thick or [0]) / min(each[axis] for axis in thick or [0])
        for each in (current, spacing)
    ]
    share = float(np.median(numbers.box_shares))
    num_flat = sum(1 in kernel for kernel in chosen.kernels)
    return Plan(
        spatial_dims=len(chosen.patch_size),
        spacing=rounded_spacing(spacing),
        slices=rules.SLICE_PLANES[axis_of_slices(numbers)],
        patch_size=chosen.patch_size,
        batch_size=fitted.batch_size,
        channels=fitted.channels,
        strides=chosen.strides,
        kernels=chosen.kernels,
        normalisation=rules.normalisations(numbers),
        batch_dice=batch_dice,
        separate_z=separate_axis(current, spacing, thick) is not None,
        low_resolution=low_resolution,
        reasons={
            "strides": f"Each of {counted(len(chosen.strides), 'stride')} halves an axis if it "
            f"keeps {rules.SMALLEST_EDGE} voxels and is less than twice as coarse as the finest "
            "axis.",
            "kernels": f"Kernels have size 1 along an axis at least twice as coarse as the finest. "
            f"There is such an axis at {num_flat} of {counted(len(chosen.kernels), 'level')}.",
            "normalisation": f"The channels are {', '.join(numbers.channels)}. In the median case, "
            f"the body's box fills {share:.3g} of the volume; below 0.75, zeros are left out.",
            "separate_z": f"The coarsest spacing is {ratios[0]:.3g} times the finest in the median "
            f"case, and {ratios[1]:.3g} times in this plan. If a single axis is over "
            f"{ANISOTROPY:g} times as coarse, the nearest slice is taken along it.",
            **fitted.reasons,
            **reasons,
        },
    )
