"""Fixtures of exports."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch traces, sizes are tensors, not the integers that signatures tell of."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
