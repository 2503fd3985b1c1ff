"""Attention blocks of networks that segkit did not build, found by type and use.

A network runs once. A module counts as an attention block if its class has such a name
(`TransformerBlock`, `SwinTransformerBlock`, `AttentionBlock`, `ChannelSELayer` and so on). There
must also be an output of it that leaves its features as they are. If blocks are nested, only the
outermost counts. A warning names attention that runs but cannot be counted.
"""

import logging
import re
from collections.abc import Callable, Mapping

from torch import nn

from segkit.nn.calls import Call, calls_of
from segkit.nn.gates import Gate

logger = logging.getLogger(__name__)

WHOLE_BLOCK = re.compile(r".*transformer(encoder|decoder)?(block|layer)([23]d)?")
"""Classes of whole blocks: attention, perceptron and their shortcuts."""
ATTENTION = re.compile(
    r"(?!attentionlayer$)"  # MONAI's, which is a whole level of its AttentionUnet
    r"((.*(attention|attn|att)|.*nonlocal|(s?w|e)?m(hs?|s)a|(channel|spatial|residual|concurrent)*"
    r"s?c?se|squeeze(and)?excit(e|ation)|c?bam|eca|epa|lka)(gate)?(block|layer|module|unit)?"
    r"([1-3n]d)?"
    r"|([cs]a|gc)(block|layer)([23]d)?|camodule|[cp]ammodule)"
)
"""Classes of attention, which may be a part of a block."""
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_attention(module: nn.Module) -> bool:
    """Whether the name of a module's class is one of attention, or of a gate."""
    return ATTENTION.fullmatch(_kind(module)) is not None or isinstance(module, Gate)


def foreign_blocks(
    network: nn.Module, run: Callable[[], object], *, but: tuple[type[nn.Module], ...] = ()
) -> list[str]:
    """The names of a network's attention blocks.

    Args:
        network: any network.
        run: runs the network once.
        but: types of modules that are left out, together with the modules in them.
    """
    calls = calls_of(network, run)
    modules = dict(network.named_modules())
    left_out = [name for name, module in modules.items() if isinstance(module, but)]
    found: list[str] = []
    # Some libraries use a wrapper for a choice of attention, which may be empty.
    candidates = [
        name
        for name, module in modules.items()
        if name in calls and _named_attention(module) and any(True for _ in module.parameters())
    ]
    for name in candidates:
        if not name or _within(name, [*left_out, *found]):
            continue
        whole = WHOLE_BLOCK.fullmatch(_kind(modules[name])) is not None
        block = name if whole else _around(name, modules, calls)
        if calls[block].neutral is not None:
            found.append(block)
    lost = [
        name
        for name in candidates
        if name
        and not _within(name, [*left_out, *found])
        and not any(_within(block, [name]) for block in found)
    ]
    if lost:
        logger.warning(
            "attention that is not counted, because no output of it would leave its features as "
            "they are: %s; name the blocks that contain it",
            ", ".join(lost),
        )
    return found


def _around(name: str, modules: Mapping[str, nn.Module], calls: Mapping[str, Call]) -> str:
    """The block to which a module of attention belongs, with its shortcuts and its perceptron.

    It is the outermost module that keeps the shape and contains no convolution over more than one
    voxel. It contains other attention only if the features of neither pass around it inside, as in
    a layer of self- and cross-attention.

    Args:
        name: name of the module of attention.
        modules: all modules of the network, by name.
        calls: the call of each module that ran.
    """
    block = name
    while (parent := block.rpartition(".")[0]) and not isinstance(
        modules[parent], nn.ModuleList | nn.ModuleDict | nn.Sequential
    ):
        others = any(
            _named_attention(part) and not _within(f"{parent}.{place}", [block])
            for place, part in modules[parent].named_modules()
            if place
        )
        convolves = any(
            isinstance(part, CONVOLUTIONS) and max(part.kernel_size) > 1
            for part in modules[parent].modules()
        )
        if parent not in calls or not calls[parent].keeps_shape or convolves:
            break
        if others and (calls[block].passes or calls[block].weighs or calls[block].opens):
            break
        block = parent
    return block


def _kind(module: nn.Module) -> str:
    return type(module).__name__.lower().replace("_", "")


def _named_attention(module: nn.Module) -> bool:
    return any(names.fullmatch(_kind(module)) for names in (WHOLE_BLOCK, ATTENTION))


def is_inside(name: str, other: str) -> bool:
    """Whether a module is a part of another, by their names in `named_modules`."""
    return name != other and (not other or name.startswith(f"{other}."))


def _within(name: str, others: list[str]) -> bool:
    return any(name == other or is_inside(name, other) for other in others)
