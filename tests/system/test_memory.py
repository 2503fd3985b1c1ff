"""Free memory respects the limits of the system and of the container."""

import os
from pathlib import Path

import pytest

from segkit.system import memory
from segkit.system.memory import free_memory, in_words


def test_free_memory_is_what_linux_and_the_container_leave(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMORY_STATE", state)
    monkeypatch.setattr(memory, "MEMORY_LIMITS", tmp_path)
    half = free_memory()
    assert half > 0  # of what is built in, as nothing is told
    state.write_text("MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: 300 kB\n")
    assert free_memory() == 300 * 1024
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.stat").write_text("anon 1000\nfile 5000\n")
    assert free_memory() == 300 * 1024
    (tmp_path / "memory.max").write_text("3000\n")
    assert free_memory() == 2000
    (tmp_path / "memory.max").write_text("500\n")
    assert free_memory() == 0
    monkeypatch.setattr(memory, "MEMORY_STATE", tmp_path / "none")
    monkeypatch.delattr(os, "sysconf")
    assert free_memory() == 4 * 1024**3


@pytest.mark.parametrize(
    ("count", "words"), [(1.234e9, "1.23 GB"), (56_789_000, "56.8 MB"), (1e9, "1.00 GB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words
