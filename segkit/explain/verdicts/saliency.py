"""Maps made of gradients, to be measured beside the network's own: Grad-CAM, and input gradients.

They are computed window by window and blended on one global grid like any map, and nothing is
scaled within a window: numbers of two windows can be compared. The network's forward pass is taken
in its parts, so no hook is needed. It is the first model's, without mirror images.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.errors import ModelError
from segkit.explain.verdicts.first_model import slabs_of_first
from segkit.geometry.grid import Placement
from segkit.inference.attention_maps import AttentionMap, MapCollector
from segkit.inference.predictor import Predictor
from segkit.io.disk_arrays import in_memory
from segkit.io.volume import Volume
from segkit.nn.map_tap import MapInfo
from segkit.nn.network import unet_of
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet

Saliency = Callable[[Float[Tensor, "batch channel *space"]], Float[Tensor, "batch 1 *cells"]]


def grad_cam(
    predictor: Predictor,
    volume: Volume,
    label: str,
    *,
    level: int,
    position: Literal["encoder", "decoder"] = "decoder",
) -> AttentionMap:
    """Where features of a level speak for a class: relu(Σ_k a_k A_k), 0 or more.

    Grad-CAM of Selvaraju et al. (2017, arXiv:1610.02391, Eq. 1-2) for segmentation, of Vinogradova
    et al. (2020, arXiv:2002.11434, Eq. 1): A_k are the features, a_k the mean over their cells of
    the gradient of the class's logits, summed over the voxels of the window that are predicted as
    it. The encoder's coarsest features are the bottleneck's. The key is 'decoder.1/gradcam-LABEL'.
    Raises ModelError for a class or level that the model does not have.
    """
    unet = unet_of(predictor.model.network)
    if not isinstance(unet, UNet):
        raise ModelError(
            f"Grad-CAM knows the levels of U-Nets alone, found a given {type(unet.module).__name__}"
            f"; take input_gradient"
        )
    levels = len(unet.encoder) if position == "encoder" else len(unet.decoder)
    if not 0 <= level < levels:
        raise ModelError(f"the {position} has the levels 0 … {levels - 1}, found {level}; name one")
    output, is_regions = _output(predictor, label)

    def look(image: Tensor) -> Tensor:
        # Features have gradients then whatever weights are frozen.
        encoded, decoded = unet.features(image.detach().requires_grad_())
        features = (encoded if position == "encoder" else decoded)[level]
        logits = unet.heads[0](decoded[0])
        slope = _slope(logits, output, features, is_regions=is_regions)
        weights = slope.mean(dim=tuple(range(2, slope.ndim)), keepdim=True)
        return (weights * features.detach()).sum(dim=1, keepdim=True).relu()

    key = f"{position}.{level}/gradcam-{label}"
    return _walk(predictor, volume, look, key, level, predictor.model.network.placements[level])


def input_gradient(predictor: Predictor, volume: Volume, label: str) -> AttentionMap:
    """How far each voxel moves a class: the largest |gradient| over the image's channels.

    Simonyan et al. (2013, arXiv:1312.6034, Sec. 3) of the class's logits, summed over the voxels of
    the window that are predicted as it. The key is 'input/gradient-LABEL'. Raises ModelError for a
    class that the model does not have.
    """
    unet = unet_of(predictor.model.network)
    output, is_regions = _output(predictor, label)
    num_channels = len(predictor.model.description.channels)

    def look(image: Tensor) -> Tensor:
        image = image.detach().requires_grad_()
        slope = _slope(unet(image), output, image, is_regions=is_regions)
        return slope[:, :num_channels].abs().amax(dim=1, keepdim=True)

    return _walk(predictor, volume, look, f"input/gradient-{label}", 0, Placement.identity(3))


def _output(predictor: Predictor, label: str) -> tuple[int, bool]:
    labelling = predictor.model.description.labelling
    if label not in labelling.outputs:
        raise ModelError(
            f"the model tells apart {', '.join(labelling.outputs)}, found {label!r}; name one"
        )
    return labelling.outputs.index(label), labelling.written is not None


def _slope(logits: Tensor, output: int, by: Tensor, *, is_regions: bool) -> Tensor:
    """The gradient of an output's logits, summed over the voxels that are predicted as it."""
    chosen = logits[:, output] > 0 if is_regions else logits.argmax(dim=1) == output
    total = (logits[:, output] * chosen).sum()
    (slope,) = torch.autograd.grad(total, [by])
    return slope


def _walk(
    predictor: Predictor,
    volume: Volume,
    look: Saliency,
    key: str,
    level: int,
    placement: Placement,
) -> AttentionMap:
    network = predictor.model.network
    device = next(network.parameters()).device
    info = MapInfo(key, "saliency", level, placement, 0.0, torch.inf)
    prepared = predictor.prepare(volume)

    def run(windows: Tensor) -> dict[str, Tensor]:
        image = windows.to(device)
        with torch.enable_grad():
            if isinstance(network, SlicewiseNetwork):
                cells = network.stack(look(network.planes(image)), len(image))
            else:
                cells = look(image)
        return {key: cells.detach().float()}

    collector = MapCollector({key: info}, prepared, allocate=in_memory)
    for slab in slabs_of_first(predictor, prepared.image, run):
        collector.take_rows(slab)
    return collector.result(volume)[key]
