import math
import subprocess
import sys
from dataclasses import replace
from itertools import permutations
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from numpy.testing import assert_allclose
from torch.utils.flop_counter import FlopCounterMode

from segkit.nn.unet import UNet
from segkit.planning.nnunet_rules import (
    ChannelNormalisation,
    Intensities,
    Lengths,
    Numbers,
    Spacing,
    activations,
    coarser,
    initial_patch,
    largest_batch,
    median_shape,
    multiply_adds,
    needs_low_resolution,
    normalisations,
    separate_axis,
    target_spacing,
    topology,
    widths,
)
from segkit.planning.plan import Plan, Steps, plan_for_memory, plan_for_time

Triple = tuple[float, float, float]
HOUNSFIELD = Intensities(
    mean=80.0, std=40.0, median=85.0, minimum=-200.0, maximum=900.0, lower=-50.0, upper=230.0
)


def alike(
    shape: tuple[int, int, int], spacing: Triple, num_cases: int, num_classes: int = 3
) -> Numbers:
    """So many MR cases of one size."""
    return Numbers(
        spacings=(spacing,) * num_cases,
        shapes=(shape,) * num_cases,
        box_shares=(1.0,) * num_cases,
        channels=("MRI",),
        intensities=(HOUNSFIELD,),
        num_classes=num_classes,
    )


HIPPOCAMPUS = alike((35, 50, 36), (1.0, 1.0, 1.0), 260)
PROSTATE = replace(alike((320, 320, 20), (0.6, 0.6, 3.6), 32), channels=("T2", "ADC"))
PROSTATE = replace(PROSTATE, intensities=(None, None))
ISOTROPIC = alike((512, 512, 512), (1.0, 1.0, 1.0), 100)


def cost_of_patch(plan: Plan, numbers: Numbers) -> int:
    """Multiply-adds of a forward pass."""
    return multiply_adds(
        channels=plan.channels,
        strides=plan.strides,
        kernels=plan.kernels,
        patch_size=plan.patch_size,
        in_channels=len(numbers.channels),
        num_classes=numbers.num_classes,
    )


def memory_of_patch(plan: Plan, numbers: Numbers) -> int:
    return activations(
        channels=plan.channels,
        strides=plan.strides,
        patch_size=plan.patch_size,
        num_classes=numbers.num_classes,
    )


# nnU-Net's own plans


@pytest.mark.parametrize("axes", [*permutations(range(3))])
def test_the_3d_plan_of_the_hippocampus_is_nnunets(axes: tuple[int, int, int]) -> None:
    x, y, z = (HIPPOCAMPUS.shapes[0][axis] for axis in axes)
    plan = plan_for_memory(alike((x, y, z), (1.0, 1.0, 1.0), 260), spatial_dims=3)
    assert plan.patch_size == tuple((40, 56, 40)[axis] for axis in axes)
    assert plan.strides == ((2, 2, 2),) * 3
    assert plan.kernels == ((3, 3, 3),) * 4
    assert plan.channels == (32, 64, 128, 256)
    assert plan.batch_size == 9  # 5 % of 260 images are 9.14 patches
    assert plan.spacing == (1.0, 1.0, 1.0)
    assert (plan.batch_dice, plan.separate_z, plan.low_resolution) == (False, False, None)


def test_the_2d_plan_of_the_hippocampus_is_nnunets() -> None:
    plan = plan_for_memory(HIPPOCAMPUS, spatial_dims=2)
    assert plan.patch_size == (40, 56)
    assert plan.slices == "axial"
    assert plan.strides == ((2, 2),) * 3
    assert plan.kernels == ((3, 3),) * 4
    assert plan.channels == (32, 64, 128, 256)
    assert plan.batch_size == 366  # of 365.6
    assert plan.batch_dice


def test_the_plan_of_the_prostate_is_nnunets() -> None:
    """Isensee et al. (2021): 20 x 320 x 256 of a median 20 x 320 x 319, spacing 3.6, .62, .62."""
    numbers = alike((319, 320, 20), (0.62, 0.62, 3.6), 32)
    plan = plan_for_memory(numbers, spatial_dims=3)
    assert plan.patch_size == (256, 320, 20)
    assert plan.batch_size == 2
    assert plan.separate_z
    # z is left alone until x and y are at 2.48 mm, and given up when it has 5 cells.
    flat, whole = (2, 2, 1), (2, 2, 2)
    assert plan.strides == (flat, flat, whole, whole, flat, flat)
    assert plan.kernels == ((3, 3, 1),) * 2 + ((3, 3, 3),) * 5
    assert plan.channels == (32, 64, 128, 256, 320, 320, 320)


def test_plans_are_those_that_nnunets_own_planner_made() -> None:
    """Its version 2.8.1, given the same spacings and shapes in its own order of axes."""
    flat, whole = (2, 2, 1), (2, 2, 2)
    isotropic = ((3, 3, 3),) * 6
    deep = (32, 64, 128, 256, 320, 320)

    liver = plan_for_memory(alike((512, 512, 432), (0.77, 0.77, 1.0), 131), spatial_dims=3)
    assert (liver.patch_size, liver.batch_size, liver.batch_dice) == ((128, 128, 128), 2, True)
    assert (liver.channels, liver.strides, liver.kernels) == (deep, (whole,) * 5, isotropic)
    low = liver.low_resolution
    assert low is not None and low.spacing == (1.868992, 1.868992, 2.427262)
    assert (low.patch_size, low.batch_size, low.batch_dice) == ((128, 128, 128), 2, False)
    assert (low.channels, low.strides, low.kernels) == (deep, (whole,) * 5, isotropic)

    knee = plan_for_memory(alike((160, 384, 384), (0.7, 0.36, 0.4), 20, 5), spatial_dims=3)
    steps = ((whole,) * 4) + ((1, 2, 2),)
    assert (knee.patch_size, knee.batch_size, knee.batch_dice) == ((80, 160, 192), 2, True)
    assert (knee.channels, knee.strides, knee.kernels) == (deep, steps, isotropic)
    low = knee.low_resolution
    assert low is not None and low.spacing == (0.968964, 0.498324, 0.553694)
    assert (low.patch_size, low.batch_size, low.strides) == ((80, 160, 192), 2, steps)

    thick = alike((240, 220, 10), (1.5, 1.5, 10.0), 150, 4)
    thin = alike((240, 220, 18), (1.5, 1.5, 5.0), 50, 4)
    heart = replace(
        thick,
        spacings=thick.spacings + thin.spacings,
        shapes=thick.shapes + thin.shapes,
        box_shares=thick.box_shares + thin.box_shares,
    )
    plan = plan_for_memory(heart, spatial_dims=3)
    assert plan.spacing == (1.5, 1.5, 5.0)
    assert (plan.patch_size, plan.batch_size, plan.batch_dice) == ((256, 224, 20), 4, False)
    assert (plan.channels, plan.strides) == (deep, (flat, whole, whole, flat, flat))
    assert plan.kernels == ((3, 3, 1), *[(3, 3, 3)] * 5)
    assert plan.low_resolution is None
    assert "10th percentile is taken, 5 mm" in plan.reasons["spacing"]
    plane = plan_for_memory(heart, spatial_dims=2)
    assert (plane.patch_size, plane.batch_size) == ((256, 224), 56)


def test_a_large_isotropic_image_gets_a_cube_of_128_and_a_plan_at_low_resolution() -> None:
    plan = plan_for_memory(ISOTROPIC, spatial_dims=3)
    assert (plan.patch_size, plan.batch_size) == ((128, 128, 128), 2)
    assert plan.batch_dice
    low = plan.low_resolution
    assert low is not None and low.low_resolution is None and not low.batch_dice
    # 128³ are 25 % of 203³: 512 / 203 = 2.52 = 1.03^31.3, and 32 steps of 3 % get there.
    assert_allclose(low.spacing, (1.03**32,) * 3, rtol=1e-5)
    assert low.patch_size == (128, 128, 128)


def test_low_resolution_that_saves_less_than_half_is_dropped() -> None:
    # 128³ are 24.7 % of 204³, and one step of 3 % is enough.
    plan = plan_for_memory(alike((204, 204, 204), (1.0, 1.0, 1.0), 100), spatial_dims=3)
    assert plan.patch_size == (128, 128, 128)
    assert plan.low_resolution is None and not plan.batch_dice
    assert "save under half" in plan.reasons["low_resolution"]


# The rules one by one


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
    assert median_shape(spacings, shapes, (2.0, 2.0, 2.0)) == (7.5, 6.5, 8.0)


def test_the_initial_patch_is_isotropic_in_millimetres_and_cut_to_the_median() -> None:
    # 256³ voxels of 1 x 2 x 4 mm in a cube of 512 mm.
    whole = (9999.0, 9999.0, 9999.0)
    assert initial_patch((1.0, 2.0, 4.0), whole) == (512, 256, 128)
    assert initial_patch((1.0, 2.0, 4.0), (40.0, 9999.0, 10.5)) == (40, 256, 10.5)
    # 2048² voxels of 1 x 4 mm in a square of 4096 mm.
    assert initial_patch((1.0, 4.0), (9999.0, 9999.0)) == (4096, 1024)


def test_topology_worked_by_hand_where_an_axis_is_six_times_as_coarse() -> None:
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


def test_activations_of_a_tiny_network() -> None:
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


def test_slices_are_resampled_apart_where_one_axis_alone_is_coarse() -> None:
    fine: Spacing = (1.0, 1.0, 1.0)
    assert separate_axis((1.0, 1.0, 3.1), fine) == 2
    assert separate_axis(fine, (3.1, 1.0, 1.0)) == 0
    assert separate_axis((1.0, 1.0, 3.0), fine) is None
    assert separate_axis((3.1, 1.0, 3.1), fine) is None
    assert separate_axis((3.1, 1.0, 3.10001), fine) is None  # equal, but for rounding
    # What the scan says goes before what the target says.
    assert separate_axis((3.1, 1.0, 3.1), (1.0, 1.0, 3.1)) is None
    assert separate_axis((3.1, 1.0, 1.0), (1.0, 1.0, 3.1)) == 0


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
def test_zeros_are_left_out_where_the_median_box_holds_under_three_quarters(
    shares: tuple[float, ...], kind: str
) -> None:
    (found,) = normalisations(replace(HIPPOCAMPUS, box_shares=shares))
    assert found.kind == kind


@pytest.mark.parametrize(
    ("spacing", "slices", "patch"),
    [
        ((3.0, 1.0, 1.0), "sagittal", (32, 40)),
        ((1.0, 3.0, 1.0), "coronal", (24, 40)),
        ((1.0, 1.0, 3.0), "axial", (24, 32)),
        ((1.0, 1.0, 1.0), "axial", (24, 32)),
    ],
)
def test_a_2d_network_sees_the_planes_across_the_coarsest_axis(
    spacing: Triple, slices: str, patch: tuple[int, int]
) -> None:
    plan = plan_for_memory(alike((24, 32, 40), spacing, 9), spatial_dims=2)
    assert (plan.slices, plan.patch_size, plan.spacing) == (slices, patch, spacing)


# Time


def test_time_without_end_gives_the_plan_for_memory() -> None:
    plan = plan_for_time(
        HIPPOCAMPUS,
        spatial_dims=3,
        minutes=1e9,
        steps=Steps(1, 1, 1),
        multiply_adds_per_second=1e9,
    )
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)
    assert replace(plan, reasons=whole.reasons) == whole
    assert "time" in plan.reasons


def in_time(billions: float) -> Plan:
    """The hippocampus' plan for so many billion multiply-adds in a step."""
    return plan_for_time(
        HIPPOCAMPUS,
        spatial_dims=3,
        minutes=10.0,
        steps=Steps(100, 100, 100),
        multiply_adds_per_second=billions * 1e9 * 100 / 600,
    )


def test_what_takes_too_long_is_thinned_out_then_narrowed_then_shrunk() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)

    def narrow(start: int) -> float:
        """Billions in a step per patch."""
        plan = replace(whole, channels=widths(4, spatial_dims=3, start=start))
        return 3 * cost_of_patch(plan, HIPPOCAMPUS) / 1e9

    plan = in_time(9 * narrow(32) * 0.999)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (32, 8, (40, 56, 40))
    assert "Made smaller, from 9 to 8" in plan.reasons["batch_size"]
    plan = in_time(2 * narrow(32) * 1.001)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (32, 2, (40, 56, 40))
    plan = in_time(2 * narrow(32) * 0.999)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (16, 2, (40, 56, 40))
    assert "Narrowed from 32 to 16" in plan.reasons["channels"]
    plan = in_time(2 * narrow(8) * 1.001)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (8, 2, (40, 56, 40))
    plan = in_time(2 * narrow(8) * 0.999)
    # x is 40 / 35 of the median image, more than y and z.
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (8, 2, (32, 56, 40))
    assert "Shrunk from 40x56x40 to 32x56x40" in plan.reasons["patch_size"]


def test_a_batch_grows_only_where_there_is_time_for_enough_steps() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)
    patch = 3 * cost_of_patch(whole, HIPPOCAMPUS)

    def planned(patches: float) -> Plan:
        """The plan where so many patches fit into the time."""
        return plan_for_time(
            HIPPOCAMPUS,
            spatial_dims=3,
            minutes=1.0,
            steps=Steps(for_batch=1000, for_width=100, for_patch=100),
            multiply_adds_per_second=patches * patch / 60,
        )

    for patches, batch in [(201, 2), (2999, 2), (3001, 3), (8999, 8), (9001, 9), (1e6, 9)]:
        plan = planned(patches)
        assert (plan.batch_size, plan.channels) == (batch, whole.channels)
    assert planned(199).channels[0] == 16


def test_channels_are_given_up_for_more_steps_than_the_patch_is() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)

    def of(start: int) -> int:
        """Multiply-adds of the least batch, so wide."""
        plan = replace(whole, channels=widths(4, spatial_dims=3, start=start))
        return 2 * 3 * cost_of_patch(plan, HIPPOCAMPUS)

    def planned(total: float) -> tuple[int, tuple[int, ...]]:
        plan = plan_for_time(
            HIPPOCAMPUS,
            spatial_dims=3,
            minutes=1.0,
            steps=Steps(for_batch=1000, for_width=400, for_patch=100),
            multiply_adds_per_second=total / 60,
        )
        return plan.channels[0], plan.patch_size

    size = (40, 56, 40)
    assert planned(401 * of(32)) == (32, size)
    assert planned(399 * of(32)) == (16, size)
    assert planned(401 * of(16)) == (16, size)
    assert planned(399 * of(16)) == planned(101 * of(8)) == (8, size)
    assert planned(99 * of(8)) == (8, (32, 56, 40))


def test_the_smallest_plan_of_all_says_that_it_takes_longer() -> None:
    plan = in_time(1e-6)
    assert (plan.channels[0], plan.batch_size) == (8, 2)
    assert len(plan.strides) == 1
    assert "there is nothing smaller" in plan.reasons["time"]


# Laws of every plan


edges, counts = st.floats(0.4, 6.0), st.integers(1, 160)
sized_cases = st.lists(
    st.tuples(st.tuples(edges, edges, edges), st.tuples(counts, counts, counts)),
    min_size=1,
    max_size=4,
)


def scans(cases: list[tuple[Triple, tuple[int, int, int]]]) -> Numbers:
    """MR cases of these spacings and shapes."""
    return replace(
        alike((1, 1, 1), (1.0, 1.0, 1.0), len(cases)),
        spacings=tuple(spacing for spacing, _ in cases),
        shapes=tuple(shape for _, shape in cases),
    )


def assert_network_can_be_built(plan: Plan, median: Lengths) -> None:
    num_levels = len(plan.channels)
    assert len(plan.strides) == num_levels - 1 >= 1 and len(plan.kernels) == num_levels
    assert all(len(row) == plan.spatial_dims for row in (*plan.strides, *plan.kernels))
    assert {edge for kernel in plan.kernels for edge in kernel} <= {1, 3}
    assert plan.batch_size >= 2
    for size, steps, longest in zip(
        plan.patch_size, zip(*plan.strides, strict=True), median, strict=True
    ):
        total = math.prod(steps)
        assert size % total == 0
        # At least four cells are left of an axis that was pooled, and no axis is longer than the
        # median image but for padding; an image too small for a network is raised to 12 at most.
        assert total == 1 or size // total >= 4
        assert size < max(longest, 12) + total


@given(sized_cases, st.sampled_from([2, 3]), st.floats(0.01, 8.0), st.floats(1e-3, 1e3))
@settings(max_examples=40)
def test_every_plan_fits_its_network(
    cases: list[tuple[Triple, tuple[int, int, int]]],
    spatial_dims: int,
    gigabytes: float,
    minutes: float,
) -> None:
    numbers = scans(cases)
    for plan in (
        plan_for_memory(numbers, spatial_dims=spatial_dims, gigabytes=gigabytes),
        plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            gigabytes=gigabytes,
            minutes=minutes,
            steps=Steps(for_batch=8000, for_width=4000, for_patch=1000),
            multiply_adds_per_second=1e10,
        ),
    ):
        each: Plan | None = plan
        while each is not None:
            median = median_shape(numbers.spacings, numbers.shapes, each.spacing)
            across = ("sagittal", "coronal", "axial").index(plan.slices)
            seen = [n for axis, n in enumerate(median) if spatial_dims == 3 or axis != across]
            # Shapes at low resolution are those of the median, which is not the median of shapes.
            slack = 0 if each is plan else 2
            assert_network_can_be_built(each, tuple(n + slack for n in seen))
            needed = each.batch_size * 3 * cost_of_patch(each, numbers) * 1000
            if "time" in each.reasons and "nothing smaller" not in each.reasons["time"]:
                assert needed <= minutes * 60 * 1e10 * (1 + 1e-9)
            each = each.low_resolution


@given(sized_cases, st.sampled_from([2, 3]), st.lists(st.floats(0.01, 16), min_size=2, max_size=2))
@settings(max_examples=20)
def test_more_memory_never_makes_less_of_a_patch(
    cases: list[tuple[Triple, tuple[int, int, int]]], spatial_dims: int, gigabytes: list[float]
) -> None:
    numbers = scans(cases)
    small, large = (
        memory_of_patch(plan_for_memory(numbers, spatial_dims=spatial_dims, gigabytes=g), numbers)
        for g in sorted(gigabytes)
    )
    assert small <= large


@given(sized_cases, st.sampled_from([2, 3]), st.lists(st.floats(-1, 4), min_size=2, max_size=2))
@settings(max_examples=15)
def test_more_time_never_makes_less_of_a_step(
    cases: list[tuple[Triple, tuple[int, int, int]]], spatial_dims: int, magnitudes: list[float]
) -> None:
    numbers = scans(cases)
    costs = []
    for magnitude in sorted(magnitudes):
        plan = plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            minutes=10**magnitude,
            steps=Steps(for_batch=8000, for_width=4000, for_patch=1000),
            multiply_adds_per_second=1e10,
        )
        costs.append(plan.batch_size * cost_of_patch(plan, numbers))
    assert costs[0] <= costs[1]


@pytest.mark.parametrize("numbers", [HIPPOCAMPUS, PROSTATE, ISOTROPIC])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_value_has_a_reason_of_one_line(numbers: Numbers, spatial_dims: int) -> None:
    plan = plan_for_memory(numbers, spatial_dims=spatial_dims)
    values = set(Plan.__dataclass_fields__) - {"spatial_dims", "reasons"}
    assert set(plan.reasons) == values
    assert all(reason.endswith(".") and "\n" not in reason for reason in plan.reasons.values())


def test_planning_needs_no_torch() -> None:
    code = "import segkit.planning.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
