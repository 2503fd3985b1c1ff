"""What all networks are: those that take volumes, whatever is inside them."""

from torch import nn

from segkit.nn.external import Given
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet

SegmentationNetwork = UNet | Given | SlicewiseNetwork


def unet_of(network: SegmentationNetwork) -> UNet | Given:
    """The U-Net itself, which is what has weights, or what was given in its stead."""
    return network.network if isinstance(network, SlicewiseNetwork) else network


def weights_of(network: SegmentationNetwork) -> nn.Module:
    """The module whose state is kept in files: the U-Net, or the very module that was given."""
    inner = unet_of(network)
    return inner.module if isinstance(inner, Given) else inner
