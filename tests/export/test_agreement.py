"""How far off an export is, is told."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from segkit.export.agreement import compare_outputs, noise_for
from segkit.export.graphs import export_onnx
from segkit.inference.engines.converted import RunGraph
from segkit.inference.engines.torch_eager import LOGITS
from tests.models import model_of

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


def test_outputs_that_differ_are_reported(tmp_path: Path) -> None:
    model = model_of({"skip": "additive_grid"}, 3)
    run = export_onnx(model, tmp_path / "a.onnx")
    assert compare_outputs(model, run, noise_for(model)).holds

    def planted(name: str, error: float) -> RunGraph:
        def off(windows: Tensor, names: tuple[str, ...]) -> list[Tensor]:
            answers = dict(zip(names, run(windows, names), strict=True))
            answers[name] = answers[name] + error
            return list(answers.values())

        return off

    for name, error in (("skip.1/gate", 0.01), (LOGITS, 0.1), ("skip.1/gate", float("nan"))):
        found = compare_outputs(model, planted(name, error), noise_for(model))
        assert not found.holds
        assert found.differences[name] == pytest.approx(error, rel=1e-3, nan_ok=True)
    with torch.no_grad():
        next(model.network.parameters()).add_(0.1)
    assert not compare_outputs(model, run, noise_for(model)).holds
