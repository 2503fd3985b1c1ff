"""A model folder: `model.json` says what it is, `weights.safetensors` holds its numbers.

Neither can run code when it is read.
"""

import json
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


@dataclass(frozen=True, eq=False)
class Model:
    """A network and all that prediction must know beside it."""

    description: ModelDescription
    network: SegmentationNetwork
    folder: Path | None = None
    """Where it was read from."""


def save_model(folder: Path, model: Model) -> None:
    """Write a model folder; the description comes last, so that a folder with one is complete."""
    state = {key: value.detach().cpu().contiguous() for key, value in _weights(model).items()}
    with whole(folder / WEIGHTS) as partial:
        save_file(state, partial)
    write_json(folder / DESCRIPTION, model.description.model_dump(mode="json"))


def load_model(path: Path) -> Model:
    """Read a model folder, or the `model` folder of a run, onto the CPU, ready to evaluate.

    Raises ModelError where there is none, or its weights do not fit its description.
    """
    folder = model_folder(path)
    source = folder / DESCRIPTION
    try:
        content = json.loads(source.read_text(encoding="utf-8"))
        description = validated(ModelDescription, content, str(source))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{source}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ModelError(f"{error}; was it written by another version of segkit?") from None
    model = Model(description, build_network(description), folder)
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
