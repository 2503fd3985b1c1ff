"""Heads of attention taken out of a model for good."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from segkit.config import attention as settings
from segkit.config.model import ModelDescription
from segkit.errors import ModelError
from segkit.explain.heads.study import multi_headed
from segkit.model.build import build_network
from segkit.model.folder import Model
from segkit.nn.network import unet_of
from segkit.nn.self_attention import SelfAttention


def prune(model: Model, kept: Mapping[str, Sequence[int]]) -> Model:
    """The model without the heads that are not kept, of the positions that are named.

    Its output is that of the model with these heads masked; its weights are fewer. Raises
    ModelError for a position without heads, a head that is not there, or none kept.
    """
    modules = multi_headed(model.network)
    state = unet_of(model.network).state_dict()
    names = {module: name for name, module in unet_of(model.network).named_modules()}
    heads = {position: module.attention.heads for position, module in modules.items()}
    for position, chosen in kept.items():
        if position not in modules:
            raise ModelError(f"no attention with heads at {position}; the model has {[*modules]}")
        count = heads[position]
        if not chosen or not set(chosen) <= set(range(count)):
            raise ModelError(
                f"{position}: heads to keep must be some of 0 … {count - 1}, found {list(chosen)}"
            )
        module, chosen = modules[position], sorted(set(chosen))
        width = module.attention.value.out_features // count
        rows = torch.cat([torch.arange(head * width, (head + 1) * width) for head in chosen])
        prefix = f"{names[module]}.attention"
        for name in ("query.weight", "query.bias", "key.weight", "value.weight", "value.bias"):
            state[f"{prefix}.{name}"] = state[f"{prefix}.{name}"][rows]
        state[f"{prefix}.out.weight"] = state[f"{prefix}.out.weight"][:, rows]
        table = f"{names[module]}.bias.table"
        if isinstance(module, SelfAttention) and table in state:
            state[table] = state[table][:, chosen]
        heads[position] = len(chosen)
    description = _with_heads(model.description, heads)
    network = build_network(description)
    unet_of(network).load_state_dict(state)
    return replace(model, description=description, network=network.eval())


def _with_heads(description: ModelDescription, heads: Mapping[str, int]) -> ModelDescription:
    attention = description.network.attention
    changed: dict[str, settings.SkipAttentionConfig | settings.TokenAttentionConfig] = {}
    if isinstance(attention.bottleneck, settings.SelfAttentionConfig):
        changed["bottleneck"] = attention.bottleneck.model_copy(
            update={"heads": heads["bottleneck"]}
        )
    if isinstance(attention.skip, settings.CrossAttentionConfig | settings.UTransformerGateConfig):
        levels = attention.skip_levels(len(description.network.channels))
        changed["skip"] = attention.skip.model_copy(
            update={"heads": [heads[f"skip.{level}"] for level in levels]}
        )
    network = description.network.model_copy(
        update={"attention": attention.model_copy(update=changed)}
    )
    return description.model_copy(update={"network": network})
