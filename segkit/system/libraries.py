"""Versions of PyTorch and its GPU libraries, and a warning if they are slow together.

PyTorch 2.9 and later compute 3D convolutions in half precision without cuDNN unless it is version
9.15 or newer, because some older versions give wrong numbers for large outputs (pytorch/pytorch
issues 166122 and 166643). A step then takes several times as long and as much memory. PyTorch 2.9
installs an older cuDNN; 2.10 and later install 9.15 or newer, unless the user replaces it.
"""

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

logger = logging.getLogger(__name__)

GUARDED_SINCE = (2, 9)
"""First version of PyTorch that avoids a cuDNN older than SOUND_CUDNN."""
SOUND_CUDNN = (9, 15)
"""First version of cuDNN that computes 3D convolutions in half precision correctly."""
RUNTIMES = ("lightning", "openvino", "onnx", "onnxruntime", "onnxscript", "triton")
"""Packages that train or run a network."""


def torch_libraries() -> dict[str, str | None]:
    """Versions of PyTorch and of its CUDA and cuDNN, which are None in a build without CUDA.

    Example:
        torch_libraries()  # {"torch": "2.14.1+cu130", "cuda": "13.0", "cudnn": "9.20.0"}
    """
    cudnn = _cudnn()
    return {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": None if cudnn is None else ".".join(str(number) for number in cudnn),
    }


def training_environment(device: torch.device) -> dict[str, str | None]:
    """The device type and the versions of its libraries; logs a warning if they are slow."""
    environment: dict[str, str | None] = {"device": device.type, **torch_libraries()}
    if device.type == "cuda" and (slow := slow_convolutions()) is not None:
        logger.warning("%s", slow)
        environment["warning"] = slow
    return environment


def installed_runtimes() -> dict[str, str | None]:
    """Versions of the packages that train or run a network; None for one that is not installed."""
    found: dict[str, str | None] = {}
    for name in RUNTIMES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def slow_convolutions() -> str | None:
    """A warning of one sentence if these libraries make 3D convolutions slow on a GPU, or None."""
    cudnn = _cudnn()
    own = tuple(int(number) for number in torch.__version__.split(".")[:2])
    if cudnn is None or own < GUARDED_SINCE or cudnn[:2] >= SOUND_CUDNN:
        return None
    found = ".".join(str(number) for number in cudnn)
    major = (torch.version.cuda or "12").split(".")[0]
    return (
        f"PyTorch {torch.__version__} computes 3D convolutions in half precision several times "
        f"slower and in more memory with cuDNN {found} than with 9.15 or newer; install torch 2.10 "
        f"or newer, or: pip install 'nvidia-cudnn-cu{major}>=9.15'"
    )


@cache
def warn_of_slow_convolutions() -> None:
    """Log the warning of `slow_convolutions`, if there is one; only once in a process."""
    if (slow := slow_convolutions()) is not None:
        logger.warning("%s", slow)


def _cudnn() -> tuple[int, int, int] | None:
    """cuDNN's version as three numbers; None if PyTorch was built without CUDA."""
    if torch.version.cuda is None:
        return None
    number = torch.backends.cudnn.version()
    if number is None:
        return None
    # 9.15.1 is 91501; before version 9, 8.9.2 was 8902.
    major, rest = divmod(number, 10000 if number >= 90000 else 1000)
    return major, *divmod(rest, 100)
