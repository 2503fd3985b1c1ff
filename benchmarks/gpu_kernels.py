"""The fused normalisation on a GPU: errors, time of a layer, and time of a training step.

    python benchmarks/gpu_kernels.py                 about a minute on one GPU
    python benchmarks/gpu_kernels.py --compile       also torch.compile; takes minutes more
    python benchmarks/gpu_kernels.py --sweep         also other sizes of tiles and launches
    python benchmarks/gpu_kernels.py --tiny          on a CPU, without the kernel: tests this script

Each line is complete and is printed at once. Layers use bfloat16. GB/s count the necessary memory
traffic: forward reads the input twice and writes once, backward reads two tensors twice and writes
once. "host" is the time in which the host launches the work. Times are medians; the number after ±
is the distance between the quartiles.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.normalisation import CHANNELS_LAST, channels_last, fuse_normalisation
from segkit.nn.unet import UNet

EPS, SLOPE = 1e-5, 0.01
NETWORKS = {
    "small": (7, (40, 56, 40), (32, 64, 128, 256)),
    "large": (2, (128, 128, 128), (32, 64, 128, 256, 320, 320)),
}
TINY_NETWORKS = {"small": (2, (8, 8, 8), (4, 8)), "large": (1, (16, 16, 16), (4, 8, 8))}
PARITY: dict[torch.dtype, list[tuple[int, ...]]] = {
    torch.float32: [(2, 32, 40, 56, 40)],
    torch.float16: [(2, 3, 33, 47)],
    torch.bfloat16: [(2, 32, 40, 56, 40), (7, 256, 5, 7, 5), (2, 3, 33, 47)],
}
"""Shapes for the comparison with float64. They are few, because each kind compiles a new kernel."""
CONFIGURATIONS = [(2048, 8, 4), (2048, 8, 8), (4096, 16, 2), (4096, 16, 4), (1024, 8, 8)]
"""For the sweep: numbers per tile, numbers per thread, programs per multiprocessor."""

STARTED = time.perf_counter()
Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def say(line: str) -> None:
    print(f"[{time.perf_counter() - STARTED:5.1f} s] {line}", flush=True)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def host_times(function: Callable[[], Any], seconds: float) -> list[float]:
    """Milliseconds of calls until they are enqueued; on a CPU, until they end."""
    times = []
    for _ in range(max(7, min(30, int(seconds / first_time(function))))):
        started = time.perf_counter()
        function()
        times.append((time.perf_counter() - started) * 1e3)
    return times


def first_time(function: Callable[[], Any]) -> float:
    """Seconds of one call, after three calls for warm-up."""
    for _ in range(3):
        function()
    synchronise()
    started = time.perf_counter()
    function()
    synchronise()
    return time.perf_counter() - started


def summary(gpu: list[float], host: list[float]) -> tuple[float, float, float]:
    """Median and interquartile distance of the GPU's times, and median of the host's times."""
    low, middle, high = statistics.quantiles(gpu, n=4)
    return middle, high - low, statistics.median(host)


def time_layer(function: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Milliseconds of GPU work for a call with a cold cache; see `summary`."""
    if not torch.cuda.is_available():
        host = host_times(function, seconds)
        return summary(host, host)
    count = max(7, min(30, int(seconds / first_time(function))))
    flush = torch.empty(2**26, dtype=torch.float32, device="cuda")
    host, events = [], []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The GPU waits, so that the host has enqueued the whole call before it starts.
        torch.cuda._sleep(2_000_000)
        flush.zero_()
        start.record()
        started = time.perf_counter()
        function()
        host.append((time.perf_counter() - started) * 1e3)
        end.record()
        events.append((start, end))
    torch.cuda.synchronize()
    return summary([start.elapsed_time(end) for start, end in events], host)


def time_step(function: Callable[[], Any], seconds: float) -> tuple[float, float, float]:
    """Milliseconds from the end of a call to the end of the next; see `summary`."""
    if not torch.cuda.is_available():
        host = host_times(function, seconds)
        return summary(host, host)
    count = max(7, min(30, int(seconds / first_time(function))))
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    host = []
    events[0].record()
    for event in events[1:]:
        started = time.perf_counter()
        function()
        host.append((time.perf_counter() - started) * 1e3)
        event.record()
    torch.cuda.synchronize()
    return summary([one.elapsed_time(two) for one, two in itertools.pairwise(events)], host)


def by_pytorch(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    normalised = F.instance_norm(features, weight=weight, bias=bias, eps=EPS)
    return F.leaky_relu(normalised, SLOPE, inplace=True)


def fused_layer() -> Layer | None:
    if not torch.cuda.is_available() or find_spec("triton") is None:
        return None
    from segkit.nn.fused_normalisation import normalise_and_leak

    return lambda features, weight, bias: normalise_and_leak(
        features, weight, bias, eps=EPS, slope=SLOPE
    )


def ordered(features: Tensor, last: bool) -> Tensor:
    return features.contiguous(memory_format=CHANNELS_LAST[features.ndim]) if last else features


def parity(layer: Layer, device: str) -> None:
    """Print the largest relative error (by norm) of each result, compared with float64."""
    for dtype, shapes in PARITY.items():
        worst = [0.0] * 4
        same = True
        for shape, last in itertools.product(shapes, (False, True)):
            features = ordered((3 + 2 * torch.randn(shape, device=device)).to(dtype), last)
            weight = 1 + 0.3 * torch.randn(shape[1], device=device)
            bias = torch.randn(shape[1], device=device)
            exact = [value.double().contiguous().requires_grad_() for value in (weight, bias)]
            exact.insert(0, features.double().contiguous().requires_grad_())
            before = F.instance_norm(exact[0], weight=exact[1], bias=exact[2], eps=EPS)
            # Cells near zero are left out, because rounding may change their sign.
            gradient = torch.randn(shape, device=device).to(dtype)
            gradient = torch.where(before.abs() < 1e-4, 0, gradient)
            truth = F.leaky_relu(before, SLOPE)
            truths = [truth, *torch.autograd.grad(truth, exact, gradient.double())]
            found: list[list[Tensor]] = []
            for _ in range(2):
                inputs = [value.clone().requires_grad_() for value in (features, weight, bias)]
                output = layer(*inputs)
                found.append([output, *torch.autograd.grad(output, inputs, gradient)])
            same = same and all(torch.equal(a, b) for a, b in zip(*found, strict=True))
            for at, (ours, theirs) in enumerate(zip(found[0], truths, strict=True)):
                ours, theirs = ours.detach().double(), theirs.detach()
                error = float((ours - theirs).norm() / theirs.norm())
                worst[at] = max(worst[at], error if error == error else float("inf"))
        limit = {torch.float32: 2e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
        good = max(worst[:2]) < limit and max(worst[2:]) < 5e-6 and same
        say(
            f"parity {str(dtype)[6:]:9s} output {worst[0]:.1e} input {worst[1]:.1e} weight "
            f"{worst[2]:.1e} bias {worst[3]:.1e}, repeatable: {same}: "
            f"{'right' if good else 'WRONG'}"
        )


def layers(networks: dict[str, Any], device: str, fused: Layer | None, seconds: float) -> None:
    say("layers: microseconds forward | forward and backward (GB/s), host")
    for name, (batch, space, channels) in networks.items():
        for level, width in enumerate(channels):
            shape = (batch, width, *(size >> level for size in space))
            one_layer(f"{name} {width:3d} x {list(shape[2:])}", shape, device, fused, seconds)


def one_layer(
    name: str, shape: tuple[int, ...], device: str, fused: Layer | None, seconds: float
) -> None:
    weight = torch.ones(shape[1], device=device, requires_grad=True)
    bias = torch.zeros(shape[1], device=device, requires_grad=True)
    cells = torch.randn(shape, device=device).bfloat16()
    slopes = torch.randn(shape, device=device).bfloat16()
    size = cells.numel() * 2 / 1e9
    variants = [("torch", by_pytorch, False), ("torch last", by_pytorch, True)]
    if fused is not None:
        variants += [("fused last", fused, True), ("fused", fused, False)]
    parts = []
    for variant, layer, last in variants:
        features = ordered(cells, last).requires_grad_()
        gradient = ordered(slopes, last)

        def forward(layer: Layer = layer, features: Tensor = features) -> None:
            with torch.no_grad():
                layer(features, weight, bias)

        def both(
            layer: Layer = layer, features: Tensor = features, gradient: Tensor = gradient
        ) -> None:
            torch.autograd.grad(layer(features, weight, bias), (features, weight, bias), gradient)

        one, _, _ = time_layer(forward, seconds)
        two, spread, host = time_layer(both, seconds)
        parts.append(
            f"{variant}: {one * 1e3:.0f} ({3 * size / one * 1e3:.0f}) | {two * 1e3:.0f}"
            f"±{spread * 1e3:.0f} ({8 * size / two * 1e3:.0f}), {host * 1e3:.0f}"
        )
    say(f"{name:24s} {'; '.join(parts)}")


def sweep(device: str, layer: Layer, networks: dict[str, Any], seconds: float) -> None:
    """Measure each configuration on the finest level and on a middle level."""
    from segkit.nn import fused_normalisation

    kept = (
        fused_normalisation.TILE,
        fused_normalisation.NUMBERS_PER_THREAD,
        fused_normalisation.PROGRAMS_PER_PROCESSOR,
    )
    for tile, numbers, programs in CONFIGURATIONS:
        fused_normalisation.TILE = tile
        fused_normalisation.NUMBERS_PER_THREAD = numbers
        fused_normalisation.PROGRAMS_PER_PROCESSOR = programs
        fused_normalisation.launch.cache_clear()
        for name, (batch, space, channels) in networks.items():
            for level in (0, 2):
                shape = (batch, channels[level], *(size >> level for size in space))
                parts = []
                for last in (True, False):
                    features = ordered(torch.randn(shape, device=device).bfloat16(), last)
                    features.requires_grad_()
                    gradient = torch.randn_like(features)
                    weight = torch.ones(shape[1], device=device, requires_grad=True)
                    bias = torch.zeros(shape[1], device=device, requires_grad=True)
                    inputs = (features, weight, bias)

                    def forward(inputs: tuple[Tensor, ...] = inputs) -> None:
                        with torch.no_grad():
                            layer(*inputs)

                    def both(
                        inputs: tuple[Tensor, ...] = inputs, gradient: Tensor = gradient
                    ) -> None:
                        torch.autograd.grad(layer(*inputs), inputs, gradient)

                    one, two = (time_layer(step, seconds)[0] for step in (forward, both))
                    parts.append(f"{one * 1e3:.0f} | {two * 1e3:.0f}")
                say(
                    f"sweep tile {tile} a thread {numbers} programs {programs}: {name} level "
                    f"{level}: last {parts[0]}; contiguous {parts[1]}"
                )
    (
        fused_normalisation.TILE,
        fused_normalisation.NUMBERS_PER_THREAD,
        fused_normalisation.PROGRAMS_PER_PROCESSOR,
    ) = kept
    fused_normalisation.launch.cache_clear()


def steps(
    networks: dict[str, Any], device: str, fused: Layer | None, seconds: float, compiled: bool
) -> None:
    """Measure training steps of each variant.

    Use a new process to change cudnn.benchmark: in one process, cuDNN keeps the first algorithm of
    each shape.
    """
    for name, setting in networks.items():
        for last in (False, True):
            kinds = ["eager"] if fused is None else ["eager", "fused"]
            for kind in kinds:
                one_step(name, setting, device, seconds, last, kind)
    for name, setting in networks.items() if compiled else ():
        for last in (False, True):
            one_step(name, setting, device, seconds, last, "compiled")


def one_step(
    name: str,
    setting: tuple[int, tuple[int, ...], tuple[int, ...]],
    device: str,
    seconds: float,
    last: bool,
    kind: str,
) -> None:
    batch, space, channels = setting
    torch.manual_seed(0)
    network = UNet(3, 1, out_channels=3, channels=channels, deep_supervision=True).to(device)
    network.train()
    if last:
        channels_last(network)
    if kind == "fused":
        fuse_normalisation(network)
    image = torch.randn(batch, 1, *space, device=device)
    label = torch.randint(0, 3, (batch, *space), device=device)

    def loss_of(image: Tensor, label: Tensor) -> Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            levels = network.supervised(image).levels
        return deep_dice_cross_entropy(levels, label, pool_batch=False)

    run = torch.compile(loss_of, dynamic=False) if kind == "compiled" else loss_of
    loss = torch.zeros(())

    def step() -> None:
        nonlocal loss
        for parameter in network.parameters():
            parameter.grad = None
        loss = run(image, label)
        loss.backward()

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step()
    synchronise()
    first = time.perf_counter() - started
    middle, spread, host = time_step(step, seconds)
    peak = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else 0.0
    benchmark = "benchmark" if torch.backends.cudnn.benchmark else ""
    say(
        f"step {name}: {'channels last' if last else 'contiguous':13s} {kind:8s} {benchmark:9s} "
        f"{middle:7.2f} ±{spread:.2f} ms (host {host:.2f}), "
        f"loss {float(loss.detach()):.5f}, {peak:.2f} GB, first {first:.1f} s"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    for flag in ("--compile", "--sweep", "--tiny"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--benchmark", action="store_true", help="only steps, with cudnn.benchmark")
    flags = parser.parse_args()
    device = "cpu" if flags.tiny else "cuda"
    networks, seconds = (TINY_NETWORKS, 0.01) if flags.tiny else (NETWORKS, 0.05)
    fused = None if flags.tiny else fused_layer()
    torch.manual_seed(0)
    if flags.benchmark:
        torch.backends.cudnn.benchmark = True
        steps(networks, device, fused, 10 * seconds, flags.compile)
        return
    name = "CPU" if flags.tiny else torch.cuda.get_device_name()
    say(f"{name}, torch {torch.__version__}, {'no kernel' if fused is None else 'with kernel'}")
    if fused is not None:
        parity(fused, device)
    say("steps: forward, loss and backward under bfloat16 autocast; milliseconds (host), loss, GB")
    steps(networks, device, fused, 10 * seconds, compiled=False)
    say("steps with cudnn.benchmark, in a new process with its own clock")
    subprocess.run([sys.executable, __file__, "--benchmark", *sys.argv[1:]], check=True)
    layers(networks, device, fused, seconds)
    if flags.sweep and fused is not None:
        sweep(device, fused, networks, seconds)
    say("done")


if __name__ == "__main__":
    main()
