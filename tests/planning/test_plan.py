import math
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import assume, given, settings
from numpy.testing import assert_allclose

from segkit.data.single_slices import flat_axes
from segkit.errors import DatasetError
from segkit.planning.budget_fit import Steps
from segkit.planning.nnunet_rules import (
    Intensities,
    Lengths,
    Numbers,
    activations,
    median_shape,
    widths,
)
from segkit.planning.plan import (
    Plan,
    coarse_plan_for_time,
    flat_axis,
    plan_for_memory,
    plan_for_time,
)
from segkit.planning.planning_task import PLANNED_STEPS

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


def cost_of_step(plan: Plan, numbers: Numbers) -> int:
    """Multiply-adds of a training step on a CPU, with Muon unless it takes most of the time."""
    work = plan.step_work(len(numbers.channels), numbers.num_classes)
    return work.network + (work.orthogonal if work.orthogonal <= 1.5 * work.network else 0)


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
    assert "takes the 10th percentile, 5 mm" in plan.reasons["spacing"]
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


def test_more_memory_gives_a_larger_patch_and_batch_until_the_dataset_limits_them() -> None:
    small, roomy = (plan_for_memory(ISOTROPIC, spatial_dims=3, gigabytes=n) for n in (8.0, 80.0))
    assert math.prod(roomy.patch_size) > 4 * math.prod(small.patch_size)
    flat, large = (plan_for_memory(ISOTROPIC, spatial_dims=2, gigabytes=n) for n in (8.0, 80.0))
    assert large.patch_size == flat.patch_size and large.batch_size > 8 * flat.batch_size
    # A patch holds a whole hippocampus, and a batch 5 % of all, whatever the memory.
    same = [plan_for_memory(HIPPOCAMPUS, spatial_dims=3, gigabytes=n) for n in (8.0, 80.0)]
    assert same[0].patch_size == same[1].patch_size and same[0].batch_size == same[1].batch_size
    assert "at most 5 % of the dataset's voxels (" in same[1].reasons["batch_size"]


def test_low_resolution_that_saves_less_than_half_is_dropped() -> None:
    # 128³ are 24.7 % of 204³, and one step of 3 % is enough.
    plan = plan_for_memory(alike((204, 204, 204), (1.0, 1.0, 1.0), 100), spatial_dims=3)
    assert plan.patch_size == (128, 128, 128)
    assert plan.low_resolution is None and not plan.batch_dice
    assert "save less than half" in plan.reasons["low_resolution"]


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


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (9.0, 1.0, 1.0), (0.1, 1.0, 1.0)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_the_spacing_of_an_axis_of_one_voxel_is_ignored(axis: int, spacing: Triple) -> None:
    x, y, z = (1 if each == axis else 96 for each in range(3))
    planes = alike((x, y, z), spacing, 20)
    plan = plan_for_memory(planes, spatial_dims=2)
    assert plan.slices == ("sagittal", "coronal", "axial")[axis]
    assert plan.patch_size == (96, 96)
    assert "one voxel along" in plan.reasons["slices"]
    with pytest.raises(DatasetError, match=f"one voxel along {'xyz'[axis]} in every case"):
        plan_for_memory(planes, spatial_dims=3)


def test_the_spacing_along_an_axis_of_one_voxel_is_not_compared() -> None:
    picture = alike((512, 512, 1), (4e-6, 4e-6, 1.0), 24)
    told = plan_for_memory(picture, spatial_dims=2).reasons["separate_z"]
    assert told.startswith("The coarsest spacing is 1 times the finest in the median case, and 1 ")


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_plan_of_slices_is_the_same_for_any_thickness(axis: int) -> None:
    def planned(thicknesses: Sequence[float]) -> Plan:
        spacings = [tuple(np.insert([1.0, 1.5], axis, each).tolist()) for each in thicknesses]
        slices = alike(shape, (1.0, 1.0, 1.0), 4)
        return plan_for_memory(replace(slices, spacings=tuple(spacings)), spatial_dims=2)

    x, y, z = np.insert([40, 36], axis, 1).tolist()
    shape = (x, y, z)
    plan = planned([2.5, 5.0, 10.0, 20.0])
    assert plan.spacing == tuple(np.insert([1.0, 1.5], axis, 7.5).tolist())
    for thicknesses in ([0.1] * 4, [100.0] * 4):
        other = planned(thicknesses)
        assert not other.separate_z and other.patch_size == plan.patch_size
        assert np.delete(other.spacing, axis).tolist() == [1.0, 1.5]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_slices_in_different_planes_are_refused(spatial_dims: int) -> None:
    # Oblique slices, of which some headers are nearer to z and others to y; and one volume.
    shapes = ((40, 36, 1),) * 3 + ((40, 1, 36),) * 2 + ((40, 36, 30),)
    slices = replace(alike((40, 36, 1), (1.4, 1.4, 8.0), 6), shapes=shapes)
    told = "found one voxel in 2 cases along y, 3 cases along z .*; rewrite the headers"
    with pytest.raises(DatasetError, match=told):
        plan_for_memory(slices, spatial_dims=spatial_dims)
    with pytest.raises(DatasetError, match=told):
        flat_axis(slices)


def test_a_median_image_of_one_voxel_along_an_axis_is_planned_in_slices() -> None:
    mostly = replace(
        alike((40, 40, 1), (1.0, 1.0, 1.0), 5), shapes=((40, 40, 1),) * 4 + ((40, 40, 2),)
    )
    assert flat_axis(mostly) == 2
    plan = plan_for_memory(mostly, spatial_dims=2)
    assert plan.slices == "axial" and plan.patch_size == (40, 40)
    assert plan.reasons["slices"] == "Slices, because there is a median of 1 voxel along z."
    with pytest.raises(DatasetError, match="found a median of 1 voxel along z; plan for 2"):
        plan_for_memory(mostly, spatial_dims=3)
    assert flat_axis(alike((40, 40, 2), (1.0, 1.0, 1.0), 5)) is None


def test_volumes_of_zeros_but_for_one_slice_are_told_as_such() -> None:
    empty = replace(alike((30, 28, 1), (1.0, 1.0, 1.0), 4), box_shares=(0.2,) * 4)
    told = "one voxel along z in every case, not counting zeros around the body"
    assert told in plan_for_memory(empty, spatial_dims=2).reasons["slices"]
    with pytest.raises(DatasetError, match=told):
        plan_for_memory(empty, spatial_dims=3)


def test_no_stage_is_so_coarse_that_a_patch_has_one_voxel_along_an_axis() -> None:
    plan = plan_for_memory(alike((4000, 3, 3), (1.0, 1.0, 1.0), 20), spatial_dims=3)
    assert plan.low_resolution is None and min(plan.patch_size) > 1
    assert "a coarser grid would have one voxel along y" in plan.reasons["low_resolution"]


def test_lines_are_refused() -> None:
    with pytest.raises(DatasetError, match="one voxel along x and z"):
        plan_for_memory(alike((1, 96, 1), (1.0, 1.0, 1.0), 20), spatial_dims=2)


# Time


def test_the_patch_that_memory_allows_decides_the_number_of_stages() -> None:
    def planned(numbers: Numbers) -> Plan:
        return plan_for_time(
            numbers,
            spatial_dims=3,
            minutes=1.0,
            steps=PLANNED_STEPS,
            multiply_adds_per_second=1e10,
        )

    brain = alike((140, 170, 140), (1.0, 1.0, 1.0), 25)
    plan = planned(brain)
    assert math.prod(plan.patch_size) < 0.25 * 140 * 170 * 140
    assert plan.low_resolution is None and not plan.batch_dice
    assert "There is one stage, so Dice is computed for each patch" in plan.reasons["batch_dice"]
    large = planned(ISOTROPIC)
    low = plan_for_memory(ISOTROPIC, spatial_dims=3).low_resolution
    assert large.low_resolution is not None and low is not None
    assert large.low_resolution.spacing == low.spacing


def test_on_the_coarser_grid_the_patch_holds_a_quarter_of_an_image() -> None:
    brain = alike((140, 170, 140), (1.0, 1.0, 1.0), 25)
    steps = PLANNED_STEPS
    plan = coarse_plan_for_time(brain, minutes=5.0, steps=steps, multiply_adds_per_second=1e10)
    assert plan is not None and plan.low_resolution is None
    held = math.prod(plan.patch_size) * math.prod(plan.spacing)
    assert held >= 0.25 * 140 * 170 * 140 and min(plan.spacing) > 1.2
    long = coarse_plan_for_time(brain, minutes=1e9, steps=steps, multiply_adds_per_second=1e10)
    assert long is None


def test_unlimited_time_gives_the_plan_for_memory() -> None:
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
    """The hippocampus' plan for 3,200 steps of so many billion multiply-adds."""
    return plan_for_time(
        HIPPOCAMPUS,
        spatial_dims=3,
        minutes=10.0,
        steps=Steps(for_batch=3200, per_channel=100, for_patch=800),
        multiply_adds_per_second=billions * 1e9 * 3200 / 600,
    )


def test_a_plan_that_takes_too_long_gets_a_smaller_batch_then_width_then_patch() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)

    def step(start: int, batch: int = 2) -> float:
        """Billions in a step."""
        channels = widths(4, spatial_dims=3, start=start)
        plan = replace(whole, channels=channels, batch_size=batch)
        return cost_of_step(plan, HIPPOCAMPUS) / 1e9

    plan = in_time(step(32, batch=9) * 0.999)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (32, 8, (40, 56, 40))
    assert "Reduced from 9 to 8" in plan.reasons["batch_size"]
    plan = in_time(step(32) * 1.001)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (32, 2, (40, 56, 40))
    plan = in_time(step(32) * 0.999)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (16, 2, (40, 56, 40))
    assert "Reduced from 32 to 16" in plan.reasons["channels"]
    # The narrowest network needs only a quarter of these steps.
    plan = in_time(step(8) * 1.001 / 4)
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (8, 2, (40, 56, 40))
    plan = in_time(step(8) * 0.999 / 4)
    # x is 40 / 35 of the median image, more than y and z.
    assert (plan.channels[0], plan.batch_size, plan.patch_size) == (8, 2, (32, 56, 40))
    assert "Reduced from 40x56x40 to 32x56x40" in plan.reasons["patch_size"]


def test_a_batch_grows_only_if_there_is_time_for_enough_steps() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)

    def planned(steps: float, batch: int) -> Plan:
        """The plan where so many steps of such a batch fit into the time."""
        step = cost_of_step(replace(whole, batch_size=batch), HIPPOCAMPUS)
        return plan_for_time(
            HIPPOCAMPUS,
            spatial_dims=3,
            minutes=1.0,
            steps=Steps(for_batch=320, per_channel=1, for_patch=8),
            multiply_adds_per_second=steps * step / 60,
        )

    for steps, of, batch in [(33, 2, 2), (319, 3, 2), (321, 3, 3), (319, 9, 8), (321, 9, 9)]:
        plan = planned(steps, of)
        assert (plan.batch_size, plan.channels) == (batch, whole.channels)
    assert planned(1e6, 9).batch_size == 9
    assert planned(31, 2).channels[0] == 16


def test_the_width_is_reduced_before_the_patch() -> None:
    whole = plan_for_memory(HIPPOCAMPUS, spatial_dims=3)

    def of(start: int) -> int:
        """Multiply-adds of the least batch, so wide."""
        channels = widths(4, spatial_dims=3, start=start)
        return cost_of_step(replace(whole, channels=channels, batch_size=2), HIPPOCAMPUS)

    def planned(total: float, per_channel: int = 20) -> tuple[int, tuple[int, ...]]:
        plan = plan_for_time(
            HIPPOCAMPUS,
            spatial_dims=3,
            minutes=1.0,
            steps=Steps(for_batch=1000, per_channel=per_channel, for_patch=100),
            multiply_adds_per_second=total / 60,
        )
        assert "more than the time allows" not in plan.reasons["time"]
        return plan.channels[0], plan.patch_size

    size = (40, 56, 40)
    assert planned(641 * of(32)) == (32, size)
    assert planned(639 * of(32)) == (16, size)
    assert planned(321 * of(16)) == (16, size)
    assert planned(319 * of(16)) == planned(101 * of(8)) == (8, size)
    assert planned(99 * of(8)) == (8, (32, 56, 40))
    # If a wide network needs fewer steps than a patch does, the patch stays as it is.
    assert planned(81 * of(16), per_channel=5) == (16, size)
    assert planned(79 * of(16), per_channel=5) == (8, size)


def test_the_time_of_muon_counts_on_a_cpu() -> None:
    """Deep 2D networks: their coarse levels have many channels and few pixels."""
    slices = alike((512, 512, 1), (1.0, 1.0, 1.0), 24)
    width = 16
    channels = widths(8, spatial_dims=2, start=width)
    plan = replace(plan_for_memory(slices, spatial_dims=2), channels=channels, batch_size=2)
    work = plan.step_work(1, slices.num_classes)
    assert 0.5 < work.orthogonal / work.network < 0.65

    def planned_width(total: float, muon_cost: float | None) -> int:
        """The width if there are so many multiply-adds for 1,024 steps with 16 channels."""
        return plan_for_time(
            slices,
            spatial_dims=2,
            minutes=1.0,
            steps=Steps(for_batch=100_000, per_channel=64, for_patch=1),
            multiply_adds_per_second=total * 1024 / 60,
            muon_cost=muon_cost,
        ).channels[0]

    for cost in (1.0, 1.5):
        whole = work.network + cost * work.orthogonal
        assert planned_width(1.001 * whole, cost) == width
        assert planned_width(0.999 * whole, cost) == 8
    assert planned_width(1.001 * work.network, None) == width
    assert planned_width(0.999 * work.network, None) == 8


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_if_time_is_short_a_patch_of_a_tube_is_made_shorter_before_it_is_made_narrower(
    axis: int,
) -> None:
    shape = [40, 40, 40]
    shape[axis] = 1000
    tube = alike((shape[0], shape[1], shape[2]), (1.0, 1.0, 1.0), 20)
    sizes = set()
    for minutes in np.geomspace(0.1, 100, 30).tolist():
        plan = plan_for_time(
            tube,
            spatial_dims=3,
            minutes=minutes,
            steps=PLANNED_STEPS,
            multiply_adds_per_second=2e10,
        )
        length = plan.patch_size[axis]
        others = [size for each, size in enumerate(plan.patch_size) if each != axis]
        sizes.add((length, *others))
        # 16 voxels may come from padding to a multiple of the strides.
        assert length <= 2 * max(others) + 16 or others == [40, 40]
    assert len(sizes) > 6 and (256, 40, 40) in sizes and (128, 40, 40) in sizes


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((1000, 40, 40), "1000x40x40, cut to 256x40x40, padded to multiples of 32x8x8: with"),
        ((3, 4, 5), "3x4x5, padded to multiples of 2x2x2, raised to a size that a network"),
        ((35, 50, 36), "35x50x36, padded to multiples of 8x8x8: with 32 channels, 2 patches"),
    ],
)
def test_the_reason_for_a_patch_leads_from_the_median_image_to_it(
    shape: tuple[int, int, int], told: str
) -> None:
    plan = plan_for_memory(alike(shape, (1.0, 1.0, 1.0), 20), spatial_dims=3)
    assert told in plan.reasons["patch_size"]


def test_a_batch_that_was_chosen_for_a_larger_patch_names_this_patch() -> None:
    few = alike((1, 128, 128), (5.0, 0.5, 0.5), 5)
    plan = plan_for_time(
        few,
        spatial_dims=2,
        minutes=1.0,
        steps=Steps(for_batch=1000, per_channel=12, for_patch=100),
        multiply_adds_per_second=1e7,
    )
    assert plan.patch_size < (128, 128) and plan.batch_size == 2
    assert plan.reasons["batch_size"].startswith("For patches of 128x128: 8 GB hold")


def test_the_smallest_plan_of_all_says_that_it_takes_longer() -> None:
    plan = in_time(1e-6)
    assert (plan.channels[0], plan.batch_size) == (8, 2)
    assert len(plan.strides) == 1
    assert "there is no smaller plan" in plan.reasons["time"]


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


def is_a_task(numbers: Numbers, spatial_dims: int) -> bool:
    """Whether cases are volumes, or for 2 dimensions planes, and most single slices share one."""
    slices = [shape for shape in numbers.shapes if 1 in shape]
    if 2 * len(slices) > len(numbers.shapes) and not flat_axes(slices):
        return False
    return len(flat_axes(numbers.shapes)) <= 3 - spatial_dims


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
    assume(is_a_task(numbers, spatial_dims))
    for plan in (
        plan_for_memory(numbers, spatial_dims=spatial_dims, gigabytes=gigabytes),
        plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            gigabytes=gigabytes,
            minutes=minutes,
            steps=Steps(for_batch=8000, per_channel=125, for_patch=1000),
            multiply_adds_per_second=1e10,
        ),
    ):
        each: Plan | None = plan
        while each is not None:
            median = median_shape(numbers.spacings, numbers.shapes, each.spacing)
            across = ("sagittal", "coronal", "axial").index(plan.slices)
            seen = [n for axis, n in enumerate(median) if spatial_dims == 3 or axis != across]
            assert spatial_dims == 3 or min(each.patch_size) > 1
            # Shapes at low resolution are those of the median, which is not the median of shapes.
            slack = 0 if each is plan else 2
            assert_network_can_be_built(each, tuple(n + slack for n in seen))
            needed = cost_of_step(each, numbers) * 1000
            if "time" in each.reasons and "no smaller plan" not in each.reasons["time"]:
                assert needed <= minutes * 60 * 1e10 * (1 + 1e-9)
            each = each.low_resolution


@given(sized_cases, st.sampled_from([2, 3]), st.lists(st.floats(0.01, 16), min_size=2, max_size=2))
@settings(max_examples=20)
def test_more_memory_never_makes_less_of_a_patch(
    cases: list[tuple[Triple, tuple[int, int, int]]], spatial_dims: int, gigabytes: list[float]
) -> None:
    numbers = scans(cases)
    assume(is_a_task(numbers, spatial_dims))
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
    assume(is_a_task(numbers, spatial_dims))
    costs = []
    for magnitude in sorted(magnitudes):
        plan = plan_for_time(
            numbers,
            spatial_dims=spatial_dims,
            minutes=10**magnitude,
            steps=PLANNED_STEPS,
            multiply_adds_per_second=1e10,
        )
        costs.append(plan.step_work(len(numbers.channels), numbers.num_classes).network)
    assert costs[0] <= costs[1]


@pytest.mark.parametrize("numbers", [HIPPOCAMPUS, PROSTATE, ISOTROPIC])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_every_value_has_a_reason_of_one_line(numbers: Numbers, spatial_dims: int) -> None:
    plan = plan_for_memory(numbers, spatial_dims=spatial_dims)
    values = set(Plan.__dataclass_fields__) - {"spatial_dims", "reasons"}
    assert set(plan.reasons) == values
    assert all(reason.endswith(".") and "\n" not in reason for reason in plan.reasons.values())


@pytest.mark.parametrize(
    ("numbers", "spatial_dims", "told"),
    [
        (alike((64, 64, 1), (1.0, 1.0, 1.0), 9), 2, "A slice may lack a class"),
        (HIPPOCAMPUS, 2, "A slice may lack a class"),
        (HIPPOCAMPUS, 3, "A patch covers enough of an image"),
        (ISOTROPIC, 3, "A patch covers little of an image"),
    ],
)
def test_the_reason_for_the_dice_of_a_batch_is_true_of_the_patch(
    numbers: Numbers, spatial_dims: int, told: str
) -> None:
    assert (
        plan_for_memory(numbers, spatial_dims=spatial_dims).reasons["batch_dice"].startswith(told)
    )


def test_many_patches_are_told_as_a_whole_number() -> None:
    small = plan_for_memory(alike((16, 16, 1), (1.0, 1.0, 1.0), 6), spatial_dims=2)
    assert small.reasons["batch_size"].startswith("8 GB hold 15,384 patches.")


def test_planning_needs_no_torch() -> None:
    code = "import segkit.planning.plan, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
