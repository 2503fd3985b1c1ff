"""Check of the losses for NaN, without a step that waits for the GPU."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from segkit.errors import TrainingError
from segkit.system.host_copy import HostCopy

MOST_PENDING = 50
"""Largest number of steps by which a loss may be late; then the check waits for it."""


@dataclass
class _Pending:
    """A loss that may still be on its way from the GPU to the host."""

    step: int
    names: Sequence[str]
    value: HostCopy


class LossWatch:
    """Finds the first loss that is NaN or infinite, with its step and the cases of its batch.

    A loss on a CPU is checked at once. A loss on a GPU is copied while the next steps are prepared.
    """

    def __init__(self) -> None:
        self.pending: deque[_Pending] = deque()

    def add(self, step: int, loss: Tensor, names: Sequence[str]) -> None:
        """Remember the loss of a step and the names of the cases in its batch."""
        self.pending.append(_Pending(step, names, HostCopy(loss)))

    def check(self, *, wait: bool = False) -> None:
        """Check the losses that have arrived, or all losses if `wait` is true.

        Raises:
            TrainingError: a loss is NaN or infinite.
        """
        while self.pending:
            oldest = self.pending[0]
            if not (oldest.value.arrived or wait) and len(self.pending) <= MOST_PENDING:
                return
            self.pending.popleft()
            loss = oldest.value.values()
            if not bool(loss.isfinite()):
                raise TrainingError(
                    f"the loss of step {oldest.step} is {float(loss)}, with patches of "
                    f"{', '.join(oldest.names) or 'unnamed cases'}; check these images, lower "
                    f"train.learning_rate, or set trainer.precision to 32-true"
                )
