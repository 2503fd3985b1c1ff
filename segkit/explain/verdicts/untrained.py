"""Maps of untrained networks, to compare a trained network's maps with.

If a gate shows no more than the same gate with random weights, its map comes from the image and the
architecture, not from training (Adebayo et al. 2018, arXiv:1810.03292). Random weights vary, so
several draws are made. The sign of a rank correlation with random weights is arbitrary, so only its
absolute value counts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

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
SAME_ARCHITECTURE = (
    "pass untrained, a function from a seed to a network with the model's architecture"
)
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
    shapes: Mapping[str, tuple[int, ...]],
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
        shapes: shape (map, x, y, z) of each of the trained network's maps, by key.
        seed: seed of the first network; the others have `seed + 1`, `seed + 2`, …
        make: makes a network from a seed. If None, it is built from the model's description.
        draws: the number of networks.

    Raises:
        ModelError: if a network from `make` has other maps than the trained network, cannot process
            the image, or has the trained network's weights; or if `make` is None and the
            model's description does not describe these maps.
    """
    member = predictor.members[0]
    trained = member.model.network
    device = next(trained.parameters()).device
    keys = list(shapes)
    for draw in range(draws):
        network, name = _made(member.model.description, make, seed + draw)
        _check_maps(name, network, trained, keys)
        if make is not None:  # segkit's own draws may equal a model that was never trained
            _check_untrained(name, network, trained)
        engine = TorchEngine(network, device=device)

        def record(windows: Tensor, engine: TorchEngine = engine) -> dict[str, Tensor]:
            outputs = engine(windows, keys)
            return {key: outputs[key] for key in keys}

        try:
            found = slide(
                image, record, member.layout_for(image.shape[1:]), batch_size=member.batch_size
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"{name} cannot process the windows of this scan ({reason}); {SAME_ARCHITECTURE}"
            ) from error
        for key, values in found.items():
            if tuple(values.shape) != tuple(shapes[key]):
                raise ModelError(
                    f"{name} has a map {key} of shape {tuple(values.shape)}, expected "
                    f"{tuple(shapes[key])} as in the trained network; {SAME_ARCHITECTURE}"
                )
        yield {key: values.cpu().numpy() for key, values in found.items()}


def _made(
    description: ModelDescription, make: MakeUntrained | None, seed: int
) -> tuple[SegmentationNetwork, str]:
    """An untrained network, and its name in errors.

    Args:
        description: the model's description.
        make: makes the network from a seed; if None, it is built from the description.
        seed: the seed.
    """
    if make is not None:
        network = make(seed)
        if not isinstance(network, SegmentationNetwork):
            raise ModelError(
                f"untrained({seed}) returned a {type(network).__name__}, expected a network like "
                f"predictor.model.network; wrap it with wrap_network(description, module)"
            )
        return network, f"the network of untrained({seed})"
    if description.network.given is not None:
        raise ModelError(
            "the model is your own network, of which segkit cannot make untrained ones; pass "
            "untrained, a function from a seed to an untrained network of its architecture"
        )
    return untrained_network(description, seed), "the network built from the model's description"


def _check_maps(
    name: str, network: SegmentationNetwork, trained: SegmentationNetwork, keys: Sequence[str]
) -> None:
    """Raise ModelError if a network's maps are not those of the trained one.

    Args:
        name: the network's name in errors.
        network: the untrained network.
        trained: the trained network.
        keys: keys of the maps.
    """
    found, expected = network.maps(), trained.maps()
    if missing := [key for key in keys if key not in found]:
        raise ModelError(f"{name} lacks the maps {', '.join(missing)}; {SAME_ARCHITECTURE}")
    for key in keys:
        if found[key] != expected[key]:
            raise ModelError(
                f"{name} has a map {key} of another stride, kind or range than the trained "
                f"network ({found[key]} instead of {expected[key]}); {SAME_ARCHITECTURE}"
            )


def _check_untrained(name: str, network: SegmentationNetwork, trained: SegmentationNetwork) -> None:
    """Raise ModelError if a network has the weights of the trained one."""
    own, others = network.state_dict(), trained.state_dict()
    if own.keys() == others.keys() and all(
        torch.equal(own[weight].cpu(), others[weight].cpu()) for weight in own
    ):
        raise ModelError(
            f"{name} has the weights of the trained network; draw new weights from the seed"
        )
