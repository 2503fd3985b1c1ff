"""Cores, memory and devices are those of the system."""

import os
import subprocess
import sys

import pytest
import torch

from segkit.errors import SegkitError
from segkit.system import resources as machine
from segkit.system.resources import bfloat16_is_fast, choose_device, num_cores


def test_cores_are_those_that_may_be_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "quota_of_cores", lambda: None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 4, 5}, raising=False)
    assert num_cores() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert num_cores() == 1


@pytest.mark.skipif(not machine.STATUS.exists(), reason="only Linux forks with that memory")
def test_the_peak_excludes_the_parent_process() -> None:
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


@pytest.mark.parametrize("there", [True, False])
def test_auto_is_a_gpu_only_if_there_is_one(there: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    assert choose_device("auto").type == ("cuda" if there else "cpu")
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"amx_bf16": True, "avx512_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"amx_bf16": False, "avx512_bf16": False, "avx512_f": True, "avx2": True}, False),
        ({}, False),
    ],
)
def test_half_precision_pays_only_with_instructions_for_it(
    capabilities: dict[str, bool], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert bfloat16_is_fast() == fast


def test_memory_that_pytorch_keeps_for_its_next_tensors_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 20_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 15_000)
    assert machine.free_memory_of(torch.device("cuda")) == 8_000


def test_a_gpu_that_is_not_there_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert machine.choose_device("cuda:1") == torch.device("cuda", 1)
    assert machine.choose_device("cuda") == torch.device("cuda")
    with pytest.raises(SegkitError, match=r"2 GPUs, numbered from 0, found cuda:2; choose one"):
        machine.choose_device("cuda:2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert machine.choose_device("cuda:2") == torch.device("cuda", 2)  # for a plan elsewhere
