"""A training step recorded once as a CUDA graph and replayed: the host launches one thing, not 600.

A step of a small network is bound by the host, which takes longer to launch kernels than the GPU to
run them. Shapes never change in training, so the forward pass, the loss and the backward pass of
every step are the same kernels on the same memory (CUDA graphs, https://docs.nvidia.com/cuda/,
"Programming guide", chapter 4.2; PyTorch's notes on CUDA semantics, "Whole-network capture").
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LossesOfBatch = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""From image and label to the loss, whose gradient is taken, and values to be logged beside it."""

_WARM_UP = 3
"""Steps before the recording, in which libraries choose their kernels and allocate."""
_TOLERANCE = 0.05
"""Of loss and gradient norm, between a recorded step and the same step itself: kernels that add in
another order differ by less, even in half precision."""


class GraphedStep:
    """Forward, loss and backward of one fixed shape on a CUDA device, replayed from a graph.

    After a call the parameters' gradients are those of that batch: they are overwritten, never
    added to, and must be neither deleted nor replaced between calls. What is recorded is replayed
    once and held against the step itself; RuntimeError if they differ.

    Args:
        loss: gives the loss of a batch first, then other scalars; runs no code that waits for the
            device.
        parameters: whose gradients are wanted.
        image: of the shape and type of every batch to come, on the device.
        label: likewise.
    """

    def __init__(
        self, loss: LossesOfBatch, parameters: Sequence[Tensor], image: Tensor, label: Tensor
    ) -> None:
        self.image, self.label = image.clone(), label.clone()
        self.parameters = parameters
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                _forget_gradients(parameters)
                value = loss(self.image, self.label)[0]
                value.backward()
        torch.cuda.current_stream().wait_stream(stream)
        expected = torch.stack([value.detach().float(), _gradient_norm(parameters)])
        # Made anew inside the graph's own memory, where each replay writes them.
        _forget_gradients(parameters)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            values = loss(self.image, self.label)
            values[0].backward()
        self.values = tuple(value.detach() for value in values)
        self.graph.replay()
        found = torch.stack([self.values[0].float(), _gradient_norm(parameters)])
        if not torch.allclose(found, expected, rtol=_TOLERANCE):
            raise RuntimeError(
                f"its replay gives loss and gradient norm {found.tolist()} for {expected.tolist()}"
            )

    def fits(self, image: Tensor, label: Tensor) -> bool:
        """Whether a batch has the recorded shape and type."""
        return all(
            given.shape == kept.shape and given.dtype == kept.dtype
            for given, kept in ((image, self.image), (label, self.label))
        )

    def make_room(self) -> None:
        """Set the gradients to 0 in their place, for a step that is not replayed."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """The loss of a batch and the other values, on the device; sets the gradients."""
        self.image.copy_(image)
        self.label.copy_(label)
        self.graph.replay()
        return tuple(value.clone() for value in self.values)


def record_step(
    network: nn.Module, losses: LossesOfBatch, image: Tensor, label: Tensor
) -> GraphedStep | None:
    """The step of a network, recorded in the precision that is on; None if it cannot be recorded.

    The network's buffers, such as running means, are as they were before.
    """
    kind, half = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

    def in_precision(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        # A copy of the weights in half precision that was kept from elsewhere would never change.
        with torch.autocast("cuda", dtype=kind, enabled=half, cache_enabled=False):
            return losses(image, label)

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    try:
        # What is drawn here must not move what the step itself will draw.
        with torch.random.fork_rng([image.device]), torch.autocast("cuda", enabled=False):
            return GraphedStep(in_precision, list(network.parameters()), image, label)
    except torch.OutOfMemoryError:
        reason = "the memory does not hold it beside what is held already"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    finally:
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    _forget_gradients(list(network.parameters()))
    torch.cuda.empty_cache()
    logger.warning("steps are launched one by one, as none could be recorded: %s", reason)
    return None


def _gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    gradients = [each.grad.float() for each in parameters if each.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()


def _forget_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
