"""The number of parameters and of multiply-adds of a network."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """Number of parameters, also of those that are not trained."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, image: Float[Tensor, "batch channel *space"]) -> float:
    """Multiply-adds of convolutions and matrix products in one forward pass of prediction.

    Fused attention counts as the matrix products that it replaces.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    modes = {part: part.training for part in network.modules()}
    network.eval()
    counter = FlopCounterMode(display=False)
    torch.backends.mha.set_fastpath_enabled(False)  # one call that the counter does not know
    try:
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            network(image)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    for part, mode in modes.items():
        part.training = mode
    return float(counter.get_total_flops()) / 2
