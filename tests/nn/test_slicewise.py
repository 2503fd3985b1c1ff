"""A network of planes on a volume is the network on each plane, put back in its place."""

import pytest
import torch
from torch.testing import assert_close

from segkit.nn.slicewise import SlicewiseNetwork
from tests.networks import image_of, network_of


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_slice_is_segmented_on_its_own(axis: int) -> None:
    plane_network = network_of({"skip": "additive_grid"}, 2)
    network = SlicewiseNetwork(plane_network, axis=axis)
    planes = [image_of(2, seed=seed) for seed in range(3)]
    logits = network(torch.stack(planes, dim=axis + 2))
    for plane, found in zip(planes, logits.unbind(axis + 2), strict=True):
        assert_close(found, plane_network(plane))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_stacked_slices_are_the_volume(axis: int) -> None:
    network = SlicewiseNetwork(network_of({}, 2), axis=axis)
    volume = torch.randn(2, 3, 4, 5, 6)
    assert torch.equal(network.stack_slices(network.split_slices(volume), 2), volume)


def test_across_the_slices_a_cell_is_a_voxel() -> None:
    plane_network = network_of({}, 2)
    network = SlicewiseNetwork(plane_network, axis=1)
    assert network.total_stride == (plane_network.total_stride[0], 1, plane_network.total_stride[1])
    assert [placement.stride[1] for placement in network.placements] == [1.0] * 3
    assert [placement.offset[1] for placement in network.placements] == [0.0] * 3
