"""Copies from the host to a GPU for which nothing waits."""

import torch
from torch import Tensor


def queued_to(values: Tensor, device: torch.device) -> Tensor:
    """Values on a device. A GPU takes those of the host from pinned memory, so nothing waits.

    (Copies in the other direction are `segkit.system.host_copy.HostCopy`.)

    Args:
        values: values on the host or on the device.
        device: the device.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)
