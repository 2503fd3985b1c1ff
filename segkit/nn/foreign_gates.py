"""`segkit.gate`: Oktay's attention gates in the skips of a network that segkit did not build."""

from collections.abc import Collection, Mapping

from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError
from segkit.geometry.grid import Placement
from segkit.nn.gated_skip import (
    GATE,
    SIGNAL,
    ForgottenSignals,
    GatedConcatenation,
    GatedConnection,
    KeptSignal,
    LatestSignal,
    OpenGate,
)
from segkit.nn.joins import FoundJoin, find_joins


def gate(
    network: nn.Module,
    image: Float[Tensor, "batch channel *space"],
    *,
    skips: Collection[str] | None = None,
    placements: Mapping[str, Placement] | None = None,
) -> dict[str, str]:
    """Put attention gates (Oktay et al. 2018) into the skips of a network of another library.

    The network gets new modules, but its output does not change: gates start exactly open, with a
    map of 1. In training, values of the map stay between 0 and 1.0625. The gating signal is the
    coarser features of the decoder. The weights of the network keep their values and names. Each
    gate is a part of the module in which its skip joins the decoder, `….segkit_gate`. Its map
    passes a tap, so `Predictor`, `explain_volume` and `judge_gates` find it by its key,
    'skip.1/gate', as in segkit's own networks. Call this before the network is compiled, exported,
    trained, or loaded with the weights of a gated network.

    Args:
        network: MONAI's DynUNet, BasicUNet, UNet, UNETR or SwinUNETR, a U-Net of
            segmentation_models_pytorch, nnU-Net's PlainConvUNet or ResidualEncoderUNet, or another
            network whose skips join the decoder in one of these forms, such as
            `self.conv(torch.cat([self.up(x), skip], dim=1))`.
        image: an input, (batch, channel, *space), whose sizes are multiples of the network's
            strides. The network runs twice, on noise of this shape.
        skips: names (`named_modules`) of the modules in which skips join the decoder. If None, all
            but those of the finest level, as in the paper; all if there is no other level.
        placements: positions of the features of skips, in voxels of the input, by the name of the
            module; only for features that cannot be followed through the layers.

    Returns:
        Names of the gated modules by the position of their gate, 'skip.1', the finest first.

    Raises:
        ModelError: if no skip joins the decoder in such a form, `skips` has an unknown name, the
            size of a skip is not a multiple of the coarser size, a module joins several skips or
            is an nn.Sequential, or a skip cannot be followed from the input, so that its map would
            have no position.

    Example:
        network = monai.networks.nets.BasicUNet(spatial_dims=3, out_channels=2)
        segkit.gate(network, torch.zeros(1, 1, 32, 32, 32))  # {'skip.1': 'upcat_2', …}
        run = segkit.train(config, network=network)
    """
    joins = find_joins(network, image)
    names = [join.module for join in joins]
    if not joins:
        raise ModelError(
            f"{type(network).__name__}: found no skip connection to gate; expected a module that "
            "is called with coarse features and a skip, or with the concatenation of a skip and of "
            "upsampled features, or MONAI's SkipConnection (by concatenation)"
        )
    coarser = [join.module for join in joins if join.cells != joins[0].cells]
    wanted = (coarser or names) if skips is None else list(skips)
    if unknown := sorted(set(wanted) - set(names)):
        raise ModelError(
            f"skips: expected names of skip connections ({', '.join(names)}), found "
            f"{', '.join(unknown)}; correct the names"
        )
    gated: dict[str, str] = {}
    made = []
    for level, join in enumerate(joins):
        if join.module in wanted:
            made.append((level, join, _made(network, join, level, placements or {})))
            gated[f"skip.{level}"] = join.module
    # Only after all checks, so that a network that cannot be gated does not change.
    for _, join, gate_of_join in made:
        _put(network, join, gate_of_join)
    if any(join.before for _, join, _ in made):
        network.register_forward_hook(ForgottenSignals())
    return gated


def _made(
    network: nn.Module, join: FoundJoin, level: int, placements: Mapping[str, Placement]
) -> OpenGate:
    """The gate of a join, with its tap placed.

    Args:
        network: the network.
        join: the join.
        level: level of the skip; 0 is the finest.
        placements: positions that the user gives, by the name of the module.
    """
    if hasattr(network.get_submodule(join.module), GATE):
        raise ModelError(
            f"{join.module}: has a segkit gate already; add gates to a network only once"
        )
    if isinstance(network.get_submodule(join.module), nn.Sequential):
        raise ModelError(
            f"{join.module}: expected a module with a forward of its own, found an nn.Sequential, "
            "which would call the gate as a layer; put it into such a module"
        )
    if join.calls > 1:
        raise ModelError(
            f"{join.module}: joins {join.calls} skips in one run, so they would share a gate; use "
            "a separate module for each, or leave it out of skips"
        )
    if any(fine % coarse for fine, coarse in zip(join.cells, join.coarse, strict=True)):
        raise ModelError(
            f"{join.module}: the skip has {join.cells} cells, which is not a multiple of the "
            f"{join.coarse} cells of the level below; give an image whose size is a multiple of "
            "the network's strides"
        )
    placement = placements.get(join.module, join.placement)
    if placement is None:
        raise ModelError(
            f"{join.module}: the position of this skip's features in the input cannot be found; "
            f"leave it out of skips, or give placements={{{join.module!r}: "
            "segkit.Placement(stride, offset)} in voxels of the input"
        )
    stride = [fine // coarse for fine, coarse in zip(join.cells, join.coarse, strict=True)]
    made = OpenGate(
        len(join.cells),
        skip_channels=join.skip_channels,
        signal_channels=join.signal_channels,
        stride=stride,
    )
    made.tap.place(f"skip.{level}", level, placement)
    weight = next(network.parameters())
    return made.to(weight.device, weight.dtype).train(network.training)


def _put(network: nn.Module, join: FoundJoin, made: OpenGate) -> None:
    """Make a gate a part of its module, and send the skip through it."""
    module = network.get_submodule(join.module)
    module.add_module(GATE, made)
    match join.form:
        case "arguments":
            assert join.arguments is not None
            module.register_forward_pre_hook(join.arguments, with_kwargs=True)
        case "connection":
            assert join.half is not None
            module.register_forward_hook(GatedConnection(join.half))
        case "concatenation":
            assert join.half is not None
            if join.before:
                before = network.get_submodule(join.before)
                holder = getattr(before, SIGNAL, None)  # of another level, if they share a module
                if holder is None:
                    holder = LatestSignal()
                    before.add_module(SIGNAL, holder)
                    before.register_forward_pre_hook(KeptSignal())
                module.add_module(SIGNAL, holder)
            module.register_forward_pre_hook(GatedConcatenation(join.half))
