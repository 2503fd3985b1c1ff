"""What is done when a device's memory runs out, so that a large scan still comes to its end."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines.torch_eager import Engine
from segkit.inference.ensemble import MergedRows, consult
from segkit.inference.source_rows import SourceRows

logger = logging.getLogger(__name__)


class SparingEngine:
    """An engine on a device; when memory runs out there it gives up first sums, then the device.

    Sums over windows are kept where the outputs come from. The first time that memory runs out,
    that batch goes to `make_host_engine()` and outputs go to the host from then on, which takes
    the sums along (`windows.Blend`). If it runs out once more, all goes to the host's engine.
    """

    def __init__(self, engine: Engine, make_host_engine: Callable[[], Engine]) -> None:
        self.engine: Engine | None = engine
        self.make_host_engine = make_host_engine
        self.host_engine: Engine | None = None

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, on the device or on the host."""
        if self.engine is not None:
            try:
                outputs = self.engine(windows, keys)
            except torch.OutOfMemoryError:
                pass  # leaving lets go of what the failed call held
            else:
                if self.host_engine is None:
                    return outputs
                return {key: output.cpu() for key, output in outputs.items()}
            self._give_up()
        assert self.host_engine is not None
        return self.host_engine(windows.cpu(), keys)

    def _give_up(self) -> None:
        if self.host_engine is None:
            logger.warning("the device's memory ran out; sums over windows are kept on the host")
            self.host_engine = self.make_host_engine()
        else:
            logger.warning("the device's memory ran out again; the network runs on the CPU")
            self.engine = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


class SparingCouncil:
    """Consults members about rows of a volume; where the device's memory runs out, on the host.

    What rows become on the volume's own grid may be far larger than what a slab of them is. From
    the first time on that it does not fit, rows are taken to the host before.
    """

    def __init__(
        self, *, shares: bool, uncertainty: bool, temperature: float | None = None
    ) -> None:
        self.consult = partial(
            consult, shares=shares, uncertainty=uncertainty, temperature=temperature
        )
        self.on_host = False

    def __call__(self, members: Sequence[SourceRows]) -> MergedRows:
        """The verdict of `ensemble.consult`."""
        if not self.on_host:
            try:
                return self.consult(members)
            except torch.OutOfMemoryError:
                pass  # leaving lets go of what the failed call held
            logger.warning("the device's memory ran out; labels are worked out on the host")
            self.on_host = True
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        return self.consult([rows.on_host() for rows in members])
