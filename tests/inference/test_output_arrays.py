"""Rows put into a result lie in their place of the volume, whatever way it is stored."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from segkit.data.preprocess import prepare_image
from segkit.geometry.grid import Grid
from segkit.inference.output_arrays import LateLabels, Results
from segkit.io.disk_arrays import in_memory
from segkit.io.volume import Volume
from tests.helpers import affine_of


@pytest.mark.parametrize("code", ["RAS", "LPS", "PSR"])
def test_rows_fill_the_box_and_the_rest_has_the_value_outside_the_box(code: str) -> None:
    values = np.zeros((9, 8, 7), np.float32)
    values[2:7, 1:6, 2:6] = np.random.default_rng(0).random((5, 5, 4)) + 1
    source = Volume(values, Grid(values.shape, affine_of(code)))
    prepared = prepare_image(source, spacing=(1.0, 1.0, 1.0), normalisers=[lambda image: image])
    results = Results(source, prepared, in_memory)
    results.add("pair", np.dtype(np.float32), [1.0, 0.0])
    inside = torch.from_numpy(prepared.orientation.turn(values)[prepared.box].copy())
    both = torch.stack([inside, -inside])
    for start in range(0, inside.shape[2], 2):
        rows = slice(start, start + 2)
        results.put("pair", rows, both[..., rows])
    found = results.volume("pair")
    assert found is not None and found.grid.agrees_with(source.grid)
    assert_array_equal(found.data[..., 1], -values)
    assert_array_equal(found.data[..., 0], np.where(values > 0, values, 1))
    assert results.volume("another") is None


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_labels_are_put_into_arrays_of_any_order_one_call_late(order: Any, kind: Any) -> None:
    labels = torch.randint(1, 200, (4, 5, 3), generator=torch.Generator().manual_seed(0))
    whole = np.zeros((6, 5, 7), kind, order=order)
    for target in (
        whole[1:5, :, 2:5],
        whole[1:5, ::-1, 2:5][::-1],
        whole.transpose(0, 1, 2)[1:5, :, 4:],
    ):
        target[:] = 0
        late = LateLabels(target)
        late.put(slice(0, 2), labels[..., :2])
        assert not target.any()
        late.put(slice(2, 3), labels[..., 2:])
        assert_array_equal(target[..., :2], labels[..., :2].numpy())
        assert not target[..., 2].any()
        late.finish()
        assert_array_equal(target, labels.numpy())
