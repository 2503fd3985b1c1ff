"""Does a map come from what was learned? Weights are drawn anew, and the map is looked at again.

Sanity checks of Adebayo et al. (2018, arXiv:1810.03292, Sec. 3): weights become those of an
untrained network, from the map's own module back towards the image, one stage more at a time; a map
that stays as it was shows the image, and nothing learned. Theirs cascade from the network's output,
but a gate does not depend on what lies behind it: here they follow what the map depends on. All
other weights, drawn anew as well, must leave the map exactly as it was.
"""

import copy
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from segkit.config.model import ModelDescription
from segkit.explain.measures.ranks import Ranked, spearman
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.model_walk import ModelWalk
from segkit.inference.predictor import Predictor
from segkit.inference.windows import slide
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.nn.map_tap import editing, taps
from segkit.nn.network import SegmentationNetwork, unet_of
from segkit.system.progress import Track, untracked

OWN = "own weights"
"""The stage of the module that makes the map."""


@dataclass(frozen=True)
class Randomisation:
    """How a map of one case holds while weights become those of an untrained network."""

    case: str
    map: str
    stages: tuple[str, ...]
    """What is drawn anew, one after another, all before it included: 'own weights', 'decoder.2' …
    from the map back to the image."""
    correlations: tuple[float, ...]
    """After each stage, Spearman's rank correlation with the trained map; NaN if either is
    constant."""
    downstream_weights: int
    """Numbers among the weights that the map does not depend on."""
    downstream_change: float
    """The most by which a cell changes when these are drawn anew; 0, or the map is not what the
    network makes it out to be."""

    @property
    def last(self) -> float:
        """The correlation when all that the map depends on is drawn anew; 1 if that is nothing."""
        return self.correlations[-1] if self.correlations else 1.0


def randomise(
    predictor: Predictor,
    volume: Volume,
    *,
    case: str,
    keys: Collection[str] | None = None,
    seed: int = 0,
    fresh: SegmentationNetwork | None = None,
    track: Track = untracked,
) -> list[Randomisation]:
    """A row per map of the first model that has a place; what is changed is a copy of the network.

    `fresh` is an untrained network of its form; one is built of the model's description from `seed`
    where there is none. Takes a pass over the volume per map and stage, and one more per map.
    """
    member = predictor.members[0]
    image = predictor.prepare(volume).image
    if fresh is None:
        fresh = untrained(member.model.description, seed)
    network = copy.deepcopy(member.model.network)
    engine = TorchEngine(network, device=next(network.parameters()).device)
    trained = copy.deepcopy(unet_of(network).state_dict())
    anew = {name: value.to(engine.device) for name, value in unet_of(fresh).state_dict().items()}
    infos = network.maps()
    chosen = [
        key
        for key, info in infos.items()
        if info.placement is not None and (keys is None or key in keys)
    ]
    before = _maps(engine, member, image, chosen)
    window = image.new_zeros(1, len(image), *member.layout.patch_size).to(engine.device)
    rows = []
    for key in track(chosen, "randomising weights", len(chosen)):
        upstream = upstream_parameters(network, key, window)
        stages = cascade(network, key, upstream)
        names: set[str] = set()
        learned = Ranked.of(before[key])
        correlations = []
        for stage in stages:
            names |= stages[stage]
            _load(network, trained, anew, names)
            redrawn = Ranked.of(_maps(engine, member, image, [key])[key])
            correlations.append(spearman(learned, redrawn))
        others = {name for name, _ in unet_of(network).named_parameters()} - upstream
        _load(network, trained, anew, others)
        after = _maps(engine, member, image, [key])[key]
        _load(network, trained, anew, set())
        rows.append(
            Randomisation(
                case,
                key,
                tuple(stages),
                tuple(correlations),
                sum(trained[name].numel() for name in others),
                float(np.abs(after - before[key]).max()),
            )
        )
    return rows


def untrained(description: ModelDescription, seed: int) -> SegmentationNetwork:
    """A network with fresh weights drawn from `seed`; torch's own generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return build_network(description).eval()


def upstream_parameters(
    network: SegmentationNetwork, key: str, window: Float[Tensor, "one channel x y z"]
) -> frozenset[str]:
    """Names, in the U-Net, of the parameters that a map is computed from.

    Those that torch's record of the computation leads back to. Some may not show, as the bias of a
    convolution before an instance normalisation.
    """
    passed: list[Tensor] = []

    def keep(attention_map: Tensor) -> Tensor:
        passed.append(attention_map)
        return attention_map

    parameters = dict(unet_of(network).named_parameters())
    required = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        with torch.enable_grad(), editing(network, {key: keep}):
            network(window)
        total = torch.stack([part.sum() for part in passed]).sum()
        if not total.requires_grad:
            return frozenset()
        slopes = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(required[name])
    return frozenset(
        name for name, slope in zip(parameters, slopes, strict=True) if slope is not None
    )


def cascade(
    network: SegmentationNetwork, key: str, upstream: Collection[str]
) -> dict[str, set[str]]:
    """The parameters that a map depends on by stage: its own module's, and then level by level
    against the way that features take, to the encoder's finest.
    """
    tap = taps(network)[key]
    own = next(
        name.rpartition(".")[0]
        for name, module in unet_of(network).named_modules()
        if module is tap
    )
    stages: dict[str, set[str]] = {}
    for name in upstream:
        parts = name.split(".")
        levelled = parts[0] in ("encoder", "decoder")
        stage = ".".join(parts[:2]) if levelled else parts[0]
        if own and name.startswith(f"{own}."):
            stage = OWN
        stages.setdefault(stage, set()).add(name)
    return {stage: stages[stage] for stage in sorted(stages, key=_depth, reverse=True)}


def _depth(stage: str) -> tuple[int, int, str]:
    """Sorts stages as features pass them, the map's own last."""
    kind, _, level = stage.partition(".")
    match kind:
        case "encoder":
            return 0, int(level), ""
        case "bottleneck":
            return 1, 0, ""
        case "decoder":
            return 2, -int(level), ""
        case _:
            return (4 if stage == OWN else 3), 0, stage


def _load(
    network: SegmentationNetwork,
    trained: dict[str, Tensor],
    anew: dict[str, Tensor],
    names: Collection[str],
) -> None:
    """Give a network its trained weights but for those named; statistics beside these go along."""
    modules = {name.rpartition(".")[0] for name in names}
    beside = {
        f"{module}.{name}"
        for module in modules
        for name, _ in unet_of(network).get_submodule(module).named_buffers(recurse=False)
        if f"{module}.{name}" in trained
    }
    chosen = beside.union(names)
    unet_of(network).load_state_dict(
        {name: anew[name] if name in chosen else value for name, value in trained.items()}
    )


def _maps(
    engine: TorchEngine, member: ModelWalk, image: Tensor, keys: Collection[str]
) -> dict[str, ndarray]:
    """Maps of the whole image, without mirror images."""

    def look(windows: Tensor) -> dict[str, Tensor]:
        outputs = engine(windows, keys)
        return {key: outputs[key] for key in keys}

    if not keys:
        return {}
    found = slide(image, look, member.layout, batch_size=member.batch_size)
    return {key: values.cpu().numpy() for key, values in found.items()}
