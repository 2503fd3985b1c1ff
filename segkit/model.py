"""A model folder: `model.json` says what it is, `weights.safetensors` holds its numbers.

Models of a first stage, whose labels it takes beside the image, lie whole in `first/0`, and so on.

Neither can run code when it is read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from segkit.build import build_network
from segkit.config import ModelDescription
from segkit.config_file import validated
from segkit.errors import ConfigError, ModelError
from segkit.files import whole, write_json
from segkit.nn.planes import SegmentationNetwork, unet_of

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
FIRST = "first"


@dataclass(frozen=True, eq=False)
class Model:
    """A network and all that prediction must know beside it."""

    description: ModelDescription
    network: SegmentationNetwork
    first: "tuple[Model, ...]" = ()
    """Of the stage before, if its description tells of one."""
    folder: Path | None = None
    """Where it was read from."""


def save_model(folder: Path, model: Model) -> None:
    """Write a model folder; the description comes last, so that a folder with one is complete."""
    for number, first in enumerate(model.first):
        save_model(folder / FIRST / str(number), first)
    state = {key: value.detach().cpu().contiguous() for key, value in _weights(model).items()}
    with whole(folder / WEIGHTS) as partial:
        save_file(state, partial)
    write_json(folder / DESCRIPTION, model.description.model_dump(mode="json"))


def load_model(path: Path) -> Model:
    """Read a model folder, or the `model` folder of a run, onto the CPU, ready to evaluate.

    Raises ModelError where there is none, or its weights do not fit its description, or its first
    stage not it.
    """
    folder = model_folder(path)
    description = read_description(folder)
    stage, first = description.first_stage, []
    for number in range(stage.models if stage else 0):
        inside = folder / FIRST / str(number)
        # Looked at before it is loaded: a first stage of a first stage ends here.
        told = read_description(inside)
        if told.channels != description.channels:
            raise ModelError(f"{inside}: its channels are not those of {folder}")
        check_first_stage(inside, told, stage.classes if stage else ())
        first.append(_with_weights(inside, told, ()))
    return _with_weights(folder, description, tuple(first))


def check_first_stage(source: Path, first: ModelDescription, classes: Sequence[str]) -> None:
    """Raise ModelError unless the model's labels are these and it takes no others' itself."""
    if first.first_stage is not None:
        raise ModelError(
            f"{source}: takes the labels of a first stage itself, and two stages are the most; "
            f"name a model that takes an image alone"
        )
    own = list(first.labels)[1:]
    if own != list(classes):
        raise ModelError(
            f"{source}: its classes are {', '.join(own)} where {', '.join(classes)} are expected; "
            f"models of one first stage share their labels"
        )


def read_description(folder: Path) -> ModelDescription:
    """What a model folder's `model.json` says. Raises ModelError where it cannot be read."""
    source = folder / DESCRIPTION
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        return validated(ModelDescription, content, str(source))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{source}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ModelError(f"{error}; was it written by another version of segkit?") from None


def _with_weights(folder: Path, description: ModelDescription, first: tuple[Model, ...]) -> Model:
    model = Model(description, build_network(description), first, folder)
    try:
        unet_of(model.network).load_state_dict(load_file(folder / WEIGHTS))
    except FileNotFoundError:
        raise ModelError(f"{folder}: expected {WEIGHTS} in it, found none") from None
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: its weights do not fit its {DESCRIPTION}: {reason}") from None
    model.network.eval()
    return model


def start_from(network: SegmentationNetwork, path: Path) -> str:
    """Give a network the weights of a model, wherever name and shape are the same, and say so.

    A model of other classes or channels lends all but its first or last layers. Raises ModelError
    where there is no model or nothing fits.
    """
    lent = _weights(load_model(path))
    own = unet_of(network).state_dict()
    fitting = {
        key: value for key, value in lent.items() if key in own and own[key].shape == value.shape
    }
    if not fitting:
        raise ModelError(f"{path}: none of its weights fits the network; give both one topology")
    unet_of(network).load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(own)} weights are those of {path}"


def model_folder(path: Path) -> Path:
    """The folder with the model: `path` itself, or `path/model` for a run."""
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION).is_file():
            return folder
    raise ModelError(f"{path}: expected a run or a model folder with {DESCRIPTION}, found neither")


def newest_model(runs: Path) -> Path:
    """The model folder of the run that finished last. Raises ModelError where there is none."""
    finished = sorted(runs.glob(f"*/model/{DESCRIPTION}"), key=lambda path: path.stat().st_mtime)
    if not finished:
        raise ModelError(f"no finished run under {runs}/; train one, or name one with --model")
    return finished[-1].parent


def _weights(model: Model) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = unet_of(model.network).state_dict()
    return weights
