"""Losses looked at when they arrive on the host, which no step waits for."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from segkit.errors import TrainingError

MOST_PENDING = 50
"""Steps after which the oldest loss is waited for: so late, at most, is a fault told."""


@dataclass
class _Pending:
    """A loss on its way."""

    step: int
    names: Sequence[str]
    value: Tensor
    arrived: torch.cuda.Event | None


class LossWatch:
    """Tells of the first loss that is no number, with its step and the cases of its batch.

    A loss on a CPU is looked at at once. That of a GPU is copied while the next steps are prepared.
    """

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()

    def add(self, step: int, loss: Tensor, names: Sequence[str]) -> None:
        """Keep the loss of a step in mind, and the names of the cases in its batch."""
        value, arrived = loss.detach(), None
        if loss.device.type == "cuda":
            value = torch.empty((), dtype=loss.dtype, pin_memory=True)
            value.copy_(loss.detach(), non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        self.pending.append(_Pending(step, names, value, arrived))

    def check(self, *, wait: bool = False) -> None:
        """Look at the losses that have arrived, or at all of them if it may `wait`.

        Raises TrainingError for a loss that is no number.
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
                    f"the loss of step {oldest.step} is {float(oldest.value)}, its patches are of "
                    f"{', '.join(oldest.names) or 'unnamed cases'}; look at these images, or lower "
                    f"train.learning_rate, or set trainer.precision to 32-true"
                )
