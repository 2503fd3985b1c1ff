"""Muon: kernels of convolutions are moved by orthogonal matrices, all other weights by AdamW."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of Jordan's (2024) polynomial, whose slope at 0 is as high as it can be."""
LEAST_NORM = 1e-7
"""A matrix is divided by its norm, or by this if the norm is less."""
RATE_OF_ADAMW = 0.2
"""The root mean square of a step, as AdamW's is about (Liu et al. 2025, arXiv:2502.16982)."""


class MuonForKernels(Optimizer):
    """Momentum whose matrix is made orthogonal for kernels; AdamW for all other weights.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/), for kernels of convolutions over
    more than one voxel, each as the matrix of its first axis and all others. Biases,
    normalisations, and what mixes the channels of one voxel (gates, heads, tokens) are AdamW's.
    A step of a matrix of m x n is scaled by 0.2 * sqrt(max(m, n)) (Liu et al. 2025), so that one
    learning rate and one decay serve both. torch.optim.Muon gives the same steps, and takes only
    parameters that are matrices.

    Args:
        parameters: of a network.
        lr: the learning rate.
        weight_decay: decoupled, of all weights.
        momentum: of the kernels' gradients.
        nesterov: whether the gradient is added to its mean once more.
        iterations: of Newton and Schulz.
        betas: of AdamW.
        eps: of AdamW.
        fused: whether AdamW moves its weights in one kernel of the GPU.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool | None = None,
    ) -> None:
        held = list(parameters)
        kernels = [each for each in held if is_kernel(each)]
        others = [each for each in held if not is_kernel(each)]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        own = {"momentum": momentum, "nesterov": nesterov, "iterations": iterations}
        # AdamW takes no empty list, and a group of none is no group.
        self.adamw = AdamW(others, betas=betas, eps=eps, fused=fused, **shared) if others else None
        groups = [{"params": kernels, **shared, **own}] if kernels else []
        super().__init__([*groups, *(self.adamw.param_groups if self.adamw else [])], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move all weights that have a gradient; what `closure` returns, if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "iterations" in group:
                self._move_kernels(group)
        if self.adamw is not None:
            # One state and one list of settings, whatever a schedule or a checkpoint has changed.
            self.adamw.param_groups = [g for g in self.param_groups if "iterations" not in g]
            self.adamw.state = self.state
            self.adamw.step()
        return loss

    def _move_kernels(self, group: dict[str, Any]) -> None:
        rate, momentum = group["lr"], group["momentum"]
        for kernel in group["params"]:
            if kernel.grad is None:
                continue
            state = self.state[kernel]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(kernel)
            mean = state["momentum_buffer"].lerp_(kernel.grad, 1 - momentum)
            step = kernel.grad.lerp(mean, momentum) if group["nesterov"] else mean
            matrix = orthogonal(step.flatten(1), group["iterations"])
            kernel.mul_(1 - rate * group["weight_decay"])
            scale = RATE_OF_ADAMW * math.sqrt(max(matrix.shape))
            kernel.add_(matrix.reshape(kernel.shape), alpha=-rate * scale)


def is_kernel(weight: Tensor) -> bool:
    """Whether weights are those of a convolution over more than one voxel, in two dimensions or
    three."""
    return weight.ndim >= 4 and math.prod(weight.shape[2:]) > 1


def orthogonal(matrix: Float[Tensor, "m n"], iterations: int) -> Float[Tensor, "m n"]:
    """The matrix with singular values of about 1 (0.7 to 1.2 after five iterations).

    Newton and Schulz's iteration with Jordan's coefficients; in bfloat16 on a GPU, in the matrix's
    own type elsewhere, as CPUs without matrix units take many times as long in bfloat16.
    """
    a, b, c = COEFFICIENTS
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    found = wide.bfloat16() if matrix.is_cuda else wide
    found = found / found.norm().clamp(min=LEAST_NORM)
    for _ in range(iterations):
        square = found @ found.T
        found = a * found + (b * square + c * square @ square) @ found
    found = found if matrix.shape[0] <= matrix.shape[1] else found.T
    return found.to(matrix.dtype)
