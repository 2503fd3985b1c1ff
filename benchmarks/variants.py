"""Train one config with each of several settings, and compare Dice, calibration and time.

    python benchmarks/variants.py GROUP CONFIG.yaml [--steps 500] [--only NAME …] [--seed 0]
        [--runs FOLDER]
    python benchmarks/variants.py --table

GROUP is `losses`, `optimisers` or `attention`. Each variant is CONFIG with other settings. All
variants of one config get the same cases, the same patches, the same first weights where the
network is the same, and the same number of steps, so that other programs on the machine change
nothing but the seconds. One seed: a difference of a few hundredths between two rows can be chance.
Other seeds than 0 give rows of their own. If CONFIG names its held-out cases, they are the same for
all seeds. `none, widened` has no attention, and as many weights as CONFIG, at the coarsest level.
Results are added to benchmarks/variants.json. A variant that is there already is not trained again,
and a stopped training is resumed.

The temperature is fitted on the held-out cases (`train.calibrate`), and the expected calibration
error (ECE) before and after is that of the same cases, over voxels in question.
"""

import argparse
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from segkit.config.load import changed, load_config
from segkit.config.model import ModelDescription
from segkit.config.training import Config
from segkit.data.dataset import dataset_of
from segkit.evaluation.overlap import mean_of_defined
from segkit.io.atomic import write_json
from segkit.io.safe_text import read_json_object
from segkit.model.build import build_network
from segkit.model.file_names import CONFIG, SUMMARY
from segkit.nn.cost import count_parameters
from segkit.system.allocator import keep_freed_memory
from segkit.system.progress import Tracker
from segkit.training.fit import train
from segkit.training.resume import resume

TABLE = Path(__file__).with_suffix(".json")
DEFAULT = "default"
WIDENED = "none, widened"


def _terms(**weights: float) -> list[str]:
    """The override that makes a loss of these terms."""
    return [f"train.loss.terms={{{', '.join(f'{name}: {w}' for name, w in weights.items())}}}"]


def _attention(place: str, kind: str) -> list[str]:
    """The override of a network whose only attention is this."""
    return [f"network.attention={{{place}: {kind}}}"]


GROUPS: dict[str, dict[str, list[str]]] = {
    "losses": {
        DEFAULT: [],
        "cross-entropy": _terms(cross_entropy=1),
        "Dice": _terms(dice=1),
        "Dice + focal": _terms(dice=1, focal=1),
        "Dice + top-k": _terms(dice=1, top_k=1),
        "Tversky + cross-entropy": _terms(tversky=1, cross_entropy=1),
        "focal Tversky": _terms(focal_tversky=1),
        "generalised Dice + cross-entropy": _terms(generalised_dice=1, cross_entropy=1),
        "Dice + cross-entropy + boundary": _terms(dice=1, cross_entropy=1, boundary=0.1),
        "Dice + cross-entropy + clDice": _terms(dice=1, cross_entropy=1, centre_line=0.5),
    },
    "optimisers": {
        DEFAULT: [],
        "SGD, polynomial": ["train.optimiser=sgd"],
        "Muon, one-cycle": ["train.optimiser=muon"],
        "AdamW, cosine": ["train.schedule=cosine"],
    },
    "attention": {
        DEFAULT: [],
        "none": ["network.attention={}"],
        WIDENED: ["network.attention={}"],
        **{
            f"{place}: {kind}": _attention(place, kind)
            for place, kind in (
                ("skip", "additive_same_level"),
                ("skip", "cross_attention"),
                ("skip", "u_transformer"),
                ("encoder", "se"),
                ("encoder", "scse"),
                ("encoder", "cbam"),
                ("encoder", "bam"),
                ("encoder", "spatial"),
                ("encoder", "gc"),
                ("encoder", "lka"),
                ("encoder", "epa"),
                ("bottleneck", "self_attention"),
                ("bottleneck", "additive_self"),
                ("bottleneck", "transformer"),
                ("bottleneck", "{kind: self_attention, window: [4, 4, 4], shift: true}"),  # 3D
                ("bottleneck", "{kind: self_attention, window: [4, 4], shift: true}"),  # 2D
            )
        },
        "MedNeXt blocks, no attention": ["network.attention={}", "network.block=mednext"],
    },
}


def main() -> None:
    """Train what is missing of a group, or print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("group", nargs="?", choices=list(GROUPS))
    parser.add_argument("config", nargs="?", type=Path)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", type=Path, default=Path("runs_variants"))
    parser.add_argument("--table", action="store_true", help="only print the tables")
    options = parser.parse_args()
    if not options.table:
        if options.config is None:
            parser.error("expected GROUP and CONFIG.yaml, or --table")
        keep_freed_memory()
        config = load_config(options.config)
        for name in options.only or GROUPS[options.group]:
            overrides = GROUPS[options.group][name]
            dims = config.network.spatial_dims
            if "window:" in name and name.count(",") != dims + 1:
                continue  # these windows have another number of axes
            if name == WIDENED:
                overrides = [*overrides, f"network.channels={widened(config)}"]
            measure(name, overrides, config, options.steps, options.runs, options.seed)
    print(tables())


def widened(config: Config) -> list[int | list[int]]:
    """Channels of a network without attention that has at least as many weights as that of CONFIG.

    Only the coarsest level is wider.
    """
    channels = [width if isinstance(width, int) else width[-1] for width in config.network.channels]
    wanted = weights_of(config)
    while True:
        plain = ["network.attention={}", f"network.channels={channels}"]
        if weights_of(changed(config, plain)) >= wanted:
            return channels
        channels[-1] += 1


def weights_of(config: Config) -> int:
    """Number of weights of a network for one channel and two classes."""
    description = ModelDescription(
        segkit="benchmark",
        run="benchmark",
        channels=["image"],
        labels={"background": 0, "one": 1},
        network=config.network,
        spacing=(1.0, 1.0, 1.0),
        normalisation=[{"kind": "zscore"}],  # type: ignore[list-item]
        slices="axial",
        patch_size=list(config.data.patch_size or ()),
    )
    return count_parameters(build_network(description))


def measure(
    name: str, overrides: list[str], config: Config, steps: int, runs: Path, seed: int
) -> None:
    """Train a variant if it is not in the table, and add it."""
    dataset = dataset_of(config.data).folder.name
    name = f"{name}, seed {seed}" if seed else name
    key = f"{dataset} {config.network.spatial_dims}D, {steps} steps/{name}"
    if key in known():
        return
    print(f"== {key}", flush=True)
    letters = "".join(letter if letter.isalnum() else "_" for letter in name)
    folder = runs / f"{dataset}_{config.network.spatial_dims}d_{steps}_{letters}"
    track = Tracker(Console())
    if (folder / SUMMARY).is_file():
        summary = read_json_object(folder / SUMMARY)
    elif (folder / CONFIG).is_file():
        summary = dict(resume(folder, track=track).summary)
    else:
        everywhere = [
            f"name={folder.name}",
            f"train.steps={steps}",
            "train.minutes=null",
            f"train.seed={seed}",
            f"train.validate_every={steps}",
            "train.calibrate=true",
            f"data.cache={runs / '.cache'}",
        ]
        summary = dict(
            train(changed(config, [*everywhere, *overrides]), runs=runs, track=track).summary
        )
    row = {
        "dice": {
            case: mean_of_defined(np.array(list(dice.values()), float))
            for case, dice in summary["validation"]["dice_of_cases"].items()
        },
        "mean_dice": summary["validation"]["mean_dice"],
        "parameters": summary["parameters"],
        "seconds_of_training": round(summary["seconds_of_training"], 1),
        "temperature": summary.get("temperature"),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "cpu": platform.machine(),
    }
    write_json(TABLE, {**known(), key: row})


def known() -> dict[str, Any]:
    """The rows that are in the table."""
    return read_json_object(TABLE) if TABLE.is_file() else {}


def tables() -> str:
    """A Markdown table for each dataset and number of steps."""
    groups: dict[str, dict[str, Any]] = {}
    for key, row in known().items():
        task, _, name = key.partition("/")
        groups.setdefault(task, {})[name] = row
    lines = []
    for task, rows in groups.items():
        lines += [
            f"\n{task}\n",
            "| variant | Dice | against default | cases better | ECE | temperature | ECE after |",
            "|---|--:|--:|--:|--:|--:|--:|",
        ]
        for name, row in rows.items():
            heat = row["temperature"] or {}
            ece = heat.get("ece_in_question") or {"before": float("nan"), "after": float("nan")}
            variant, _, seed = name.partition(", seed ")
            default = rows.get(f"{DEFAULT}, seed {seed}" if seed else DEFAULT)
            beside = _beside(row, default) if default and variant != DEFAULT else " | "
            lines.append(
                f"| {name} | {row['mean_dice']:.3f} | {beside} | {ece['before']:.3f} "
                f"| {heat.get('value', float('nan')):.2f} | {ece['after']:.3f} |"
            )
    return "\n".join(lines)


def _beside(row: dict[str, Any], default: dict[str, Any]) -> str:
    """Mean difference of Dice from the default, and in how many cases it is positive."""
    both = [case for case in default["dice"] if case in row["dice"]]
    gains = [row["dice"][case] - default["dice"][case] for case in both]
    if not gains:
        return " | "
    return f"{statistics.mean(gains):+.3f} | {sum(gain > 0 for gain in gains)} of {len(gains)}"


if __name__ == "__main__":
    main()
