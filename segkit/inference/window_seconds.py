"""Estimate the time of scoring: seconds for a window, and number of windows of an image."""

import math
import time
from collections.abc import Sequence

import torch
from torch import nn

from segkit.config.model import ModelDescription
from segkit.inference.engines.torch_eager import first_width_of, is_slow_alone
from segkit.inference.windows import window_starts

TRIES, AT_ONCE = 3, 2
OVERLAP = 0.5
"""The share of a window that neighbours have in common, as predictions have it by default."""
MOST_FOR_SCORING, MOST_FOR_ONE_CASE = 0.25, 0.5
"""The final scores take at most the first share of a timed run, and fewer cases are scored if
necessary. If a single case takes longer, it may take the second share."""


def num_windows(
    size: Sequence[int],
    patch_size: Sequence[int],
    stride: Sequence[int],
    *,
    at_once: int = 1,
    axis: int = 0,
) -> int:
    """Number of windows of an image, if neighbours overlap by half. Single slices do not overlap.

    Neighbours overlap by more if half a window is no multiple of the network's stride.

    Args:
        size: size of the image in voxels.
        patch_size: size of a window; 1 along the axis of the slices that a 2D network sees.
        stride: the network's total stride along each axis; windows start at multiples of it.
        at_once: number of windows that are computed at once. If fewer are left, as many count.
        axis: the axis along which windows follow one another. Those of another place along it are
            not computed at once.
    """
    along = [
        len(window_starts(n, p, 0.0 if p == 1 else OVERLAP, s))
        for n, p, s in zip(size, patch_size, stride, strict=True)
    ]
    rows = along.pop(axis)
    return rows * math.ceil(math.prod(along) / at_once) * at_once


def seconds_to_score(total: float, held_out: int, per_case: float, before: float = 0.0) -> float:
    """Seconds that a timed run keeps for its final scores.

    These are enough for all held-out cases, but at most a quarter of the time. At least one case
    is scored, so there is time for one if it takes at most half of the time.

    Args:
        total: seconds of the whole run.
        held_out: number of held-out cases.
        per_case: seconds of a case.
        before: seconds until the first case can be scored.
    """
    if not held_out:
        return 0.0
    one = min(before + per_case, MOST_FOR_ONE_CASE * total)
    return min(before + held_out * per_case, max(MOST_FOR_SCORING * total, one))


def mean_windows(
    sizes: Sequence[Sequence[int]],
    description: ModelDescription,
    device: torch.device,
    precision: torch.dtype,
    *,
    width: int | None = None,
) -> float:
    """Mean number of windows that are computed for an image.

    A small window that is left over is computed as two (`is_slow_alone`), and counts as two.

    Args:
        sizes: the size of each image in voxels.
        description: the description of the model.
        device: where the network runs.
        precision: data type of the arithmetic.
        width: channels that the first 3D convolution computes, 0 if there is none; None if they are
            those of the description's first level.
    """
    network = description.network
    if width is None:
        width = network.channels[0] if network.spatial_dims == 3 else 0
    patch, stride = description.volume_patch, description.volume_stride
    at_once = 2 if is_slow_alone(width, device, patch, precision) else 1
    counts = [num_windows(size, patch, stride, at_once=at_once) for size in sizes]
    return sum(counts) / len(counts)


def scored_in(device: torch.device, trained_in: torch.dtype) -> torch.dtype:
    """The precision of the final scores, as far as their time is concerned.

    A CPU computes them in single precision, and a GPU in float16, which takes as long as bfloat16.

    Args:
        device: the device that trains.
        trained_in: the precision of the training, and so of its validations.
    """
    if device.type == "cpu":
        return torch.float32
    return torch.float16 if trained_in == torch.float32 else trained_in


def seconds_of_window(
    network: nn.Module, description: ModelDescription, precision: torch.dtype
) -> float:
    """Seconds of a window, of two that are computed at once; the fastest of some tries.

    Args:
        network: the network, on its device; it does not change.
        description: the description of the model.
        precision: data type of the arithmetic.
    """
    device = next(network.parameters()).device
    shape = (AT_ONCE, description.channels_in, *description.volume_patch)
    windows = torch.zeros(shape, device=device)
    on_gpu = device.type == "cuda"
    was_training, tries = network.training, []
    network.eval()
    with (
        torch.inference_mode(),
        torch.autocast(device.type, dtype=precision, enabled=precision != torch.float32),
    ):
        for _ in range(TRIES):
            started = time.perf_counter()
            network(windows)
            if on_gpu:
                torch.cuda.synchronize(device)
            tries.append((time.perf_counter() - started) / AT_ONCE)
    network.train(was_training)
    return min(tries[1:])


def seconds_of_case(
    network: nn.Module,
    description: ModelDescription,
    sizes: Sequence[Sequence[int]],
    trained_in: torch.dtype,
) -> tuple[float, float]:
    """Mean seconds of a case: in a validation of the training, and in its final scores.

    Args:
        network: the network, on its device; it does not change.
        description: the description of the model.
        sizes: the size of each case in voxels.
        trained_in: the precision of the training.
    """
    device, width = next(network.parameters()).device, first_width_of(network)
    seconds = {
        precision: seconds_of_window(network, description, precision)
        * mean_windows(sizes, description, device, precision, width=width)
        for precision in {trained_in, scored_in(device, trained_in)}
    }
    return seconds[trained_in], seconds[scored_in(device, trained_in)]
