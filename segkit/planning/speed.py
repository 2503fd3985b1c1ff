"""Measurement of this machine's speed in training, on which plans for a time depend."""

import contextlib
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.data.augment_spatial import Vary
from segkit.io.atomic import write_json
from segkit.io.safe_text import read_json_object
from segkit.nn.adamw import fused_adamw
from segkit.nn.cpu_convolutions import right_convolutions
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.muon import MuonForKernels
from segkit.nn.network import SegmentationNetwork
from segkit.nn.normalisation import order_for
from segkit.nn.unet import UNet
from segkit.planning.nnunet_rules import multiply_adds
from segkit.system.core_share import FREE, CoreShare
from segkit.system.graphed_step import record_step
from segkit.system.resources import precision_of

PROCESSORS = Path("/proc/cpuinfo")
CHANNELS = (16, 32, 64)
PATCH = (32, 32, 32)
CHANNELS_ON_GPU = (32, 64, 128, 256)
PATCH_ON_GPU = (96, 96, 96)
BATCH = 2
CPU = torch.device("cpu")
CLIPPED = 12.0
RATE = 1e-3
"""The learning rate, which does not change the time of a step."""
WARM_UP = 5
REPEATS_ON_GPU = 20
LONG_ENOUGH = 2.0
"""Seconds of steps on a CPU, the first included, after which no more steps are timed."""
AUGMENTATIONS = 8
"""Number of augmentations that are timed on a CPU, unless they are slow."""


def step_seconds(
    network: SegmentationNetwork,
    image: Tensor,
    label: Tensor,
    *,
    vary: Vary | None = None,
    muon: bool = False,
    repeats: int = 5,
) -> float:
    """Seconds of a training step on this device, as training runs it.

    On a CPU this is the fastest of some steps and the mean of some augmentations, on free cores:
    time in which threads waited for other programs does not count. On a GPU the step is recorded
    and replayed, and this is the mean of all steps.

    Args:
        network: the network, on the device; its memory order is set to the fastest one.
        image: images of a batch as it is cut, on the device.
        label: labels of the batch, on the device.
        vary: the augmentation; none by default.
        muon: whether the optimiser is Muon; it is AdamW by default.
        repeats: number of steps that are timed on a CPU after one step to warm up; fewer, but at
            least two, if steps are slow. The fastest counts, as others may have waited for a core.
    """
    device = image.device
    order_for(network, device)
    network.train()
    parameters = list(network.parameters())
    optimiser: torch.optim.Optimizer = (
        MuonForKernels(parameters, lr=RATE, weight_decay=0.0)
        if muon
        else fused_adamw(parameters, lr=RATE)
    )
    half = precision_of(device)
    generator = torch.Generator().manual_seed(0)

    def losses(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast(device.type, dtype=half, enabled=half != torch.float32):
            levels = network.supervised(image).levels
        return (deep_dice_cross_entropy(levels, label, pool_batch=False),)

    def varied() -> tuple[Tensor, Tensor]:
        return (image, label) if vary is None else vary(image.float(), label, generator)

    # With float16, the loss is scaled, and training does not record its steps.
    records = device.type == "cuda" and half != torch.float16
    graphed = record_step(network, losses, *varied()) if records else None

    def step(image: Tensor, label: Tensor) -> None:
        if graphed is None:
            with right_convolutions(device):
                losses(image, label)[0].backward()
        else:
            graphed(image, label)
        torch.nn.utils.clip_grad_norm_(parameters, CLIPPED)
        optimiser.step()
        if graphed is None:
            optimiser.zero_grad()

    if device.type != "cuda":
        batch = varied()
        seconds = _seconds_on_free_cores(lambda: step(*batch), repeats)
        # Each augmentation draws other changes and takes another time, so the mean counts.
        augmenting = _seconds_on_free_cores(varied, AUGMENTATIONS) if vary is not None else [0.0]
        return min(seconds) + sum(augmenting) / len(augmenting)
    for _ in range(WARM_UP):
        step(*varied())
    torch.cuda.synchronize(device)
    started = time.perf_counter()
    for _ in range(REPEATS_ON_GPU):
        step(*varied())
    torch.cuda.synchronize(device)
    return (time.perf_counter() - started) / REPEATS_ON_GPU


@contextlib.contextmanager
def kernels_of_training(device: torch.device) -> Iterator[None]:
    """A context in which cuDNN searches for the fastest kernels on a GPU, as it does in training.

    PyTorch keeps the kernel of a shape, so one that was chosen without a search would stay for the
    training that follows in the same process. The device is PyTorch's current GPU in it, on whose
    streams steps are recorded.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with torch.cuda.device(device):
            yield
    finally:
        torch.backends.cudnn.benchmark = before


def _seconds_on_free_cores(work: Callable[[], object], repeats: int) -> list[float]:
    """Seconds of some repeats of this work, after one to warm up that does not count."""
    seconds: list[float] = []
    spent = 0.0
    while len(seconds) < 3 or (len(seconds) <= repeats and spent < LONG_ENOUGH):
        watch, started = CoreShare(), time.perf_counter()
        work()
        taken = time.perf_counter() - started
        spent += taken
        seconds.append(taken * watch.share())
    return seconds[1:]


@dataclass
class Figures:
    """Measured values of this machine, stored in a JSON file, so that later plans use the same.

    A stored value is used again only if the measurement, the processor, the precision of training,
    torch and its number of threads are the same; on a GPU also the card and cuDNN. A value that was
    measured while other programs used the cores is only kept by this object, so that a later plan
    measures again.
    """

    file: Path
    known: dict[str, float] = field(default_factory=dict)
    """Values by their descriptions."""
    share: float = 1.0
    """The lowest share of the cores that this process had during a measurement on the CPU."""

    def once(
        self, figure: Mapping[str, Any], measure: Callable[[], float], device: torch.device = CPU
    ) -> float:
        """A value from this object or the file, or else measured now.

        Args:
            figure: JSON values that describe the measurement.
            measure: makes the measurement.
            device: the device that is measured.
        """
        about = _described(figure, device)
        key = json.dumps(about, sort_keys=True)
        if key not in self.known:
            stored = self._stored()
            found = [float(entry["value"]) for entry in stored if entry["of"] == about]
            if found and found[0] > 0:
                self.known[key] = found[0]
            else:
                watch = CoreShare()
                self.known[key] = measure()
                share = watch.share() if device.type == "cpu" else 1.0
                self.share = min(self.share, share)
                if share >= FREE:
                    entry = {"of": about, "value": self.known[key]}
                    write_json(self.file, {"measured": [*stored, entry]})
        return self.known[key]

    def _stored(self) -> list[dict[str, Any]]:
        """The entries of the file; none if it does not exist or is damaged."""
        try:
            stored = read_json_object(self.file)["measured"]
            return [{"of": entry["of"], "value": float(entry["value"])} for entry in stored]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def busy(self) -> str | None:
        """A warning if other programs used the cores during a measurement."""
        if self.share >= FREE:
            return None
        return (
            f"other programs use the cores: while training steps were timed, their threads had a "
            f"core for {self.share:.0%} of the time; this plan is for free cores, so fewer steps "
            f"may fit into its minutes; end the other programs, or plan for fewer minutes"
        )


def _described(figure: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """A description of a measurement on this machine, as it comes back from JSON."""
    about = {
        "figure": figure,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": str(precision_of(device)),
    }
    if device.type == "cuda":
        about["device"] = torch.cuda.get_device_name(device)
        about["cudnn"] = torch.backends.cudnn.version()
        about["triton"] = find_spec("triton") is not None
        about["searched"] = True  # earlier versions measured without `kernels_of_training`
    described: dict[str, Any] = json.loads(json.dumps(about))  # a tuple comes back as a list
    return described


def _processor() -> str:
    """The processor's name, or its architecture if the name is unknown."""
    try:
        lines = PROCESSORS.read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def multiply_adds_per_second(device: torch.device = CPU) -> float:
    """Multiply-adds per second in training steps of a U-Net on a device, in its fastest precision.

    The network is small on a CPU, and large enough to use the whole device on a GPU.
    """
    channels, size = (CHANNELS, PATCH) if device.type == "cpu" else (CHANNELS_ON_GPU, PATCH_ON_GPU)
    steps: Sequence[tuple[int, int, int]] = ((2, 2, 2),) * (len(channels) - 1)
    network = UNet(3, 1, out_channels=3, channels=channels, strides=steps).to(device)
    image = torch.randn(BATCH, 1, *size, device=device)
    label = torch.zeros(BATCH, *size, dtype=torch.long, device=device)
    per_step = (
        3
        * BATCH
        * multiply_adds(
            channels=channels,
            strides=steps,
            kernels=((3, 3, 3),) * len(channels),
            patch_size=size,
            in_channels=1,
            num_classes=3,
        )
    )
    return per_step / step_seconds(network, image, label)
