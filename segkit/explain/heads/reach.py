"""Reach of attention heads: mean attention distance (mm) and entropy of each head.

The rows of an attention matrix are observed block by block while the network computes them. The
whole matrix is never in memory, and the results are exact.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.inference.predictor import Predictor
from segkit.nn.map_tap import Edit, editing, taps
from segkit.nn.positions import cells_of


@dataclass(frozen=True)
class HeadReach:
    """Mean attention distance and entropy of one head, and both for uniform attention."""

    distance_mm: float
    uniform_distance_mm: float
    """The distance if a head attended equally to all cells."""
    entropy: float
    """In nats."""
    uniform_entropy: float

    @property
    def distance_ratio(self) -> float:
        """Distance divided by that of uniform attention; 1 means no preference for near cells."""
        return self.distance_mm / self.uniform_distance_mm if self.uniform_distance_mm else 1.0

    def figures(self) -> dict[str, float]:
        """The values for a JSON file."""
        return {
            "distance_mm": self.distance_mm,
            "distance_over_uniform": self.distance_ratio,
            "entropy": self.entropy,
            "entropy_over_uniform": self.entropy / self.uniform_entropy
            if self.uniform_entropy
            else 1.0,
        }


class ReachWatcher:
    """Observes attention rows, and returns them unchanged.

    It computes the mean attention distance of Dosovitskiy et al. (2021, arXiv:2010.11929, Sec.
    D.7): the distance between the centres of query and key, weighted by attention. The distance 0
    of a cell to itself is included. The mean is over queries, windows and images.

    Args:
        cells: size of the grid on which attention is computed.
        window: size of the attention windows that the grid is cut into; None if there is one.
        shift: cells by which the windows are shifted along each axis; 0 if not given.
        pitch_mm: distance (mm) between neighbouring cells along each axis.
    """

    def __init__(
        self,
        cells: Sequence[int],
        *,
        window: Sequence[int] | None,
        pitch_mm: Sequence[float],
        shift: Sequence[int] | None = None,
    ) -> None:
        self.boxes = list(boxes(cells, window or cells, shift))
        self.pitch_mm = tuple(pitch_mm)
        shape = tuple(window or cells)
        self.positions = cells_of(shape).double() * torch.tensor(self.pitch_mm).double()
        self.next_query = 0
        self.distance: Tensor | None = None
        self.entropy: Tensor | None = None
        self.queries: Tensor | None = None

    def __call__(
        self, rows: Float[Tensor, "batch heads queries keys"]
    ) -> Float[Tensor, "batch heads queries keys"]:
        """The rows, unchanged."""
        seen = rows.detach().double()
        first, last = self.next_query, self.next_query + rows.shape[2]
        self.next_query = last % len(self.positions)
        positions = self.positions.to(rows.device)
        apart = torch.cdist(positions[first:last], positions)
        distance = torch.einsum("bhqk,qk->h", seen, apart)
        entropy = -torch.special.xlogy(seen, seen).sum(dim=(0, 2, 3))
        queries = seen.sum(dim=(0, 2, 3))  # a row sums to 1, or to 0 if it lies beyond the grid
        if self.distance is None or self.entropy is None or self.queries is None:
            self.distance, self.entropy, self.queries = distance, entropy, queries
        else:
            self.distance, self.entropy = self.distance + distance, self.entropy + entropy
            self.queries = self.queries + queries
        return rows

    def result(self) -> list[HeadReach]:
        """Distance and entropy of each head, over all observed rows."""
        assert self.distance is not None and self.entropy is not None and self.queries is not None
        counts = [math.prod(box) for box in self.boxes]
        total = sum(counts)
        far = sum(
            count * uniform_distance(box, self.pitch_mm)
            for count, box in zip(counts, self.boxes, strict=True)
        )
        wide = sum(count * math.log(count) for count in counts)
        distances, entropies = self.distance / self.queries, self.entropy / self.queries
        return [
            HeadReach(distance, far / total, entropy, wide / total)
            for distance, entropy in zip(distances.tolist(), entropies.tolist(), strict=True)
        ]


def boxes(
    cells: Sequence[int], window: Sequence[int], shift: Sequence[int] | None = None
) -> Iterator[tuple[int, ...]]:
    """The sizes of the windows that a grid is cut into; those at its ends may be smaller.

    Shifted windows begin with a smaller one, which holds the cells before the first whole window.
    An axis that one window covers is not shifted.

    Args:
        cells: size of the grid.
        window: size of the windows.
        shift: cells by which the windows are shifted along each axis.
    """
    sizes = []
    for size, width, step in zip(cells, window, shift or [0] * len(window), strict=True):
        moved = step if size > width else 0
        cuts = [*([0] if moved else []), *range(moved, size, width), size]
        sizes.append([last - first for first, last in itertools.pairwise(cuts)])
    return itertools.product(*sizes)


def uniform_distance(cells: Sequence[int], pitch_mm: Sequence[float]) -> float:
    """Mean distance (mm) of all pairs of cells of a grid, including each cell with itself.

    Along an axis of n cells, n - |o| pairs have the offset o. For one axis the mean is
    pitch (n^2 - 1) / (3 n).
    """
    squares = torch.zeros((), dtype=torch.float64)
    pairs = torch.ones((), dtype=torch.float64)
    for size, pitch in zip(cells, pitch_mm, strict=True):
        offset = torch.arange(-size + 1, size, dtype=torch.float64)
        squares = squares[..., None] + (offset * pitch) ** 2
        pairs = pairs[..., None] * (size - offset.abs())
    return float((squares.sqrt() * pairs).sum() / pairs.sum())


@contextmanager
def watching(predictor: Predictor) -> Iterator[Mapping[str, ReachWatcher]]:
    """Observe each attention matrix while the predictor runs; the watchers, by position."""
    network, description = predictor.model.network, predictor.model.description
    watchers = {
        position: ReachWatcher(cells, window=tap_window, shift=shift, pitch_mm=pitch)
        for position, (cells, tap_window, shift, pitch) in _matrices(network, description).items()
    }
    edits: dict[str, Edit] = {f"{place}/received": watcher for place, watcher in watchers.items()}
    with editing(network, edits):
        yield watchers


def _matrices(
    network: torch.nn.Module, description: ModelDescription
) -> dict[
    str,
    tuple[tuple[int, ...], tuple[int, ...] | None, tuple[int, ...] | None, tuple[float, ...]],
]:
    """Grid size, window size, its shift and pitch (mm) of each attention matrix, by position."""
    spacing = list(description.spacing)
    if description.axis_across is not None:
        spacing.pop(description.axis_across)
    found = {}
    for tap in taps(network).values():
        if tap.kind != "received" or tap.info is None or tap.info.placement is None:
            continue
        stride = tap.info.placement.stride
        cells = tuple(
            round(size / step) for size, step in zip(description.patch_size, stride, strict=True)
        )
        pitch = tuple(mm * step for mm, step in zip(spacing, stride, strict=True))
        found[tap.info.key.split("/")[0]] = (cells, tap.window, tap.shift, pitch)
    return found
