"""Whatever wraps a network, its U-Net and the module with its weights are found."""

from torch import nn

from segkit.nn.external import ExternalNetwork
from segkit.nn.network import unet_of, weights_of
from segkit.nn.slicewise import SlicewiseNetwork
from tests.networks import network_of


def test_the_u_net_of_a_slicewise_network_is_found_and_has_the_weights() -> None:
    flat, deep = network_of({}, 2), network_of({}, 3)
    assert unet_of(SlicewiseNetwork(flat, axis=0)) is flat
    assert unet_of(deep) is deep and weights_of(deep) is deep
    assert weights_of(SlicewiseNetwork(flat, axis=0)) is flat


def test_the_weights_of_a_users_module_are_its_own() -> None:
    module = nn.Conv2d(1, 2, kernel_size=1)
    given = ExternalNetwork(module, out_channels=2, multiple=(1, 1))
    assert unet_of(SlicewiseNetwork(given, axis=2)) is given
    assert weights_of(SlicewiseNetwork(given, axis=2)) is module
    assert list(weights_of(given).state_dict()) == ["weight", "bias"]
