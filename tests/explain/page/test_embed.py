"""What a page embeds is what a reader gets back, on its grid."""

import base64
import gzip
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra.numpy import array_shapes, arrays
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

from segkit.errors import VolumeError
from segkit.explain.page.embed import Embedded, embed, embed_labels, thinning
from segkit.geometry.grid import Grid, Orientation
from tests.helpers import affines


def decoded(text: str, described: dict[str, Any]) -> ndarray:
    """What a reader makes of a volume's text, written after the words of `embed`."""
    plain = np.frombuffer(gzip.decompress(base64.b64decode(text)), np.uint8)
    codes = plain.astype(int)
    if described["bytes"] == 2:
        low, high = codes.reshape(2, -1)
        codes = low + 256 * high
    values = described["low"] + described["step"] * codes
    values[codes == described["missing"]] = np.nan
    return values.reshape(described["shape"], order="F")


def reread(embedded: Embedded) -> ndarray:
    return decoded(embedded.text, embedded.description())


def grid_of(values: ndarray, affine: ndarray | None = None) -> Grid:
    x, y, z = values.shape
    return Grid((x, y, z), np.eye(4) if affine is None else affine)


SHAPES = array_shapes(min_dims=3, max_dims=3, max_side=5)


FLOATS = st.floats(-1e6, 1e6, width=32) | st.just(float("nan")) | st.just(float("inf"))


@given(arrays(np.float32, SHAPES, elements=FLOATS), affines(), st.booleans())
def test_embedded_values_are_within_half_a_step_and_keep_their_position(
    values: ndarray, affine: ndarray, fine: bool
) -> None:
    grid = grid_of(values, affine)
    embedded = embed(values, grid, fine=fine)
    turned = Orientation.of(affine).turn(values)
    expected = np.where(np.isfinite(turned), turned, np.nan)
    assert_allclose(
        reread(embedded), expected, rtol=1e-12, atol=embedded.step * 0.5000001, equal_nan=True
    )
    finite = values[np.isfinite(values)]
    spread = float(np.ptp(finite.astype(float))) if finite.size else 0.0
    assert embedded.step <= max(spread / (65533 if fine else 253), 1.0)
    assert_allclose(embedded.grid.centres(), Orientation.of(affine).turn(grid.centres()), atol=1e-9)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64, np.float32, bool])
def test_whole_numbers_are_embedded_exactly(kind: type) -> None:
    values = np.random.default_rng(0).integers(-900, 3000, (3, 4, 5)).astype(kind)
    embedded = embed(values, grid_of(values))
    assert embedded.step == 1 and embedded.missing is None
    assert_array_equal(reread(embedded), values)


def test_a_constant_is_embedded_exactly() -> None:
    for constant in (0.0, -7.25, 1e-9):
        values = np.full((2, 3, 1), constant)
        assert_array_equal(reread(embed(values, grid_of(values))), values)


def test_labels_are_embedded_exactly_and_too_large_ones_refused() -> None:
    labels = np.array([[[0, 3, 65535]]])
    assert_array_equal(reread(embed_labels(labels, grid_of(labels))), labels)
    with pytest.raises(VolumeError, match="of at most 65535 for a page, found 65536; renumber"):
        embed_labels(labels + 1, grid_of(labels))


def test_too_large_a_scan_is_thinned_along_its_finest_axes_first() -> None:
    grid = Grid((100, 100, 10), np.diag([0.5, 0.5, 3.0, 1.0]))
    assert thinning(grid, most=100_000) == (1, 1, 1)
    assert thinning(grid, most=99_999) == (2, 2, 1)
    assert thinning(grid, most=24_999) == (3, 3, 1)
    assert thinning(grid, most=1) == (100, 100, 10)
