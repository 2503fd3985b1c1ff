"""ROAD: delete the image in the order of an attribution, without traces of the deletion.

If deleted voxels get a constant, the network sees their outline, and the score depends on it.
Rong et al. (2022, arXiv:2202.00449) replace each by the weighted mean of its neighbours, which are
partly deleted themselves. So all deleted voxels solve a system of linear equations; a little noise
is added so that the region is not too smooth.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, Shaped
from numpy import ndarray
from scipy.sparse import coo_matrix, diags
from scipy.sparse.linalg import cg, spsolve

from segkit.errors import SegkitError
from segkit.explain.attribution.stability import floating
from segkit.explain.verdicts.deletion import cell_order

DIRECT = 20_000
"""Up to so many deleted voxels the equations are solved directly, and above by iteration."""
TOLERANCE = 1e-6


def impute(
    image: Shaped[ndarray, "channel *space"],
    deleted: Bool[ndarray, "*space"],
    *,
    noise: float = 0.01,
    seed: int = 0,
) -> Float[ndarray, "channel *space"]:
    """The image with deleted voxels replaced by the weighted mean of their neighbours, with noise.

    Neighbours share an edge, a face or a corner with the voxel. Their weights are 1, 1/2 and 1/3
    for distances of 1, √2 and √3 voxels, scaled to sum to 1. In 2D these are the weights of the
    paper, 1/6 and 1/12; the paper has no 3D. At the end of the image there are fewer neighbours.

    Args:
        image: the image.
        deleted: the voxels to replace.
        noise: standard deviation of the noise that is added to them.
        seed: seed of the noise.

    Returns:
        A new image, of the same data type; of floating point if that is an integer type.

    Raises:
        SegkitError: every voxel is deleted, so that nothing is known, or the noise is negative or
            not finite.
    """
    if not 0 <= noise < np.inf:
        raise SegkitError(f"noise: expected 0 or more, found {noise}; change it")
    if deleted.all():
        raise SegkitError("expected some voxels that are not deleted, found none; delete fewer")
    found = floating(image).copy()
    count = int(deleted.sum())
    if not count:
        return found
    space = deleted.shape
    number = np.full(space, -1)
    number[deleted] = np.arange(count)
    places = np.argwhere(deleted)
    diagonal = np.zeros(count)
    known = np.zeros((count, len(image)))
    rows, columns, weights = [], [], []
    for offset in itertools.product((-1, 0, 1), repeat=len(space)):
        distance = np.abs(offset).sum()
        if distance == 0:
            continue
        there = places + offset
        inside = ((there >= 0) & (there < space)).all(axis=1)
        own = np.flatnonzero(inside)
        neighbour = tuple(there[inside].T)
        diagonal[own] += 1 / distance
        gone = number[neighbour] >= 0
        rows.append(own[gone])
        columns.append(number[neighbour][gone])
        weights.append(np.full(int(gone.sum()), -1 / distance))
        present = tuple(axis[~gone] for axis in neighbour)
        known[own[~gone]] += image[(slice(None), *present)].T / distance
    shape = (count, count)
    system = coo_matrix(
        (np.concatenate(weights), (np.concatenate(rows), np.concatenate(columns))), shape
    )
    system = (system + diags(diagonal)).tocsc()
    random = np.random.default_rng(seed)
    for channel, right in enumerate(known.T):
        if count <= DIRECT:
            values = spsolve(system, right)
        else:  # the system is symmetric and positive definite
            values, _ = cg(system, right, rtol=TOLERANCE, M=diags(1 / diagonal))
        found[channel][deleted] = values + noise * random.standard_normal(count)
    return found


def road(
    image: Shaped[ndarray, "channel *space"],
    attribution: Shaped[ndarray, "*space"],
    score: Callable[[ndarray], float],
    *,
    fractions: Sequence[float] = (0.1, 0.2, 0.4, 0.7, 0.9),
    noise: float = 0.01,
    seed: int = 0,
) -> Mapping[float, float]:
    """The score of an image after more and more voxels are imputed, the highest attribution first.

    Rong et al. (2022, arXiv:2202.00449). The earlier the score falls, the better the attribution
    finds the voxels on which the score depends. Compare the curve only with curves of other
    orders, such as a random one.

    Args:
        image: the image, (channel, *space).
        attribution: a value for each voxel, (*space). Voxels of NaN are never deleted; equal
            values are deleted in random order.
        score: a function of an image, such as the soft Dice of its prediction.
        fractions: the shares of voxels to delete, each below 1.
        noise: standard deviation of the noise in imputed voxels, in the units of the image.
        seed: seed of noise and of random order.

    Returns:
        The score for each share.

    Raises:
        SegkitError: a share is not in [0, 1) or leaves no voxel, the attribution has another shape
            than the image or no finite value, or the noise is negative or not finite.

    Example:
        by_map = segkit.road(image, attribution, soft_dice)
        by_chance = segkit.road(image, np.zeros_like(attribution), soft_dice)
    """
    if attribution.shape != image.shape[1:]:
        raise SegkitError(
            f"expected an attribution of the image's shape {image.shape[1:]}, found "
            f"{attribution.shape}; resample it to the image"
        )
    if not all(0 <= fraction < 1 for fraction in fractions):
        raise SegkitError(
            f"expected shares from 0 to below 1, found {tuple(fractions)}; change them"
        )
    if not np.isfinite(attribution).any():
        raise SegkitError(
            "expected an attribution with values, found none that is finite; compute it again"
        )
    order = cell_order(floating(attribution), seed=seed)
    found = {}
    for fraction in fractions:
        deleted = np.zeros(attribution.size, bool)
        deleted[order[: round(fraction * len(order))]] = True
        filled = impute(image, deleted.reshape(attribution.shape), noise=noise, seed=seed)
        found[fraction] = float(score(filled))
    return found
