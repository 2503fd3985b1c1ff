"""Model folders: `model.json` describes a model, `weights.safetensors` holds its weights.

If a network also takes the labels of a first stage, the models of that stage lie in `first/0`,
`first/1` and so on. The model folder of a run has no weights before training ends; the checkpoints
of the run have weights earlier. No file of a model folder can run code. If the network is a Python
module (`network.given`), only its weights are saved; to load them, pass the same module.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription, PostprocessingConfig
from segkit.errors import ConfigError, ModelError, counted
from segkit.io.atomic import json_text, whole, write_json
from segkit.io.checksums import checksum
from segkit.io.picture_rules import PictureRules
from segkit.io.safe_text import read_json_object
from segkit.model.build import build_network, weight_shapes, wrap_network
from segkit.model.checkpoint import (
    advice_without_weights,
    checkpoint_path,
    read_checkpoint,
    weights_of_network,
)
from segkit.model.fetch_model import fetch_model
from segkit.model.file_names import DESCRIPTION, FIRST, FOLD, SUMMARY, WEIGHTS
from segkit.nn.network import SegmentationNetwork, weights_of


@dataclass(frozen=True, eq=False)
class Model:
    """A network, and all other data that prediction needs.

    Example:
        model = segkit.load_model("runs/my_run")
        prediction = segkit.Predictor(model)(scan)
    """

    description: ModelDescription
    """Channels, labels, spacing, normalisation and architecture, as in `model.json`."""
    network: SegmentationNetwork
    """Takes volumes, (batch, channel, x, y, z) in RAS+ order at the description's spacing."""
    first: "tuple[Model, ...]" = ()
    """The models of the first stage, if the description has one."""
    folder: Path | None = None
    """The folder from which the model was read; None if its weights do not come from a folder."""


def save_model(folder: str | Path, model: Model) -> None:
    """Write a model folder.

    Args:
        folder: the folder to write to; it is created if it does not exist.
        model: the model, with the models of its first stage, if it has one.

    Raises:
        ModelError: the weights cannot be written.
        OSError: the folder cannot be written to.

    Example:
        segkit.save_model("my_model", model)
    """
    folder = Path(folder)
    save_firsts(folder, model.first)
    with whole(folder / WEIGHTS) as partial:
        try:
            save_file(_savable(model), partial)
        except SafetensorError as error:
            raise ModelError(
                f"{folder / WEIGHTS}: cannot be written: {error}"
                "; free some space on the disk, or choose another folder"
            ) from None
    save_description(folder, model.description)


def save_firsts(folder: Path, first: Sequence[Model]) -> None:
    """Write the models of a first stage into a model folder."""
    for number, model in enumerate(first):
        save_model(folder / FIRST / str(number), model)


def save_description(folder: Path, description: ModelDescription) -> None:
    """Write the description of a model into its folder."""
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def described_model(description: ModelDescription, module: nn.Module) -> Model:
    """A model from any PyTorch module that computes logits, for `Predictor` and for export.

    Args:
        description: how the module was trained. Its `network.given.multiple` says of which numbers
            the sizes of the module's input must be multiples.
        module: maps images (batch, channel, *space), in RAS+ order at the description's spacing, to
            logits (batch, class or region, *space). *space is (x, y, z), or two of these axes for a
            2D model.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: the description is that of a U-Net or has a first stage, or the module's state
            cannot be saved.

    Example:
        model = segkit.described_model(description, module)
        labels = segkit.Predictor(model)(scan).labels
    """
    return Model(description, wrap_network(description, module).eval())


def picture_rules_of(
    description: ModelDescription, pixel_size: Sequence[str] | None = None
) -> PictureRules:
    """The rules by which pictures are read for a model.

    Args:
        description: description of the model.
        pixel_size: pixel size, such as ["4 nm"], which is used instead of the one in the files.

    Raises:
        ModelError: the description has colours of labels that do not exist, or the pixel size is
            not a length.
    """
    try:
        return description.picture_rules(pixel_size)
    except ValueError as error:
        raise ModelError(f"{description.run}: {error}") from None


def load_model(
    path: str | Path, *, network: nn.Module | None = None, checkpoint: str | None = None
) -> Model:
    """Read a model onto the CPU, in evaluation mode.

    Args:
        path: a model folder, the folder of a run, or that of a cross-validation, from which the
            first fold is read; or an address of these, such as `hf:OWNER/NAME@REVISION` or
            `https://SERVER/model.zip`, which is downloaded the first time (see `fetch_model`).
        network: the module with which the model was trained, if it came from Python. The weights
            are loaded into it.
        checkpoint: `best` or `last`: take the weights from this checkpoint of a run, which may
            still be training. If not given, take the weights at the end of the run. The
            temperature of a run belongs to these, so a checkpoint has none.

    Returns:
        The model, with the models of its first stage, if it has one.

    Raises:
        ModelError: there is no model, its weights do not fit its description, or its first stage
            does not fit the model; or the model cannot be fetched.

    Example:
        model = segkit.load_model("runs/my_run")
    """
    folder = model_folders(path, checkpoint)[0]
    description = load_description(folder)
    stage, first = description.first_stage, []
    for number in range(stage.models if stage else 0):
        inside = folder / FIRST / str(number)
        # Checked before the weights are read: a first stage must not have a first stage itself.
        first_description = load_description(inside)
        if first_description.channels != description.channels:
            raise ModelError(
                f"{inside}: expected the channels of {folder}, {', '.join(description.channels)}, "
                f"found {', '.join(first_description.channels)}; train both stages with the same "
                "channels"
            )
        check_first_stage(inside, first_description, stage.classes if stage else ())
        first.append(_with_weights(inside, first_description, ()))
    if checkpoint is None:
        return _with_weights(folder, description, tuple(first), network)
    source = checkpoint_path(folder, checkpoint)
    built = wrap_network(description, network) if network else build_network(description)
    try:
        built.load_state_dict(_finite(weights_of_network(read_checkpoint(source))))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source}: does not fit {folder / DESCRIPTION}: {reason}; restore the files of the run"
        ) from None
    built.cpu().eval()
    # The temperature was fitted for the weights at the end of the run.
    return Model(description.model_copy(update={"temperature": None}), built, tuple(first))


def check_first_stage(source: Path, first: ModelDescription, classes: Sequence[str]) -> None:
    """Raise ModelError unless a model has these classes and no first stage itself."""
    if first.first_stage is not None:
        raise ModelError(
            f"{source}: needs the labels of a first stage itself, but segkit allows only two "
            "stages; choose a model that needs only an image"
        )
    own = list(first.labels)[1:]
    if own != list(classes):
        raise ModelError(
            f"{source}: expected the classes {', '.join(classes)}, found {', '.join(own)}; use "
            "first-stage models that all have the same labels"
        )


def load_description(folder: Path) -> ModelDescription:
    """The description in a model folder.

    Raises:
        ModelError: it cannot be read, or is incomplete.
    """
    source = folder / DESCRIPTION
    try:
        description = validated(ModelDescription, read_json_object(source), str(source))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: cannot be read: {error}"
            "; use a model that segkit train has written, or copy it again"
        ) from None
    except ConfigError as error:
        raise ModelError(
            f"{error}; use the version of segkit that wrote the model, or copy the model again"
        ) from None
    if len(description.normalisation) != len(description.channels):
        raise ModelError(
            f"{source}: expected a normalisation for each of "
            f"{counted(len(description.channels), 'channel')}, found "
            f"{len(description.normalisation)}"
            "; use a model that segkit train has written"
        )
    if any(None in setting.model_dump().values() for setting in description.normalisation):
        raise ModelError(
            f"{source}: expected numbers for every CT window, found null; use a model that segkit "
            f"train has written"
        )
    return description


def _with_weights(
    folder: Path,
    description: ModelDescription,
    first: tuple[Model, ...],
    module: nn.Module | None = None,
) -> Model:
    """A model with the weights in its folder. Raises ModelError.

    Args:
        folder: the model folder.
        description: the description of the model.
        first: the models of its first stage.
        module: the user's own module, if the network is one.
    """
    source = folder / WEIGHTS
    _check_there(source)
    try:
        # Names and shapes are compared with the header of the file before memory is allocated, so
        # that neither the network nor the weights can be larger than the file.
        if module is None:
            _check_fit(_shapes_in(source), weight_shapes(description))
            network = build_network(description)
        else:
            network = wrap_network(description, module)
        model = Model(description, network, first, folder)
        weights_of(network).load_state_dict(_finite(load_file(source)))
    except (ConfigError, SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{folder}: its weights do not fit its {DESCRIPTION}: {reason}"
            "; copy the whole folder again, or restore its files"
        ) from None
    # The user's module may be on a GPU.
    model.network.cpu().eval()
    return model


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The weights in a model folder by name, whatever network they are of.

    Raises:
        ModelError: there are none, or they cannot be read, or one is NaN or infinite.
    """
    source = folder / WEIGHTS
    _check_there(source)
    try:
        return _finite(load_file(source))
    except (SafetensorError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"{source}: cannot be read: {reason}; copy the whole folder again"
        ) from None


def _check_there(source: Path) -> None:
    """Raise ModelError unless a model folder has its file of weights."""
    if not source.is_file():
        folder = source.parent
        advice = advice_without_weights([folder.parent]) or "copy the whole folder again"
        raise ModelError(f"{folder}: expected {WEIGHTS} in it, found none; {advice}")


def _finite(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights. Raises ValueError if one is NaN or infinite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} contains NaN or infinity")
    return weights


def _shapes_in(source: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor in a weights file, read from its header."""
    with safe_open(source, framework="pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _check_fit(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError for the first tensor that is missing, unknown, or has another shape."""
    for name in [*expected, *found]:
        if name not in found:
            raise ValueError(f"{name} is missing")
        if name not in expected:
            raise ValueError(f"the network has no weight {name}")
        if found[name] != expected[name]:
            raise ValueError(f"{name}: expected the shape {expected[name]}, found {found[name]}")


def checksums_of(model: Model) -> dict[str, str]:
    """SHA-256 of each file of a model, on disk or as `save_model` would write it."""
    if model.folder is not None:
        files = [model.folder / name for name in (DESCRIPTION, WEIGHTS)]
        return {file.name: checksum(file) for file in files}
    contents = {
        DESCRIPTION: json_text(model.description.model_dump(mode="json")).encode(),
        WEIGHTS: save(_savable(model)),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def adopt(folder: Path, postprocessing: PostprocessingConfig) -> None:
    """Write the post-processing of labels into the description of a model folder."""
    description = load_description(folder).model_copy(update={"postprocessing": postprocessing})
    save_description(folder, description)


def model_folder(path: str | Path) -> Path:
    """The first folder of `model_folders`."""
    return model_folders(path)[0]


def model_folders(path: str | Path, checkpoint: str | None = None) -> tuple[Path, ...]:
    """The model folders at a path or address.

    Args:
        path: a model folder, the folder of a run, or that of a cross-validation; or an address, as
            in `fetch_model`.
        checkpoint: `best` or `last` if weights of a checkpoint are wanted.

    Returns:
        `path` itself, `path/model` of a run, or one folder for each fold that is finished, or that
        has the checkpoint.

    Raises:
        ModelError: there is no model folder, or the model cannot be fetched.
    """
    path = fetch_model(path)
    for folder in (path, path / "model"):
        if (folder / DESCRIPTION).is_file():
            return (folder,)
    file = f"model/{WEIGHTS}" if checkpoint is None else f"{checkpoint}.ckpt"
    folds = [
        description
        for description in sorted(path.glob(f"{FOLD}*/model/{DESCRIPTION}"))
        if (description.parents[1] / file).is_file()
    ]
    if not folds:
        if checkpoint is not None and any(path.glob(f"{FOLD}*/model/{WEIGHTS}")):
            raise ModelError(
                f"{path}: expected {file} in its folds, found none; leave out the checkpoint"
            )
        runs = [path, *sorted(path.glob(f"{FOLD}*"))]
        raise ModelError(
            f"{path}: expected a run or a model folder with {DESCRIPTION}, found neither; "
            f"{advice_without_weights(runs) or 'name another path'}"
        )
    return tuple(description.parent for description in folds)


def newest_model(runs: Path) -> Path:
    """The run that finished last: its model folder, or the folder of the cross-validation.

    Raises:
        ModelError: no run has finished.
    """
    finished = [
        summary
        for summary in runs.glob(f"*/{SUMMARY}")
        if any(summary.parent.glob(f"model/{WEIGHTS}"))
        or any(summary.parent.glob(f"{FOLD}*/model/{WEIGHTS}"))
    ]
    if not finished:
        raise ModelError(
            f"expected a finished run under {runs}/, found none; train one, or name a model with "
            f"--model"
        )
    folder = max(finished, key=lambda path: path.stat().st_mtime).parent
    return folder / "model" if (folder / "model").is_dir() else folder


def _savable(model: Model) -> dict[str, torch.Tensor]:
    # Copied, because safetensors refuses weights that share memory, and a user's module may have
    # such weights.
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in _weights(model).items()
    }


def _weights(model: Model) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = weights_of(model.network).state_dict()
    return weights
