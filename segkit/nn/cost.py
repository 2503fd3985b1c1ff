"""How many numbers a network learns, and how much it computes."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(network: nn.Module) -> int:
    """How many numbers are learned."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_multiply_adds(network: nn.Module, image: Float[Tensor, "batch channel *space"]) -> float:
    """Those of convolutions and matrix products in one forward pass in prediction.

    Fused attention is counted as the matrix products that it stands for.
    """
    modes = {part: part.training for part in network.modules()}
    network.eval()
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
        network(image)
    for part, mode in modes.items():
        part.training = mode
    return float(counter.get_total_flops()) / 2
