"""What is done when a device's memory runs out, so that a large scan still comes to its end."""

import logging
from collections.abc import Callable, Collection

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines import Engine

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
