"""PyTorch as it is: precision, and what a GPU gives."""

import pytest
import torch

from segkit.inference.engines.choose import choose_engine
from segkit.inference.engines.torch_eager import TorchEngine, windows_at_once
from segkit.nn.network import unet_of
from tests.engines import CPU, keys_of, windows_of
from tests.models import model_of


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


@pytest.mark.parametrize(
    ("spatial_dims", "size", "at_once"),
    [
        (3, (16, 16, 16), 2),  # 6 channels at the finest level: 6 x 16 x 16 is small
        (3, (64, 52, 4), 2),  # 19,968
        (3, (64, 56, 4), 1),  # 21,504
        (2, (16, 16, 1), 1),
    ],
)
def test_a_small_window_alone_is_computed_as_two(
    spatial_dims: int, size: tuple[int, int, int], at_once: int
) -> None:
    """PyTorch convolves one small sample more slowly than two. The outputs are the same."""
    model = model_of({"skip": "additive_grid"}, spatial_dims)
    keys = [*keys_of(model)]
    first = unet_of(model.network).encoder[0]
    seen: list[int] = []
    first.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    pair = torch.randn(2, 2, *size, generator=torch.Generator().manual_seed(0))
    engine = TorchEngine(model.network, device=CPU)
    together = {key: output.clone() for key, output in engine(pair, keys).items()}
    alone = engine(pair[1:], keys)
    assert seen == [2, at_once]
    assert windows_at_once(model.network, CPU, size) == at_once
    assert windows_at_once(model.network, torch.device("cuda"), size) == 4
    assert windows_at_once(model.network, CPU, size, torch.bfloat16) == 1
    assert alone.keys() == together.keys()
    for key, output in alone.items():
        torch.testing.assert_close(output, together[key][1:], rtol=1e-4, atol=1e-5)


def test_one_small_window_is_computed_as_one_in_bfloat16() -> None:
    """There PyTorch uses the same convolution for any number of windows."""
    model = model_of({}, 3)
    seen: list[int] = []
    first = unet_of(model.network).encoder[0]
    first.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    engine = TorchEngine(model.network, device=CPU, precision=torch.bfloat16)
    engine(torch.zeros(1, 2, 16, 16, 16), ())
    assert seen == [1]
