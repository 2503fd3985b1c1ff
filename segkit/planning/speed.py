"""How fast this machine's processor trains; plans for a time depend on it."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.io.atomic import write_json
from segkit.io.safe_text import read_json_object
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.normalisation import channels_last
from segkit.nn.unet import UNet
from segkit.planning.nnunet_rules import multiply_adds
from segkit.system.resources import half_pays

PROCESSORS = Path("/proc/cpuinfo")
CHANNELS = (16, 32, 64)
PATCH = (32, 32, 32)
BATCH = 2


def step_seconds(
    network: SegmentationNetwork, image: Tensor, label: Tensor, *, half: bool, repeats: int = 5
) -> float:
    """Seconds of a training step on the CPU: the median of the repeats, after one to warm up.

    The network's weights get the memory order that training gives them.
    """
    channels_last(network)
    optimiser = torch.optim.AdamW(network.parameters())
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            levels = network.train().supervised(image).levels
        deep_dice_cross_entropy(levels, label, pool_batch=False).backward()
        optimiser.step()
        optimiser.zero_grad()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def measured_once(file: Path, figure: Mapping[str, Any], measure: Callable[[], float]) -> float:
    """A figure of this processor, measured once and kept in a JSON file, so that plans agree.

    The file knows it by the figure's name, the processor, the version of torch and its threads.
    """
    about = {
        "figure": figure,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    about = json.loads(json.dumps(about))  # a tuple comes back as a list
    try:
        known = read_json_object(file)["measured"]
        found = [float(entry["value"]) for entry in known if entry["of"] == about]
    except (OSError, ValueError, KeyError, TypeError):
        known, found = [], []
    if not found or not found[0] > 0:
        found = [measure()]
        write_json(file, {"measured": [*known, {"of": about, "value": found[0]}]})
    return found[0]


def _processor() -> str:
    """The processor's name, or else its kind."""
    try:
        lines = PROCESSORS.read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiply_adds_per_second() -> float:
    """Multiply-adds in a second of training a small U-Net on this CPU, in its faster precision."""
    steps: Sequence[tuple[int, int, int]] = ((2, 2, 2),) * (len(CHANNELS) - 1)
    network = UNet(3, 1, out_channels=3, channels=CHANNELS, strides=steps)
    image, label = torch.randn(BATCH, 1, *PATCH), torch.zeros(BATCH, *PATCH, dtype=torch.long)
    per_step = (
        3
        * BATCH
        * multiply_adds(
            channels=CHANNELS,
            strides=steps,
            kernels=((3, 3, 3),) * len(CHANNELS),
            patch_size=PATCH,
            in_channels=1,
            num_classes=3,
        )
    )
    return per_step / step_seconds(network, image, label, half=half_pays())
