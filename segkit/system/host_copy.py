"""Copies of a GPU's values on the host, for which no step and no window waits."""

import torch
from torch import Tensor


class HostCopy:
    """A tensor's copy in host memory, which may still be on its way from a GPU.

    The copy is queued behind the work of the GPU, and the host goes on. So later changes of the
    tensor do not reach it. A tensor that is on the host already is kept itself: do not change it.

    Example:
        finite = HostCopy(logits.isfinite().all())
        …  # more work for the GPU
        if not bool(finite.values()):  # waits until the copy has arrived
    """

    def __init__(self, tensor: Tensor) -> None:
        """Start to copy."""
        tensor = tensor.detach()
        self.event: torch.cuda.Event | None = None
        self.held = tensor
        if tensor.device.type == "cuda":
            # Only a copy to pinned memory leaves the host free.
            self.held = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self.held.copy_(tensor, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record(torch.cuda.current_stream(tensor.device))
        elif tensor.device.type != "cpu":
            self.held = tensor.cpu()

    @property
    def arrived(self) -> bool:
        """True if `values` does not wait."""
        return self.event is None or self.event.query()

    def values(self) -> Tensor:
        """The values; waits until they have arrived."""
        if self.event is not None:
            self.event.synchronize()
        return self.held
