"""Continue with less GPU memory, or in host memory, if GPU memory runs out."""

import logging
from collections.abc import Callable, Collection, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines.torch_eager import Engine
from segkit.inference.ensemble import MergedRows, combine
from segkit.inference.source_rows import SourceRows

logger = logging.getLogger(__name__)


class MemoryFallbackEngine:
    """An engine on a GPU that first moves its sums, then itself, to the host if memory runs out.

    The sums over windows are on the device of the outputs (`windows.Blend`). When memory runs out
    for the first time, `make_host_engine()` computes that batch, and from then on all outputs are
    copied to host memory, so that the sums move there too. If memory runs out again, the host's
    engine computes everything.
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
                pass  # when this block ends, the memory of the failed call is free
            else:
                if self.host_engine is None:
                    return outputs
                return {key: output.cpu() for key, output in outputs.items()}
            self._give_up()
        assert self.host_engine is not None
        return self.host_engine(windows.cpu(), keys)

    def _give_up(self) -> None:
        if self.host_engine is None:
            logger.warning("out of GPU memory; sums over windows are kept in host memory")
            self.host_engine = self.make_host_engine()
        else:
            logger.warning("out of GPU memory again; the network runs on the CPU")
            self.engine = None
        torch.cuda.empty_cache()


class OneWindowEngine:
    """An engine that computes windows one by one after memory ran out for several."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.one_by_one = False

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """Logits of the windows, and the maps of these keys."""
        if not self.one_by_one:
            try:
                return self.engine(windows, keys)
            except torch.OutOfMemoryError:
                pass  # when this block ends, the memory of the failed call is free
            torch.cuda.empty_cache()
            self.one_by_one = len(windows) > 1
        each = [
            {key: output.clone() for key, output in self.engine(window, keys).items()}
            for window in windows.split(1)
        ]
        return {key: torch.cat([outputs[key] for outputs in each]) for key in each[0]}


class RowCombiner:
    """Combines the rows of several models; in host memory if GPU memory runs out.

    Rows on the volume's own grid may be much larger than a slab. Once they do not fit into GPU
    memory, all following rows are copied to the host first.
    """

    def __init__(
        self, *, probabilities: bool, uncertainty: bool, temperature: float | None = None
    ) -> None:
        self.combine = partial(
            combine,
            probabilities=probabilities,
            uncertainty=uncertainty,
            temperature=temperature,
        )
        self.on_host = False

    def __call__(self, members: Sequence[SourceRows]) -> MergedRows:
        """The result of `ensemble.combine`."""
        if not self.on_host:
            try:
                return self.combine(members)
            except torch.OutOfMemoryError:
                pass  # when this block ends, the memory of the failed call is free
            logger.warning("out of GPU memory; labels are computed in host memory")
            self.on_host = True
            torch.cuda.empty_cache()
        return self.combine([rows.on_host() for rows in members])
