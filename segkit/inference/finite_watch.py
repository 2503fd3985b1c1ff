"""Check that a network's outputs are finite, without a window that waits for the GPU."""

from collections import deque

import torch
from torch import Tensor

from segkit.system.host_copy import HostCopy


class FiniteWatch:
    """Looks for NaN and infinity in outputs, after more work has been queued for the GPU."""

    def __init__(self) -> None:
        self.pending: deque[HostCopy] = deque()

    def add(self, values: Tensor) -> None:
        """Look at values. Nothing waits for them here."""
        if values.numel():
            # The extremes are NaN or infinite if any value is, and need no copy of the values.
            extremes = torch.stack([values.amin(), values.amax()])
            self.pending.append(HostCopy(extremes.isfinite().all()))

    def all_finite(self) -> bool:
        """Whether all values since the last call were finite; waits until this is known."""
        while self.pending:
            if not bool(self.pending.popleft().values()):
                return False
        return True
