"""Does a network attend to anything? Its attention blocks by name, each replaced by the identity.

    with as_identity(network, ["bottleneck.0"]):
        logits = network(image)

The test of Wald et al. (2025, arXiv:2503.01835, Sec. 3): if a network is as good without a block,
the block does nothing that the rest could not. Nothing is trained again, so a network that falls
says that it uses the block, not that it needed one.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.cost import count_multiply_adds, count_parameters
from segkit.nn.map_tap import PassThrough, Stage
from segkit.nn.unet import Join, UNet


@dataclass(frozen=True)
class AttentionShare:
    """How much of a network is attention.

    Example:
        share = segkit.attention_share(model.network, torch.zeros(1, 1, 64, 64, 64))
        share.parameters_share_outside, share.multiply_adds_share_outside
    """

    parameters: int
    """Of the whole network."""
    parameters_outside: int
    """Of what is not in an attention block."""
    multiply_adds: float
    """Of one forward pass."""
    multiply_adds_outside: float
    """… with every attention block replaced by the identity."""

    @property
    def parameters_share_outside(self) -> float:
        """The share of parameters outside attention; 1 for a network without."""
        return self.parameters_outside / self.parameters if self.parameters else float("nan")

    @property
    def multiply_adds_share_outside(self) -> float:
        """The share of multiply-adds outside attention; 1 for a network without."""
        if not self.multiply_adds:
            return float("nan")
        return self.multiply_adds_outside / self.multiply_adds

    def unet_index(self, unet_parameters: int) -> float:
        """Parameters outside attention over those of a U-Net of reference (Wald et al. 2025).

        At 1 or more, what is not attention is as large as a network that needs none.
        """
        return self.parameters_outside / unet_parameters


def attention_blocks(network: nn.Module) -> dict[str, str]:
    """The attention blocks of segkit's own U-Nets: the module's name in `network`, by position.

    Positions are those of maps: 'encoder.1', 'skip.0', 'decoder.2', 'bottleneck', and
    'bottleneck.0', 'bottleneck.1', … where several blocks follow one another. A presence head is
    none, for the segmentation does not pass through it. A network that holds none of segkit's
    U-Nets gives no names: name its modules yourself.

    Args:
        network: segkit's, or any other that may hold one of segkit's U-Nets.

    Returns:
        Names as in `network.named_modules()`, by position.

    Raises:
        AttributeError: if `network` is not a PyTorch module.

    Example:
        for position, name in segkit.attention_blocks(model.network).items():
            print(position, name)
    """
    found: dict[str, str] = {}
    for name, module in network.named_modules():
        if isinstance(module, UNet):
            prefix = f"{name}." if name else ""
            found |= {place: prefix + path for place, path in _blocks_of(module)}
    return found


def _blocks_of(unet: UNet) -> Iterator[tuple[str, str]]:
    for level, parts in enumerate(unet.encoder):
        _, _, attention = parts.children()
        yield from _named(f"encoder.{level}", f"encoder.{level}.2", attention)
    yield from _named("bottleneck", "bottleneck", unet.bottleneck)
    for level, join in enumerate(unet.decoder):
        assert isinstance(join, Join)
        if join.gate is not None:
            yield f"skip.{level}", f"decoder.{level}.gate"
        yield from _named(f"decoder.{level}", f"decoder.{level}.attention", join.attention)


def _named(position: str, path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    if isinstance(module, Stage):
        for number in range(len(module)):
            yield f"{position}.{number}", f"{path}.{number}"
    elif not isinstance(module, nn.Identity):
        yield position, path


@contextmanager
def as_identity(network: nn.Module, blocks: Collection[str]) -> Iterator[None]:
    """Within it, blocks of a network are the identity; afterwards the network is what it was.

    Args:
        network: segkit's or any other.
        blocks: positions from `attention_blocks`, or names of modules (`named_modules`), whose
            output must have the shape and the meaning of their first input, as that of a
            transformer block has.

    Raises:
        ValueError: if the network has no such block.

    Example:
        with as_identity(model.network, attention_blocks(model.network)):
            without = segkit.Predictor(model)(volume)
    """
    replaced: list[tuple[nn.Module, str, nn.Module]] = []
    places = {block: _place(network, block) for block in blocks}
    try:
        # An outer module comes before those in it, whose places are not looked up again.
        for parent, child in places.values():
            replaced.append((parent, child, getattr(parent, child)))
            setattr(parent, child, PassThrough())
        yield
    finally:
        for parent, child, module in reversed(replaced):
            setattr(parent, child, module)


def _place(network: nn.Module, block: str) -> tuple[nn.Module, str]:
    """The module that holds a block, and the block's name in it."""
    known = attention_blocks(network)
    path = known.get(block, block)
    if path not in dict(network.named_modules()) or not path:
        raise ValueError(
            f"the network has no attention block {block!r}; it has {', '.join(known) or 'none'}, "
            f"and any other module can be given by its name"
        )
    parent, _, child = path.rpartition(".")
    return network.get_submodule(parent), child


def attention_share(
    network: nn.Module,
    image: Float[Tensor, "batch channel *space"],
    blocks: Collection[str] | None = None,
) -> AttentionShare:
    """How many parameters and multiply-adds a network has, and how many of them outside attention.

    Args:
        network: segkit's or any other; it runs twice and stays as it is.
        image: what it is counted with.
        blocks: as for `as_identity`; all of `attention_blocks` if None.

    Raises:
        ValueError: if the network has no such block.

    Example:
        image = torch.zeros(1, 1, 64, 64, 64)
        share = segkit.attention_share(model.network, image)
    """
    blocks = list(attention_blocks(network)) if blocks is None else blocks
    whole, work = count_parameters(network), count_multiply_adds(network, image)
    with as_identity(network, blocks):
        return AttentionShare(
            whole, count_parameters(network), work, count_multiply_adds(network, image)
        )
