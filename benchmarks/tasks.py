"""Plan, train, predict and score on one dataset, and compare with a baseline without training.

    python benchmarks/tasks.py ROW --data FOLDER [--minutes 4] [--runs runs_tasks]

ROW is a dataset and a kind of network: `hippocampus/2d`, `sarcoma_ct/3d`, `brains/coarser`,
`em2012/chosen`. For the kind `chosen`, segkit tries several plans and takes the best; the other
kinds are plans that it tries. The row is added to benchmarks/tasks.json. An existing row is not
measured again, and a stopped training is resumed. All held-out cases are scored, even if this takes
longer than the given minutes. benchmarks/synthetic_brains.py writes the brains.

The baseline is k-means on the raw intensities of each image, with one cluster for zeros and one for
each class. Each cluster gets the class that is best over the training cases.
"""

import argparse
import itertools
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from segkit.data.dataset import CaseFiles, Dataset, read_case, read_dataset
from segkit.data.split import Split, split
from segkit.evaluation.dice import dice_of
from segkit.evaluation.overlap import mean_of_defined
from segkit.inference.postprocess import class_means
from segkit.io.atomic import write_json
from segkit.io.safe_text import read_json_object
from segkit.model.file_names import CONFIG, SUMMARY
from segkit.model.folder import load_model
from segkit.planning.candidates import plan_candidates
from segkit.racing import plan_by_race
from segkit.system.allocator import keep_freed_memory
from segkit.system.progress import Tracker
from segkit.training.final_scores import score
from segkit.training.fit import train
from segkit.training.resume import resume

TABLE = Path(__file__).with_suffix(".json")
HELD_OUT = {"sarcoma_ct": 0.25, "em2012": [f"em_{number}" for number in range(24, 30)]}
"""For each dataset, the held-out cases or their share; the default is a fifth."""
KINDS = {"2d": "2D", "3d": "3D", "coarser": "3D, coarser"}
"""For each kind of row, the name of the plan in a race of `segkit plan`."""
BASELINE_CASES = 20
MOST_MAPPINGS = 5000


def main() -> None:
    """Measure a row and add it to the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", help="DATASET/2d, /3d, /coarser, or /chosen")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--data", type=Path, required=True, help="folder of datasets")
    parser.add_argument("--runs", type=Path, default=Path("runs_tasks"))
    options = parser.parse_args()
    name, _, kind = options.row.partition("/")
    if kind not in (*KINDS, "chosen"):
        parser.error(f"expected DATASET and one of {', '.join(KINDS)}, chosen; got {options.row}")
    key = f"{options.row}/{options.minutes:g} min"
    rows = read_json_object(TABLE) if TABLE.is_file() else {}
    if key in rows:
        print(f"{key}: already measured: {rows[key]}")
        return
    keep_freed_memory()
    dataset = read_dataset(options.data / name)
    parts = split(dataset, HELD_OUT.get(name, 0.2), seed=0)
    row = measured(dataset, parts, kind, options.minutes, options.runs)
    row["baseline"] = baseline(dataset, parts)
    rows = read_json_object(TABLE) if TABLE.is_file() else {}
    write_json(TABLE, {**rows, key: row})
    print(f"{key}: {row}")


def measured(
    dataset: Dataset, parts: Split, kind: str, minutes: float, runs: Path
) -> dict[str, Any]:
    """Plan, train, predict and score. An existing run is resumed."""
    name = f"{dataset.folder.name}_{kind}_{minutes:g}"
    folder, track = runs / name, Tracker(Console())
    held_out = [case.name for case in parts.held_out]
    started = time.monotonic()
    if (folder / SUMMARY).is_file():
        summary = read_json_object(folder / SUMMARY)
    elif (folder / CONFIG).is_file():
        summary = dict(resume(folder, track=track).summary)
    else:
        if kind == "chosen":
            planned = plan_by_race(
                dataset.folder, minutes=minutes, runs=runs, held_out=held_out, track=track
            )
        else:
            dims = int(kind[0]) if kind[0] in "23" else None
            planned = plan_candidates(
                dataset.folder,
                cache=runs / ".cache",
                spatial_dims=dims,
                minutes=minutes,
                runs=runs,
                track=track,
                starters=lambda names: [name for name in names if name == KINDS[kind]],
            )[KINDS[kind]]
        print(planned.text)
        config = planned.config.model_copy(
            update={
                "name": name,
                "data": planned.config.data.model_copy(
                    update={"validation": held_out, "first_stage": None}
                ),
            }
        )
        spent = time.monotonic() - started
        summary = dict(train(config, runs=runs, track=track, spent=spent).summary)
    scores = score(load_model(folder / "model"), dataset, parts.held_out, track)
    return {
        "dice": round(scores["mean_dice"], 4),
        "cases": scores["cases"],
        "minutes": summary["minutes"],
        "steps": summary["steps"],
        "load": round(os.getloadavg()[0], 1),
        "cpu": f"{platform.machine()}, {torch.get_num_threads()} threads",
    }


def baseline(dataset: Dataset, parts: Split) -> float:
    """Mean Dice of k-means over the held-out cases, on their own grids."""
    members = dataset.labelling.members
    numbers = [0, *(group[0] for group in members.values())]
    seen = [clustered(case, dataset, len(numbers)) for case in parts.train[:BASELINE_CASES]]
    count = len(numbers) + 1
    mappings = list(itertools.islice(itertools.product(numbers, repeat=count), MOST_MAPPINGS))
    table = np.zeros((count, len(numbers)))
    for clusters, label in seen:
        for place, number in enumerate(numbers):
            table[:, place] += np.bincount(clusters[label == number], minlength=count)
    best = max(mappings, key=lambda mapping: _dice_of_table(table, mapping, numbers))
    dice = []
    for case in parts.held_out:
        clusters, label = clustered(case, dataset, len(numbers))
        dice.append(dice_of(np.array(best)[clusters], label, dataset.labelling))
    return round(mean_of_defined(class_means(np.array(dice))), 4)


def _dice_of_table(table: np.ndarray, mapping: tuple[int, ...], numbers: list[int]) -> float:
    """Mean Dice without background, if each cluster gets the class in `mapping`."""
    dice = []
    for place, number in enumerate(numbers[1:], start=1):
        given = [cluster for cluster, chosen in enumerate(mapping) if chosen == number]
        found, both = table[given].sum(), table[given, place].sum()
        dice.append(2 * both / max(found + table[:, place].sum(), 1))
    return float(np.mean(dice))


def clustered(case: CaseFiles, dataset: Dataset, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Clusters of a case's first channel (0 for zeros, then by intensity), and its labels."""
    image, label = read_case(case, dataset)
    values = np.asarray(image.data[..., 0], float)
    inside = values[values != 0]
    inside = inside[:: max(len(inside) // 50_000, 1)]
    centres = np.quantile(inside, (np.arange(count) + 0.5) / count)
    for _ in range(20):
        cuts = (centres[1:] + centres[:-1]) / 2
        group = np.searchsorted(cuts, inside)
        sums = np.bincount(group, inside, minlength=count)
        sizes = np.bincount(group, minlength=count)
        centres = np.sort(np.where(sizes > 0, sums / np.maximum(sizes, 1), centres))
    clusters = np.searchsorted((centres[1:] + centres[:-1]) / 2, values) + 1
    return np.where(values == 0, 0, clusters), label.data


if __name__ == "__main__":
    main()
