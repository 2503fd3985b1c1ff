"""A model folder: `model.json` describes the model, `weights.safetensors` holds its weights.

The models of a first stage, whose labels the network takes beside the image, lie in `first/0`,
`first/1` and so on. A run's model folder has no weights before its training ends; until then, and
after it, the run's checkpoints have some. No file of a model folder can run code. The weights of a
module from Python (`network.given`) are its own state; load it with the same module.
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
from segkit.io.atomic import json_text, whole, write_json
from segkit.io.checksums import checksum
from segkit.io.picture_rules import PictureRules
from segkit.io.safe_text import read_json_object
from segkit.model.build import build_network, weight_shapes, wrap_network
from segkit.model.checkpoint import checkpoint_path, read_checkpoint, weights_of_network
from segkit.nn.network import SegmentationNetwork, weights_of

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
FIRST = "first"
SUMMARY = "summary.json"
"""The file of a finished run, or of a finished cross-validation, beside its models."""
FOLD = "fold_"
"""The name of a fold's run in the folder of a cross-validation begins so."""
CONVOLUTION = re.compile(r"(encoder\.\d+\.1|decoder\.\d+\.block)\..*weight")
"""Names of weights in the blocks of a U-Net."""


@dataclass(frozen=True, eq=False)
class Model:
    """A network, and all else that a prediction needs."""

    description: ModelDescription
    """Channels, labels, spacing, normalisation and architecture, as in `model.json`."""
    network: SegmentationNetwork
    """Takes volumes, (batch, channel, x, y, z) in RAS+ order at the description's spacing."""
    first: "tuple[Model, ...]" = ()
    """The models of the first stage, if the description has one."""
    folder: Path | None = None
    """The folder that it was read from; None if its weights come from elsewhere."""


def save_model(folder: str | Path, model: Model) -> None:
    """Write a model folder.

        segkit.save_model("my_model", model)

    Args:
        folder: to write to; it is made if it is not there.
        model: with the models of its first stage, if any.

    Raises:
        ModelError: the weights cannot be written.
        OSError: the folder cannot be written to.
    """
    folder = Path(folder)
    save_firsts(folder, model.first)
    with whole(folder / WEIGHTS) as partial:
        try:
            save_file(_savable(model), partial)
        except SafetensorError as error:
            raise ModelError(f"{folder / WEIGHTS}: cannot be written: {error}") from None
    save_description(folder, model.description)


def save_firsts(folder: Path, first: Sequence[Model]) -> None:
    """Write the models of a first stage into a model folder."""
    for number, model in enumerate(first):
        save_model(folder / FIRST / str(number), model)


def save_description(folder: Path, description: ModelDescription) -> None:
    """Write the description of a model into its folder."""
    write_json(folder / DESCRIPTION, description.model_dump(mode="json"))


def described_model(description: ModelDescription, module: nn.Module) -> Model:
    """A model of any module that gives logits, for `Predictor` and for export.

        model = segkit.described_model(description, module)
        labels = segkit.Predictor(model)(scan).labels

    Args:
        description: how the module was trained; its `network.given.multiple` says what the sizes of
            the module's input must be multiples of.
        module: gives logits (batch, class or region, *space) of images (batch, channel, *space), in
            RAS+ order at the description's spacing; *space is (x, y, z), or a plane of it.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelError: the description is that of a U-Net or has a first stage, or the module's state
            cannot be saved.
    """
    return Model(description, wrap_network(description, module).eval())


def picture_rules_of(
    description: ModelDescription, pixel_size: Sequence[str] | None = None
) -> PictureRules:
    """How pictures are read for a model.

    Args:
        description: of the model.
        pixel_size: wins over what files say, such as ["4 nm"].

    Raises:
        ModelError: the description names colours of labels that it does not have, or the size is
            no length.
    """
    try:
        return description.picture_rules(pixel_size)
    except ValueError as error:
        raise ModelError(f"{description.run}: {error}") from None


def load_model(
    path: str | Path, *, network: nn.Module | None = None, checkpoint: str | None = None
) -> Model:
    """Read a model onto the CPU, in evaluation mode.

        model = segkit.load_model("runs/my_run")

    Args:
        path: a model folder, or the folder of a run; of a cross-validation its first fold is read.
        network: the module that the model was trained with, if it came from Python; it gets the
            weights.
        checkpoint: `best` or `last`, to take the weights from that checkpoint of a run, which may
            still be training; if not given, they are those that the run ended with.

    Raises:
        ModelError: there is no model, its weights do not fit its description, or its first stage
            does not fit it.
    """
    folder = model_folders(Path(path), checkpoint)[0]
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
    if checkpoint is None:
        return _with_weights(folder, description, tuple(first), network)
    source = checkpoint_path(folder, checkpoint)
    built = wrap_network(description, network) if network else build_network(description)
    try:
        built.load_state_dict(_finite(weights_of_network(read_checkpoint(source))))
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{source}: does not fit {folder / DESCRIPTION}: {reason}") from None
    built.cpu().eval()
    return Model(description, built, tuple(first))


def check_first_stage(source: Path, first: ModelDescription, classes: Sequence[str]) -> None:
    """Raise ModelError unless the model has these classes and no first stage of its own."""
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
    """The description in a model folder. Raises ModelError if it cannot be read."""
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
        begun = [name for name in ("best", "last") if (folder.parent / f"{name}.ckpt").is_file()]
        advice = f"; the run has not ended, so ask for its checkpoint: {' or '.join(begun)}"
        raise ModelError(f"{folder}: expected {WEIGHTS} in it, found none{advice if begun else ''}")
    try:
        # Compared with the file's header before anything is allocated, so that neither network nor
        # weights can be larger than the file.
        if module is None:
            _check_fit(_shapes_in(source), weight_shapes(description))
            network = build_network(description)
        else:
            network = wrap_network(description, module)
        model = Model(description, network, first, folder)
        weights_of(network).load_state_dict(_finite(load_file(source)))
    except (ConfigError, SafetensorError, OSError, ValueError, RuntimeError, MemoryError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder}: its weights do not fit its {DESCRIPTION}: {reason}") from None
    # A module from Python may lie on a GPU.
    model.network.cpu().eval()
    return model


def _finite(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same weights. Raises ValueError if one is no number."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} holds values that are not numbers")
    return weights


def _shapes_in(source: Path) -> dict[str, tuple[int, ...]]:
    """The name and shape of each tensor in a weights file, by its header."""
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
    """The SHA-256 of each file of a model: as it is on disk, or as `save_model` would write it."""
    if model.folder is not None:
        files = [model.folder / name for name in (DESCRIPTION, WEIGHTS)]
        return {file.name: checksum(file) for file in files}
    contents = {
        DESCRIPTION: json_text(model.description.model_dump(mode="json")).encode(),
        WEIGHTS: save(_savable(model)),
    }
    return {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}


def adopt(folder: Path, postprocessing: PostprocessingConfig) -> None:
    """Write the post-processing of predicted labels into the description of a model folder."""
    description = load_description(folder).model_copy(update={"postprocessing": postprocessing})
    save_description(folder, description)


def start_from(network: SegmentationNetwork, path: Path) -> str:
    """Copy the weights of a model whose name and shape a network has too; say how many they are.

    A model of other classes or channels lends all but its first or last layers.

    Raises ModelError if there is no model, if there are several, or if no convolution of its blocks
    fits: a network of another kind or width would take only biases, which teach nothing.
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


def model_folders(path: Path, checkpoint: str | None = None) -> tuple[Path, ...]:
    """The folders of the models at a path. Raises ModelError if there is none.

    It is `path` itself, `path/model` of a run, or one for each fold of a cross-validation that is
    finished, or that has the `checkpoint` that is asked for.
    """
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
        raise ModelError(
            f"{path}: expected a run or a model folder with {DESCRIPTION}, found neither"
        )
    return tuple(description.parent for description in folds)


def newest_model(runs: Path) -> Path:
    """The model folder of the run, or the folder of the cross-validation, that finished last.

    Raises ModelError if there is none.
    """
    finished = [
        summary
        for summary in runs.glob(f"*/{SUMMARY}")
        if any(summary.parent.glob(f"model/{WEIGHTS}"))
        or any(summary.parent.glob(f"{FOLD}*/model/{WEIGHTS}"))
    ]
    if not finished:
        raise ModelError(f"no finished run under {runs}/; train one, or name one with --model")
    folder = max(finished, key=lambda path: path.stat().st_mtime).parent
    return folder / "model" if (folder / "model").is_dir() else folder


def _savable(model: Model) -> dict[str, torch.Tensor]:
    # Copied: safetensors refuses weights that share memory, as those of a given module may.
    return {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in _weights(model).items()
    }


def _weights(model: Model) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = weights_of(model.network).state_dict()
    return weights
