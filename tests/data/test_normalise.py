"""Intensities on one scale: what the arithmetic of each normalisation gives."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy.testing import assert_allclose, assert_array_equal
from torch.testing import assert_close

from segkit.config.data import CtWindowConfig, ZScoreConfig
from segkit.data.normalise import build_normalisers, ct_window, foreground_statistics, zscore


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1.0, 1e6])
@pytest.mark.parametrize("offset", [0.0, -3.0, 1e3])
def test_zscore_gives_mean_0_and_standard_deviation_1(scale: float, offset: float) -> None:
    noise = np.random.default_rng(0).normal(offset, 1, (8, 9, 10)) * scale
    image = zscore(torch.from_numpy(noise.astype(np.float32)), nonzero=False).double()
    assert_close(image.mean().item(), 0.0, rtol=0, atol=1e-4)
    assert_close(image.std(correction=0).item(), 1.0, rtol=1e-4, atol=0)


@given(st.integers(1, 40), st.booleans())
def test_zscore_a_few_planes_at_a_time_is_that_of_all_voxels(planes: int, nonzero: bool) -> None:
    values = np.random.default_rng(planes).integers(-2, 3, (planes, 3, 2)).astype(np.float32)
    values[0, 0] = 1, 2
    counted = values[values != 0] if nonzero else values
    expected = (values - counted.mean(dtype=float)) / counted.std(dtype=float)
    found = zscore(torch.from_numpy(values), nonzero=nonzero)
    assert_close(found, torch.from_numpy(expected).float(), rtol=1e-6, atol=1e-6)


@given(st.floats(1e-6, 1e6), st.floats(-100, 100))
def test_zscore_does_not_depend_on_scale_or_offset(scale: float, offset: float) -> None:
    noise = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 5)))
    moved = zscore((noise + offset) * scale, nonzero=False)
    assert_close(moved, zscore(noise, nonzero=False), rtol=0, atol=1e-6)


def test_zscore_over_voxels_other_than_0_also_shifts_the_background() -> None:
    tissue = np.random.default_rng(0).normal(50, 20, (4, 9, 10)).astype(np.float32)
    head = torch.from_numpy(np.concatenate([np.zeros_like(tissue), tissue]))
    image = zscore(head, nonzero=True)
    assert_close(image[4:].mean().item(), 0.0, rtol=0, atol=1e-5)
    assert_close(image[4:].std(correction=0).item(), 1.0, rtol=1e-5, atol=0)
    background = torch.full_like(image[:4], -float(tissue.mean() / tissue.std()))
    assert_close(image[:4], background, rtol=1e-5, atol=0)


@pytest.mark.parametrize("nonzero", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e-20, 1e20])
def test_zscore_of_a_constant_is_0(value: float, nonzero: bool) -> None:
    image = zscore(torch.full((5, 6, 7), value), nonzero=nonzero)
    assert_array_equal(image, np.zeros((5, 6, 7)))


def test_ct_window_clips_and_then_scales() -> None:
    hounsfield = torch.tensor([-1000.0, -160.0, 40.0, 240.0, 3000.0])
    image = ct_window(hounsfield, lower=-160.0, upper=240.0, mean=40.0, std=50.0)
    assert image.tolist() == [-4.0, -4.0, 0.0, 4.0, 4.0]


def test_foreground_statistics_are_percentiles_mean_and_standard_deviation() -> None:
    # 0 … 1000: the percentiles 0.5 and 99.5 are 5 and 995, the variance (1001² - 1) / 12.
    values = np.random.default_rng(0).permutation(1001).astype(float)
    expected = (5.0, 995.0, 500.0, np.sqrt((1001**2 - 1) / 12))
    assert_allclose(foreground_statistics(values), expected, rtol=1e-12)


def test_foreground_statistics_of_a_constant_can_be_divided_by() -> None:
    assert foreground_statistics(np.full(9, 3.0)) == (3.0, 3.0, 3.0, 1e-8)


def test_each_channel_is_normalised_by_its_own_settings() -> None:
    scan = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    whole, tissue, window = build_normalisers(
        [
            ZScoreConfig(),
            ZScoreConfig(nonzero=True),
            CtWindowConfig(lower=0.0, upper=4.0, mean=2.0, std=2.0),
        ]
    )
    assert_close(whole(scan), zscore(scan, nonzero=False), rtol=0, atol=0)
    assert_close(tissue(scan), zscore(scan, nonzero=True), rtol=0, atol=0)
    assert window(scan).tolist() == [[-1.0, -0.5], [0.0, 1.0]]
