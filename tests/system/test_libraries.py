"""Versions of PyTorch and cuDNN, and whether 3D convolutions are slow with them."""

import pytest
import torch

from segkit.system.libraries import (
    installed_runtimes,
    slow_convolutions,
    torch_libraries,
    training_environment,
    warn_of_slow_convolutions,
)


def pretend(monkeypatch: pytest.MonkeyPatch, own: str, cuda: str | None, cudnn: int | None) -> None:
    monkeypatch.setattr(torch, "__version__", own)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)


@pytest.mark.parametrize(
    ("own", "cudnn", "slow"),
    [
        ("2.9.0+cu128", 91002, True),
        ("2.9.1+cu130", 91300, True),
        ("2.9.1+cu128", 91501, False),
        ("2.10.0a0+git1", 91400, True),
        ("2.10.0+cu128", 91501, False),
        ("2.14.1+cu130", 92000, False),
        ("2.8.0+cu128", 91002, False),
        ("2.9.0+cu118", 8902, True),
        ("2.9.0+cu128", None, False),
    ],
)
def test_3d_convolutions_are_slow_since_torch_2_9_with_a_cudnn_before_9_15(
    own: str, cudnn: int | None, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, own, "12.8", cudnn)
    told = slow_convolutions()
    assert (told is not None) == slow
    if told is not None:
        assert own in told and "pip install 'nvidia-cudnn-cu12>=9.15'" in told


def test_versions_of_cudnn_are_read_from_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in ((91501, "9.15.1"), (92000, "9.20.0"), (8902, "8.9.2")):
        pretend(monkeypatch, "2.14.1+cu130", "13.0", number)
        told = {"torch": "2.14.1+cu130", "cuda": "13.0", "cudnn": name}
        assert torch_libraries() == told


def test_a_torch_without_cuda_has_no_cudnn_and_nothing_is_slow(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend(monkeypatch, "2.9.0+cpu", None, None)
    assert torch_libraries() == {"torch": "2.9.0+cpu", "cuda": None, "cudnn": None}
    assert slow_convolutions() is None


def test_a_runtime_that_is_not_installed_has_no_version() -> None:
    found = installed_runtimes()
    assert found["lightning"] is not None and found["openvino"] is not None
    assert set(found) == {"lightning", "openvino", "onnx", "onnxruntime", "onnxscript", "triton"}


def test_a_training_on_a_gpu_warns_of_slow_convolutions_and_its_summary_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "2.9.1+cu128", "12.8", 91002)
    assert "warning" not in training_environment(torch.device("cpu")) and not caplog.text
    told = training_environment(torch.device("cuda"))
    assert told["device"] == "cuda" and told["cudnn"] == "9.10.2"
    assert told["warning"] == slow_convolutions() and str(told["warning"]) in caplog.text


def test_a_prediction_on_a_gpu_warns_of_slow_convolutions_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pretend(monkeypatch, "2.9.1+cu128", "12.8", 91002)
    warn_of_slow_convolutions.cache_clear()
    for _ in range(2):
        warn_of_slow_convolutions()
    assert caplog.text.count(str(slow_convolutions())) == 1
    warn_of_slow_convolutions.cache_clear()
