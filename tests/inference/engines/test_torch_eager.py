"""PyTorch as it is: precision, and what a GPU gives."""

import pytest
import torch

from segkit.inference.engines.choose import choose_engine
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.nn.network import unet_of
from tests.engines import CPU, keys_of, windows_of
from tests.models import model_of


def test_logits_that_overflow_float16_are_computed_again_in_float32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = model_of({}, 3), windows_of(3)
    with torch.no_grad():
        unet_of(model.network).heads[0].weight.mul_(1e6)
    exact = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    engine = TorchEngine(model.network, device=CPU, precision=torch.float16)
    for _ in range(2):
        assert torch.equal(engine(batch, ())[LOGITS], exact)
    assert caplog.text.count("overflow float16") == 1


def test_bfloat16_comes_back_as_float32() -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    outputs = TorchEngine(model.network, device=CPU, precision=torch.bfloat16)(
        batch, keys_of(model)
    )
    assert {output.dtype for output in outputs.values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_the_same_outputs_as_the_cpu(precision: torch.dtype) -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    keys = keys_of(model)
    expected = TorchEngine(model_of({"skip": "additive_grid"}, 3).network, device=CPU)(batch, keys)
    # Otherwise cuDNN rounds what it multiplies to ten bits, in float32 too.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = choose_engine("auto", model, device="cuda", precision=precision)(batch, keys)
    for key, values in expected.items():
        assert found[key].device.type == "cuda"
        tolerance = 1e-3 if precision == torch.float32 else 0.1 * values.std()
        assert (found[key].cpu() - values).abs().mean() < tolerance
