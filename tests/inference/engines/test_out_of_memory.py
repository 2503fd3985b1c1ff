"""A device whose memory runs out still comes to the end of a scan."""

from collections.abc import Collection
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from segkit.geometry.grid import Grid
from segkit.inference import windows
from segkit.inference.engines.out_of_memory import MemoryFallbackEngine, OneWindowEngine
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.predictor import Predictor
from segkit.inference.windows import WindowLayout, slide
from segkit.io.volume import Volume
from tests.engines import CPU, Planted, keys_of, windows_of
from tests.models import model_of


def test_out_of_memory_moves_first_the_sums_and_then_the_network_to_the_host(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    eager = TorchEngine(model.network, device=CPU)
    keys = keys_of(model)
    device, host = Planted(eager, failing=(2, 4)), Planted(eager, failing=())
    engine = MemoryFallbackEngine(device, lambda: host)
    counts = []
    for _ in range(6):
        found = engine(batch, keys)
        for key, values in eager(batch, keys).items():
            assert torch.equal(found[key], values)
        counts.append((device.calls, host.calls))
    # The second batch alone goes to the host; from the fourth on, all do.
    assert counts == [(1, 0), (2, 1), (3, 1), (4, 2), (4, 3), (4, 4)]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "sums over windows are kept in host memory" in caplog.messages[0]
    assert "the network runs on the CPU" in caplog.messages[1]


def test_windows_of_a_validation_are_computed_one_by_one_after_memory_ran_out() -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    eager = TorchEngine(model.network, device=CPU)
    keys = keys_of(model)
    planted = Planted(eager, failing=(2,))
    engine = OneWindowEngine(planted)
    calls = []
    for _ in range(3):
        found = engine(batch, keys)
        for key, values in eager(batch, keys).items():
            torch.testing.assert_close(found[key], values)
        calls.append(planted.calls)
    assert len(batch) == 3 and calls == [1, 5, 8]
    # One window does not fit: there is no smaller batch.
    with pytest.raises(torch.OutOfMemoryError):
        OneWindowEngine(Planted(eager, failing=(1, 2)))(batch[:1], keys)


def test_another_error_of_the_device_does_not_count_as_out_of_memory() -> None:
    def fail(windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        raise RuntimeError("device-side assert")

    engine = MemoryFallbackEngine(fail, lambda: fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine(windows_of(3), ())


def test_sums_that_do_not_fit_on_the_device_are_kept_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = windows_of(3, 1)[0]

    def slid() -> Tensor:
        return slide(
            image,
            lambda batch: {"same": batch},
            WindowLayout((4, 4, 4), (0.5, 0.5, 0.5), (2, 2, 2)),
        )["same"]

    zeros = torch.zeros
    expected = slid()

    def crowded(*size: Any, **options: Any) -> Tensor:
        # Sums alone have a channel and three axes.
        if "device" in options and isinstance(size[0], tuple) and len(size[0]) == 4:
            raise torch.OutOfMemoryError("planted")
        return zeros(*size, **options)

    monkeypatch.setattr(windows.torch, "zeros", crowded)
    assert torch.equal(slid(), expected)
    assert "kept in host memory" in caplog.text


@pytest.mark.gpu
def test_labels_are_the_same_if_gpu_memory_runs_out_in_a_scan() -> None:
    model = model_of({"skip": "additive_grid"}, 3)
    values = np.random.default_rng(0).standard_normal((34, 19, 21, 2)).astype(np.float32)
    volume = Volume(values, Grid((34, 19, 21), np.eye(4)))
    predictor = Predictor(model, device="cuda")
    expected = predictor(volume, maps=True).labels.data
    (member,) = predictor.members
    assert isinstance(member.engine, MemoryFallbackEngine) and member.engine.engine is not None
    planted = Planted(member.engine.engine, failing=(5, 9))
    member.engine.engine = planted
    assert (predictor(volume, maps=True).labels.data == expected).mean() > 0.999
    assert planted.calls == 9 and member.engine.engine is None
