"""The type of all networks that take volumes."""

from torch import nn

from segkit.nn.external import ExternalNetwork
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet

SegmentationNetwork = UNet | ExternalNetwork | SlicewiseNetwork


def unet_of(network: SegmentationNetwork) -> UNet | ExternalNetwork:
    """The U-Net, or the user's own network, without the wrapper that feeds it slices."""
    return network.network if isinstance(network, SlicewiseNetwork) else network


def weights_of(network: SegmentationNetwork) -> nn.Module:
    """The module whose state is saved: the U-Net, or the user's own module."""
    inner = unet_of(network)
    return inner.module if isinstance(inner, ExternalNetwork) else inner
