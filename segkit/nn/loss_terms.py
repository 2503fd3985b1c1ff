"""Terms that a loss can be made of: of voxels, of overlap, of distance, of centre lines.

All look at a batch by way of `Judged`: probabilities beside what is right, with ignored voxels left
out of both. Each gives a scalar that is smallest if the two agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

SMOOTH = 1e-5
"""Added to an overlap and to its total, so that a class in neither has an overlap of 1."""
LEAST = 1e-7
"""Below this a base of a power counts as this, as roots have no gradient at 0."""


@dataclass(frozen=True)
class Judged:
    """A batch's probabilities beside what is right, over classes or over regions.

    Classes exclude each other and the first is the background; regions may overlap.
    """

    probabilities: Float[Tensor, "batch outputs *space"]
    """0 where a voxel does not count."""
    target: Float[Tensor, "batch outputs *space"]
    """1 if the voxel belongs to the class or region; 0 where it does not count."""
    cross_entropy: Float[Tensor, "batch decisions *space"]
    """-log of the probability of what is right: one decision a voxel for classes, one of each
    region for regions."""
    weight: Float[Tensor, "batch decisions *space"]
    """Of each decision: the weight of its class or region, 0 where a voxel does not count."""
    weights: tuple[float, ...]
    """Of each output."""
    first: int
    """The first output that is no background: 1 of classes, 0 of regions."""
    spacing: tuple[float, ...]
    """Of the voxels, in mm."""
    pool_batch: bool
    """Whether sums for an overlap go over the whole batch, or over each sample."""

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that an overlap is summed over."""
        space = tuple(range(2, self.probabilities.ndim))
        return (0, *space) if self.pool_batch else space

    def mean(self, scores: Float[Tensor, "*samples structures"]) -> Float[Tensor, ""]:
        """The mean over samples and over outputs, which hold no background, by their weights."""
        weights = self.weights[self.first :]
        return (scores * constants(weights, scores.device)).sum(-1).mean() / sum(weights)

    @property
    def structures(self) -> tuple[Tensor, Tensor]:
        """Probabilities and target of all outputs but the background."""
        return self.probabilities[:, self.first :], self.target[:, self.first :]


@lru_cache(maxsize=64)
def constants(values: tuple[float, ...], device: torch.device) -> Float[Tensor, " values"]:
    """Numbers on a device, which are brought there once, so that no step waits for them."""
    return torch.tensor(values).to(device, non_blocking=True)


def dice(judged: Judged) -> Float[Tensor, ""]:
    """One minus soft Dice, 2 sum(p t) / (sum p + sum t) (Drozdzal et al. 2016)."""
    return tversky(judged, 0.5, 0.5)


def tversky(judged: Judged, false_positives: float, false_negatives: float) -> Float[Tensor, ""]:
    """One minus Tversky's index (Salehi et al. 2017, arXiv:1706.05721, equation 3).

    Both weights 0.5 make it Dice. A larger weight of false negatives finds more, at the price of
    false alarms.
    """
    return judged.mean(1 - _tversky_index(judged, false_positives, false_negatives))


def focal_tversky(
    judged: Judged, false_positives: float, false_negatives: float, gamma: float
) -> Float[Tensor, ""]:
    """(1 - Tversky's index) to the power 1 / gamma (Abraham and Khan 2019, arXiv:1810.07842).

    Classes are averaged where the paper adds.
    """
    index = _tversky_index(judged, false_positives, false_negatives)
    return judged.mean((1 - index).clamp(min=LEAST) ** (1 / gamma))


def _tversky_index(
    judged: Judged, false_positives: float, false_negatives: float
) -> Float[Tensor, "*samples structures"]:
    (found, target), axes = judged.structures, judged.axes
    right = (found * target).sum(axes)
    alarms, missed = found.sum(axes) - right, target.sum(axes) - right
    smooth = SMOOTH / 2
    return (right + smooth) / (right + false_positives * alarms + false_negatives * missed + smooth)


def generalised_dice(judged: Judged) -> Float[Tensor, ""]:
    """One minus generalised Dice (Sudre et al. 2017, arXiv:1707.03237, section 2.1).

    Classes, the background among them, are weighted by one over their squared volume. A class that
    a sample lacks has the largest weight of those that the sample holds, as its own is infinite.
    The weights of classes that were asked for multiply these.
    """
    found, target, axes = judged.probabilities, judged.target, judged.axes
    volume = target.sum(axes)
    weight = torch.where(volume > 0, volume.clamp(min=1) ** -2, 0)
    largest = weight.amax(-1, keepdim=True)
    weight = torch.where(volume > 0, weight, torch.where(largest > 0, largest, 1))
    weight = weight * constants(judged.weights, weight.device)
    overlap = (weight * (found * target).sum(axes)).sum(-1)
    total = (weight * (found.sum(axes) + volume)).sum(-1)
    return (1 - (2 * overlap + SMOOTH) / (total + SMOOTH)).mean()


def cross_entropy(judged: Judged) -> Float[Tensor, ""]:
    """The mean over voxels by their classes' weights, as torch's; over regions too if there are."""
    return _weighted(judged.cross_entropy, judged.weight)


def focal(judged: Judged, gamma: float) -> Float[Tensor, ""]:
    """Cross-entropy times (1 - p) to the power gamma (Lin et al. 2017, arXiv:1708.02002, eq. 4).

    p is the probability of what is right. The mean is over voxels, where the paper divides by the
    number of objects.
    """
    each = judged.cross_entropy
    missed = (-torch.expm1(-each)).clamp(min=LEAST)
    return _weighted(missed**gamma * each, judged.weight)


def top_k(judged: Judged, share: float) -> Float[Tensor, ""]:
    """The mean of the largest cross-entropies, so large a share of all (Wu et al. 2016,
    arXiv:1605.06885).

    At least one counts. Voxels that are left out are not among all.
    """
    each = torch.where(judged.weight > 0, judged.cross_entropy * judged.weight, 0).flatten()
    counted = (judged.weight > 0).sum()
    ordered = each.sort(descending=True).values
    number = (share * counted).ceil().clamp(min=1)
    kept = torch.arange(len(ordered), device=each.device) < number
    return (ordered * kept).sum() / number


def boundary(judged: Judged, reach: int) -> Float[Tensor, ""]:
    """The mean of probabilities times the signed distance from the true surface (Kervadec et al.
    2019, arXiv:1812.07032, equation 5).

    The distance is negative within, and is measured up to `reach` voxels along each axis, beyond
    which it counts as that far; it is in units of the smallest spacing times `reach`, so that it
    lies in -1 to 1. In the paper it goes on without a limit, in voxels.
    """
    found, target = judged.structures
    with torch.no_grad():
        inside = distance_from(target == 0, judged.spacing, reach)
        outside = distance_from(target == 1, judged.spacing, reach)
        signed = (outside - inside) / (reach * min(judged.spacing))
    return judged.mean((found * signed).flatten(2).mean(-1))


def distance_from(
    seeds: Tensor, spacing: Sequence[float], reach: int
) -> Float[Tensor, "batch outputs *space"]:
    """Each voxel's distance from the nearest seed, in the unit of the spacing.

    It is exact up to `reach` voxels along each axis; a distance beyond `reach` times the smallest
    spacing counts as that. One axis after the other, squared distances along it are added and the
    least is kept (Felzenszwalb and Huttenlocher 2012, section 2.1, by brute force over a short
    reach, which no device waits for).
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


def centre_line(judged: Judged, iterations: int) -> Float[Tensor, ""]:
    """One minus soft clDice, for vessels and other tubes (Shit et al. 2021, arXiv:2003.07311).

    Its harmonic mean is of how much of the found centre line lies in the true structure, and how
    much of the true centre line was found (equation 3); centre lines are those of `thinned`.
    """
    (found, target), axes = judged.structures, judged.axes
    thin_found, thin_target = thinned(found, iterations), thinned(target, iterations)
    precision = ((thin_found * target).sum(axes) + SMOOTH) / (thin_found.sum(axes) + SMOOTH)
    sensitivity = ((thin_target * found).sum(axes) + SMOOTH) / (thin_target.sum(axes) + SMOOTH)
    return judged.mean(1 - 2 * precision * sensitivity / (precision + sensitivity))


def thinned(
    structures: Float[Tensor, "batch outputs *space"], iterations: int
) -> Float[Tensor, "batch outputs *space"]:
    """Soft centre lines (Shit et al. 2021, algorithm 1).

    As many iterations as the largest structure's radius in voxels thin it whole.
    """
    line = F.relu(structures - _opened(structures))
    for _ in range(iterations):
        structures = _eroded(structures)
        new = F.relu(structures - _opened(structures))
        line = line + F.relu(new - line * new)
    return line


def _eroded(structures: Tensor) -> Tensor:
    """The least over each voxel and its neighbours along the axes."""
    pool = _pool(structures)
    dims = structures.ndim - 2
    least = structures
    for axis in range(dims):
        size = [3 if other == axis else 1 for other in range(dims)]
        padding = [1 if other == axis else 0 for other in range(dims)]
        least = torch.minimum(least, -pool(-structures, size, 1, padding))
    return least


def _opened(structures: Tensor) -> Tensor:
    """Eroded, then the largest over each voxel and all its neighbours."""
    return _pool(structures)(_eroded(structures), 3, 1, 1)


def _pool(structures: Tensor) -> Callable[..., Tensor]:
    return F.max_pool2d if structures.ndim == 4 else F.max_pool3d


def _weighted(values: Tensor, weight: Tensor) -> Tensor:
    """Their mean by weight; 0 if no voxel counts."""
    total = weight.sum()
    return (values * weight).sum() / torch.where(total > 0, total, 1)
