"""A plan for a dataset, within a budget of memory or of time, and the reason for each value.

The budget of memory is nnU-Net's (see `nnunet_rules`); that of time is for training without an
accelerator. A 2D plan has a spacing across its planes as well: that of the 3D plan.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import numpy as np

from segkit.errors import DatasetError
from segkit.geometry.grid import ANISOTROPY, rounded_spacing, separate_axis
from segkit.planning import nnunet_rules as rules
from segkit.planning.nnunet_rules import (
    ChannelNormalisation,
    Lengths,
    Numbers,
    Setting,
    Size,
    Topology,
)


@dataclass(frozen=True)
class Plan:
    """How to train on a dataset, and why."""

    spatial_dims: int
    spacing: tuple[float, float, float]
    slices: Literal["sagittal", "coronal", "axial"]
    """The planes of a 2D network: those across the coarsest axis."""
    patch_size: Size
    batch_size: int
    channels: tuple[int, ...]
    """Widths of the levels, finest first."""
    strides: tuple[Size, ...]
    """Of each step down."""
    kernels: tuple[Size, ...]
    """Of each level."""
    normalisation: tuple[ChannelNormalisation, ...]
    batch_dice: bool
    separate_z: bool
    low_resolution: "Plan | None"
    reasons: dict[str, str]
    """A sentence for each value."""


class Fit(NamedTuple):
    """The patch, network and batch that a budget allows."""

    topology: Topology
    channels: tuple[int, ...]
    batch_size: int
    reasons: dict[str, str]


def plan_for_memory(numbers: Numbers, *, spatial_dims: int, gigabytes: float = 8.0) -> Plan:
    """nnU-Net's plan: the largest patch, and then the largest batch, that the memory allows."""

    def fit(setting: Setting) -> Fit:
        return _fit_memory(setting, gigabytes)

    return _plan(numbers, spatial_dims, fit, fit)


@dataclass(frozen=True)
class Steps:
    """How many training steps are wanted before the time goes into something else."""

    for_batch: int
    """The batch is made smaller until so many steps fit."""
    for_width: int
    """The network is made narrower until so many steps fit."""
    for_patch: int
    """The patch is made smaller until so many steps fit."""


def plan_for_time(
    numbers: Numbers,
    *,
    spatial_dims: int,
    minutes: float,
    steps: Steps,
    multiply_adds_per_second: float,
    gigabytes: float = 8.0,
) -> Plan:
    """The plan for the memory, made smaller until enough training steps fit into the minutes.

    First the batch is made smaller, then the network narrower, then the patch smaller; `steps` says
    how many steps each must allow. If even the smallest plan takes longer, it is the result, and
    its reasons say so. Only the convolutions of training count, not preparation, validation or
    augmentation. Whether there are two stages follows from the patch that memory allows, as in
    nnU-Net, and not from the one that is left by time.
    """
    fit, fit_memory = _fits(minutes * 60 * multiply_adds_per_second, steps, gigabytes)
    return _plan(numbers, spatial_dims, fit, fit_memory)


def coarse_plan_for_time(
    numbers: Numbers,
    *,
    minutes: float,
    steps: Steps,
    multiply_adds_per_second: float,
    gigabytes: float = 8.0,
) -> Plan | None:
    """The plan in one stage at the first coarser spacing whose patch holds a quarter of an image.

    The patch is the one that time allows. None if it holds as much at full resolution, or if the
    coarser grid would save under half of the voxels. Arguments as for `plan_for_time`.
    """
    fit, _ = _fits(minutes * 60 * multiply_adds_per_second, steps, gigabytes)
    if len(flat_axes(numbers)):
        return None
    _, setting = _target(numbers, 3)
    plan, _ = _low_resolution(numbers, setting, fit(setting), fit, fit)
    return plan


def _fits(
    total: float, steps: Steps, gigabytes: float
) -> tuple[Callable[[Setting], Fit], Callable[[Setting], Fit]]:
    """The fit for a total of multiply-adds, and that for the memory."""
    return (
        lambda setting: _fit_time(setting, gigabytes, total, steps),
        lambda setting: _fit_memory(setting, gigabytes),
    )


def flat_axes(numbers: Numbers) -> list[int]:
    """Axes along which every case has one voxel; with one, the task is 2D in the plane across it.

    Raises DatasetError if the cases have no plane.
    """
    flat = [axis for axis in range(3) if all(shape[axis] == 1 for shape in numbers.shapes)]
    if len(flat) > 1:
        axes = " and ".join("xyz"[axis] for axis in flat)
        raise DatasetError(
            f"expected planes or volumes, found cases of one voxel along {axes}; a network that "
            f"segments lines does not exist here"
        )
    return flat


def across(numbers: Numbers) -> int:
    """The axis across the planes that a 2D network sees.

    That of one voxel in every case, whatever spacing its header claims; else that of the fewest
    voxels if a median image has no 2 along it; else the coarsest.
    """
    if flat := flat_axes(numbers):
        return flat[0]
    spacing = rules.target_spacing(numbers.spacings, numbers.shapes)
    shape = rules.median_shape(numbers.spacings, numbers.shapes, spacing)
    if min(shape) < 2:
        return min(range(3), key=lambda axis: (shape[axis], -spacing[axis]))
    return rules.coarsest_axis(spacing)


def _fit_memory(setting: Setting, gigabytes: float) -> Fit:
    num_axes = len(setting.spacing)
    scale = gigabytes / rules.REFERENCE_GIGABYTES
    budget = rules.REFERENCE_ACTIVATIONS[num_axes] * rules.REFERENCE_BATCH[num_axes] * scale
    first = rules.topology(setting.spacing, rules.initial_patch(setting.spacing, setting.median))
    for candidate in rules.shrinking(setting, first):
        channels = rules.widths(len(candidate.kernels), spatial_dims=num_axes)
        cost = rules.activations(
            channels=channels,
            strides=candidate.strides,
            patch_size=candidate.patch_size,
            num_classes=setting.num_classes,
        )
        if cost * rules.SMALLEST_BATCH <= budget:
            break
    patch = candidate.patch_size
    covered = setting.dataset_voxels * rules.LARGEST_SHARE / math.prod(patch)
    verb = "hold" if cost * rules.SMALLEST_BATCH <= budget else "should hold only"
    shrunk = "" if candidate == first else f", shrunk from {_size(first.patch_size)}"
    reasons = {
        "patch_size": f"The median image is {_size(setting.median)}, padded to multiples of "
        f"{_size(candidate.divisor)}{shrunk}: {rules.SMALLEST_BATCH} patches make "
        f"{rules.SMALLEST_BATCH * cost / 1e6:.4g} million activations, and {gigabytes:g} GB {verb} "
        f"{budget / 1e6:.4g} million.",
        "batch_size": f"{gigabytes:g} GB hold {budget / cost:.4g} patches, 5 % of the dataset's "
        f"voxels are {covered:.4g}, and a batch is {rules.SMALLEST_BATCH} at least.",
        "channels": f"{channels[0]} at the finest of {len(channels)} levels, doubled at each step, "
        f"and {rules.MOST_CHANNELS[num_axes]} at most.",
    }
    batch = rules.largest_batch(budget, cost, patch, setting.dataset_voxels)
    return Fit(candidate, channels, batch, reasons)


def _fit_time(setting: Setting, gigabytes: float, total: float, steps: Steps) -> Fit:
    """The fit for a total of so many multiply-adds."""
    start = _fit_memory(setting, gigabytes)

    def cost(candidate: Topology, channels: Sequence[int]) -> int:
        """Multiply-adds of one patch in a training step: forward once and backward twice."""
        return 3 * rules.multiply_adds(
            channels=channels,
            strides=candidate.strides,
            kernels=candidate.kernels,
            patch_size=candidate.patch_size,
            in_channels=setting.in_channels,
            num_classes=setting.num_classes,
        )

    def narrowed(candidate: Topology, width: int) -> tuple[int, ...]:
        num_levels = len(candidate.kernels)
        return rules.widths(num_levels, spatial_dims=len(setting.spacing), start=width)

    chosen, batch = start.topology, start.batch_size
    affordable = int(total / steps.for_batch // cost(chosen, start.channels))
    batch = max(min(batch, affordable), rules.SMALLEST_BATCH)
    for width in rules.START_WIDTHS:
        channels = narrowed(chosen, width)
        if batch * cost(chosen, channels) <= total / steps.for_width:
            break
    for chosen in rules.shrinking(setting, start.topology):
        channels = narrowed(chosen, channels[0])
        if batch * cost(chosen, channels) <= total / steps.for_patch:
            break
    needed = batch * cost(chosen, channels)
    budget = f"a step takes {needed / 1e9:.3g} billion multiply-adds"
    if needed > total / steps.for_patch:
        budget += ", more than the time has room for, but there is nothing smaller"
    patch = _size(chosen.patch_size)
    reasons = dict(start.reasons)
    if channels != start.channels:
        reasons["channels"] = (
            f"Narrowed from {start.channels[0]} to {channels[0]}, for more steps: {budget}."
        )
    if batch != start.batch_size:
        reasons["batch_size"] = (
            f"Made smaller, from {start.batch_size} to {batch}: that gives time for more steps."
        )
    if chosen != start.topology:
        whole = _size(start.topology.patch_size)
        reasons["patch_size"] = f"Shrunk from {whole} to {patch}, for more steps: {budget}."
    return Fit(chosen, channels, batch, {**reasons, "time": f"With this patch, {budget}."})


def _target(numbers: Numbers, spatial_dims: int) -> tuple[tuple[float, float, float], Setting]:
    """The spacing that all cases are brought to, and what patch and network are fitted to there."""
    spacing = rules.target_spacing(numbers.spacings, numbers.shapes)
    shape = rules.median_shape(numbers.spacings, numbers.shapes, spacing)
    left_out = across(numbers) if spatial_dims == 2 else None
    axes = [axis for axis in range(3) if axis != left_out]
    return spacing, Setting(
        spacing=tuple(spacing[axis] for axis in axes),
        # A plane of one line is padded, so that the patch of a 2D network is always a plane.
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
    if spatial_dims == 3 and (flat := flat_axes(numbers)):
        raise DatasetError(
            f"expected volumes for a plan of 3 dimensions, found one voxel along "
            f"{'xyz'[flat[0]]} in every case; plan with 2"
        )
    spacing, setting = _target(numbers, spatial_dims)
    coarsest = rules.coarsest_axis(spacing)
    fitted = fit(setting)
    low, why_low = None, "A 2D network sees planes at one resolution."
    if spatial_dims == 3:
        low, why_low = _low_resolution(numbers, setting, fit_memory(setting), fit_memory, fit)
    pooled = spatial_dims == 2 or low is not None
    median = _median_spacing(numbers)
    why_spacing = f"{_size(median)} mm is the median of {len(numbers.spacings)} cases"
    if spacing != median:
        why_spacing += (
            f"; along {'xyz'[coarsest]}, over {ANISOTROPY:g} times as coarse and of under a third "
            f"of the voxels, the 10th percentile is taken, {spacing[coarsest]:.4g} mm"
        )
    reasons = {
        "spacing": f"{why_spacing}.",
        "slices": _why_slices(numbers, spacing),
        "low_resolution": why_low,
        "batch_dice": (
            "A patch holds little of an image, so that Dice is steadier over the whole batch."
            if pooled
            else "A patch holds enough of an image for a Dice of its own."
        ),
    }
    return _assembled(numbers, spacing, fitted, pooled, low, reasons)


def _why_slices(numbers: Numbers, spacing: tuple[float, float, float]) -> str:
    axis = "xyz"[across(numbers)]
    if flat_axes(numbers):
        return f"Every case has one voxel along {axis}."
    if across(numbers) != rules.coarsest_axis(spacing):
        return f"No axis has fewer voxels than {axis}."
    return f"No axis is coarser than {axis} at {_size(spacing)} mm."


def _low_resolution(
    numbers: Numbers,
    full: Setting,
    fitted: Fit,
    holds: Callable[[Setting], Fit],
    fit: Callable[[Setting], Fit],
) -> tuple[Plan | None, str]:
    """The plan at the first coarser spacing whose patch holds enough of the median image.

    The patch of `fitted`, and of `holds` at coarser spacings, decides which spacing that is; `fit`
    makes the plan there.
    """
    whole = voxels = math.prod(full.median)
    setting = full
    share = math.prod(fitted.topology.patch_size) / whole
    seen = f"The patch holds {share:.3g} of the median image's voxels"
    spacing, coarse = full.spacing, fitted
    while rules.needs_low_resolution(coarse.topology.patch_size, voxels):
        spacing = rules.coarser(spacing)
        shape = [f / s * n for f, s, n in zip(full.spacing, spacing, full.median, strict=True)]
        voxels = math.prod(shape)
        setting = replace(
            full,
            spacing=spacing,
            median=tuple(max(round(n), 1) for n in shape),
            dataset_voxels=voxels * len(numbers.shapes),
        )
        coarse = holds(setting)
    if coarse is fitted:
        return None, f"{seen}, and {rules.LEAST_COVERED:g} would do."
    enough = f"at {_size(spacing)} mm it holds enough"
    if whole / voxels < 2:
        return None, f"{seen}, but {enough}, which would save under half of them."
    reasons = {
        "spacing": f"{seen} at {_size(full.spacing)} mm; {enough}.",
        "slices": f"They are those of {_size(full.spacing)} mm.",
        "low_resolution": "This plan is that of low resolution.",
        "batch_dice": "A patch holds enough of an image for a Dice of its own.",
    }
    x, y, z = spacing
    low = _assembled(numbers, (x, y, z), fit(setting), False, None, reasons)
    return low, f"{seen}, under {rules.LEAST_COVERED:g}; {enough}."


def _assembled(
    numbers: Numbers,
    spacing: tuple[float, float, float],
    fitted: Fit,
    batch_dice: bool,
    low_resolution: Plan | None,
    reasons: dict[str, str],
) -> Plan:
    chosen = fitted.topology
    current = _median_spacing(numbers)
    ratios = [max(each) / min(each) for each in (current, spacing)]
    share = float(np.median(numbers.box_shares))
    num_flat = sum(1 in kernel for kernel in chosen.kernels)
    return Plan(
        spatial_dims=len(chosen.patch_size),
        spacing=rounded_spacing(spacing),
        slices=rules.SLICE_PLANES[across(numbers)],
        patch_size=chosen.patch_size,
        batch_size=fitted.batch_size,
        channels=fitted.channels,
        strides=chosen.strides,
        kernels=chosen.kernels,
        normalisation=rules.normalisations(numbers),
        batch_dice=batch_dice,
        separate_z=separate_axis(current, spacing) is not None,
        low_resolution=low_resolution,
        reasons={
            "strides": f"Each of {len(chosen.strides)} strides halves the axes that keep "
            f"{rules.SMALLEST_EDGE} cells and are under twice as coarse as the finest.",
            "kernels": f"{num_flat} of {len(chosen.kernels)} levels have an axis at least twice as "
            f"coarse as the finest, along which they do not look.",
            "normalisation": f"Channels are {', '.join(numbers.channels)}, and the body's box "
            f"holds {share:.3g} of the volume in the median (zeros are left out under 0.75).",
            "separate_z": f"The coarsest spacing is {ratios[0]:.3g} times the finest in the median "
            f"case and {ratios[1]:.3g} times in the target; one axis alone over {ANISOTROPY:g} "
            f"times would be resampled apart, by the nearest slice.",
            **fitted.reasons,
            **reasons,
        },
    )


def _median_spacing(numbers: Numbers) -> tuple[float, float, float]:
    x, y, z = np.median(np.array(numbers.spacings, float), axis=0).tolist()
    return x, y, z


def _size(numbers: Lengths) -> str:
    return "x".join(f"{number:.4g}" for number in numbers)
