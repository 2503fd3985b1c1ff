"""Read the weights in a checkpoint of a run: the best so far, or the last."""

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from segkit.errors import ModelError
from segkit.model.file_names import CONFIG, WEIGHTS

Checkpoint = Literal["best", "last"]
BEST = "best.ckpt"
UNREADABLE = (
    pickle.UnpicklingError,  # such as for anything but plain data
    RuntimeError,
    OSError,
    EOFError,
    ValueError,
    AttributeError,
    IndexError,
    KeyError,
    TypeError,
)
"""Errors that PyTorch raises for a file that is not a checkpoint."""
NO_WEIGHTS_YET = (
    "the run has no weights yet, so wait for its first checkpoint, or resume it if it was stopped"
)
PREFIX = "network."
"""Prefix of the names of the network's weights in a checkpoint."""


def checkpoint_path(folder: Path, checkpoint: str) -> Path:
    """The checkpoint file beside a run's model folder.

    Raises:
        ModelError: there is no such file, or `checkpoint` is neither `best` nor `last`.
    """
    if checkpoint not in get_args(Checkpoint):
        raise ModelError(f"checkpoint: expected 'best' or 'last', found {checkpoint!r}; use one")
    path = folder.parent / f"{checkpoint}.ckpt"
    if not path.is_file():
        advice = (
            "choose a run that has validated at least once, or leave out the checkpoint"
            if (folder / WEIGHTS).is_file()
            else NO_WEIGHTS_YET
        )
        raise ModelError(f"{folder.parent}: expected {path.name}, found none; {advice}")
    return path


def advice_without_weights(runs: Sequence[Path]) -> str | None:
    """What to do about runs that have no final weights yet; None if none of them is a run."""
    begun = [
        name
        for name in get_args(Checkpoint)
        if any((run / f"{name}.ckpt").is_file() for run in runs)
    ]
    if begun:
        return f"the run has not ended, so ask for its checkpoint: {' or '.join(begun)}"
    return NO_WEIGHTS_YET if any((run / CONFIG).is_file() for run in runs) else None


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint: only plain data and tensors, so that it cannot run code.

    Raises:
        ModelError: the file is not a checkpoint of a training.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        if not content["state_dict"].keys() or int(content["global_step"]) < 0:
            raise ValueError("it contains no weights")
    except UNREADABLE as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path}: cannot be read as a checkpoint: {reason}; use a checkpoint that segkit train "
            "has written"
        ) from None
    return dict(content)


def weights_of_network(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The network's weights in a checkpoint, by name; their average with `train.averaging`."""
    return {
        name.removeprefix(PREFIX): value
        for name, value in content["state_dict"].items()
        if name.startswith(PREFIX)
    }
