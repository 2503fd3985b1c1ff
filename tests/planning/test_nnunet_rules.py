"""nnU-Net's rules one by one, worked out by hand."""

from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from numpy.testing import assert_allclose
from torch.utils.flop_counter import FlopCounterMode

from segkit.nn.unet import UNet
from segkit.planning.nnunet_rules import (
    ChannelNormalisation,
    activations,
    coarser,
    initial_patch,
    largest_batch,
    median_shape,
    multiply_adds,
    needs_low_resolution,
    normalisations,
    resampled_shapes,
    target_spacing,
    topology,
    widths,
)
from tests.planning.test_plan import HIPPOCAMPUS, HOUNSFIELD, Triple


def test_the_target_spacing_is_the_median_of_each_axis() -> None:
    spacings = [(1.0, 2.0, 2.5), (3.0, 1.0, 2.0), (2.0, 9.0, 1.0)]
    assert target_spacing(spacings, [(50, 50, 50)] * 3) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("axis", range(3))
@pytest.mark.parametrize(
    ("slices", "num_slices", "expected"),
    [
        # Of 5, 6, …, 15 the median is 10 and the 10th percentile 6.
        (range(5, 16), 10, 6.0),
        # A third of the others' voxels is too many to be treated apart.
        (range(5, 16), 70, 10.0),
        # Two fine cases would put it below the others.
        ([1, 1, *[10] * 9], 10, 1.5 + 1e-5),
        # Not over three times 1.5.
        ([4.5] * 11, 10, 4.5),
    ],
)
def test_a_coarse_axis_of_few_slices_takes_a_low_percentile(
    axis: int, slices: list[float], num_slices: int, expected: float
) -> None:
    spacings, shapes = [], []
    for thickness in slices:
        spacing, shape = [1.5, 1.5, 1.5], [200, 200, 200]
        spacing[axis], shape[axis] = float(thickness), num_slices
        spacings.append(tuple(spacing))
        shapes.append(tuple(shape))
    wanted = [1.5, 1.5, 1.5]
    wanted[axis] = expected
    assert target_spacing(spacings, shapes) == pytest.approx(tuple(wanted), rel=1e-12)


def test_the_median_shape_is_that_of_rounded_shapes_at_the_target() -> None:
    spacings = [(1.0, 1.0, 2.0), (2.0, 1.0, 2.0)]
    shapes = [(10, 11, 7), (10, 14, 9)]
    # At 2 mm: 5 x 5.5 x 7 and 10 x 7 x 9, of which 5.5 is rounded to the even 6.
    assert resampled_shapes(spacings, shapes, (2.0, 2.0, 2.0)) == [[5, 6, 7], [10, 7, 9]]
    assert median_shape(spacings, shapes, (2.0, 2.0, 2.0)) == (7.5, 6.5, 8.0)
    assert resampled_shapes([(1.0, 1.0, 9.0)], [(8, 1, 1)], (4.0, 4.0, 4.0)) == [[2, 1, 1]]


def test_the_initial_patch_is_isotropic_in_millimetres_and_cut_to_the_median() -> None:
    # 256³ voxels of 1 x 2 x 4 mm in a cube of 512 mm.
    whole = (9999.0, 9999.0, 9999.0)
    assert initial_patch((1.0, 2.0, 4.0), whole) == (512, 256, 128)
    assert initial_patch((1.0, 2.0, 4.0), (40.0, 9999.0, 10.5)) == (40, 256, 10.5)
    # 2048² voxels of 1 x 4 mm in a square of 4096 mm.
    assert initial_patch((1.0, 4.0), (9999.0, 9999.0)) == (4096, 1024)


def test_the_topology_for_an_axis_six_times_as_coarse_equals_one_by_hand() -> None:
    found = topology((0.6, 0.6, 3.6), (300, 310, 18))
    # mm   .6 .6 3.6 | 1.2 1.2 3.6 | 2.4 2.4 3.6 | 4.8 4.8 7.2 | 9.6 9.6 14.4 | 19.2 19.2 14.4 | …
    # size 300 310 18| 150 155 18  | 75 78 18    | 38 39 9     | 19 20 5      | 10 10 5        | 5 5
    flat, whole = (2, 2, 1), (2, 2, 2)
    assert found.strides == (flat, flat, whole, whole, flat, flat)
    assert found.kernels == ((3, 3, 1), (3, 3, 1), *[(3, 3, 3)] * 5)
    assert found.divisor == (64, 64, 4)
    assert found.patch_size == (320, 320, 20)


def test_an_axis_alone_needs_12_cells_to_be_pooled() -> None:
    assert topology((1.0, 4.0), (12, 6)).strides == ((2, 1),)
    assert topology((1.0, 1.0), (8, 8)).strides == ((2, 2),)
    assert topology((1.0, 1.0), (16, 8)).strides == ((2, 2),)  # then 8 and 4: one alone
    assert topology((1.0, 1.0), (24, 8)).strides == ((2, 2), (2, 1))


def test_a_patch_too_small_for_any_step_is_raised_along_its_fine_axes() -> None:
    assert topology((1.0, 1.0, 1.0), (3, 5, 7)).patch_size == (8, 8, 8)
    assert topology((1.0, 1.0, 5.0), (3, 5, 2)).patch_size == (8, 8, 2)
    assert topology((1.0, 3.0, 5.0), (11, 5, 2)).patch_size == (12, 5, 2)


@given(
    st.tuples(*[st.floats(0.3, 6.0)] * 3),
    st.tuples(*[st.integers(1, 300)] * 3),
    st.permutations(range(3)),
)
def test_topology_does_not_depend_on_the_order_of_axes(
    spacing: Triple, patch: tuple[int, int, int], axes: list[int]
) -> None:
    def turned(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(values[axis] for axis in axes)

    found = topology(spacing, patch)
    assert topology(turned(spacing), turned(patch)) == (
        turned(found.patch_size),
        tuple(turned(step) for step in found.strides),
        tuple(turned(kernel) for kernel in found.kernels),
    )


@given(st.tuples(*[st.floats(0.3, 6.0)] * 3), st.tuples(*[st.integers(1, 300)] * 3))
def test_a_padded_patch_has_the_topology_that_it_was_padded_for(
    spacing: Triple, patch: tuple[int, int, int]
) -> None:
    found = topology(spacing, patch)
    assert topology(spacing, found.patch_size) == found


def test_widths_double_up_to_nnunets_largest() -> None:
    assert widths(6, spatial_dims=3) == (32, 64, 128, 256, 320, 320)
    assert widths(6, spatial_dims=2) == (32, 64, 128, 256, 512, 512)
    assert widths(3, spatial_dims=3, start=8) == (8, 16, 32)


def test_activations_of_a_tiny_network_equal_a_count_by_hand() -> None:
    # 64 and 16 cells. Down 2 * 2 * 64 + 2 * 4 * 16, up 3 * 2 * 64, head 3 * 64.
    found = activations(channels=(2, 4), strides=((2, 2),), patch_size=(8, 8), num_classes=3)
    assert found == 256 + 128 + 384 + 192


@pytest.mark.parametrize("deep_supervision", [False, True])
@pytest.mark.parametrize(
    ("channels", "strides", "kernels", "patch_size"),
    [
        ((2, 3), ((2, 2),), ((3, 3), (3, 3)), (6, 4)),
        ((3, 4, 5, 2), ((2, 2), (2, 1), (1, 2)), ((3, 1), (3, 3), (5, 3), (3, 3)), (8, 12)),
        ((2, 4, 3), ((2, 2, 1), (2, 2, 2)), ((3, 3, 1), (3, 3, 3), (3, 3, 3)), (8, 4, 6)),
    ],
)
@pytest.mark.parity
def test_multiply_adds_are_half_of_what_torch_counts(
    channels: tuple[int, ...],
    strides: tuple[tuple[int, ...], ...],
    kernels: tuple[tuple[int, ...], ...],
    patch_size: tuple[int, ...],
    deep_supervision: bool,
) -> None:
    network = UNet(
        len(patch_size),
        2,
        out_channels=3,
        channels=channels,
        strides=strides,
        kernels=kernels,
        deep_supervision=deep_supervision,
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.supervised(torch.zeros(1, 2, *patch_size))
    found = multiply_adds(
        channels=channels,
        strides=strides,
        kernels=kernels,
        patch_size=patch_size,
        in_channels=2,
        num_classes=3,
        deep_supervision=deep_supervision,
    )
    assert counter.get_total_flops() == 2 * found


@pytest.mark.parity
def test_a_training_step_takes_about_three_forward_passes() -> None:
    channels, patch = (8, 16, 16), (16, 16)
    network = UNet(2, 1, out_channels=2, channels=channels, deep_supervision=True)
    with FlopCounterMode(display=False) as counter:
        torch.stack([level.sum() for level in network.supervised(torch.zeros(2, 1, *patch)).levels])
        forward = counter.get_total_flops()
        sum(
            level.sum() for level in network.supervised(torch.zeros(2, 1, *patch)).levels
        ).backward()
    # The first convolution has no gradient to hand on.
    assert_allclose(counter.get_total_flops() - forward, 3 * forward, rtol=0.02)


def test_the_batch_is_held_by_memory_and_by_5_percent_of_the_voxels() -> None:
    # 5 % of 40,000 voxels are 20 patches of 100.
    assert largest_batch(1200.0, 100, (10, 10), 40_000.0) == 12
    assert largest_batch(9900.0, 100, (10, 10), 40_000.0) == 20
    assert largest_batch(100.0, 100, (10, 10), 40_000.0) == 2
    assert largest_batch(9900.0, 100, (10, 10), 1_000.0) == 2


def test_low_resolution_is_needed_under_a_quarter_of_the_voxels() -> None:
    assert not needs_low_resolution((5, 5), 100.0)
    assert needs_low_resolution((5, 5), 100.1)


def test_a_spacing_is_coarsened_along_the_fine_axes_first() -> None:
    assert coarser((1.0, 2.0, 4.0)) == (1.03, 2.0, 4.0)
    assert coarser((1.9, 1.9, 4.0)) == (1.9 * 1.03, 1.9 * 1.03, 4.0)
    assert coarser((2.0, 3.0, 4.0)) == (2.0 * 1.03, 3.0 * 1.03, 4.0 * 1.03)


def test_a_channel_named_ct_is_clipped_and_any_other_scaled_by_itself() -> None:
    numbers = replace(HIPPOCAMPUS, channels=("CT", "PET"), intensities=(HOUNSFIELD, HOUNSFIELD))
    window = ChannelNormalisation("ct", lower=-50.0, upper=230.0, mean=80.0, std=40.0)
    assert normalisations(numbers) == (window, ChannelNormalisation("zscore"))
    bare = replace(numbers, intensities=(None, None))
    assert normalisations(bare)[0] == ChannelNormalisation("ct")


@pytest.mark.parametrize(
    ("shares", "kind"),
    [((0.1, 0.74, 1.0), "zscore nonzero"), ((0.1, 0.75, 1.0), "zscore")],
)
def test_zeros_are_left_out_if_the_median_box_has_under_three_quarters(
    shares: tuple[float, ...], kind: str
) -> None:
    (found,) = normalisations(replace(HIPPOCAMPUS, box_shares=shares))
    assert found.kind == kind
