"""Windows for engines, and how far their answers may be apart."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from segkit.inference.engines.choose import EngineName, choose_engine
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, Engine, TorchEngine
from segkit.model.folder import Model
from tests.models import model_of

CPU = torch.device("cpu")


def windows_of(spatial_dims: int, count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (12, 6, 6) if spatial_dims == 3 else (12, 10, 4)
    return torch.randn(count, 2, *size, generator=generator)


def keys_of(model: Model) -> list[str]:
    presence = [PRESENCE] if model.network.presence is not None else []
    return [*model.network.maps(), *presence]


def assert_agree(engine: Engine, model: Model, batch: Tensor) -> None:
    """Logits and every map, with and without being asked for."""
    keys = keys_of(model)
    expected = TorchEngine(model.network, device=CPU)(batch, keys)
    found = engine(batch, keys)
    assert set(found) == set(expected) == {LOGITS, *keys}
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=1e-4)
    same = found[LOGITS].argmax(dim=1) == expected[LOGITS].argmax(dim=1)
    assert same.float().mean() >= 0.9999
    bare = engine(batch, ())
    assert set(bare) == {LOGITS}
    torch.testing.assert_close(bare[LOGITS], expected[LOGITS], rtol=0, atol=1e-4)


def agrees(name: EngineName, spatial_dims: int, attention: dict[str, Any]) -> None:
    model = model_of(attention, spatial_dims)
    engine = choose_engine(name, model, device="cpu")
    for count in (1, 3):
        assert_agree(engine, model, windows_of(spatial_dims, count))


class Planted:
    """An engine whose device runs out of memory at these calls."""

    def __init__(self, engine: Engine, failing: Collection[int]) -> None:
        self.engine = engine
        self.failing = failing
        self.calls = 0

    def __call__(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls in self.failing:
            raise torch.OutOfMemoryError("planted")
        return self.engine(windows, keys)
