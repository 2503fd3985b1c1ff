"""Terms of a loss: cross-entropy, overlap, distance to the surface, centre lines.

Each term is a function from `LossInputs` (probabilities and targets, without ignored voxels) to a
scalar, which is smallest if probabilities and targets agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMOOTH = 1e-5
"""Added to an overlap and to its total. So a class that is absent from both has an overlap of 1."""
LEAST = 1e-7
"""Smallest base of a power: roots have no finite gradient at 0."""


@dataclass(frozen=True)
class LossInputs:
    """Probabilities and targets of a batch; each output is a class or a region.

    Classes exclude each other and the first is the background; regions may overlap.
    """

    probabilities: Float[Tensor, "batch outputs *space"]
    """0 at an ignored voxel."""
    target: Float[Tensor, "batch outputs *space"]
    """1 if the voxel belongs to the class or region; 0 at an ignored voxel."""
    cross_entropy: Float[Tensor, "batch decisions *space"]
    """-log of the probability of the true answer: one for each voxel with classes, one for each
    voxel and region with regions."""
    weight: Float[Tensor, "batch decisions *space"]
    """Weight of each value of `cross_entropy`: that of its class or region, 0 at an ignored
    voxel."""
    weights: tuple[float, ...]
    """Weight of each output."""
    first: int
    """First output that is not the background: 1 with classes, 0 with regions."""
    spacing: tuple[float, ...]
    """Spacing of the voxels, in mm."""
    pool_batch: bool
    """Compute an overlap over the whole batch instead of over each sample."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes over which an overlap is summed."""
        space = tuple(range(2, self.probabilities.ndim))
        return (0, *space) if self.pool_batch else space

    def mean(self, scores: Float[Tensor, "*samples structures"]) -> Float[Tensor, ""]:
        """Weighted mean of scores over samples and over outputs without the background."""
        weights = self.weights[self.first :]
        return (scores * constants(weights, scores.device)).sum(-1).mean() / sum(weights)

    @property
    def structures(self) -> tuple[Tensor, Tensor]:
        """Probabilities and target of all outputs but the background."""
        return self.probabilities[:, self.first :], self.target[:, self.first :]


@lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device) -> Float[Tensor, " values"]:
    """Numbers as a tensor on a device. They are copied once, so that no training step waits."""
    return torch.tensor(values).to(device, non_blocking=True)


def dice(inputs: LossInputs) -> Float[Tensor, ""]:
    """One minus soft Dice: 1 - 2 sum(p t) / (sum p + sum t) (Drozdzal et al. 2016)."""
    return tversky(inputs, 0.5, 0.5)


def tversky(
    inputs: LossInputs, false_positives: float, false_negatives: float
) -> Float[Tensor, ""]:
    """One minus Tversky's index (Salehi et al. 2017, arXiv:1706.05721, equation 3).

    Args:
        inputs: probabilities and targets.
        false_positives, false_negatives: their weights. With 0.5 and 0.5 this is Dice. A larger
            weight of false negatives finds more of a structure, but gives more false positives.
    """
    return inputs.mean(1 - _tversky_index(inputs, false_positives, false_negatives))


def focal_tversky(
    inputs: LossInputs, false_positives: float, false_negatives: float, gamma: float
) -> Float[Tensor, ""]:
    """(1 - Tversky's index) to the power 1 / gamma (Abraham and Khan 2019, arXiv:1810.07842).

    We average over classes; the paper adds them.

    Args:
        inputs: probabilities and targets.
        false_positives, false_negatives: weights, as in `tversky`.
        gamma: the exponent is 1 / gamma.
    """
    index = _tversky_index(inputs, false_positives, false_negatives)
    return inputs.mean((1 - index).clamp(min=LEAST) ** (1 / gamma))


def _tversky_index(
    inputs: LossInputs, false_positives: float, false_negatives: float
) -> Float[Tensor, "*samples structures"]:
    (found, target), axes = inputs.structures, inputs.axes
    right = (found * target).sum(axes)
    alarms, missed = found.sum(axes) - right, target.sum(axes) - right
    smooth = SMOOTH / 2
    return (right + smooth) / (right + false_positives * alarms + false_negatives * missed + smooth)


def generalised_dice(inputs: LossInputs) -> Float[Tensor, ""]:
    """One minus generalised Dice (Sudre et al. 2017, arXiv:1707.03237, section 2.1).

    The weight of each class, the background included, is one over its squared volume, times its
    weight in `LossInputs`. For a class that is absent from a sample this would be infinite; it gets
    the largest weight of the classes in the sample. We divide the weights by the largest, which
    changes no quotient: one over the squared volume of an organ would be less than `SMOOTH`, so
    that the loss would be near 0 for any prediction.
    """
    found, target, axes = inputs.probabilities, inputs.target, inputs.axes
    volume = target.sum(axes)
    smallest = torch.where(volume > 0, volume, torch.inf).amin(-1, keepdim=True)
    weight = torch.where(volume > 0, (smallest / volume.clamp(min=1)) ** 2, 1)
    weight = weight * constants(inputs.weights, weight.device)
    overlap = (weight * (found * target).sum(axes)).sum(-1)
    total = (weight * (found.sum(axes) + volume)).sum(-1)
    return (1 - (2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def cross_entropy(inputs: LossInputs) -> Float[Tensor, ""]:
    """Mean cross-entropy over voxels (and regions), weighted by class like PyTorch's."""
    return _weighted(inputs.cross_entropy, inputs.weight)


def focal(inputs: LossInputs, gamma: float) -> Float[Tensor, ""]:
    """Cross-entropy times (1 - p) to the power gamma (Lin et al. 2017, arXiv:1708.02002, eq. 4).

    p is the probability of the true class. We average over voxels; the paper divides by the number
    of objects.
    """
    each = inputs.cross_entropy
    missed = (-torch.expm1(-each)).clamp(min=LEAST)
    return _weighted(missed**gamma * each, inputs.weight)


def top_k(inputs: LossInputs, share: float) -> Float[Tensor, ""]:
    """Mean of the largest cross-entropies: the term of nnU-Net's `DC_and_topk_loss`.

    Wu et al. (2016, arXiv:1605.06885, section 4) keep the voxels whose true class has a probability
    below a threshold, and at least a number of them; here their number is fixed. The mean is over
    the voxels that are kept, so the gradient of each is 1 / share times that in `cross_entropy`.

    If a structure cannot be told from more than `share` of the voxels, this term is least if all of
    these have a probability of at most 1/2. Then nothing is predicted, and only another term with
    enough weight can change that (docs/training.md).

    Args:
        inputs: probabilities and targets.
        share: share of the voxels that count, in (0, 1]; at least one voxel counts. Ignored voxels
            are not part of the total. With regions, the total is all voxels of all regions.
    """
    each = torch.where(inputs.weight > 0, inputs.cross_entropy * inputs.weight, 0).flatten()
    counted = (inputs.weight > 0).sum()
    ordered = each.sort(descending=True).values
    number = (share * counted).ceil().clamp(min=1)
    kept = torch.arange(len(ordered), device=each.device) < number
    return (ordered * kept).sum() / number


def boundary(inputs: LossInputs, reach: int) -> Float[Tensor, ""]:
    """Mean of the probabilities times the signed distance from the true surface.

    Kervadec et al. (2019, arXiv:1812.07032, equation 5). The distance is negative inside the
    structure. It is divided by `reach` times the smallest spacing and limited to [-1, 1]. In the
    paper it has no limit and is in voxels. An axis of one voxel has no distances, so its spacing
    does not count. Ignored voxels belong neither to the structure nor to its outside, and the mean
    is over the others.

    Args:
        inputs: probabilities and targets.
        reach: largest distance along an axis, in voxels.
    """
    found, target = inputs.structures
    counted = inputs.weight[:, -found.shape[1] :] > 0
    sizes = found.shape[2:]
    within = [step for step, size in zip(inputs.spacing, sizes, strict=True) if size > 1]
    finest = min(within or inputs.spacing)
    spacing = [
        step if size > 1 else finest for step, size in zip(inputs.spacing, sizes, strict=True)
    ]
    with torch.no_grad():
        inside = distance_from((target == 0) & counted, spacing, reach)
        outside = distance_from(target == 1, spacing, reach)
        signed = (outside - inside) / (reach * finest)
        voxels = counted.expand_as(signed).flatten(2).sum(-1).clamp(min=1)
    return inputs.mean((found * signed).flatten(2).sum(-1) / voxels)


def distance_from(
    seeds: Tensor, spacing: Sequence[float], reach: int
) -> Float[Tensor, "batch outputs *space"]:
    """Distance of each voxel from the nearest seed, in the unit of the spacing.

    The largest value is `reach` times the smallest spacing; up to that, distances are exact. For
    one axis after the other, the squared distance along the axis is added and the minimum is kept
    (Felzenszwalb and Huttenlocher 2012, section 2.1). We try every shift of at most `reach` voxels,
    so that a GPU need not wait for the host.

    Args:
        seeds: True at the seeds, (batch, outputs, *space).
        spacing: distance between voxels along each axis.
        reach: largest distance along an axis, in voxels.
    """
    most = reach * min(spacing)
    squared = torch.where(seeds, 0.0, most**2)
    for axis, step in enumerate(spacing, start=2):
        nearest = squared
        size = squared.shape[axis]
        for shift in range(1, min(reach, size - 1) + 1):
            added = (shift * step) ** 2
            if added >= most**2:
                break
            before = squared.narrow(axis, 0, size - shift) + added
            after = squared.narrow(axis, shift, size - shift) + added
            ends = [0] * (2 * (squared.ndim - axis))
            ends[-2], ends[-1] = shift, 0
            nearest = torch.minimum(nearest, F.pad(before, ends, value=most**2))
            ends[-2], ends[-1] = 0, shift
            nearest = torch.minimum(nearest, F.pad(after, ends, value=most**2))
        squared = nearest
    return squared.sqrt()


def centre_line(inputs: LossInputs, iterations: int) -> Float[Tensor, ""]:
    """One minus soft clDice, for vessels and other tubes (Shit et al. 2021, arXiv:2003.07311).

    clDice is the harmonic mean of two shares (equation 3): the part of the predicted centre line
    that lies in the true structure, and the part of the true centre line that lies in the predicted
    structure. `thinned` computes the centre lines.

    Args:
        inputs: probabilities and targets.
        iterations: number of steps of `thinned`.
    """
    (found, target), axes = inputs.structures, inputs.axes
    thin_found, thin_target = thinned(found, iterations), thinned(target, iterations)
    precision = ((thin_found * target).sum(axes) + SMOOTH) / (thin_found.sum(axes) + SMOOTH)
    sensitivity = ((thin_target * found).sum(axes) + SMOOTH) / (thin_target.sum(axes) + SMOOTH)
    return inputs.mean(1 - 2 * precision * sensitivity / (precision + sensitivity))


def thinned(
    structures: Float[Tensor, "batch outputs *space"], iterations: int
) -> Float[Tensor, "batch outputs *space"]:
    """Soft centre lines of structures (Shit et al. 2021, algorithm 1).

    Use as many iterations as the radius of the largest structure has voxels.
    """
    line = F.relu(structures - _opened(structures))
    for _ in range(iterations):
        structures = _eroded(structures)
        new = F.relu(structures - _opened(structures))
        line = line + F.relu(new - line * new)
    return line


def _eroded(structures: Tensor) -> Tensor:
    """Minimum over each voxel and its direct neighbours along the axes."""
    pool = _pool(structures)
    dims = structures.ndim - 2
    least = structures
    for axis in range(dims):
        size = [3 if other == axis else 1 for other in range(dims)]
        padding = [1 if other == axis else 0 for other in range(dims)]
        least = torch.minimum(least, -pool(-structures, size, 1, padding))
    return least


def _opened(structures: Tensor) -> Tensor:
    """Erosion, then the maximum over each voxel and all its neighbours."""
    return _pool(structures)(_eroded(structures), 3, 1, 1)


def _pool(structures: Tensor) -> Callable[..., Tensor]:
    return F.max_pool2d if structures.ndim == 4 else F.max_pool3d


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    """Weighted mean of values; 0 if all weights are 0."""
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1)
