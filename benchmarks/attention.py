"""The cost of each kind of attention, relative to a plain U-Net of the same widths.

    python benchmarks/attention.py [--size 64] [--rounds 9] [--device cpu] [--kinds KIND …]

In every round, each network and the plain U-Net run once, and the ratio of their times is taken.
The Markdown table has the medians of these ratios. Multiply-adds are counted, not timed.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.model.build import build_network
from segkit.nn.cost import count_multiply_adds, count_parameters

PLAIN = "plain"
MEDNEXT = "block: mednext"
KINDS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "skip: additive_grid": {"skip": "additive_grid"},
    "skip: additive_grid, softmax": {"skip": {"kind": "additive_grid", "coefficients": "softmax"}},
    "skip: additive_grid, hard": {"skip": {"kind": "additive_grid", "coefficients": "hard"}},
    "skip: additive_grid, 2 gates": {"skip": {"kind": "additive_grid", "gates": 2}},
    "skip: additive_same_level": {"skip": "additive_same_level"},
    "skip: cross_attention": {"skip": "cross_attention"},
    "skip: u_transformer": {"skip": "u_transformer"},
    **{
        f"encoder: {kind}": {"encoder": kind}
        for kind in ("se", "eca", "cbam", "bam", "scse", "spatial", "sse", "gc", "lka", "epa")
    },
    "bottleneck: self_attention": {"bottleneck": "self_attention"},
    "bottleneck: self_attention, shift": {
        "bottleneck": {"kind": "self_attention", "window": [4, 4, 4], "shift": True}
    },
    "bottleneck: additive_self": {"bottleneck": "additive_self"},
    "bottleneck: transformer": {"bottleneck": "transformer"},
    "head: gated": {"head": "gated"},
    "head: learned_query": {"head": "learned_query"},
    MEDNEXT: {},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=64, help="voxels along each axis")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    options = parser.parse_args()
    device = torch.device(options.device)
    image = torch.randn(1, 1, *[options.size] * 3, device=device)
    networks = {name: network(name, options.size).to(device) for name in options.kinds}
    plain = network(PLAIN, options.size).to(device)
    console = Console()
    lines = [
        f"One image of {options.size}³ voxels, widths 16 to 128, {device.type}, "
        f"{torch.get_num_threads()} threads, medians of {options.rounds} paired rounds.",
        "",
        "| kind | parameters | multiply-adds | forward | forward and backward |",
        "|---|---:|---:|---:|---:|",
    ]
    size, work = count_parameters(plain), count_multiply_adds(plain, image)
    for name, one in track(networks.items(), "measuring", console=console):
        forward = ratio(lambda n: n(image), plain, one, options.rounds, device)
        both = ratio(lambda n: train_once(n, image), plain, one, options.rounds, device)
        lines.append(
            f"| {name} | {count_parameters(one):,} ({count_parameters(one) / size - 1:+.1%}) "
            f"| {count_multiply_adds(one, image) / 1e9:.2f} G "
            f"({count_multiply_adds(one, image) / work - 1:+.1%}) | {forward:.3f} | {both:.3f} |"
        )
    console.print("\n".join(lines), highlight=False, soft_wrap=True)


def network(name: str, size: int) -> nn.Module:
    """A 3D U-Net of that kind, as a config would build it."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"attention": KINDS[name]}
    if name == MEDNEXT:
        settings["block"] = "mednext"
    return build_network(
        ModelDescription(
            segkit="benchmark",
            run="benchmark",
            channels=["image"],
            labels={"background": 0, "one": 1, "two": 2},
            network=validated(NetworkConfig, settings, "benchmark"),
            spacing=(1.0, 1.0, 1.0),
            normalisation=["zscore"],
            slices="axial",
            patch_size=[size] * 3,
        )
    )


def train_once(network: nn.Module, image: Tensor) -> None:
    """One forward and backward pass through all supervised outputs."""
    levels, presence = network.supervised(image)  # type: ignore[operator]
    loss = torch.stack([level.mean() for level in levels]).sum()
    if presence is not None:
        loss = loss + presence.mean()
    loss.backward()
    network.zero_grad()


def ratio(
    run: Callable[[nn.Module], object],
    plain: nn.Module,
    other: nn.Module,
    rounds: int,
    device: torch.device,
) -> float:
    """Median over rounds of the ratio of times: other network / plain network."""
    ratios = []
    for number in range(rounds + 1):
        seconds = []
        # The order alternates, so that the same network does not always find a warm cache.
        pair = [plain, other] if number % 2 else [other, plain]
        for network in pair:
            if device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            run(network)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        if number % 2 == 0:
            seconds.reverse()
        if number:  # the first round warms up
            ratios.append(seconds[1] / seconds[0])
    return statistics.median(ratios)


if __name__ == "__main__":
    main()
