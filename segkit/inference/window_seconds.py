"""How long a network takes for a window, and how many windows an image has: what scoring costs."""

import math
import time
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

TRIES = 3


def num_windows(size: Sequence[int], patch_size: Sequence[int]) -> int:
    """Windows of an image that overlap by half."""
    counts = (max(math.ceil(2 * n / p) - 1, 1) for n, p in zip(size, patch_size, strict=True))
    return math.prod(counts)


def seconds_of_window(network: nn.Module, windows: Float[Tensor, "batch channel *space"]) -> float:
    """Seconds that a network takes for each of some windows: the fastest of the tries.

    Args:
        network: on its device; it is left as it was.
        windows: on the device, as many as are given to it at once.
    """
    was_training, tries = network.training, []
    network.eval()
    with torch.inference_mode():
        for _ in range(TRIES):
            started = time.perf_counter()
            network(windows)
            if windows.is_cuda:
                torch.cuda.synchronize(windows.device)
            tries.append((time.perf_counter() - started) / len(windows))
    network.train(was_training)
    return min(tries[1:])
