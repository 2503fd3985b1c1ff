"""The largest network, patch and batch that fit into a budget of memory or time."""

import itertools
import math
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

from segkit.errors import counted
from segkit.planning import nnunet_rules as rules
from segkit.planning.nnunet_rules import Lengths, Setting, Topology
from segkit.planning.planned_optimiser import planned_work
from segkit.planning.step_work import step_work

MOST_ELONGATED = 2.0
"""If time is short, a patch is first shortened along an axis that is more than so many times as
long, in mm, as all other axes."""


class Fit(NamedTuple):
    """The patch, network and batch that a budget allows."""

    topology: Topology
    channels: tuple[int, ...]
    batch_size: int
    reasons: dict[str, str]


@dataclass(frozen=True)
class Steps:
    """The numbers of training steps that must fit into the time, before a part is made smaller."""

    for_batch: int
    """The batch is made smaller until this number of steps fits."""
    per_channel: int
    """The network is made narrower until so many steps fit for each channel of its finest level. A
    wide network needs more steps, and each takes longer."""
    for_patch: int
    """The patch is made smaller until this number of steps of the narrowest network fits."""


def per_axis(numbers: Lengths) -> str:
    """A number for each axis in words, such as "64x64x32"."""
    return "x".join(f"{number:.0f}" if number >= 1000 else f"{number:.4g}" for number in numbers)


def _count(number: float, digits: int = 4) -> str:
    """A number in words, such as "0.4578" or "15,440"."""
    return f"{number:,.0f}" if number >= 1000 else f"{number:.{digits}g}"


def fit_memory(setting: Setting, gigabytes: float) -> Fit:
    """The largest patch that the memory allows, and then the largest batch.

    Args:
        setting: the data.
        gigabytes: memory of the device, in 10⁹ bytes.
    """
    num_axes = len(setting.spacing)
    scale = gigabytes / rules.REFERENCE_GIGABYTES
    budget = rules.REFERENCE_ACTIVATIONS[num_axes] * rules.REFERENCE_BATCH[num_axes] * scale
    initial = rules.initial_patch(setting.spacing, setting.median)
    first = rules.topology(setting.spacing, initial)
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
    cut = "" if initial == setting.median else f", cut to {per_axis(initial)}"
    is_small = any(
        size >= n + d for size, n, d in zip(first.patch_size, initial, first.divisor, strict=True)
    )
    shrunk = ", raised to a size that a network can halve" if is_small else ""
    if candidate != first:
        shrunk += f", reduced from {per_axis(first.patch_size)}"
    reasons = {
        "patch_size": f"The median image is {per_axis(setting.median)}{cut}, padded to multiples "
        f"of {per_axis(candidate.divisor)}{shrunk}: with {channels[0]} channels, "
        f"{rules.SMALLEST_BATCH} patches have {_count(rules.SMALLEST_BATCH * cost / 1e6)} million "
        f"activations, and {gigabytes:g} GB {verb} {_count(budget / 1e6)} million.",
        "batch_size": f"{gigabytes:g} GB hold {_count(budget / cost)} patches. A batch has at most "
        f"5 % of the dataset's voxels ({_count(covered)} patches), but at least "
        f"{rules.SMALLEST_BATCH} patches.",
        "channels": f"{channels[0]} at the finest of {counted(len(channels), 'level')}, doubled "
        "at each step, "
        f"and at most {rules.MOST_CHANNELS[num_axes]}.",
    }
    batch = rules.largest_batch(budget, cost, patch, setting.dataset_voxels)
    return Fit(candidate, channels, batch, reasons)


def _without_tubes(setting: Setting) -> Setting:
    """The setting, with a median image that is at most twice as long (in mm) as along other axes.

    A patch is shortened along the axis that is longest in relation to the median image. In a tube,
    such as a spinal cord of 1000x40x40 voxels, it would become a thread of 176x8x8 voxels.
    """
    lengths = [s * n for s, n in zip(setting.spacing, setting.median, strict=True)]
    longest = MOST_ELONGATED * sorted(lengths)[-2]
    median = (min(n, longest / s) for s, n in zip(setting.spacing, setting.median, strict=True))
    return replace(setting, median=tuple(median))


def fit_time(
    setting: Setting, gigabytes: float, total: float, steps: Steps, *, muon_cost: float | None
) -> Fit:
    """The fit for a total number of multiply-adds.

    Args:
        setting: the data.
        gigabytes: memory of the device, in 10⁹ bytes.
        total: number of multiply-adds in the whole training.
        steps: the numbers of steps that must fit.
        muon_cost: how long one of Muon's multiply-adds takes, in those of the network; None if the
            plan is not for a CPU.
    """
    start = fit_memory(setting, gigabytes)

    def cost(candidate: Topology, channels: tuple[int, ...], batch: int) -> float:
        """Multiply-adds of a training step, or its time in them."""
        work = step_work(
            batch_size=batch,
            channels=channels,
            strides=candidate.strides,
            kernels=candidate.kernels,
            patch_size=candidate.patch_size,
            in_channels=setting.in_channels,
            num_classes=setting.num_classes,
        )
        return planned_work(work, muon_cost=muon_cost)

    def narrowed(candidate: Topology, width: int) -> tuple[int, ...]:
        num_levels = len(candidate.kernels)
        return rules.widths(num_levels, spatial_dims=len(setting.spacing), start=width)

    sizes = range(rules.SMALLEST_BATCH, start.batch_size + 1)
    affordable = bisect_right(
        sizes, total / steps.for_batch, key=partial(cost, start.topology, start.channels)
    )
    batch = sizes[max(affordable - 1, 0)]
    *wider, narrowest = rules.START_WIDTHS
    smaller = rules.shrinking(_without_tubes(setting), start.topology)
    candidates = itertools.chain(
        ((start.topology, width, width * steps.per_channel) for width in wider),
        ((topology, narrowest, steps.for_patch) for topology in smaller),
    )
    for chosen, width, wanted in candidates:
        channels = narrowed(chosen, width)
        needed = cost(chosen, channels, batch)
        if needed <= total / wanted:
            break
    budget = f"a step takes the time of {_count(needed / 1e9, 3)} billion multiply-adds"
    if needed > total / wanted:
        budget += ", which is more than the time allows, but there is no smaller plan"
    patch = per_axis(chosen.patch_size)
    reasons = dict(start.reasons)
    if channels != start.channels:
        reasons["channels"] = (
            f"Reduced from {start.channels[0]} to {channels[0]}, for more steps: {budget}."
        )
    if batch != start.batch_size:
        reasons["batch_size"] = (
            f"Reduced from {start.batch_size} to {batch}, which gives time for more steps."
        )
    if chosen != start.topology:
        whole = per_axis(start.topology.patch_size)
        if batch == start.batch_size:
            reasons["batch_size"] = f"For patches of {whole}: {reasons['batch_size']}"
        reasons["patch_size"] = f"Reduced from {whole} to {patch}, for more steps: {budget}."
    return Fit(chosen, channels, batch, {**reasons, "time": f"With this patch, {budget}."})
