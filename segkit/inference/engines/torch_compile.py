"""`torch.compile`: the network as one graph, in kernels made for this machine."""

from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor

from segkit.errors import ModelError
from segkit.inference.engines.torch_eager import TorchEngine, run
from segkit.nn.map_tap import edited


class CompiledEngine(TorchEngine):
    """PyTorch through its own compiler, one graph for each set of keys.

    The first call of each compiles, which takes from seconds to minutes; torch keeps what it
    compiled in a cache of its own (`TORCHINDUCTOR_CACHE_DIR`). On a CPU it needs a C++ compiler.
    Windows go through one by one, so that there is one shape alone, and a network with edited maps
    runs as it is, for each edit would be compiled anew. Raises ModelError where the compiler fails.
    """

    @cached_property
    def compiled(self) -> Callable[..., dict[str, Tensor]]:
        """`run`, compiled for one shape."""
        return torch.compile(run, fullgraph=True, dynamic=False)

    def compute(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        """The outputs for windows on the engine's device."""
        if edited(self.network):
            return super().compute(windows, keys)
        names = tuple(sorted(keys))
        try:
            each = [self.compiled(self.network, one, names) for one in windows.split(1)]
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"torch.compile cannot compile this network here: {reason}; use --engine torch"
            ) from error
        return {name: torch.cat([outputs[name] for outputs in each]) for name in each[0]}
