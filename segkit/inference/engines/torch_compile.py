"""Engine that compiles the network with `torch.compile`, for this machine."""

from collections.abc import Callable, Collection
from functools import cached_property

import torch
from torch import Tensor

from segkit.errors import ModelError
from segkit.inference.engines.torch_eager import TorchEngine, run
from segkit.nn.map_tap import edited


class CompiledEngine(TorchEngine):
    """PyTorch with its own compiler. Each set of keys has its own graph.

    The first call with a set of keys compiles the graph, which takes seconds to minutes; PyTorch
    caches it (`TORCHINDUCTOR_CACHE_DIR`). On a CPU this needs a C++ compiler. Windows are computed
    one by one, so that only one shape is compiled. A network with edited maps runs without
    compilation, because each edit would need a new graph.

    Raises:
        ModelError: the compiler fails.
    """

    @cached_property
    def compiled(self) -> Callable[..., dict[str, Tensor]]:
        """`run`, compiled for one shape."""
        return torch.compile(run, fullgraph=True, dynamic=False)

    def compute(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        """Outputs of `run` for windows on the engine's device."""
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
