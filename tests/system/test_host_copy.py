"""A copy has the values that a tensor had when it began, and is complete when it is read."""

import pytest
import torch

from segkit.system.host_copy import HostCopy


def test_a_tensor_on_the_host_is_its_own_copy_and_has_arrived() -> None:
    values = torch.arange(4.0, requires_grad=True)
    copy = HostCopy(values)
    assert copy.arrived and copy.values().tolist() == [0, 1, 2, 3]
    assert copy.values().data_ptr() == values.data_ptr() and not copy.values().requires_grad


@pytest.mark.gpu
def test_a_copy_from_a_gpu_has_the_values_that_it_had_when_the_copy_began() -> None:
    large = torch.rand(4096, 4096, device="cuda")
    values = (large @ large)[:64].t()  # not in the order of memory
    expected = values.clone()
    copy = HostCopy(values)
    values.zero_()
    found = copy.values()
    assert copy.arrived and found.device.type == "cpu" and found.is_pinned()
    assert torch.equal(found, expected.cpu())
