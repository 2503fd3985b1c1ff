"""What a training step takes of memory, told before there is any: by one that computes nothing.

The network, its loss and the way back run on tensors that have shapes and no numbers
(`FakeTensorMode`), while every block of memory that they would take is counted from when it is made
until it is let go. So the estimate knows every layer and every kind of attention without a formula
for each. Not counted are the libraries' own (workspaces of cuDNN and oneDNN, CUDA's half gigabyte)
and what the augmentation takes before the network's first layer.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.normalisation import CHANNELS_LAST

MOMENTS = {"adamw": 2, "sgd": 1}
"""Numbers that an optimiser keeps for each weight."""


@dataclass(frozen=True)
class StepMemory:
    """Bytes that one training step takes at its peak, by what takes them."""

    weights: int
    """With the buffers of normalisation and, where the weights are averaged, the average."""
    gradients: int
    moments: int
    """The optimiser's."""
    patches: int
    """As they were cut, with their margins."""
    activations: int
    """What the layers and the loss keep for the way back."""
    passing: int
    """What is made on the way and let go, where all together is the most."""

    @property
    def total(self) -> int:
        """The peak."""
        held = self.weights + self.gradients + self.moments + self.patches
        return held + self.activations + self.passing

    def __str__(self) -> str:
        """The peak and its parts, in words."""
        weights = self.weights + self.gradients + self.moments
        return (
            f"{in_words(self.total)}: {in_words(self.activations + self.passing)} of activations, "
            f"{in_words(weights)} of weights, their gradients and the optimiser's moments, "
            f"{in_words(self.patches)} of patches"
        )


def in_words(count: float) -> str:
    """Bytes as MB or GB (10⁶ and 10⁹)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def step_memory(
    network: SegmentationNetwork,
    *,
    in_channels: int,
    patch_size: Sequence[int],
    margin: Sequence[int] = (0, 0, 0),
    batch_size: int,
    moments: int,
    averaged: bool = False,
    half: bool = False,
) -> StepMemory:
    """What a training step of a network, which it leaves as it was, takes at its peak.

    Args:
        network: in training mode.
        patch_size: in voxels of a volume.
        margin: what is cut beyond either end of a patch.
        moments: numbers that the optimiser keeps for each weight.
        averaged: whether a running average of the weights is kept.
        half: whether layers compute in half precision (mixed, so that weights stay in single).
    """
    cut_size = [size + 2 * beyond for size, beyond in zip(patch_size, margin, strict=True)]
    trained = Supervising(network)
    with FakeTensorMode(), Counting() as counted:
        parameters = {
            name: torch.empty(
                weight.shape,
                dtype=weight.dtype,
                # As a CPU trains them.
                memory_format=CHANNELS_LAST.get(weight.ndim, torch.contiguous_format),
            ).requires_grad_()
            for name, weight in trained.named_parameters()
        }
        buffers = {
            name: torch.empty(buffer.shape, dtype=buffer.dtype)
            for name, buffer in trained.named_buffers()
        }
        weights = [*parameters.values(), *buffers.values()]
        held = {
            "weights": [*weights, *(torch.empty_like(weight) for weight in weights if averaged)],
            "moments": [torch.empty_like(p) for p in parameters.values() for _ in range(moments)],
            "patches": [
                torch.empty(batch_size, in_channels, *cut_size),
                torch.empty(batch_size, *cut_size, dtype=torch.uint8),
            ],
            # Those of one step are let go when the next begins its way back.
            "gradients": [torch.empty_like(parameter) for parameter in parameters.values()],
        }
        sizes = {name: sum(map(_size, tensors)) for name, tensors in held.items()}
        image = torch.empty(batch_size, in_channels, *patch_size)
        label = torch.empty(batch_size, *patch_size, dtype=torch.uint8)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            levels = functional_call(trained, {**parameters, **buffers}, (image,))
            loss = deep_dice_cross_entropy(levels, label, pool_batch=False)
        activations = counted.now - sum(sizes.values())
        del held["gradients"]
        loss.backward()
    passing = counted.peak - activations - sum(sizes.values())
    return StepMemory(**sizes, activations=activations, passing=passing)


class Supervising(nn.Module):
    """A network whose call is its training."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Logits of every supervised level."""
        return self.network.supervised(image).levels


class Counting(TorchDispatchMode):
    """Counts the bytes of every tensor made within it, from when it is made until it is let go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The result of one operation, whose memory is counted."""
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._let_go, key, size)

    def _let_go(self, key: int, size: int) -> None:
        self._known.remove(key)
        self.now -= size


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
