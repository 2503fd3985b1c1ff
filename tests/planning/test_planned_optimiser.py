"""A plan has Muon on a CPU, unless making its steps orthogonal takes longer than the network."""

from dataclasses import replace

import pytest

from segkit.nn.muon import is_kernel
from segkit.nn.unet import UNet
from segkit.planning.nnunet_rules import Numbers
from segkit.planning.plan import Plan, plan_for_memory
from segkit.planning.planned_optimiser import planned_optimiser, planned_work
from segkit.planning.step_work import StepWork


def pictures(edge: int) -> Plan:
    """nnU-Net's plan for square pictures."""
    size = (edge, edge, 1)
    numbers = Numbers(
        spacings=((1.0, 1.0, 1.0),) * 24,
        shapes=(size,) * 24,
        box_shares=(1.0,) * 24,
        channels=("EM",),
        intensities=(None,),
        num_classes=2,
    )
    return plan_for_memory(numbers, spatial_dims=2)


def chosen(plan: Plan, *, own_schedule: bool = False, cost: float | None = 1.0) -> tuple[str, str]:
    work = plan.step_work(in_channels=1, num_classes=2)
    return planned_optimiser(work, own_schedule=own_schedule, muon_cost=cost)


@pytest.mark.parametrize("edge", [48, 192])
def test_the_arithmetic_of_muon_is_that_of_the_networks_kernels(edge: int) -> None:
    plan = pictures(edge)
    strides, kernels = plan.strides, plan.kernels
    network = UNet(2, 1, out_channels=2, channels=plan.channels, strides=strides, kernels=kernels)
    total = 0
    for weight in network.parameters():
        if is_kernel(weight):
            short, long = sorted(weight.flatten(1).shape)
            total += 2 * short**2 * long + 17 * short**3
    assert plan.step_work(in_channels=1, num_classes=2).orthogonal == total


def test_a_deep_network_with_small_batches_trains_with_adamw() -> None:
    deep = replace(pictures(512), channels=(8, 16, 32, 64, 128, 256, 512, 512), batch_size=2)
    name, why = chosen(deep)
    assert name == "adamw"
    assert why.endswith("its own arithmetic takes 1.3 times as long as the network's.")
    # With more patches, or fewer channels, the network takes most of the time.
    assert chosen(replace(deep, batch_size=4))[0] == "muon"
    assert chosen(replace(deep, channels=(8, 16, 32, 64, 128, 128, 128, 128)))[0] == "muon"


def test_muon_takes_a_larger_share_of_a_step_in_half_precision() -> None:
    work = StepWork(forward=10, network=90, orthogonal=70)
    single, _ = planned_optimiser(work, own_schedule=False, muon_cost=1.0)
    half, why = planned_optimiser(work, own_schedule=False, muon_cost=1.8)
    assert (single, half) == ("muon", "adamw") and "takes 1.4 times as long" in why
    assert planned_work(work, muon_cost=1.0) == 160
    assert planned_work(work, muon_cost=1.8) == planned_work(work, muon_cost=None) == 90
    assert planned_work(work._replace(orthogonal=20), muon_cost=1.8) == 126


def test_other_devices_and_nnunets_schedule_do_not_ask() -> None:
    plan = pictures(512)
    assert chosen(plan, cost=None)[0] == "adamw"
    assert chosen(plan, own_schedule=True) == ("sgd", "")
