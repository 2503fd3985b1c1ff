"""Maps of untrained networks, to compare a trained network's maps with.

If a gate shows no more than the same gate with random weights, its map comes from the image and the
architecture, not from training (Adebayo et al. 2018, arXiv:1810.03292). Random weights vary, so
several draws are made. The sign of a rank correlation with random weights is arbitrary, so only its
absolute value counts.
"""

from collections.abc import Callable, Collection, Iterator
from functools import partial

import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.errors import ModelError
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.predictor import Predictor
from segkit.inference.windows import slide
from segkit.model.build import build_network
from segkit.nn.network import SegmentationNetwork

UNTRAINED_DRAWS = 8
"""Number of untrained networks that a gate is compared with."""
MakeUntrained = Callable[[int], SegmentationNetwork]
"""A function from a seed to an untrained network with the model's architecture."""


def untrained_network(description: ModelDescription, seed: int) -> SegmentationNetwork:
    """A network with random weights drawn from `seed`. Torch's global generator is not changed."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_network(description).eval()


def untrained_maps(
    predictor: Predictor,
    image: Float[Tensor, "channel x y z"],
    keys: Collection[str],
    *,
    seed: int,
    make: MakeUntrained | None = None,
    draws: int = UNTRAINED_DRAWS,
) -> Iterator[dict[str, Float[ndarray, "map x y z"]]]:
    """The maps of an image from several untrained networks, one network after the other.

    They lie on the grids of the trained network's maps. The windows are those of the first model of
    the predictor, without mirroring.

    Args:
        predictor: runs the trained model.
        image: the image as the network receives it.
        keys: keys of the maps.
        seed: seed of the first network; the others have `seed + 1`, `seed + 2`, …
        make: makes a network from a seed. If None, it is built from the model's description.
        draws: the number of networks.

    Raises:
        ModelError: if a network from `make` lacks one of the maps.
    """
    member = predictor.members[0]
    make = make or partial(untrained_network, member.model.description)
    device = next(member.model.network.parameters()).device
    for draw in range(draws):
        network = make(seed + draw)
        if missing := sorted(set(keys) - set(network.maps())):
            raise ModelError(
                f"untrained({seed + draw}) returned a network without the maps "
                f"{', '.join(missing)}; return one with the model's architecture"
            )
        engine = TorchEngine(network, device=device)

        def record(windows: Tensor, engine: TorchEngine = engine) -> dict[str, Tensor]:
            outputs = engine(windows, keys)
            return {key: outputs[key] for key in keys}

        found = slide(
            image, record, member.layout_for(image.shape[1:]), batch_size=member.batch_size
        )
        yield {key: values.cpu().numpy() for key, values in found.items()}
