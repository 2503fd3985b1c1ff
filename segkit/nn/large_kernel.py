"""Large-kernel attention, f(x): each voxel is weighted by voxels up to eleven voxels away."""

import math

import torch.nn.functional as F
from torch import nn

from segkit.nn.blocks import CONV, Features, NormalisationKind, normalisation
from segkit.nn.map_tap import MapTap
from segkit.nn.transformer import LayerScale

LOCAL_SIZE = 5
DISTANT_SIZE = 7
DILATION = 3
"""A kernel of 21 cells is replaced by one of 2 * 3 - 1 = 5 cells, and one of 21 / 3 = 7 cells that
are 3 apart."""


class LargeKernelAttention(nn.Module):
    """Features plus the same features, weighted by convolutions with large kernels.

        a = gelu(W₁ norm x)
        x + λ ⊙ W₂ (A ⊙ a),   A = W₃ conv₇(conv₅(a))

    Guo et al. (2022, arXiv:2202.09741, Eq. 1-2 and Fig. 3d). Both convolutions are depthwise, 5 and
    7 cells (these dilated by 3) along each axis, so that A sees 23 cells. W are 1x1 convolutions,
    and λ is a number for each channel, 0.01 at first. In 3D it is that of Azad et al. (2023,
    arXiv:2309.00121), but without deformable convolutions. Values of A have either sign and no
    bounds. The map is the mean of their absolute values over channels.

    We differ from the paper in two points. The second half of the block, a perceptron, is left out,
    because the U-Net's own convolutions follow. The shortcut of their code around W₂ within norm x
    is left out too.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        norm: NormalisationKind = "instance",
        layer_scale: float = 0.01,
    ) -> None:
        super().__init__()
        conv = CONV[spatial_dims]
        self.norm = normalisation(norm, spatial_dims, channels)
        self.project = conv(channels, channels, kernel_size=1)
        self.local = conv(
            channels, channels, kernel_size=LOCAL_SIZE, padding=LOCAL_SIZE // 2, groups=channels
        )
        self.distant = conv(
            channels,
            channels,
            kernel_size=DISTANT_SIZE,
            padding=DILATION * (DISTANT_SIZE // 2),
            dilation=DILATION,
            groups=channels,
        )
        self.mix = conv(channels, channels, kernel_size=1)
        self.out = conv(channels, channels, kernel_size=1)
        self.scale = LayerScale(channels, initial=layer_scale)
        for layer in (self.project, self.local, self.distant, self.mix, self.out):
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.weight[0].numel()))
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        self.branch = MapTap("branch")
        self.tap = MapTap("spatial", highest=math.inf, magnitude=True)

    def forward(self, features: Features) -> Features:
        """The features plus the weighted features."""
        gated = F.gelu(self.project(self.norm(features)))
        attention = self.tap(self.mix(self.distant(self.local(gated))))
        added = self.scale(self.out(attention * gated))
        if self.branch.edit is not None:
            switches = self.branch(added.new_ones(len(added), 1))
            added = added * switches.view(-1, *[1] * (added.ndim - 1)).to(added.dtype)
        return features + added.to(features.dtype)
