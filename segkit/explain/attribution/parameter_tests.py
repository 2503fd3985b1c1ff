"""Does an attribution depend on the output that it explains, and on the learnt weights?"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Shaped
from numpy import ndarray
from torch import nn

from segkit.errors import SegkitError
from segkit.explain.attribution.stability import floating
from segkit.explain.measures.ranks import Ranked, spearman

AnyModule = TypeVar("AnyModule", bound=nn.Module)
Similarity = Callable[[ndarray, ndarray], float]
"""A function of two attributions; 1 if they are equal."""


def rank_similarity(first: ndarray, second: ndarray) -> float:
    """Spearman's rank correlation of two attributions, over the values that both have."""
    both = np.isfinite(first) & np.isfinite(second)
    one, other = (np.asarray(values, np.float64)[both] for values in (first, second))
    return spearman(Ranked.of(one), Ranked.of(other))


def random_logit(
    explain: Callable[[str], ndarray],
    output: str,
    others: Sequence[str],
    *,
    seed: int = 0,
    similarity: Similarity = rank_similarity,
) -> float:
    """The similarity of the attribution of an output to that of another output, drawn at random.

    Sixt et al. (2020, arXiv:1912.09818, Sec. 5). An attribution that hardly depends on the output
    explains the image, not the output.

    Args:
        explain: a function from the name of an output to its attribution, always over the same
            region. For a liver it calls `attribute` with `structure="liver"` and this `output`.
        output: the name of the output.
        others: the outputs from which another one is drawn.
        seed: seed of the draw.
        similarity: compares two attributions.

    Returns:
        The similarity; lower is better.

    Raises:
        SegkitError: there is no other output.

    Example:
        segkit.random_logit(explain, "liver", ["background", "liver", "spleen"])
    """
    wrong = [name for name in others if name != output]
    if not wrong:
        raise SegkitError(
            f"expected an output other than {output}, found none; name a second output"
        )
    chosen = wrong[int(np.random.default_rng(seed).integers(len(wrong)))]
    return similarity(explain(output), explain(chosen))


def smooth_mprt(
    network: nn.Module,
    explain: Callable[[nn.Module, ndarray], ndarray],
    image: Shaped[ndarray, "*shape"],
    *,
    draws: int = 10,
    noise: float = 0.1,
    seed: int = 0,
    similarity: Similarity = rank_similarity,
) -> dict[str, float]:
    """The similarity of the attribution to that of a network with more and more random layers.

    Hedström et al. (2023, arXiv:2401.06465). Layers are randomised as in the cascade of Adebayo et
    al. (2018, arXiv:1810.03292), which begins at the output. Attributions are means over noisy
    copies of the image, so that noise of gradients is not mistaken for sensitivity. An attribution
    that stays similar does not depend on the learnt weights.

    Args:
        network: the network; a copy is changed.
        explain: a function from a network and an image to the attribution.
        image: the image.
        draws: number of copies; the last one has no noise.
        noise: standard deviation of the noise, as a share of the image's range.
        seed: seed of noise and weights.
        similarity: compares two attributions.

    Returns:
        The similarity after each layer was randomised, by the layer's name, the last layer first.

    Raises:
        SegkitError: the network has no parameters, or there are no copies.

    Example:
        segkit.smooth_mprt(network, explain, image, draws=10)
    """
    if draws < 1:
        raise SegkitError(f"draws: expected 1 or more, found {draws}; raise it")
    random = np.random.default_rng(seed)
    values = floating(image)
    spread = noise * float(np.ptp(values))
    copies = [values + spread * random.standard_normal(values.shape) for _ in range(draws - 1)]
    copies = [one.astype(values.dtype) for one in [*copies, values]]

    def smooth(current: nn.Module) -> ndarray:
        mean: ndarray = np.mean([explain(current, one) for one in copies], axis=0)
        return mean

    own = smooth(network)
    found = {
        name: similarity(own, smooth(changed)) for name, changed in randomised(network, seed=seed)
    }
    if not found:
        raise SegkitError("expected a network with parameters, found none; pass another network")
    return found


def randomised(network: AnyModule, *, seed: int = 0) -> Iterator[tuple[str, AnyModule]]:
    """A copy of a network with one more random layer at each step, the last layer first.

    Layers are taken in the reverse order of `named_modules`. A layer with `reset_parameters` is
    initialised again, each from the same seed, as in Quantus. The values of other parameters, such
    as the bias of a gate, are shuffled. Torch's global generator is not changed.

    Args:
        network: the network.
        seed: seed of the weights.

    Yields:
        The name of the layer, and the copy, which the next step changes.
    """
    changed = copy.deepcopy(network)
    for name, module in reversed(list(changed.named_modules())):
        own = list(module.parameters(recurse=False))
        if not own:
            continue
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.default_generator.manual_seed(seed)
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
            else:
                for parameter in own:
                    order = torch.randperm(parameter.numel())
                    parameter.copy_(parameter.flatten()[order].view_as(parameter))
        yield name, changed
