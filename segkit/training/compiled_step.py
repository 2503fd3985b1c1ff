"""Network and loss of a training step, compiled by `torch.compile` if requested or if it is faster.

The compiled function is not a part of the module, so names of weights and checkpoints stay the
same. `auto` decides by measuring:

    10 steps as usual ── enough time left? ── compile ── 10 compiled steps ── keep the faster way
"""

import logging
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from segkit.training.time_limit import wait_for_device

logger = logging.getLogger(__name__)

BACKEND = "inductor"
WARM_UP, MEASURED = 5, 10
"""Steps before the measured ones, and the measured ones, of each way."""
WORTH_IT = 600.0
"""Compiling takes about a minute. With `auto` it is tried only if so many seconds are left."""
GAIN = 0.95
"""Compiled steps are kept if they take less than this share of the time of the others."""

Compute = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A function of image and label that returns losses."""


class CompiledStep:
    """The losses of a step: computed as usual, or by the compiled function.

    Args:
        compute: the losses of image and label.
        wanted: `auto` measures both ways and keeps the faster; True compiles.
        clock: a function that returns the current time in seconds.
    """

    def __init__(
        self,
        compute: Compute,
        wanted: bool | Literal["auto"],
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.compute = compute
        self.deciding = wanted == "auto"
        self.active = wanted is True
        self.clock = clock
        self.compiled: Compute | None = None
        self.calls = 0
        self.started = 0.0
        self.plain = float("nan")
        """Mean seconds of a step that is not compiled."""

    def begin(self, seconds_left: Callable[[float], float], device: torch.device) -> None:
        """Decide how the next batch is computed; called before each.

        Args:
            seconds_left: the rest of the training in seconds, from the seconds of a batch.
            device: the device that trains.
        """
        if not self.deciding:
            return
        self.calls += 1
        if self.calls == WARM_UP + 1:
            wait_for_device(device)
            self.started = self.clock()
        if self.calls != WARM_UP + MEASURED + 1:
            return
        wait_for_device(device)
        taken = (self.clock() - self.started) / MEASURED
        if not self.active:
            self.plain, left = taken, seconds_left(taken)
            self.active = left >= WORTH_IT
            self.deciding, self.calls = self.active, 1
            if not self.active:
                logger.info("not compiled, because only %.0f s of training are left", left)
            return
        self.deciding, self.active = False, taken < GAIN * self.plain
        logger.info(
            "a batch takes %.3g ms compiled and %.3g ms uncompiled; %s",
            1000 * taken,
            1000 * self.plain,
            "it stays compiled" if self.active else "it is no longer compiled",
        )

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The losses of a batch."""
        if not self.active:
            return self.compute(image, label)
        if self.compiled is None:
            self.compiled = torch.compile(self.compute, dynamic=False, backend=BACKEND)
        try:
            return self.compiled(image, label)
        except TorchDynamoException as error:
            self.active = self.deciding = False
            reason = " ".join(str(error).split())[:200]
            logger.warning(
                "torch.compile cannot compile this step, so it runs uncompiled: %s", reason
            )
            return self.compute(image, label)
