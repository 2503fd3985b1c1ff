"""Weights out of a checkpoint of a run: those that scored best so far, or the last."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from segkit.errors import ModelError

Checkpoint = Literal["best", "last"]
BEST = "best.ckpt"
UNREADABLE = (
    pickle.UnpicklingError,  # what is no plain data, among others
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
)
"""What torch raises for a file that is no checkpoint."""
PREFIX = "network."
"""Of the names of the network's weights in a checkpoint."""


def checkpoint_path(folder: Path, checkpoint: str) -> Path:
    """The checkpoint beside a run's model folder.

    Raises ModelError if there is none, or if the word is neither `best` nor `last`.
    """
    if checkpoint not in get_args(Checkpoint):
        raise ModelError(f"checkpoint is {checkpoint!r}; choose one of 'best', 'last'")
    path = folder.parent / f"{checkpoint}.ckpt"
    if not path.is_file():
        raise ModelError(
            f"{folder.parent}: has no {path.name}; name a run that has validated once, or leave "
            f"the checkpoint out"
        )
    return path


def read_checkpoint(path: Path) -> dict[str, Any]:
    """What a checkpoint holds: plain data and tensors only, so that it can run no code.

    Raises ModelError if the file is no checkpoint of a training.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not content["state_dict"].keys() or int(content["global_step"]) < 0:
            raise ValueError("it holds no weights")
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"{path}: cannot be read as a checkpoint: {reason}") from None
    return dict(content)


def weights_of_network(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's weights in a checkpoint, by name; with `train.averaging` their average."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in content["state_dict"].items()
        if name.startswith(PREFIX)
    }
