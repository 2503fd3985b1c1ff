"""A training step that is recorded once as a CUDA graph and then replayed with a single launch.

A step of a small network launches some 600 kernels, which takes the host longer than the GPU needs
to run them. Shapes never change during training, so the forward pass, the loss and the backward
pass of every step are the same kernels on the same memory (CUDA graphs,
https://docs.nvidia.com/cuda/, "Programming guide", chapter 4.2; PyTorch's notes on CUDA semantics,
"Whole-network capture").
"""

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

LossesOfBatch = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""A function of image and label that returns the loss to differentiate, then values to log."""

_WARM_UP = 3
"""Steps before the recording, during which libraries choose kernels and allocate memory."""
_TOLERANCE = 0.05
"""Largest relative difference in loss and gradient norm between a replayed step and the same step
run normally. Another order of summation makes a smaller difference, even in half precision."""


class GraphedStep:
    """Forward pass, loss, backward pass and clipping for one fixed shape on a CUDA device, as a
    graph.

    A call sets the gradients of the parameters to those of the batch: it overwrites them and never
    adds to them. Gradients may be deleted or replaced between calls, as Lightning does before each
    validation: the next call puts them back into the memory that the recording writes.

    Args:
        loss: returns the loss of a batch first, then other scalars. It must not run code that waits
            for the device.
        parameters: the parameters that need gradients.
        image: a batch on the device, with the shape and type of every later batch.
        label: its labels, likewise.
        clip: the largest norm of all gradients together; larger ones are scaled down. None: any.

    Raises:
        RuntimeError: the step cannot be recorded, or one replay of the recording gives other values
            than the step itself.
    """

    def __init__(
        self,
        loss: LossesOfBatch,
        parameters: Sequence[Tensor],
        image: Tensor,
        label: Tensor,
        clip: float | None = None,
    ) -> None:
        self.image, self.label = image.clone(), label.clone()
        self.parameters = parameters

        def step() -> tuple[Tensor, ...]:
            values = loss(self.image, self.label)
            values[0].backward()
            if clip is not None:
                torch.nn.utils.clip_grad_norm_(parameters, clip)
            # Values with a graph would keep it alive, on the stream of the warm-up.
            return tuple(value.detach() for value in values)

        stream = torch.cuda.Stream()
        # Not the stream that PyTorch keeps for all recordings: it may belong to another GPU.
        recording = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                _forget_gradients(parameters)
                value = step()[0]
        torch.cuda.current_stream().wait_stream(stream)
        expected = torch.stack([value.float(), _gradient_norm(parameters)])
        # The recording allocates gradients in the graph's memory; each replay writes them there.
        _forget_gradients(parameters)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads, such as the one that pins batches, may use the device meanwhile.
        with torch.cuda.graph(self.graph, stream=recording, capture_error_mode="thread_local"):
            self.values = step()
        self.gradients = [parameter.grad for parameter in parameters]
        self.graph.replay()
        found = torch.stack([self.values[0].float(), _gradient_norm(parameters)])
        if not torch.allclose(found, expected, rtol=_TOLERANCE):
            raise RuntimeError(
                f"expected loss and gradient norm {expected.tolist()}, the replay gives "
                f"{found.tolist()}"
            )

    def fits(self, image: Tensor, label: Tensor) -> bool:
        """Whether a batch has the recorded shape and type."""
        return all(
            given.shape == kept.shape and given.dtype == kept.dtype
            for given, kept in ((image, self.image), (label, self.label))
        )

    def zero_gradients(self) -> None:
        """Set the gradients to 0 in place, before a step that is not replayed."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad.zero_()

    def __call__(self, image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        """Loss of a batch and the other values, on the device. The call sets the gradients."""
        self.image.copy_(image)
        self.label.copy_(label)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return tuple(value.clone() for value in self.values)


def record_step(
    network: nn.Module,
    losses: LossesOfBatch,
    image: Tensor,
    label: Tensor,
    clip: float | None = None,
) -> GraphedStep | None:
    """Recording of a network's step in the active precision, or None if it cannot be recorded.

    The recording leaves the network's buffers, such as running means, unchanged.

    Args:
        network: the network, on a CUDA device.
        losses: returns the loss of a batch first, then other scalars.
        image: a batch on the device.
        label: its labels.
        clip: the largest norm of all gradients together; None for no limit.
    """
    kind, half = torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda")

    def in_precision(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        # A cached half-precision copy of the weights would not follow the optimiser's updates.
        with torch.autocast("cuda", dtype=kind, enabled=half, cache_enabled=False):
            return losses(image, label)

    buffers = {name: buffer.clone() for name, buffer in network.named_buffers()}
    stream = torch.cuda.current_stream()
    try:
        # Random numbers drawn here must not change those of the real steps.
        with torch.random.fork_rng([image.device]), torch.autocast("cuda", enabled=False):
            return GraphedStep(in_precision, list(network.parameters()), image, label, clip)
    except torch.OutOfMemoryError:
        reason = "not enough GPU memory is free"
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
    finally:
        torch.cuda.set_stream(stream)  # a recording that failed may have left another one
        for name, buffer in network.named_buffers():
            buffer.copy_(buffers[name])
    _forget_gradients(list(network.parameters()))
    torch.cuda.empty_cache()
    logger.warning("could not record a step as a CUDA graph, so steps run without it: %s", reason)
    return None


def _gradient_norm(parameters: Sequence[Tensor]) -> Tensor:
    gradients = [each.grad.float() for each in parameters if each.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm()


def _forget_gradients(parameters: Sequence[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None
