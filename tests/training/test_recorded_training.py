"""Training by recorded steps, with CUDA graphs played on the CPU; tests/test_gpu.py has a GPU."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import segkit
from segkit.system.graphed_step import GraphedStep, LossesOfBatch, record_step
from segkit.training import module
from tests.played_cuda import played_cuda
from tests.small import small_config, small_dataset

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Graph:
    """Writes the gradients of a batch where the recording had them, whatever the weights hold."""

    def __init__(self) -> None:
        self.step: GraphedStep | None = None
        self.losses: LossesOfBatch | None = None
        self.clip: float | None = None
        self.replays = 0

    def replay(self) -> None:
        if self.step is None or self.losses is None:
            return  # what is recorded has run already
        self.replays += 1
        values = self.losses(self.step.image, self.step.label)
        found = torch.autograd.grad(values[0], self.step.parameters)
        kept = [each for each in self.step.gradients if each is not None]
        for place, gradient in zip(kept, found, strict=True):
            place.copy_(gradient)
        if self.clip is not None:
            norm = torch.stack([gradient.norm() for gradient in kept]).norm()
            for place in kept:
                place.mul_((self.clip / (norm + 1e-6)).clamp(max=1))
        for place, value in zip(self.step.values, values, strict=True):
            place.copy_(value.detach())


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Graph]]:
    """The graphs of all recorded steps, which the CPU plays."""
    made: list[Graph] = []

    def played(
        network: nn.Module,
        losses: LossesOfBatch,
        image: Tensor,
        label: Tensor,
        clip: float | None = None,
    ) -> GraphedStep | None:
        step = record_step(network, losses, image, label, clip)
        assert step is not None
        graph: Any = step.graph
        graph.step, graph.losses, graph.clip = step, losses, clip
        made.append(graph)
        return step

    monkeypatch.setattr(module, "RECORDED_DEVICE", "cpu")
    monkeypatch.setattr(module, "record_step", played)
    with played_cuda(Graph):
        yield made


@pytest.mark.parametrize(
    ("optimiser", "averaging"),
    [
        ("adamw", 0.9),
        ("muon", None),
        pytest.param("adamw", None, marks=pytest.mark.slow),
        pytest.param("muon", 0.9, marks=pytest.mark.slow),
        pytest.param("sgd", None, marks=pytest.mark.slow),
        pytest.param("sgd", 0.9, marks=pytest.mark.slow),
    ],
)
def test_recorded_steps_train_as_steps_do_also_after_a_validation(
    optimiser: str, averaging: float | None, graphs: list[Graph], tmp_path: Path
) -> None:
    data = small_dataset(tmp_path / "data")
    train = {
        "optimiser": optimiser,
        "learning_rate": 1e-2,
        "steps": 6,
        "validate_every": 2,
        "averaging": averaging,
        "gradient_clip": 0.5,
    }
    config = small_config(data, train=train)
    weights = []
    for name in ("recorded", "run"):
        with pytest.MonkeyPatch.context() as patch:
            if name == "run":
                patch.setattr(module, "RECORDED_DEVICE", "cuda")
            run = segkit.train(config, runs=tmp_path / name)
        # Not the best weights: rounding could decide between two of the same score.
        state = torch.load(run.folder / "last.ckpt", weights_only=True)["state_dict"]
        weights.append({key: values for key, values in state.items() if "network" in key})
    (graph,) = graphs
    assert graph.replays == 6
    compared = [key for key in weights[1] if not is_cancelled(key, weights[1])]
    assert len(compared) > len(weights[1]) / 2
    for key in compared:
        found, expected = weights[0][key], weights[1][key]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=key)


def is_cancelled(key: str, weights: Mapping[str, Tensor]) -> bool:
    """Whether a weight is the bias of a convolution before a normalisation, which subtracts it.

    Its gradient is 0 but for rounding, which AdamW enlarges: it divides gradients by their size.
    """
    layer, _, kind = key.rpartition(".")
    block, _, number = layer.rpartition(".")
    after = weights.get(f"{block}.{int(number) + 1}.weight") if number.isdigit() else None
    return (
        kind == "bias"
        and weights[f"{layer}.weight"].ndim > 1
        and after is not None
        and after.ndim == 1
    )
