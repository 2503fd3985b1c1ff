"""AdamW that updates all weights in one kernel."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

FUSED_DEVICES = {"cpu", "cuda"}
"""Types of devices for which segkit uses PyTorch's kernel that updates all weights at once."""


def fused_adamw(parameters: Iterable[Tensor], **settings: Any) -> AdamW:
    """PyTorch's AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101), in one kernel if possible.

    On a CPU this takes a quarter to a half of the time of PyTorch's default. The loaded moments of
    a checkpoint are stored in the order of the weights, see `order_moments`.

    Args:
        parameters: the weights, on the device on which they are trained.
        settings: arguments of PyTorch's AdamW.

    Example: `fused_adamw(network.parameters(), lr=3e-3, weight_decay=1e-2)`.
    """
    held = list(parameters)
    fused = all(_can_be_fused(each) for each in held) or None
    optimiser = AdamW(held, **settings, fused=fused)
    optimiser.register_load_state_dict_post_hook(order_moments)
    return optimiser


def _can_be_fused(weight: Tensor) -> bool:
    """Whether the kernel can update a weight: real numbers that fill their memory.

    On a CPU the kernel would write between the elements of a weight that is a part of a larger
    tensor, such as `weight[:, :1]`.
    """
    on_device = weight.device.type in FUSED_DEVICES and weight.is_floating_point()
    # An empty copy keeps the strides if they leave no gap, and only then.
    return on_device and torch.empty_like(weight, device="meta").stride() == weight.stride()


@torch.no_grad()
def order_moments(optimiser: Optimizer) -> None:
    """Store what an optimiser keeps of each weight in the same order of memory as the weight.

    PyTorch's kernel for a CPU takes each element of a weight and of its moments by its place in
    memory, whatever the order of axes; the kernel for a GPU refuses different orders. New moments
    have the order of their weight, but those of a checkpoint have the order of the device on which
    it was written (see `order_for` in segkit/nn/normalisation.py).
    """
    for weight, kept in optimiser.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                ordered = torch.empty_like(weight, dtype=value.dtype, device=value.device)
                kept[name] = ordered.copy_(value)
