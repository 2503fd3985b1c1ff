"""Check of the losses for NaN, without a step that waits for the GPU."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.errors import TrainingError

MOST_PENDING = 50
"""Largest number of steps by which a loss may be late; then the check waits for it."""


@dataclass
class _Pending:
    """A loss that may still be on its way from the GPU to the host."""

    step: int
    names: Sequence[str]
    value: Tensor
    arrived: torch.cuda.Event | None


class LossWatch:
    """Finds the first loss that is NaN or infinite, with its step and the cases of its batch.

    A loss on a CPU is checked at once. A loss on a GPU is copied while the next steps are prepared.
    """

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()

    def add(self, step: int, loss: Tensor, names: Sequence[str]) -> None:
        """Remember the loss of a step and the names of the cases in its batch."""
        value, arrived = loss.detach(), None
        if loss.device.type == "cuda":
            value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            value.copy_(loss.detach(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(_Pending(step, names, value, arrived))

    def check(self, *, wait: bool = False) -> None:
        """Check the losses that have arrived, or all losses if `wait` is true.

        Raises:
            TrainingError: a loss is NaN or infinite.
        """
        while self.pending:
            oldest = self.pending[0]
            if oldest.arrived is not None and not oldest.arrived.query():
                if not wait and len(self.pending) <= MOST_PENDING:
                    return
                oldest.arrived.synchronize()
            self.pending.popleft()
            if not bool(oldest.value.isfinite()):
                raise TrainingError(
                    f"the loss of step {oldest.step} is {float(oldest.value)}, with patches of "
                    f"{', '.join(oldest.names) or 'unnamed cases'}; check these images, lower "
                    f"train.learning_rate, or set trainer.precision to 32-true"
                )
