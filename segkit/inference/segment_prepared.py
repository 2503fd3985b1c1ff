"""Segmentation of prepared images, for validation during training."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines.out_of_memory import OneWindowEngine
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine, windows_at_once
from segkit.inference.model_walk import window_layout
from segkit.inference.source_rows import labels_of
from segkit.inference.windows import stream
from segkit.nn.network import SegmentationNetwork


def segment_prepared(
    network: SegmentationNetwork,
    image: Float[Tensor, "channel x y z"],
    *,
    patch_size: tuple[int, int, int],
    overlap: float = 0.5,
    written: Sequence[int] | None = None,
) -> Tensor:
    """Labels of a prepared image on the image's own grid, for validation during training.

    Args:
        network: the network, on its device.
        image: the prepared image.
        patch_size: size of windows in voxels.
        overlap: share of a window that neighbours have in common.
        written: the numbers of regions, in order; None if the outputs are classes.

    Returns:
        Labels (x, y, z).
    """
    device = next(network.parameters()).device
    # A GPU uses the precision of training.
    half = device.type == "cuda" and torch.is_autocast_enabled("cuda")
    precision = torch.get_autocast_dtype("cuda") if half else torch.float32
    engine = OneWindowEngine(TorchEngine(network, device=device, precision=precision))
    layout = window_layout(network, patch_size, overlap, image.shape[1:])
    batch_size = windows_at_once(network, device, layout.patch_size)
    slabs = stream(image, lambda windows: engine(windows, ()), layout, batch_size=batch_size)
    return torch.cat([labels_of(slab.rows.pop(LOGITS), written) for slab in slabs])
