"""Fixtures of engines."""

from pathlib import Path
from typing import Any

import jaxtyping
import pytest
from torch import Tensor

from segkit.inference.engines.openvino import OpenVino


@pytest.fixture(autouse=True)
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch traces, sizes are tensors, not the integers that signatures tell of."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that OpenVINO was told to write, as it is told."""
    told: list[str] = []
    convert = OpenVino.convert

    def counted(runtime: OpenVino, network: Any, window: Tensor, folder: Path) -> None:
        told.append(folder.name)
        convert(runtime, network, window, folder)

    monkeypatch.setattr(OpenVino, "convert", counted)
    return told
