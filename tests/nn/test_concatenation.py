"""Wide concatenation gives, bit for bit, what PyTorch's own concatenation gives."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from segkit.nn import concatenation
from segkit.nn.concatenation import concatenate_channels
from segkit.nn.normalisation import CHANNELS_LAST

KINDS = [torch.float32, torch.float16, torch.bfloat16]


def parts_of(
    widths: Sequence[int], batch: int, space: Sequence[int], kind: torch.dtype, device: str = "cpu"
) -> list[Tensor]:
    order = CHANNELS_LAST[2 + len(space)]
    parts = [torch.randn(batch, width, *space, device=device).to(kind) for width in widths]
    return [part.contiguous(memory_format=order).requires_grad_() for part in parts]


def assert_as_by_pytorch(parts: list[Tensor], *, wide: bool) -> None:
    assert concatenation._can_copy_wide(parts) == wide
    found, expected = concatenate_channels(parts), torch.cat(parts, dim=1)
    assert torch.equal(found, expected) and found.dtype == expected.dtype
    gradient = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(output, parts, gradient) for output in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert torch.equal(one, two) and one.dtype == two.dtype
    if wide:
        order = CHANNELS_LAST[found.ndim]
        assert all(each.is_contiguous(memory_format=order) for each in (found, *ours))


@given(
    widths=st.lists(st.sampled_from([8, 16, 24, 40]), min_size=1, max_size=3),
    batch=st.integers(1, 3),
    space=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    kind=st.sampled_from(KINDS),
)
def test_wide_copies_are_bit_for_bit_those_of_pytorch(
    widths: list[int], batch: int, space: list[int], kind: torch.dtype
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(concatenation, "WIDE_DEVICE", "cpu")
        assert_as_by_pytorch(parts_of(widths, batch, space, kind), wide=True)


def test_a_gradient_in_another_order_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concatenation, "WIDE_DEVICE", "cpu")
    parts = parts_of([8, 16], 2, (3, 4, 5), torch.float32)
    gradient = torch.randn(2, 24, 3, 4, 5)
    found = torch.autograd.grad(concatenate_channels(parts), parts, gradient)
    assert all(map(torch.equal, found, gradient.split([8, 16], dim=1)))


def test_a_gradient_that_begins_between_two_pieces_is_copied(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(concatenation, "WIDE_DEVICE", "cpu")
    parts = parts_of([8, 8], 1, (1, 1), torch.float32)
    gradient = torch.randn(17)[1:].view(1, 16, 1, 1)
    found = torch.autograd.grad(concatenate_channels(parts), parts, gradient)
    assert all(map(torch.equal, found, gradient.split(8, dim=1)))


def test_features_that_are_not_whole_pieces_of_16_bytes_are_concatenated_by_pytorch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(concatenation, "WIDE_DEVICE", "cpu")
    of_four = parts_of([4, 8], 2, (3, 4, 5), torch.bfloat16)
    assert_as_by_pytorch(of_four, wide=False)
    assert_as_by_pytorch(parts_of([4, 8], 2, (3, 4, 5), torch.float32), wide=True)
    contiguous = [torch.randn(2, 8, 3, 4, 5, requires_grad=True) for _ in range(2)]
    assert_as_by_pytorch(contiguous, wide=False)
    mixed = [*parts_of([8], 2, (3, 4), torch.float32), *parts_of([8], 2, (3, 4), torch.bfloat16)]
    assert_as_by_pytorch(mixed, wide=False)
    moved = torch.randn(2 * 12 * 8 + 1)[1:].view(2, 3, 4, 8).movedim(-1, 1).requires_grad_()
    assert_as_by_pytorch([moved, moved], wide=False)


def test_on_a_cpu_pytorch_concatenates() -> None:
    assert_as_by_pytorch(parts_of([8, 8], 1, (3, 4, 5), torch.float32), wide=False)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", [(33, 20), (9, 20, 7)])
def test_wide_copies_on_a_gpu_are_bit_for_bit_those_of_pytorch(
    space: tuple[int, ...], kind: torch.dtype
) -> None:
    assert_as_by_pytorch(parts_of([32, 64], 2, space, kind, "cuda"), wide=True)
