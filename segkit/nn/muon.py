"""Muon: it updates kernels of convolutions by orthogonal matrices; AdamW updates other weights."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

from segkit.nn.adamw import fused_adamw, order_moments

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The coefficients of Jordan's (2024) polynomial, which has the highest possible slope at 0."""
AT_ONCE = 5
"""Number of iterations that are computed without the matrix itself."""
LEAST_NORM = 1e-7
"""A matrix is divided by its norm, or by this if the norm is less."""
RATE_OF_ADAMW = 0.2
"""The root mean square of a step, about as in AdamW (Liu et al. 2025, arXiv:2502.16982)."""


class MuonForKernels(Optimizer):
    """An optimiser with Muon for kernels, and AdamW for all other weights.

    Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/) takes the momentum of a kernel as
    a matrix, makes it orthogonal, and uses it as the step. It is applied to kernels of convolutions
    over more than one voxel, as matrices of their first axis and all others. (For a convolution,
    this is the matrix of the linear map from a window to a voxel. If a transposed convolution has a
    stride of its kernel size, it is the transpose of the map from a voxel to its block; the step is
    the transpose too, so it is the same.) AdamW updates biases,
    normalisations, and weights that mix the channels of one voxel (gates, heads, tokens). The step
    of an m x n matrix is scaled by 0.2 * sqrt(max(m, n)) (Liu et al. 2025), so that both use the
    same learning rate and decay. torch.optim.Muon gives the same steps, but takes only matrices.

    Args:
        parameters: the parameters of a network.
        lr: the learning rate.
        weight_decay: decoupled weight decay of all weights.
        momentum: decay of the mean gradient of kernels.
        nesterov: whether the gradient is added to its mean once more.
        iterations: number of iterations of Newton and Schulz.
        betas: decays of AdamW.
        eps: epsilon of AdamW.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        *,
        lr: float,
        weight_decay: float,
        momentum: float = 0.95,
        nesterov: bool = True,
        iterations: int = 5,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
    ) -> None:
        held = list(parameters)
        kernels = [each for each in held if is_kernel(each)]
        others = [each for each in held if not is_kernel(each)]
        shared: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        own = {"momentum": momentum, "nesterov": nesterov, "iterations": iterations}
        # AdamW refuses an empty list, and an empty group has no use.
        self.adamw = fused_adamw(others, betas=betas, eps=eps, **shared) if others else None
        groups = [{"params": kernels, **shared, **own}] if kernels else []
        super().__init__([*groups, *(self.adamw.param_groups if self.adamw else [])], {})
        self.register_load_state_dict_post_hook(order_moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all weights that have a gradient, and return the result of `closure`, if any."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "iterations" in group:
                self._move_kernels(group)
        if self.adamw is not None:
            # Both share one state and one list of groups, which schedules and checkpoints change.
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
            # Columns in the order of memory need no copy, and their order does not change the step.
            axes = sorted(range(1, kernel.ndim), key=kernel.stride, reverse=True)
            ordered = kernel.permute(0, *axes)
            matrix = orthogonal(step.permute(0, *axes).flatten(1), group["iterations"])
            scale = RATE_OF_ADAMW * math.sqrt(max(matrix.shape))
            ordered.mul_(1 - rate * group["weight_decay"])
            ordered.add_(matrix.reshape(ordered.shape), alpha=-rate * scale)


def is_kernel(weight: Tensor) -> bool:
    """Whether weights are the kernel of a convolution over more than one voxel, in 2D or 3D."""
    return weight.ndim >= 4 and math.prod(weight.shape[2:]) > 1


def orthogonal(matrix: Float[Tensor, "m n"], iterations: int) -> Float[Tensor, "m n"]:
    """The matrix with its singular values set to about 1 (0.7 to 1.2 after five iterations).

    This is the iteration of Newton and Schulz with Jordan's coefficients, X <- (a + b G + c G^2) X
    with G = X X^T, in float32 at least. On a CPU it is computed from G alone, see `_iterated`.
    If products of float32 may be rounded to ten bits or fewer (on a GPU, or because of
    `torch.set_float32_matmul_precision`), each iteration begins with X, which corrects rounding
    errors.
    """
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    exact = torch.promote_types(matrix.dtype, torch.float32)
    with torch.autocast(matrix.device.type, enabled=False):
        found = wide.to(exact)
        found = found / found.norm().clamp(min=LEAST_NORM)
        at_once = AT_ONCE if _products_are_exact(matrix) else 1
        for done in range(0, iterations, at_once):
            found = _iterated(found, min(at_once, iterations - done))
    found = found.to(matrix.dtype)
    return found if matrix.shape[0] <= matrix.shape[1] else found.T


def _products_are_exact(matrix: Tensor) -> bool:
    """Whether matrix products keep all bits of float32."""
    products = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    return matrix.device.type == "cpu" and products.fp32_precision not in ("bf16", "tf32")


def _iterated(wide: Float[Tensor, "m n"], iterations: int) -> Float[Tensor, "m n"]:
    """The matrix after some iterations of Newton and Schulz.

    The factors before X are polynomials of the first G, which is much smaller than X. So the
    product of the factors is computed first, and then applied to X once. This takes half the time
    or less, but each iteration multiplies the rounding errors of G by up to a^2.
    """
    a, b, c = COEFFICIENTS
    gram = wide @ wide.T
    product: Tensor | None = None
    for left in reversed(range(iterations)):
        factor = torch.addmm(b * gram, gram, gram, alpha=c)
        factor.diagonal().add_(a)
        product = factor if product is None else factor @ product
        if left:
            gram = factor @ gram @ factor
    return wide if product is None else product @ wide
