"""The cores, memory and devices that this process may use."""

import contextlib
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch

from segkit.errors import SegkitError, counted
from segkit.system.control_groups import quota_of_cores
from segkit.system.memory import free_memory

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

STATUS = Path("/proc/self/status")
logger = logging.getLogger(__name__)


def choose_device(name: str) -> torch.device:
    """The device of this name; `auto` is a CUDA device if there is one, otherwise the CPU.

    Raises:
        SegkitError: there is no device of this name.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SegkitError(
            f"device: expected auto, cpu or cuda, found {name!r}; choose one"
        ) from None
    # A plan may be for a GPU that this machine does not have.
    count = torch.cuda.device_count() if device.type == "cuda" else 0
    if 0 < count <= (device.index or 0):
        raise SegkitError(
            f"device: this machine has {counted(count, 'GPU')}, numbered from 0, found {name}; "
            f"choose one of them"
        )
    return device


def bfloat16_is_fast() -> bool:
    """Whether this CPU trains faster in bfloat16, that is, whether it has instructions for it.

    With Intel's matrix units (AMX), a step takes half the time of single precision. With AVX-512's
    products of bfloat16 (AMD from Zen 4 on, and some of Intel's), it takes half to three quarters,
    but a fifth longer if the network is tiny (measured on Zen 5). Without either, it takes 40 times
    as long.
    """
    # Some versions of torch do not report capabilities; single precision is then the safe answer.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    has = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return has and torch.backends.mkldnn.is_available()


def precision_of(device: torch.device) -> torch.dtype:
    """The data type in which a device probably trains and predicts fastest."""
    if device.type == "cuda":
        # PyTorch tells this of the current GPU.
        with contextlib.nullcontext() if device.index is None else torch.cuda.device(device):
            half = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float16
    return torch.bfloat16 if device.type == "cpu" and bfloat16_is_fast() else torch.float32


def num_cores() -> int:
    """Number of cores that this process may use.

    The quota of a container counts (`quota_of_cores`), rounded up: 1.5 cores keep two threads busy.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = quota_of_cores()
    return cores if quota is None else min(cores, math.ceil(quota))


def limit_threads() -> None:
    """Let torch use no more threads than the control groups give this process cores.

    Torch counts the cores of the machine. If a container has a quota of 2 of 64 cores, 64 threads
    use it up at the start of each period, and then all of them wait for the next.
    """
    quota, threads = quota_of_cores(), torch.get_num_threads()
    if quota is not None and threads > (most := num_cores()):
        torch.set_num_threads(most)
        logger.info(
            "torch uses %d instead of %d threads, because the limit of this container or job is "
            "%.3g cores",
            most,
            threads,
            quota,
        )


def free_memory_of(device: torch.device) -> int:
    """Free bytes of a GPU's memory, or of the host's memory for a CPU.

    Memory that PyTorch keeps for its next tensors counts as free.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    return free_memory()


def peak_of_process() -> int | None:
    """Peak memory of this process in bytes, or None if the system does not report it.

    On Linux the peak is read from /proc, because getrusage includes the parent process.
    """
    if STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
