"""The cores, memory and devices that this process may use."""

import os
import sys
from pathlib import Path
from typing import Any

import torch

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

UNKNOWN_MEMORY = 4 * 1024**3
MEMORY_STATE = Path("/proc/meminfo")
MEMORY_LIMITS = Path("/sys/fs/cgroup")
STATUS = Path("/proc/self/status")


def choose_device(name: str) -> torch.device:
    """The device of that name; `auto` is a CUDA device if there is one, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def half_pays() -> bool:
    """Whether this CPU is faster in bfloat16: only if its cores have matrix units for it.

    With them (Intel's AMX) a step takes half the time of single precision; without them, 40 times.
    """
    # Not every version of torch tells; then single precision is the safe answer.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16"))


def precision_of(device: torch.device) -> torch.dtype:
    """The data type that a device trains and predicts fastest in, as far as it is known."""
    if device.type == "cuda":
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if half else torch.float16
    return torch.bfloat16 if device.type == "cpu" and half_pays() else torch.float32


def in_words(count: float) -> str:
    """Bytes as MB or GB (10⁶ and 10⁹)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def free_memory_of(device: torch.device) -> int:
    """Bytes of a GPU's memory, or of the host's, that this process may take."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return free_memory()


def free_memory() -> int:
    """Bytes that new processes may take: Linux's "available", within the container's limit.

    Without Linux: half of the memory that is built in, or 4 GiB if the system does not tell it.
    """
    try:
        lines = MEMORY_STATE.read_text(encoding="ascii").splitlines()
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
        free = int(available) * 1024
    except (OSError, ValueError):
        return _half_of_what_is_built_in()
    try:
        limit = int((MEMORY_LIMITS / "memory.max").read_text(encoding="ascii"))
        lines = (MEMORY_LIMITS / "memory.stat").read_text(encoding="ascii").splitlines()
        (held,) = (line.split()[1] for line in lines if line.startswith("anon "))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return free
    return min(free, max(limit - int(held), 0))


def _half_of_what_is_built_in() -> int:
    if not hasattr(os, "sysconf"):
        return UNKNOWN_MEMORY
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def peak_of_process() -> int | None:
    """The most bytes that this process has held; None if the system does not tell.

    On Linux it comes from the process's status: getrusage counts the parent it was forked from.
    """
    if STATUS.exists():
        lines = STATUS.read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
