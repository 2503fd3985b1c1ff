"""Error rates of the rule in docs/verdicts.md, on gates with a known verdict.

    python -m benchmarks.verdicts OUT.json [--only NAME …] [--dims 2 3] [--seeds 20]
        [--counts 1 3 8 12 20] [--pool 30] [--table]

The gallery has small networks in 2D and 3D with planted gates: gates whose weights are set by hand.
A network uses its gate for the segmentation or ignores it. The images show a structure at random
places. For each of 20 seeds, the rule judges 1, 3, 8, 12 and 20 scans, each set within the next.
The evidence of a scan is measured once. Gates without random weights share a pool of scans, from
which each seed draws 20; so their seeds are not independent. Gates with random weights have new
scans for each seed. The mean map for deletion is that of up to eight earlier scans of the pool.

Results are written gate by gate. Run the command again to continue after a stop. `--table` prints
the content of OUT.json as Markdown.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.planted_gallery import GALLERY, SURE, network_of, predictor_of
from benchmarks.planted_gates import SHAPES, Planted
from segkit.explain.verdicts.evidence import CaseEvidence, gather_evidence
from segkit.explain.verdicts.rule import GateVerdict, judge_evidence
from segkit.geometry.grid import Grid
from segkit.io.atomic import write_json
from segkit.io.volume import Volume

COUNTS = (1, 3, 8, 12, 20)
POOL = 30
EARLIER = 8


def evidence_of(planted: Planted, dims: int, count: int, seed: int) -> list[CaseEvidence]:
    """The evidence of `count` scans with the network of a seed."""
    predictor = predictor_of(planted, dims, 1000 + seed)
    found: list[CaseEvidence] = []
    for number in range(count):
        random = np.random.default_rng((seed, number, dims))
        channels, labels = planted.case(random, SHAPES[dims])
        volume = Volume(
            np.stack(channels, axis=-1).astype(np.float32), Grid(SHAPES[dims], np.eye(4))
        )
        if planted.channels == 1:
            volume = volume.like(volume.data[..., 0])
        prediction = predictor(volume, maps=True)
        found.append(
            gather_evidence(
                predictor,
                volume,
                volume.like(labels.astype(np.uint8)),
                prediction.maps,
                labels=prediction.labels,
                case=f"{number}",
                earlier=found[:EARLIER],
                untrained=lambda draw: network_of(planted.name, dims, draw, trained=False),
            )
        )
    return found


def word_of(planted: Planted, verdicts: Sequence[GateVerdict]) -> str:
    """The verdict on the gate; marked if it is for the wrong structure or direction."""
    verdict = next((one for one in verdicts if one.map == f"skip.{planted.target}/gate"), None)
    if verdict is None:  # the structure is in none of these scans
        return "no verdict"
    word = str(verdict.word)
    right = verdict.structure in (planted.structure, "foreground")
    if planted.useful and word in SURE and not (right and verdict.direction in planted.directions):
        return f"{word} of something else"
    return word


def judged(
    planted: Planted, dims: int, seeds: int, counts: Sequence[int] = COUNTS, pool_size: int = POOL
) -> dict[str, dict[str, int]]:
    """For each number of scans, the number of seeds with each verdict."""
    most = max(counts)
    words: dict[int, Counter[str]] = {count: Counter() for count in counts}
    pool = [] if planted.random else evidence_of(planted, dims, pool_size, 0)
    for seed in range(seeds):
        drawn = evidence_of(planted, dims, most, seed) if planted.random else pool
        order = np.random.default_rng((seed, dims, 7)).permutation(len(drawn))[:most]
        for count in counts:
            verdicts = judge_evidence([drawn[place] for place in order[:count]])
            words[count][word_of(planted, verdicts)] += 1
    return {str(count): dict(found) for count, found in words.items()}


def table(results: dict[str, Any]) -> list[str]:
    """A Markdown table with the number of seeds for each verdict."""
    columns = ["gate", "dims", "right", *(f"{count} scans" for count in COUNTS)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for planted in GALLERY:
        for dims in (2, 3):
            found = results.get(f"{planted.name}, {dims}D")
            if found is None:
                continue
            cells = [
                ", ".join(
                    f"{short(word)} {number}"
                    for word, number in sorted(found["words"].get(str(count), {}).items())
                )
                or "–"
                for count in COUNTS
            ]
            right = " or ".join(short(word) for word in planted.right)
            lines.append(f"| {planted.name} | {dims} | {right} | {' | '.join(cells)} |")
    return lines


def short(word: str) -> str:
    """A letter for each verdict."""
    return {"informative": "I", "redundant": "R", "uninformative": "U", "cannot tell": "?"}.get(
        word, word
    )


def main() -> None:
    """Judge the gallery gate by gate, and write each result at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=[one.name for one in GALLERY])
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--counts", nargs="+", type=int, default=COUNTS)
    parser.add_argument("--pool", type=int, default=POOL)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print("\n".join(table(results)))
        return
    for planted in GALLERY:
        for dims in options.dims:
            name = f"{planted.name}, {dims}D"
            if planted.name not in options.only or name in results:
                continue
            started = time.perf_counter()
            words = judged(planted, dims, options.seeds, options.counts, options.pool)
            seconds = round(time.perf_counter() - started, 1)
            # Another run may have written results in the meantime.
            results = json.loads(options.out.read_text()) if options.out.exists() else {}
            results[name] = {
                "words": words,
                "seeds": options.seeds,
                "scans in the pool": options.pool,
                "seconds": seconds,
            }
            write_json(options.out, results)
            print(name, words, f"{seconds} s", flush=True)


if __name__ == "__main__":
    main()
