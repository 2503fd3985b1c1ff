"""ONNX Runtime reads outputs by their place in the file and computes those that are asked for."""

from pathlib import Path

import pytest
import torch

from segkit.inference.engines.converted import Traced
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from tests.engines import CPU, windows_of
from tests.models import model_of


@pytest.mark.parametrize("count", [1, 3])
def test_a_file_with_a_named_batch_runs_any_number_of_windows(count: int, tmp_path: Path) -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3, count)
    traced, runtime = Traced(model.network).eval(), OnnxRuntime()
    runtime.write(traced, windows_of(3, 2), tmp_path / "network.onnx", free={0: "batch"})
    asked = (LOGITS, traced.names[-1])
    found = runtime.read(tmp_path / "network.onnx", traced.names)(batch, asked)
    expected = TorchEngine(model.network, device=CPU)(batch, asked[1:])
    assert len(found) == 2
    for name, values in zip(asked, found, strict=True):
        torch.testing.assert_close(values, expected[name], rtol=1e-4, atol=1e-4)
