"""How far windows disagree about a map."""

import numpy as np
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from segkit.inference.window_disagreement import SQUARES, WindowSpread, where_windows_meet
from segkit.inference.windows import WindowLayout, slide, window_starts, window_weight


def test_disagreement_is_the_weighted_deviation_between_windows() -> None:
    size, patch, stride, overlap = (13, 8, 9), (8, 8, 4), 2, 0.5
    random = torch.Generator().manual_seed(0)
    starts = [window_starts(*told, overlap, stride) for told in zip(size, patch, strict=True)]
    places = [(x, y, z) for x in starts[0] for y in starts[1] for z in starts[2]]
    said = {place: torch.rand(1, 4, 4, 2, generator=random) for place in places}
    spread = WindowSpread(["map"])
    spread.set_windows(places, patch)
    order = iter(places)

    def windows(_: Tensor) -> dict[str, Tensor]:
        outputs = {"map": said[next(order)][None]}
        spread.add_squares(outputs)
        return outputs

    blended = slide(
        torch.zeros(1, *size),
        windows,
        WindowLayout(patch, (overlap,) * 3, (stride,) * 3),
    )
    found = spread.deviation("map", blended["map"], blended["map" + SQUARES])[0].numpy()
    weight = torch.ones(())
    for width in patch:
        weight = weight[..., None] * window_weight(width).view(-1, stride).mean(dim=1)
    cells = [-(-length // stride) for length in size]
    each = np.full((len(places), *[length + 4 for length in cells]), np.nan)
    weights = np.zeros_like(each)
    for number, place in enumerate(places):
        x, y, z = (first // stride for first in place)
        each[number, x : x + 4, y : y + 4, z : z + 2] = said[place][0].numpy()
        weights[number, x : x + 4, y : y + 4, z : z + 2] = weight.numpy()
    inside = (slice(None), *(slice(0, length) for length in cells))
    each, weights = each[inside], weights[inside]
    mean = np.nansum(weights * each, axis=0) / weights.sum(axis=0)
    squares = np.nansum(weights * (each - mean) ** 2, axis=0) / weights.sum(axis=0)
    # Sums in single precision: their rounding, 1e-7, is a square's.
    assert_allclose(found, np.sqrt(squares), atol=5e-4)
    count = spread.windows_over(cells, (float(stride),) * 3)
    assert_array_equal(count, (~np.isnan(each)).sum(axis=0))
    shown = where_windows_meet(found[..., None], count)
    assert_array_equal(np.isnan(shown), count < 2)


def test_windows_that_say_the_same_do_not_disagree() -> None:
    spread = WindowSpread(["map"])

    def same(windows: Tensor) -> dict[str, Tensor]:
        outputs = {"map": torch.full((len(windows), 1, 8), 0.7)}
        spread.add_squares(outputs)
        return outputs

    blended = slide(torch.zeros(1, 20), same, WindowLayout((8,), (0.5,), (1,)))
    found = spread.deviation("map", blended["map"], blended["map" + SQUARES])
    assert float(found.max()) < 1e-6
