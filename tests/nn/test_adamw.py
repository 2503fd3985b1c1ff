"""The fused AdamW is PyTorch's, with moments of a checkpoint in any order of memory."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.testing import assert_close

from segkit.nn.adamw import fused_adamw
from segkit.nn.muon import MuonForKernels
from segkit.nn.normalisation import CHANNELS_LAST

Make = Callable[[list[nn.Parameter]], Optimizer]


def weights_of(*, channels_last: bool) -> list[nn.Parameter]:
    """The weights of layers in 3D and 2D, the same values in both orders."""
    torch.manual_seed(0)
    layers = nn.ModuleList(
        [nn.Conv3d(3, 5, 3), nn.Conv2d(4, 6, 3), nn.ConvTranspose3d(5, 4, 2), nn.Conv3d(5, 4, 1)]
    )
    found = list(layers.parameters())
    for weight in found:
        if channels_last and weight.ndim in CHANNELS_LAST:
            weight.data = weight.data.contiguous(memory_format=CHANNELS_LAST[weight.ndim])
    return found


def train(optimiser: Optimizer, weights: list[nn.Parameter], steps: range) -> None:
    """Steps with a gradient that depends on the weights and on the step."""
    for step in steps:
        loss = torch.zeros(())
        for weight in weights:
            wave = torch.arange(weight.numel()).reshape(weight.shape) * (0.1 + step)
            loss = loss + (weight * wave.cos()).sum() + (weight**2).sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


@pytest.mark.parity
@pytest.mark.parametrize("channels_last", [False, True])
def test_steps_are_those_of_pytorchs_loop_over_weights(channels_last: bool) -> None:
    found, expected = weights_of(channels_last=channels_last), weights_of(channels_last=False)
    shared = {"lr": 0.02, "weight_decay": 0.1, "betas": (0.9, 0.99), "eps": 1e-7}
    train(fused_adamw(found, **shared), found, range(4))
    train(AdamW(expected, **shared, foreach=False), expected, range(4))
    for one, other in zip(found, expected, strict=True):
        assert_close(one.detach(), other.detach(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("into_channels_last", [False, True])
@pytest.mark.parametrize(
    "make",
    [
        lambda weights: fused_adamw(weights, lr=0.02, weight_decay=0.1),
        lambda weights: MuonForKernels(weights, lr=0.02, weight_decay=0.1),
    ],
    ids=["adamw", "muon"],
)
def test_a_state_from_weights_in_another_order_goes_on_with_the_same_steps(
    make: Make, into_channels_last: bool
) -> None:
    """A GPU without triton keeps weights in the usual order, and a CPU channels last."""
    whole = weights_of(channels_last=not into_channels_last)
    first = make(whole)
    train(first, whole, range(3))
    state = copy.deepcopy(first.state_dict())
    resumed = weights_of(channels_last=into_channels_last)
    with torch.no_grad():
        for weight, value in zip(resumed, whole, strict=True):
            weight.copy_(value)
    again = make(resumed)
    again.load_state_dict(state)
    kept: list[tuple[nn.Parameter, Tensor]] = [
        (weight, value)
        for weight, values in again.state.items()
        for value in values.values()
        if value.shape == weight.shape
    ]
    assert len(kept) >= len(resumed)
    assert all(value.stride() == weight.stride() for weight, value in kept)
    train(first, whole, range(3, 6))
    train(again, resumed, range(3, 6))
    for one, other in zip(whole, resumed, strict=True):
        assert_close(one.detach(), other.detach(), rtol=0, atol=1e-5)


def test_the_step_of_a_weight_that_is_one_number_stays_a_count() -> None:
    weight = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    optimiser = fused_adamw([weight], lr=0.1)
    train(optimiser, [weight], range(2))
    optimiser.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    step = optimiser.state[weight]["step"]
    assert step.dtype == torch.float32 and float(step) == 2


def part_of_a_larger_tensor() -> nn.Parameter:
    whole = torch.arange(24.0).reshape(2, 3, 2, 2)
    return nn.Parameter(whole[:, :1])


@pytest.mark.parametrize("make", [fused_adamw, lambda held, **s: MuonForKernels(held, **s)])
def test_a_weight_that_is_part_of_a_larger_tensor_is_updated_alone(
    make: Callable[..., Optimizer],
) -> None:
    """PyTorch's kernel would write to the elements between."""
    found, expected = part_of_a_larger_tensor(), part_of_a_larger_tensor()
    if make is not fused_adamw:  # not a kernel of Muon: one voxel
        found, expected = (nn.Parameter(each[:, :, :1, 0].detach()) for each in (found, expected))
    assert not found.is_contiguous() and found.untyped_storage().nbytes() == 24 * 4
    train(make([found], lr=0.02, weight_decay=0.1), [found], range(4))
    train(AdamW([expected], lr=0.02, weight_decay=0.1, foreach=False), [expected], range(4))
    assert_close(found.detach(), expected.detach(), rtol=0, atol=1e-6)
    storage = torch.empty(0).set_(found.untyped_storage())
    assert torch.equal(storage[4:12], torch.arange(4.0, 12.0))


def test_complex_weights_are_updated_by_pytorchs_loop() -> None:
    found, expected = (nn.Parameter(torch.tensor([1 + 2j, 3 - 1j])) for _ in range(2))
    for weight, make in [(found, fused_adamw), (expected, AdamW)]:
        optimiser = make([weight], lr=0.1)
        for _ in range(3):
            optimiser.zero_grad()
            (weight.abs() ** 2).sum().backward()
            optimiser.step()
    assert_close(found.detach(), expected.detach())


def test_a_weight_whose_elements_share_memory_is_refused_as_by_pytorch() -> None:
    weight = nn.Parameter(torch.ones(2, 1).expand(2, 4))
    weight.grad = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="single memory location"):
        fused_adamw([weight], lr=0.1).step()
