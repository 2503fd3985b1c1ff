"""CUDA streams and graphs that a CPU plays, to record a step without a GPU."""

import contextlib
from collections.abc import Iterator
from unittest import mock


class Stream:
    """Runs at once."""

    def wait_stream(self, other: "Stream") -> None:
        pass


@contextlib.contextmanager
def played_cuda(graph: type) -> Iterator[None]:
    """Let streams run at once, and let CUDA graphs be of this type."""

    def inside(*_: object, **__: object) -> contextlib.nullcontext[None]:
        return contextlib.nullcontext()

    with contextlib.ExitStack() as patches:
        for name, fake in (
            ("torch.cuda.Stream", Stream),
            ("torch.cuda.current_stream", Stream),
            ("torch.cuda.stream", inside),
            ("torch.cuda.set_stream", inside),
            ("torch.cuda.graph", inside),
            ("torch.cuda.CUDAGraph", graph),
            ("torch.random.fork_rng", inside),
        ):
            patches.enter_context(mock.patch(name, fake))
        yield
