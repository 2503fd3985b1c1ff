"""Maps of networks that learned nothing, to compare a trained network's maps with.

A gate that shows no more than the same gate with random weights shows the image and the form of the
network (Adebayo et al. 2018, arXiv:1810.03292). One draw of random weights is an accident, so that
several are taken, and only the size of a rank correlation counts: its sign is an accident too.
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
"""Untrained networks that a gate is compared with."""
MakeUntrained = Callable[[int], SegmentationNetwork]
"""From a seed to an untrained network of the model's form."""


def untrained_network(description: ModelDescription, seed: int) -> SegmentationNetwork:
    """A network with fresh weights drawn from `seed`; torch's own generator stays as it was."""
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
    """The maps of an image by untrained networks, a draw of weights after the other.

    They lie on the grids of the trained network's maps, in the windows of the first model and
    without mirror images. `make` builds a network from a seed, by default from the model's
    description; seeds are `seed`, `seed + 1`, …

    Raises:
        ModelError: if a network that was made lacks one of the maps.
    """
    member = predictor.members[0]
    make = make or partial(untrained_network, member.model.description)
    device = next(member.model.network.parameters()).device
    for draw in range(draws):
        network = make(seed + draw)
        if missing := sorted(set(keys) - set(network.maps())):
            raise ModelError(
                f"untrained({seed + draw}) gave a network without the maps {', '.join(missing)}; "
                f"return a network of the model's form"
            )
        engine = TorchEngine(network, device=device)

        def look(windows: Tensor, engine: TorchEngine = engine) -> dict[str, Tensor]:
            outputs = engine(windows, keys)
            return {key: outputs[key] for key in keys}

        found = slide(image, look, member.layout, batch_size=member.batch_size)
        yield {key: values.cpu().numpy() for key, values in found.items()}
