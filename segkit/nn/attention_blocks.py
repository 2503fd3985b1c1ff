"""Does a network use its attention? Finds its attention blocks and replaces them by the identity.

    with as_identity(network, ["bottleneck.0"]):
        logits = network(image)

The test of Wald et al. (2025, arXiv:2503.01835, Sec. 3): if a network is as good without a block,
the rest of the network can do the work of the block. The network is not trained again. So a lower
score means that this network uses the block. It does not mean that training needs such a block.
"""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor, nn

from segkit.nn.calls import Call, calls_of
from segkit.nn.cost import count_multiply_adds, count_parameters
from segkit.nn.foreign_blocks import foreign_blocks
from segkit.nn.gates import Gate
from segkit.nn.map_tap import MapTap, PassThrough, Stage, computing_again, passing_through
from segkit.nn.network import SegmentationNetwork, weights_of
from segkit.nn.running import in_prediction
from segkit.nn.unet import Join, UNet


@dataclass(frozen=True)
class AttentionShare:
    """How much of a network is attention.

    Example:
        share = segkit.attention_share(model.network, torch.zeros(1, 1, 64, 64, 64))
        share.parameters_share_outside, share.multiply_adds_share_outside
    """

    parameters: int
    """Number of parameters of the whole network."""
    parameters_outside: int
    """Number of parameters outside attention blocks."""
    multiply_adds: float
    """Multiply-adds of one forward pass."""
    multiply_adds_outside: float
    """The same with every attention block replaced by the identity."""

    @property
    def parameters_share_outside(self) -> float:
        """The share of parameters outside attention; 1 for a network without attention."""
        return self.parameters_outside / self.parameters if self.parameters else float("nan")

    @property
    def multiply_adds_share_outside(self) -> float:
        """The share of multiply-adds outside attention; 1 for a network without attention."""
        if not self.multiply_adds:
            return float("nan")
        return self.multiply_adds_outside / self.multiply_adds

    def unet_index(self, unet_parameters: int) -> float:
        """Parameters outside attention, divided by those of a reference U-Net (Wald et al. 2025).

        If it is 1 or more, the part outside attention is as large as a network without attention.

        Args:
            unet_parameters: number of parameters of the U-Net.
        """
        return self.parameters_outside / unet_parameters


def attention_blocks(
    network: nn.Module, image: Float[Tensor, "batch channel *space"] | None = None
) -> dict[str, str]:
    """The attention blocks of a network: the module's name in `network`, by position.

    In segkit's own U-Nets, positions are those of maps: 'encoder.1', 'skip.0', 'decoder.2',
    'bottleneck', and 'bottleneck.0', 'bottleneck.1', … if several blocks follow one another. A
    presence head is not listed, because the segmentation does not pass through it. Gates of
    `segkit.gate` have such positions too.

    In other networks, the position is the module's own name. Their blocks are found only if `image`
    is given. Then the network runs once. A module counts if its class has a name of attention
    (`TransformerBlock`, `AttentionBlock`, `MultiheadAttention`, `ChannelSELayer`, …) and
    `as_identity` can let its features through. If attention is a part of a block with shortcuts,
    the block counts, unless it contains convolutions over more than one voxel. A warning names
    attention that runs but cannot be counted.

    Args:
        network: segkit's or any other.
        image: an input of the network, (batch, channel, *space); None to find only segkit's own
            attention.

    Returns:
        Names as in `network.named_modules()`, by position.

    Raises:
        Exception: the network's own, if it cannot run on `image`.

    Example:
        for position, name in segkit.attention_blocks(model.network).items():
            print(position, name)

        swin = monai.networks.nets.SwinUNETR(in_channels=1, out_channels=2, feature_size=12)
        segkit.attention_blocks(swin, torch.zeros(1, 1, 64, 64, 64))  # swinViT.layers1.0.blocks.0 …
    """
    found = _own_blocks(network)
    if image is not None:
        prefix = _prefix(network)
        others = foreign_blocks(network, lambda: network(image), but=(UNet, Gate))
        found |= {name.removeprefix(prefix): name for name in others}
    return found


def _own_blocks(network: nn.Module) -> dict[str, str]:
    """Blocks of segkit's U-Nets in a network, and segkit's gates in other networks."""
    found: dict[str, str] = {}
    inner: list[str] = []
    for name, module in network.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(module, UNet):
            inner.append(prefix)
            found |= {place: prefix + path for place, path in _blocks_of(module)}
        elif isinstance(module, Gate) and not any(name.startswith(place) for place in inner):
            positions = [
                part.info.key.split("/")[0]
                for part in module.modules()
                if isinstance(part, MapTap) and part.info is not None
            ]
            found |= dict.fromkeys(positions[:1], name)
    return found


def _prefix(network: nn.Module) -> str:
    """The prefix in `network` of the module names of the user's own network."""
    if not isinstance(network, SegmentationNetwork):
        return ""
    own = weights_of(network)
    (name,) = [name for name, module in network.named_modules() if module is own]
    return f"{name}." if name else ""


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
    """Inside `with`, these blocks of a network are the identity; then the network is restored.

    Every call of a block is replaced, however the network holds it. Blocks that are not segkit's
    own are looked at in the first call of `network`, which therefore runs it once more:

    - Features: the argument that reaches the output without weights (the skip of a gate), or else
      the argument called `x`, `x_…`, `skip…` or `query`.
    - If the block's output is added to these features outside the block, as in
      `x + attention(norm(x))`, it is 0 instead. If it multiplies them, as in `x * attention(x)`, it
      is 1, and in `x * (1 + attention(x))` it is 0. Then the features stay as they are.
    - If the block returns a tuple, this is its first part. Other tensors in it become NaN.

    Args:
        network: segkit's or any other. Call it itself inside `with`, not only a part of it.
        blocks: positions from `attention_blocks`, or names of modules (`named_modules`).

    Raises:
        ValueError: if the network has no such block. In the first call: if the network does not
            call the block, if several arguments may be its features, or if no output of it would
            leave them as they are.

    Example:
        with segkit.as_identity(model.network, segkit.attention_blocks(model.network)):
            without = segkit.Predictor(model)(scan)
    """
    chosen = {block: _module(network, block) for block in blocks}
    own = _own_blocks(network)
    foreign = {block: module for block, module in chosen.items() if block not in own}
    waiting = list(foreign)
    with passing_through(list(chosen.values())) as identities:

        def look(
            network: nn.Module, given: tuple[object, ...], named: Mapping[str, object]
        ) -> None:
            if not waiting:
                return
            waiting.clear()  # first, because the hook runs again in this call of the network
            with computing_again(network):
                calls = calls_of(network, lambda: network(*given, **named))
            names = {module: name for name, module in network.named_modules()}
            for block, module in foreign.items():
                _fit(identities[module], block, calls.get(names[module]))

        handle = network.register_forward_pre_hook(look, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _fit(identity: PassThrough, block: str, call: Call | None) -> None:
    """Set the features of an identity, and what it returns, by a call of the block."""
    if call is None:
        raise ValueError(
            f"{block}: expected a module that the network calls, found one that it does not call; "
            f"name one of attention_blocks(network, image)"
        )
    if call.rivals and call.neutral == "features":
        raise ValueError(
            f"{block}: expected one argument to be the features, found several of the output's "
            f"shape ({', '.join(call.rivals)}); name the block that contains it, or call the "
            f"argument x"
        )
    if call.neutral is None:
        raise ValueError(
            f"{block}: expected a module whose output has the shape of its features, is added to "
            f"them or multiplies them, found {call.output or 'no tensor'} of {call.features}, used "
            f"in another way; choose the block that contains it"
        )
    identity.place, identity.argument = call.argument
    identity.unchanged = call.unchanged


def _module(network: nn.Module, block: str) -> nn.Module:
    """The module of a block."""
    known = _own_blocks(network)
    modules = dict(network.named_modules(remove_duplicate=False))
    within = _prefix(network) + block
    path = known.get(block, within if block and within in modules else block)
    if path not in modules or not path:
        raise ValueError(
            f"the network has no attention block {block!r}; it has {', '.join(known) or 'none'}, "
            f"and any other module can be given by its name"
        )
    return modules[path]


def attention_share(
    network: nn.Module,
    image: Float[Tensor, "batch channel *space"],
    blocks: Collection[str] | None = None,
) -> AttentionShare:
    """How many parameters and multiply-adds a network has, and how many of them outside attention.

    Args:
        network: segkit's or any other; it runs a few times and does not change.
        image: an input, (batch, channel, *space), for which multiply-adds are counted.
        blocks: as for `as_identity`; all of `attention_blocks` if None.

    Returns:
        The numbers of the whole network, and those outside the blocks.

    Raises:
        ValueError: as for `as_identity`.

    Example:
        image = torch.zeros(1, 1, 64, 64, 64)
        share = segkit.attention_share(model.network, image)
    """
    blocks = list(attention_blocks(network, image)) if blocks is None else blocks
    whole, work = count_parameters(network), count_multiply_adds(network, image)
    outside = _count_outside(network, {_module(network, block) for block in blocks})
    with as_identity(network, blocks):
        with in_prediction(network):
            network(image)  # the first call does more work: it looks at the blocks
        return AttentionShare(whole, outside, work, count_multiply_adds(network, image))


def _count_outside(network: nn.Module, blocks: Collection[nn.Module]) -> int:
    """Number of parameters of the modules that are in no block."""
    parameters: set[nn.Parameter] = set()
    waiting = [network]
    while waiting:
        module = waiting.pop()
        if module not in blocks:
            parameters.update(module.parameters(recurse=False))
            waiting += module.children()
    return sum(parameter.numel() for parameter in parameters)
