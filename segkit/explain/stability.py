"""Do networks that were trained alike, but for the seed, attend alike?"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from segkit.errors import ModelError
from segkit.explain.measures.ranks import spearman
from segkit.inference.attention_maps import AttentionMap


@dataclass(frozen=True)
class Stability:
    """How far models agree on one map of one volume."""

    case: str
    map: str
    models: int
    spearman: float | None
    """Spearman's rank correlation, mean over pairs of models; None where no pair has one."""
    lowest: float | None
    """Of the pairs."""


def stability(case: str, maps: Sequence[Mapping[str, AttentionMap]]) -> list[Stability]:
    """A row per map that has a place and that all models have; `maps` are each model's by key.

    Three models or more make it worth something. Pairs of which a map is constant have no ranks and
    are left out. Raises ModelError for fewer than two models, or where their maps lie on different
    grids.
    """
    if len(maps) < 2:
        raise ModelError(f"seeds are compared between models, found {len(maps)}; name two or more")
    rows = []
    for key in maps[0]:
        volumes = [found[key].volume for found in maps if key in found]
        placed = [volume for volume in volumes if volume is not None]
        if len(placed) < len(maps):
            continue
        if any(not volume.grid.agrees_with(placed[0].grid) for volume in placed):
            raise ModelError(
                f"{key}: the models' maps lie on different grids; compare models of one config "
                f"that differ in their seed"
            )
        pairs = [
            spearman(first.data, second.data) for first, second in itertools.combinations(placed, 2)
        ]
        known = [value for value in pairs if value is not None]
        rows.append(
            Stability(
                case,
                key,
                len(maps),
                sum(known) / len(known) if known else None,
                min(known, default=None),
            )
        )
    return rows
