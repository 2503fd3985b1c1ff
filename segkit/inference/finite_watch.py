"""Check that a network's outputs are finite, without a window that waits for the GPU."""

import torch
from torch import Tensor

from segkit.system.host_copy import HostCopy


class FiniteWatch:
    """Looks for NaN and infinity in outputs, after more work has been queued for the GPU.

    Example:
        finite = FiniteWatch()
        finite.add(logits)
        …  # more work for the GPU
        if not finite.so_far():
            raise …
    """

    def __init__(self) -> None:
        self.known = True
        self.flag: Tensor | None = None
        """Whether the values are finite that were added since the last answer, on their device."""
        self.copy: HostCopy | None = None

    def add(self, values: Tensor) -> None:
        """Look at values. Nothing waits for them here."""
        if values.numel():
            # The extremes are NaN or infinite if any value is, and need no copy of the values.
            finite = torch.stack([values.amin(), values.amax()]).isfinite().all()
            # If GPU memory ran out, the values before may be on another device.
            self.flag = finite if self.flag is None else finite & self.flag.to(finite.device)

    def send(self) -> None:
        """Start to copy the answer for all values so far to the host."""
        if self.flag is not None:
            self.copy, self.flag = HostCopy(self.flag), None

    def so_far(self) -> bool:
        """Whether all values before the last `send` were finite; waits until this is known."""
        if self.copy is not None:
            self.known = self.known and bool(self.copy.values())
            self.copy = None
        return self.known

    def at_end(self) -> bool:
        """Whether all values were finite; waits until this is known."""
        self.so_far()
        self.send()
        return self.so_far()
