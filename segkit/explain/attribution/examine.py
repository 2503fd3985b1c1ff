"""Deletion and randomisation of attributions, as for gates.

deletion        the image is replaced by its mean, voxels of high attribution first; the
                agreement with the first prediction should fall sooner than in a random order
randomisation   the attribution of the same network with random weights should differ
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from segkit.explain.attribution.attribute import Attribution, attribute
from segkit.explain.attribution.parameter_tests import randomised, rank_similarity
from segkit.explain.display import Curve, Line, Table, rounded
from segkit.explain.verdicts.deletion import (
    FRACTIONS,
    Blocks,
    DeletionCurve,
    SoftDiceToFirst,
    cell_order,
    deletion_curves,
    mean_of_channels,
)
from segkit.explain.verdicts.evidence import HIGH_FIRST
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.system.progress import Track, untracked

LARGE_FIRST = "largest magnitude first"
AT_RANDOM = "random order"
RANDOM_ORDERS = 3
"""Number of random orders, whose curves are averaged."""
RANDOM_NETWORKS = 2
"""Number of networks with random weights."""


@dataclass(frozen=True)
class AttributionTest:
    """Results of deletion and randomisation for one attribution."""

    key: str
    curves: Mapping[str, DeletionCurve]
    """By order of deletion. Empty if the structure is not predicted on the network's grid."""
    similarities: tuple[float, ...]
    """Absolute rank correlation with the attribution of each network with random weights."""

    @property
    def similarity(self) -> float:
        """Mean of the similarities that are known; NaN if there is none."""
        known = [value for value in self.similarities if np.isfinite(value)]
        return float(np.mean(known)) if known else float("nan")

    def figures(self) -> dict[str, Any]:
        """The results as plain data, for JSON."""
        return {
            "deletion_area": {order: curve.area for order, curve in self.curves.items()},
            "similarity_to_random_networks": list(self.similarities),
        }


def examine_attributions(
    predictor: Predictor,
    volume: Volume,
    labels: Volume,
    found: Mapping[str, Attribution],
    *,
    seed: int = 0,
    track: Track = untracked,
) -> dict[str, AttributionTest]:
    """Delete the image in the order of each attribution, and compare with random networks.

    Each attribution is computed `RANDOM_NETWORKS` times more. Only the first model of an ensemble
    is used.

    Args:
        predictor: runs the model.
        volume: the scan.
        labels: the labels that are the regions of the attributions.
        found: the attributions, by key.
        seed: seed of random orders and weights.
        track: reports the progress.

    Returns:
        The results by the attribution's key.
    """
    if not found:
        return {}
    curves = _deletion(predictor, volume, found, seed, track)
    similar = _randomisation(predictor, volume, labels, found, seed, track)
    return {key: AttributionTest(key, curves[key], tuple(similar[key])) for key in found}


def _deletion(
    predictor: Predictor,
    volume: Volume,
    found: Mapping[str, Attribution],
    seed: int,
    track: Track,
) -> dict[str, dict[str, DeletionCurve]]:
    """Deletion curves of each attribution, by its key and by order."""
    member = predictor.members[0]
    volume = predictor.with_numbers(volume)
    prepared = predictor.prepare(volume)
    image, channels = prepared.image, len(member.model.description.channels)
    replacement = mean_of_channels(image, channels)
    structures = list(dict.fromkeys(one.structure for one in found.values()))
    skip = member.skipped(volume, prepared)
    agreement = SoftDiceToFirst(predictor, image, structures, skip=skip)
    results: dict[str, dict[str, DeletionCurve]] = {key: {} for key in found}
    for key, one in track(found.items(), "deleting by attributions", len(found)):
        if one.structure not in agreement.structures:
            continue
        values = one.values.data.reshape(*one.values.grid.shape, -1).astype(np.float64)
        signed, size = values.mean(axis=3), np.abs(values).mean(axis=3)
        blocks = Blocks.of(one.values.grid, prepared.grid)

        def curve(
            order: Float[ndarray, "x y z"],
            number: int = 0,
            blocks: Blocks = blocks,
            structure: str = one.structure,
        ) -> DeletionCurve:
            cells = cell_order(order, seed=seed + number)
            curves = deletion_curves(image, replacement, blocks, cells, agreement)
            return next(each for each in curves if each.structure == structure)

        # A constant map has a random order.
        constant = np.where(np.isfinite(signed), 0.0, np.nan)
        chance = [curve(constant, number) for number in range(RANDOM_ORDERS)]
        mean = np.mean([each.scores for each in chance], axis=0)
        results[key] = {
            HIGH_FIRST: curve(signed),
            LARGE_FIRST: curve(size),
            AT_RANDOM: DeletionCurve(one.structure, FRACTIONS, tuple(mean.tolist())),
        }
    return results


def _randomisation(
    predictor: Predictor,
    volume: Volume,
    labels: Volume,
    found: Mapping[str, Attribution],
    seed: int,
    track: Track,
) -> dict[str, list[float]]:
    """Absolute rank correlations of attributions with those of networks with random weights."""
    model = predictor.members[0].model
    similar: dict[str, list[float]] = {key: [] for key in found}
    methods = {one.method: one.settings for one in found.values()}
    for draw in range(RANDOM_NETWORKS):
        *_, (_, network) = randomised(model.network, seed=seed + draw)
        options = {**vars(predictor.settings), "engine": "torch", "tta": False}
        other = Predictor(replace(model, network=network, folder=None), **options)
        for method, settings in methods.items():
            structures = [one.structure for one in found.values() if one.method == method]
            random = attribute(
                other,
                volume,
                method,
                structure=structures,
                region=labels,
                settings=settings,
                track=track,
            )
            for one in random.values():
                own = found[one.key].values.data
                similar[one.key].append(abs(rank_similarity(own, one.values.data)))
    return similar


def examination_tables(tests: Mapping[str, AttributionTest]) -> list[Table]:
    """The results as a table of a page; none if there are none."""
    if not tests:
        return []
    orders = [HIGH_FIRST, LARGE_FIRST, AT_RANDOM]
    rows = [
        [
            key,
            *(rounded(one.curves[order].area) if one.curves else None for order in orders),
            rounded(one.similarity),
        ]
        for key, one in tests.items()
    ]
    columns = ["attribution", *(f"area, {order}" for order in orders), "random weights"]
    return [
        Table(
            "Deletion and randomisation of attributions",
            columns,
            rows,
            note="The image is replaced by its mean in an order; the area under the agreement with "
            "the first prediction is low if the prediction changes early. An attribution should "
            "have a lower area than the random order. The last column is the absolute rank "
            "correlation with the attribution of the same network with random weights: near 1, "
            "the attribution does not depend on what the network has learnt.",
        )
    ]


def examination_curves(tests: Mapping[str, AttributionTest]) -> Sequence[Curve]:
    """The deletion curves as plots of a page."""
    return [
        Curve(
            f"Deletion: {key}",
            "share of cells deleted",
            "agreement",
            [Line(order, each.fractions, each.scores) for order, each in one.curves.items()],
            note="Agreement is soft Dice with the prediction for the whole image.",
        )
        for key, one in tests.items()
        if one.curves
    ]
