"""A recording is kept only if its replay gives the same values as the step itself. CUDA is mocked
here; tests/test_gpu.py uses a real GPU."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from segkit.system.graphed_step import GraphedStep, record_step
from tests.played_cuda import played_cuda


class Graph:
    """What is recorded has run already."""

    factor = 1.0
    network: nn.Module

    def replay(self) -> None:
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(self.factor)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(1, 2, 3), nn.BatchNorm1d(2), nn.Conv1d(2, 1, 1))


@pytest.fixture(autouse=True)
def playing(network: nn.Module) -> Iterator[None]:
    with played_cuda(Graph):
        Graph.network, Graph.factor = network, 1.0
        yield


def recorded(network: nn.Module) -> GraphedStep | None:
    def losses(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return ((network(image) - label).square().mean(),)

    return record_step(network, losses, torch.randn(4, 1, 9), torch.randn(4, 1, 7))


def test_a_step_is_kept_if_its_replay_is_equal_and_buffers_stay_unchanged(
    network: nn.Module,
) -> None:
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    step = recorded(network)
    assert step is not None
    assert step.fits(torch.randn(4, 1, 9), torch.randn(4, 1, 7))
    assert not step.fits(torch.randn(3, 1, 9), torch.randn(3, 1, 7))
    for name, buffer in network.named_buffers():
        assert torch.equal(buffer, before[name])


def test_a_replay_with_other_gradients_is_rejected_and_leaves_no_gradients(
    network: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    Graph.factor = 3.0
    assert recorded(network) is None
    assert "expected loss and gradient norm" in caplog.text
    assert all(parameter.grad is None for parameter in network.parameters())


def test_zero_gradients_keeps_the_tensors_of_the_gradients(
    network: nn.Module,
) -> None:
    step = recorded(network)
    assert step is not None
    places = [parameter.grad for parameter in network.parameters()]
    step.zero_gradients()
    for place, parameter in zip(places, network.parameters(), strict=True):
        assert parameter.grad is place and place is not None and not place.any()
