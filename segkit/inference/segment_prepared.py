"""Segmentation of prepared images, for validation during training."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines.out_of_memory import OneWindowEngine
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine, windows_at_once
from segkit.inference.finite_watch import FiniteWatch
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

    The network computes in the precision of training, which is that of `torch.autocast`; in single
    precision, if its outputs overflow float16.

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
    layout = window_layout(network, patch_size, overlap, image.shape[1:])

    def segment(precision: torch.dtype) -> tuple[Tensor, FiniteWatch]:
        engine = OneWindowEngine(TorchEngine(network, device=device, precision=precision))
        at_once = windows_at_once(network, device, layout.patch_size, precision)
        finite, labels = FiniteWatch(), []
        for slab in stream(image, lambda windows: engine(windows, ()), layout, batch_size=at_once):
            if precision == torch.float16:
                finite.add(slab.rows[LOGITS])
            labels.append(labels_of(slab.rows.pop(LOGITS), written))
        return torch.cat(labels), finite

    half = torch.is_autocast_enabled(device.type)
    labels, finite = segment(torch.get_autocast_dtype(device.type) if half else torch.float32)
    return labels if finite.at_end() else segment(torch.float32)[0]
