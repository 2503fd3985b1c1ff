"""Cores, memory and devices are told as the system has them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkit.system import memory
from segkit.system import resources as machine
from segkit.system.memory import free_memory, in_words
from segkit.system.resources import choose_device, half_pays, num_cores


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


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


@pytest.mark.skipif(not machine.STATUS.exists(), reason="only Linux forks with that memory")
def test_the_peak_is_of_the_process_alone_and_not_of_what_it_was_forked_from() -> None:
    told = (
        "b'1' * 100_000_000; from segkit.system.resources import peak_of_process as f; print(f())"
    )
    fork = (
        f"held = b'1' * 3_000_000_000; import subprocess, sys; del held; "
        f"print(subprocess.run([sys.executable, '-c', {told!r}], capture_output=True, "
        f"text=True, check=True, close_fds=False).stdout)"
    )
    found = subprocess.run([sys.executable, "-c", fork], capture_output=True, text=True, check=True)
    assert 50e6 < int(found.stdout) < 2e9


@pytest.mark.parametrize(
    ("count", "words"), [(1.234e9, "1.23 GB"), (56_789_000, "56.8 MB"), (1e9, "1.00 GB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_a_gpu_only_if_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto").type == ("cuda" if there else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("capabilities", [{"amx_bf16": True}, {"amx_bf16": False}, {}])
def test_half_precision_pays_only_with_matrix_units(
    capabilities: dict[str, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert half_pays() == capabilities.get("amx_bf16", False)
