"""A model folder: `model.json` says what it is, `weights.safetensors` holds its numbers.

Models of a first stage, whose labels it takes beside the image, lie whole in `first/0`, and so on.

Neither can run code when it is read, and neither names any. The weights of a module that Python
gave (`network.given`) are those of its own state, and it must be given again to be loaded.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription, PostprocessingConfig
from segkit.errors import ConfigError, ModelError
from segkit.io.atomic import checksum, json_text, whole, write_json
from segkit.io.safe_text import read_json_object
from segkit.model.build import build_network, weight_shapes, wrap_network
from segkit.nn.network import SegmentationNetwork, weights_of

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
FIRST = "first"
SUMMARY = "summary.json"
"""What a finished run, or a finished cross-validation, has beside its models."""
FOLD = "fold_"
"""Before its number, the name of a fold's run in the folder of a cross-validation."""
CONVOLUTION = re.compile(r"(encoder\.\d+\.1|decoder\.\d+\.block)\..*weight")
"""Names of weights in the blocks of a U-Net."""


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
    """Write a model folder; the description comes last, so that a folder with one is complete.

    Raises OSError where it cannot be written.
    """
    for number, first in enumerate(model.first):
        save_model(folder / FIRST / str(number), first)
    with whole(folder / WEIGHTS) as partial:
        try:
            save_file(_savable(model), partial)
        except SafetensorError as error:
            raise ModelError(f"{folder / WEIGHTS}: cannot be written: {error}") from None
    write_json(folder / DESCRIPTION, model.description.model_dump(mode="json"))


def described_model(description: ModelDescription, module: nn.Module) -> Model:
    """A model of any module that gives logits, for `Predictor` and for export.

    The description says what it was trained on and, as `network.given`, what the sizes of its input
    must be multiples of. Raises ModelError where the two do not fit.
    """
    return Model(description, wrap_network(description, module).eval())


def load_model(path: Path, *, network: nn.Module | None = None) -> Model:
    """Read a model folder, or the `model` folder of a run, onto the CPU, ready to evaluate.

    `network` is the module of a model that was trained with one; it gets the weights.
    Raises ModelError where there is none, or its weights do not fit its description, or its first
    stage not it.
    """
    folder = model_folder(path)
    description = load_description(folder)
    stage, first = description.first_stage, []
    for number in range(stage.models if stage else 0):
        inside = folder / FIRST / str(number)
        # Looked at before it is loaded: a first stage of a first stage ends here.
        told = load_description(inside)
        if told.channels != description.channels:
            raise ModelError(f"{inside}: its channels are not those of {folder}")
        check_first_stage(inside, told, stage.classes if stage else ())
        first.append(_with_weights(inside, told, ()))
    return _with_weights(folder, description, tuple(first), network)


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


def load_description(folder: Path) -> ModelDescription:
    """What a model folder's `model.json` says. Raises ModelError where it cannot be read."""
    source = folder / DESCRIPTION
    try:
        description = validated(ModelDescription, read_json_object(source), str(source))
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be read: {error}") from None
    except ConfigError as error:
        raise ModelError(f"{error}; was it written by another version of segkit?") from None
    if len(description.normalisation) != len(description.channels):
        raise ModelError(
            f"{source}: expected a normalisation for each of {len(description.channels)} channels, "
            f"found {len(description.normalisation)}"
        )
    if any(None in setting.model_dump().values() for setting in description.normalisation):
        raise ModelError(f"{source}: its CT window lacks numbers; was it made by segkit train?")
    return description


def _with_weights(
    folder: Path,
    description: ModelDescription,
    first: tuple[Model, ...],
    module: nn.Module | None = None,
) -> Model:
    source = folder / WEIGHTS
    if not source.is_file():
        raise ModelError(f"{folder}: expected {WEIGHTS} in it, found none")
    try:
        # Held against what the file says it holds before there is either network or weights, so
        # that neither can be larger than the file.
        if module is None:
            _check_fit(_shapes_in(source), weight_shapes(description))
            network = build_network(description)
        else:
            network = wrap_network(description, module)
        model = Model(description, network, first, folder)
        weights = load_file(source)
        for name, value in weights.items():
            if not value.isfinite().all():
                raise ValueError(f"{name} holds values that are not numbers")
        weights_of(network).load_state_dict(weights)
    except (ConfigError, SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: its weights do not fit its {DESCRIPTION}: {reason}") from None
    # A module that was given may lie on a GPU.
    model.network.cpu().eval()
    return model


def _shapes_in(source: Path) -> dict[str, tuple[int, ...]]:
    """What a weights file says it holds."""
    with safe_open(source, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_fit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError for the first tensor that is missing, unknown, or of another shape."""
    for name in [*expected, *found]:
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"{name} is no weight of the network")
        if found[name] != expected[name]:
            raise ValueError(f"{name} is {found[name]} where {expected[name]} is expected")


def checksums_of(model: Model) -> dict[str, str]:
    """The SHA-256 of a model's files, as they are or as `save_model` would write them."""
    if model.folder is not None:
        files = [model.folder / name for name in (DESCRIPTION, WEIGHTS)]
        return {file.name: checksum(file) for file in files}
    contents = {
        DESCRIPTION: json_text(model.description.model_dump(mode="json")).encode(),
        WEIGHTS: save(_savable(model)),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def adopt(folder: Path, postprocessing: PostprocessingConfig) -> None:
    """Write what is to be done to predicted labels into the description of a model folder."""
    description = load_description(folder).model_copy(update={"postprocessing": postprocessing})
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def start_from(network: SegmentationNetwork, path: Path) -> str:
    """Give a network the weights of a model, wherever name and shape are the same, and say so.

    A model of other classes or channels lends all but its first or last layers. Raises ModelError
    where there is no model, where there are several, and where no convolution of its blocks fits:
    a network of another kind or width would take its biases alone, which teach nothing.
    """
    folders = model_folders(path)
    if len(folders) > 1:
        raise ModelError(
            f"{path}: expected one model, found those of {len(folders)} folds; name one, such as "
            f"{folders[0].parent}"
        )
    lent = _weights(load_model(path))
    own = weights_of(network).state_dict()
    fitting = {
        key: value for key, value in lent.items() if key in own and own[key].shape == value.shape
    }
    if not any(CONVOLUTION.match(key) and value.ndim > 1 for key, value in fitting.items()):
        raise ModelError(
            f"{path}: none of its weights fits the network; give both the same "
            f"network.spatial_dims, channels, strides and kernels"
        )
    weights_of(network).load_state_dict(fitting, strict=False)
    return f"{len(fitting)} of {len(own)} weights are those of {path}"


def model_folder(path: Path) -> Path:
    """The folder with the model: the only one of `model_folders`, or the first fold's."""
    return model_folders(path)[0]


def model_folders(path: Path) -> tuple[Path, ...]:
    """The folders with the models: `path` itself, `path/model` for a run, or those of the finished
    folds of a cross-validation, in order. Raises ModelError where there is none.
    """
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION).is_file():
            return (folder,)
    folds = sorted(path.glob(f"{FOLD}*/model/{DESCRIPTION}"))
    if not folds:
        raise ModelError(
            f"{path}: expected a run or a model folder with {DESCRIPTION}, found neither"
        )
    return tuple(description.parent for description in folds)


def newest_model(runs: Path) -> Path:
    """What finished last: a run's model folder, or the folder of a cross-validation, of which
    `model_folders` gives the models. Raises ModelError where there is none.
    """
    finished = list(runs.glob(f"*/model/{DESCRIPTION}"))
    of_folds = {path.parents[2] / SUMMARY for path in runs.glob(f"*/{FOLD}*/model/{DESCRIPTION}")}
    finished += [path for path in of_folds if path.is_file()]
    if not finished:
        raise ModelError(f"no finished run under {runs}/; train one, or name one with --model")
    return max(finished, key=lambda path: path.stat().st_mtime).parent


def _savable(model: Model) -> dict[str, torch.Tensor]:
    # Copied, as weights that share memory, which a given module may have, are not written.
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in _weights(model).items()
    }


def _weights(model: Model) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = weights_of(model.network).state_dict()
    return weights
