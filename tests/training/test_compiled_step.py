"""A compiled step keeps losses and names of weights; with `auto` it is kept only if it pays."""

import logging
from pathlib import Path
from typing import Any

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from segkit.config.load import load_config
from segkit.model.folder import load_model
from segkit.training import compiled_step
from segkit.training.compiled_step import GAIN, MEASURED, WARM_UP, WORTH_IT, CompiledStep
from segkit.training.fit import train
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_module import batches, module_of, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph is captured as always, and run by PyTorch itself; shapes are not checked in it."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    monkeypatch.setattr(compiled_step, "BACKEND", "eager")


def test_a_compiled_step_gives_the_same_loss_and_gradients() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)

    def losses(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return ((layer(image).square().sum(-1) - label).square().mean(),)

    image, label = torch.randn(4, 3), torch.randn(4)
    found = []
    for wanted in (False, True):
        layer.zero_grad()
        (loss,) = CompiledStep(losses, wanted)(image, label)
        loss.backward()
        assert layer.weight.grad is not None
        found.append((loss.detach(), layer.weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1])


def test_a_module_trains_the_same_weights_under_the_same_names() -> None:
    weights = []
    for compiled in (False, True):
        module = module_of(compiled=compiled)
        trainer_of(3).fit(module, batches(3))
        assert (module.compiled.compiled is not None) == compiled
        weights.append(module.state_dict())
    assert list(weights[0]) == list(weights[1])
    assert not any("_orig_mod" in name for name in weights[1])
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)


class Simulated:
    """A training of steps that take a time of their own, compiled or not."""

    def __init__(self, plain: float, compiled: float) -> None:
        self.now, self.seconds = 0.0, {False: plain, True: compiled}
        self.step = CompiledStep(lambda image, label: (image,), "auto", clock=lambda: self.now)
        self.ways: list[bool] = []

    def run(self, left: float) -> list[bool]:
        """Whether each of the first steps was compiled."""
        for _ in range(3 * (WARM_UP + MEASURED)):
            self.step.begin(lambda per_batch: left, CPU)
            self.ways.append(self.step.active)
            first = self.step.active and self.ways.count(True) == 1
            self.now += self.seconds[self.step.active] + (60 if first else 0)  # it compiles
        return self.ways


@pytest.mark.parametrize(
    ("compiled", "left", "tried", "kept", "told"),
    [
        (0.5, WORTH_IT, True, True, "500 ms compiled and 1e+03 ms uncompiled; it stays compiled"),
        (1.1 * GAIN, WORTH_IT, True, False, "it is no longer compiled"),
        (0.5, WORTH_IT - 1, False, False, "not compiled, because only 599 s of training"),
    ],
)
def test_auto_keeps_the_faster_way_if_there_is_time_to_find_out(
    compiled: float,
    left: float,
    tried: bool,
    kept: bool,
    told: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO):
        ways = Simulated(1.0, compiled).run(left)
    once = WARM_UP + MEASURED
    assert not any(ways[:once])
    assert any(ways) == tried and ways[-1] == kept
    assert ways.count(True) == {(True, True): 2 * once, (True, False): once}.get((tried, kept), 0)
    assert told in caplog.text


def test_a_step_that_cannot_be_compiled_runs_as_usual(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Any:
        raise RuntimeError("there is no compiler")

    monkeypatch.setattr(compiled_step, "BACKEND", broken)
    step = CompiledStep(lambda image, label: (image.sum() + label.sum(),), True)
    for _ in range(2):
        assert float(step(torch.ones(2), torch.ones(3))[0]) == 5.0
    (told,) = (each.message for each in caplog.records if each.name == compiled_step.__name__)
    assert "cannot compile this step, so it runs uncompiled" in told
    assert "there is no compiler" in told


@pytest.mark.slow
def test_a_compiled_run_is_resumed_and_predicts_as_any_other(tmp_path: Path) -> None:
    config = small_config(small_dataset(tmp_path / "data"), trainer={"compile": True})
    run = train(config, runs=tmp_path)
    assert load_config(run.folder / "config.yaml").trainer.compile is True
    load_model(run.folder / "model")
    for name in ("last.ckpt", "best.ckpt"):
        content = torch.load(run.folder / name, weights_only=True)
        assert not any("_orig_mod" in key for key in content["state_dict"])
    done = resume(run.folder, overrides=["train.steps=6", "trainer.compile=false"])
    assert done.summary["steps"] == 6
