"""TorchScript takes any batch on any device."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from segkit.export.graphs import example_windows
from segkit.export.torchscript import METADATA, export_torchscript, read_torchscript
from segkit.inference.engines.torch_eager import LOGITS
from tests.models import FAST, SLOW, model_of

pytestmark = pytest.mark.usefixtures("unchecked_shapes")


def rounding(network: nn.Module, values: Tensor) -> float:
    """The most by which a network's values may differ if the same sums are added otherwise.

    A layer rounds by some units in the last place of its largest value, and as each normalises,
    what one rounds away is carried on at about its size: 8 units for each layer, 9e-5 for 53 layers
    and a largest logit of 1.9. Most traces differ by none. A trace takes attention apart, while
    PyTorch runs it in one kernel that is less exact: with it a U-Transformer differs by 3.9e-5, and
    from its own values in float64 by 3.7e-5, the trace by 1e-6.
    """
    layers = sum(not list(module.children()) for module in network.modules())
    return 8 * layers * torch.finfo(values.dtype).eps * float(values.abs().max())


def takes_any_batch_on_any_device(
    spatial_dims: int, attention: dict[str, Any], folder: Path
) -> None:
    model = model_of(attention, spatial_dims)
    export_torchscript(model, folder / "model.ts", {"name": "brains"})
    run = read_torchscript(folder / "model.ts")
    for count in (1, 3):
        batch = example_windows(model)[:1].repeat(count, 1, 1, 1, 1)
        batch *= torch.arange(1, count + 1)[:, None, None, None, None]
        with torch.no_grad():
            expected = model.network(batch)
        (found,) = run(batch, (LOGITS,))
        assert (found - expected).abs().max() <= rounding(model.network, expected)
    told = {METADATA: ""}
    with warnings.catch_warnings(action="ignore"):
        kept = torch.jit.load(folder / "model.ts", _extra_files=told)
    assert json.loads(told[METADATA]) == {"name": "brains"}
    # What a trace fixed of the device that it was made on would fail on another.
    assert "Device = prim::Constant" not in str(kept.inlined_graph)


@pytest.mark.parametrize("family", ["self-attention", "planes with presence"])
def test_the_network_of_a_bundle_takes_any_batch_on_any_device(family: str, tmp_path: Path) -> None:
    takes_any_batch_on_any_device(*FAST[family], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [*FAST, *SLOW])
def test_the_network_of_every_family_takes_any_batch_on_any_device(
    family: str, tmp_path: Path
) -> None:
    takes_any_batch_on_any_device(*{**FAST, **SLOW}[family], tmp_path)
