"""Rows that slabs make known, piece by piece, are those of the whole resampled at once."""

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal
from torch import Tensor
from torch.testing import assert_close

from segkit.data.preprocess import Prepared, prepare_image
from segkit.geometry.grid import Grid
from segkit.geometry.resample import resample
from segkit.inference import source_rows
from segkit.inference.engines.out_of_memory import RowCombiner
from segkit.inference.ensemble import combine
from segkit.inference.source_rows import SourceRows, pieces, to_source_rows
from segkit.io.volume import Volume
from tests.helpers import grids


def prepared_of(grid: Grid, spacing: tuple[float, float, float]) -> Prepared:
    volume = Volume(np.ones(grid.shape, np.float32), grid)
    return prepare_image(volume, spacing=spacing, normalisers=[lambda image: image])


@st.composite
def cut(draw: st.DrawFn, length: int) -> list[int]:
    """Lengths of slabs that make up a length."""
    ends = sorted({*draw(st.sets(st.integers(1, length))), length})
    return np.diff([0, *ends]).tolist()


@settings(max_examples=40)
@given(
    grids(largest=8),
    st.tuples(*[st.floats(0.4, 5.0)] * 3),
    st.integers(1, 19),
    st.integers(1, 400),
    st.integers(1, 2000),
    st.booleans(),
    st.data(),
)
def test_rows_of_slabs_are_those_of_the_whole_at_once(
    grid: Grid,
    spacing: tuple[float, float, float],
    classes: int,
    voxels: int,
    at_once: int,
    classes_last: bool,
    data: st.DataObject,
) -> None:
    size = max(grid.spacing)
    spacing = (spacing[0] * size, spacing[1] * size, spacing[2] * size)
    prepared = prepared_of(grid, spacing)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(classes + 1, *prepared.grid.shape, generator=generator)
    if classes_last:
        logits = logits.movedim(0, -1).contiguous().movedim(-1, 0)
    slabs = logits.split(data.draw(cut(prepared.grid.shape[2])), dim=-1)
    whole = resample(logits, prepared.positions_of_source())
    labels, shares, spread = [], [], []
    reached = 0
    for first, rows in to_source_rows(slabs, prepared, with_spread=True):
        assert first == reached
        reached += rows.count
        for start, (few,) in pieces([rows], voxels=voxels):
            assert (
                few.count == 1
                or few.count * len(rows.positions[0]) * len(rows.positions[1]) <= voxels
            )
            assert start + few.count <= rows.count
            with mock.patch.object(source_rows, "AT_ONCE", at_once):
                labels.append(few.labels())
            shares.append(few.probabilities())
            spread.append(few.spread())
    assert reached == prepared.source.shape[2]
    probabilities = torch.cat(shares, dim=-1)
    assert_close(probabilities, whole[:classes].softmax(dim=0), rtol=1e-4, atol=1e-6)
    assert_close(torch.cat(spread, dim=-1), whole[classes], rtol=1e-4, atol=1e-5)
    chosen = torch.cat(labels, dim=-1)
    best = probabilities.gather(0, chosen[None])[0]
    assert_close(best, probabilities.max(dim=0).values, rtol=1e-4, atol=1e-6)


@given(st.integers(1, 20), st.integers(1, 50), st.booleans())
def test_if_logits_are_equal_the_lowest_class_wins(
    classes: int, at_once: int, classes_last: bool
) -> None:
    prepared = prepared_of(Grid((3, 4, 5), np.eye(4)), (1.0, 1.0, 1.0))
    values = np.random.default_rng(classes).integers(0, 3, (classes, 3, 4, 5))
    logits = torch.from_numpy(values).float()
    if classes_last:
        logits = logits.movedim(0, -1).contiguous().movedim(-1, 0)
    ((_, rows),) = to_source_rows([logits], prepared)
    with mock.patch.object(source_rows, "AT_ONCE", at_once):
        assert_array_equal(rows.labels().numpy(), values.argmax(axis=0))


def test_without_mirrors_there_is_no_spread() -> None:
    prepared = prepared_of(Grid((3, 4, 5), np.eye(4)), (1.0, 1.0, 1.0))
    ((_, rows),) = to_source_rows([torch.randn(2, 3, 4, 5)], prepared)
    assert_array_equal(rows.spread().numpy(), np.zeros((3, 4, 5)))


def test_a_slab_is_freed_before_the_next_is_requested() -> None:

    prepared = prepared_of(Grid((3, 4, 12), np.eye(4)), (1.0, 1.0, 1.0))
    alive: list[weakref.ref[Tensor]] = []

    def slabs() -> Iterator[Tensor]:
        for _ in range(4):
            assert all(past() is None for past in alive)
            slab = torch.randn(2, 3, 4, 3)
            alive.append(weakref.ref(slab))
            yield slab
            del slab

    for _, rows in to_source_rows(slabs(), prepared):
        rows.labels()
        del rows
    assert len(alive) == 4


def test_if_gpu_memory_is_full_rows_are_computed_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Once it was, the device is asked no more; what comes out is the same."""
    prepared = prepared_of(Grid((5, 4, 6), np.eye(4)), (0.7, 1.0, 1.3))
    slab = torch.randn(3, *prepared.grid.shape, generator=torch.Generator().manual_seed(1))
    ((_, rows),) = to_source_rows([slab], prepared)
    expected = combine([rows, rows], probabilities=True, uncertainty=True)
    tried: list[bool] = []
    on_host: set[int] = set()

    def crowded(block: Tensor, positions: Any) -> Tensor:
        tried.append(block.untyped_storage().data_ptr() in on_host)
        if not tried[-1]:
            raise torch.OutOfMemoryError("planted")
        return resample(block, positions)

    def moved(rows: SourceRows) -> SourceRows:
        copy = rows.logits.clone()
        on_host.add(copy.untyped_storage().data_ptr())
        return replace(rows, logits=copy)

    assert torch.equal(rows.on_host().labels(), rows.labels())
    monkeypatch.setattr(source_rows, "resample", crowded)
    monkeypatch.setattr(SourceRows, "on_host", moved)
    council = RowCombiner(probabilities=True, uncertainty=True)
    for _ in range(2):
        found = council([rows, rows])
        for name, value in vars(expected).items():
            assert torch.equal(getattr(found, name), value), name
    assert tried.count(False) == 1
    assert caplog.messages == ["out of GPU memory; labels are computed in host memory"]


def test_rows_before_a_slab_go_to_the_host_with_it() -> None:
    prepared = prepared_of(Grid((3, 4, 9), np.eye(4)), (1.0, 1.0, 1.6))
    slabs = torch.randn(2, *prepared.grid.shape).split(2, dim=-1)
    for _, rows in to_source_rows(slabs, prepared):
        assert torch.equal(rows.on_host().probabilities(), rows.probabilities())
