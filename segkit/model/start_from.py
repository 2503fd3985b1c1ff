"""A network that begins with the weights of another model: fine-tuning."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.config.training import OtherChannels
from segkit.errors import ModelError, first_few
from segkit.model.folder import Model, load_description, load_model, model_folders, weights_in
from segkit.nn.network import SegmentationNetwork, weights_of

FIRST_LAYERS = {"convolution": "encoder.0.1.layers.0.weight", "mednext": "encoder.0.1.0.weight"}
"""For each kind of block, the name of the only kernel of a U-Net that sees the channels of the
image. If an image has no fewer channels than the finest level, `mednext` has none."""
OUTPUTS = re.compile(r"(heads\.\d+|presence(\.classify)?)\.(weight|bias)|presence\.queries")
"""Names of the weights of a U-Net that have a row for each class or region."""
CONVOLUTION = re.compile(r"(encoder\.\d+\.1|decoder\.\d+\.block)\..*weight")
"""Names of the weights in the blocks of a U-Net."""
NAMES_TOLD = 4


@dataclass(frozen=True)
class TakenOver:
    """Which weights of a network are those of another model."""

    model: str
    """The path of the other model."""
    copied: int
    """The number of weights (tensors) that were copied."""
    of: int
    """The number of weights that the network has."""
    channels: Mapping[str, str] = field(default_factory=dict)
    """For each channel of the image, the origin of its kernels in the first layer; empty if the
    first layer was copied as it is, or begins anew."""
    anew: tuple[str, ...] = ()
    """Names of the weights that are not copied."""
    reordered: bool = False
    """Whether both have the same classes in another order, so that the rows of the layers that
    compute logits were copied by the names of the classes."""
    other_names: tuple[str, ...] = ()
    """Names of the model's channels or classes, as in `channels T1`, if a module from Python has
    as many others. Its weights are copied nevertheless."""

    @property
    def told(self) -> str:
        """A summary in one line."""
        parts = [f"{self.copied} of {self.of} weights were copied from {self.model}"]
        if self.channels:
            each = [f"{name}: {source}" for name, source in self.channels.items()]
            parts.append(f"kernels of the first layer for {first_few(each, NAMES_TOLD)}")
        if self.reordered:
            parts.append("those that compute logits by the names of the classes")
        if self.other_names:
            parts.append(
                f"also those for its {' and '.join(self.other_names)}, because segkit does not "
                "know which layers of a module from Python see them"
            )
        if self.anew:
            parts.append(f"these begin anew: {first_few(list(self.anew), NAMES_TOLD)}")
        return "; ".join(parts)

    def as_json(self) -> dict[str, Any]:
        """The same for a summary."""
        return {
            "model": self.model,
            "copied": self.copied,
            "of": self.of,
            "channels": dict(self.channels),
            "anew": list(self.anew),
            "reordered": self.reordered,
            "other_names": list(self.other_names),
            "told": self.told,
        }


def start_from(
    network: SegmentationNetwork,
    path: Path,
    *,
    description: ModelDescription,
    other_channels: OtherChannels = "mean",
) -> TakenOver:
    """Copy weights of a model into a network, for each name and shape that both have.

    If the model has other classes, or regions instead of classes, the layers that compute its
    logits are not copied. If it has the same in another order, they are copied by their names. If
    it has other channels, its first layer is fitted to the channels of the network by their names
    (see `fitted_kernels`). For a module from Python, only names and shapes count.

    Args:
        network: the network; it changes in place.
        path: a model folder, the folder of a run, or an address (see `fetch_model`).
        description: the description of the network.
        other_channels: the kernels of channels that the model does not have.

    Returns:
        Which weights were copied.

    Raises:
        ModelError: there is no model or more than one, or no convolution in the blocks of the
            U-Net fits. (Between networks of different kinds or widths, only biases would fit, and
            these are useless.) Or the channels differ, and more layers than the first see them. Or
            the network is a module from Python, and no matrix or kernel fits, the channels or
            classes are the model's in another order, or `other_channels` is given.
    """
    folders = model_folders(path)
    if len(folders) > 1:
        raise ModelError(
            f"{path}: expected one model, found the models of {len(folders)} folds; choose one, "
            f"such as {folders[0].parent}"
        )
    if description.network.given is not None:
        if other_channels != "mean":
            raise ModelError(
                f"train.other_channels is {other_channels}, but segkit does not know which layers "
                "of a module from Python see the channels; remove it"
            )
        return _module_from(network, folders[0], path, description)
    model = load_model(path)
    given: dict[str, Tensor] = weights_of(model.network).state_dict()
    own: dict[str, Tensor] = weights_of(network).state_dict()
    order = _order_of_classes(model.description, description)
    given = _in_order(given, order, bool(description.regions))
    fitting = {
        key: value for key, value in given.items() if key in own and own[key].shape == value.shape
    }
    if not any(CONVOLUTION.match(key) and value.ndim > 1 for key, value in fitting.items()):
        raise ModelError(
            f"{path}: none of its weights fits the network; give the network the same "
            "network.spatial_dims, channels, strides and kernels"
        )
    copied = len(fitting)
    first, sources = _first_layer(model, own, description, other_channels)
    if first is not None:
        name = FIRST_LAYERS[description.network.block.kind]
        copied -= name in fitting
        fitting[name] = first
    weights_of(network).load_state_dict(fitting, strict=False)
    anew = tuple(key for key in own if key not in fitting)
    reordered = order is not None and order != sorted(order)
    return TakenOver(str(path), copied, len(own), sources, anew, reordered)


def _module_from(
    network: SegmentationNetwork, folder: Path, path: Path, description: ModelDescription
) -> TakenOver:
    """Copy weights of a model into a module from Python, by their names and shapes.

    Args:
        network: the network that contains the module.
        folder: the model folder.
        path: the path that the user gave, for messages.
        description: the description of the network.
    """
    other = load_description(folder)
    given, own = weights_in(folder), weights_of(network).state_dict()
    fitting = {
        key: value for key, value in given.items() if key in own and own[key].shape == value.shape
    }
    if not any(value.ndim > 1 for value in fitting.values()):
        raise ModelError(
            f"{path}: none of its weights has the name and shape of a weight of the module, which "
            f"has weights such as {first_few(list(own), NAMES_TOLD)}; give a model that was "
            "trained with such a module"
        )
    others = []
    for what, theirs, ours in (
        ("channels", list(other.channels), list(description.channels)),
        ("classes", list(other.labels)[1:], list(description.labels)[1:]),
    ):
        if theirs != ours and sorted(theirs) == sorted(ours):
            raise ModelError(
                f"{path}: expected the {what} {', '.join(ours)}, found them in the order "
                f"{', '.join(theirs)}, and segkit does not know which layers of a module from "
                f"Python see them; give the dataset the {what} in this order"
            )
        if theirs != ours and len(theirs) == len(ours):
            others.append(f"{what} {', '.join(theirs)}")
    weights_of(network).load_state_dict(fitting, strict=False)
    anew = tuple(key for key in own if key not in fitting)
    return TakenOver(str(path), len(fitting), len(own), anew=anew, other_names=tuple(others))


def _order_of_classes(given: ModelDescription, own: ModelDescription) -> list[int] | None:
    """For each class or region of a network, but the background, its place among a model's.

    None if the names differ, or if one has classes and the other has regions.
    """
    names, own_names = list(given.labels)[1:], list(own.labels)[1:]
    if bool(given.regions) != bool(own.regions) or set(names) != set(own_names):
        return None
    return [names.index(name) for name in own_names]


def _in_order(
    given: Mapping[str, Tensor], order: list[int] | None, is_of_regions: bool
) -> dict[str, Tensor]:
    """The weights with the rows of classes in this order; without these layers if it is None."""
    if order is None:
        return {key: value for key, value in given.items() if not OUTPUTS.fullmatch(key)}
    with_background = order if is_of_regions else [0, *(place + 1 for place in order)]
    return {
        key: value[with_background if key.startswith("heads.") else order]
        if OUTPUTS.fullmatch(key)
        else value
        for key, value in given.items()
    }


def fitted_kernels(
    given: Tensor,
    own: Tensor,
    *,
    given_channels: Sequence[str],
    channels: Sequence[str],
    other_channels: OtherChannels,
) -> tuple[Tensor, dict[str, str]]:
    """Kernels of a first layer for the channels of another image, and the origin of each.

    A channel whose name is also in the model gets the model's kernels. If no name is in both, and
    both have the same number of channels, channels are assigned in order. Every other channel gets
    the `mean` of all of the model's kernels, the kernels of the model's channels in turn
    (`copied`), `zero`, or its own new ones (`anew`). Kernels are not scaled, because a
    normalisation follows them.

    Args:
        given: the model's kernels, (out, channel, ...).
        own: the network's kernels.
        given_channels: names of the model's channels.
        channels: names of the network's channels.
        other_channels: the kernels of channels that the model does not have.
    """
    known = {name: place for place, name in enumerate(given_channels)}
    in_order = len(channels) == len(given_channels) and not known.keys() & set(channels)
    kernels, sources = own.clone(), {}
    others = 0
    for place, name in enumerate(channels):
        found = known.get(name, place if in_order else None)
        if found is None and other_channels == "copied":
            found, others = others % len(given_channels), others + 1
        if found is not None:
            kernels[:, place] = given[:, found]
            sources[name] = f"those of {given_channels[found]}"
        elif other_channels == "mean":
            kernels[:, place] = given.mean(dim=1)
            sources[name] = "the mean of all"
        elif other_channels == "zero":
            kernels[:, place] = 0
            sources[name] = "zero"
        else:
            sources[name] = "new ones"
    return kernels, sources


def _first_layer(
    model: Model,
    own: Mapping[str, Tensor],
    description: ModelDescription,
    other_channels: OtherChannels,
) -> tuple[Tensor | None, dict[str, str]]:
    """Kernels of the first layer and their origin; None if it is copied or begins anew."""
    theirs, channels = model.description.channels, description.channels
    name = FIRST_LAYERS[description.network.block.kind]
    given, kernels = weights_of(model.network).state_dict().get(name), own.get(name)
    first_classes = [
        stage.classes if stage else []
        for stage in (model.description.first_stage, description.first_stage)
    ]
    same_labels = first_classes[0] == first_classes[1]
    if channels == theirs and same_labels:
        return None, {}
    if given is None or kernels is None:
        raise ModelError(
            f"{model.folder}: expected the channels {', '.join(channels)} and the same first stage "
            f"or none, found {', '.join(theirs)}, and several layers see them; use the same "
            "channels, or networks with more network.channels at the finest level than the image "
            "has channels"
        )
    if given.shape[:1] != kernels.shape[:1] or given.shape[2:] != kernels.shape[2:]:
        return None, {}
    # Behind the channels of the image stand those of the labels of a first stage, if there is one.
    count, labels = len(channels), given[:, len(theirs) :]
    image, sources = fitted_kernels(
        given[:, : len(theirs)],
        kernels[:, :count],
        given_channels=theirs,
        channels=channels,
        other_channels=other_channels,
    )
    return torch.cat([image, labels if same_labels else kernels[:, count:]], dim=1), sources
