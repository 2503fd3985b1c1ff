"""Muon moves kernels as torch.optim.Muon moves their matrices, and the rest as AdamW."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.config.training import TrainConfig
from segkit.nn.muon import COEFFICIENTS, MuonForKernels, _iterated, is_kernel, orthogonal
from segkit.training.optimisers import make_optimiser, make_schedule


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(
        [nn.Conv3d(2, 5, 3), nn.Conv2d(4, 3, (1, 3)), nn.Conv3d(5, 4, 1), nn.Linear(4, 6)]
    )


def gradients(weights: list[nn.Parameter], seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(each.shape, generator=generator) for each in weights]


def test_kernels_over_more_than_one_voxel_are_muons() -> None:
    names = [name for name, weight in layers().named_parameters() if is_kernel(weight)]
    assert names == ["0.weight", "1.weight"]


def test_an_orthogonal_matrix_has_singular_values_of_about_one() -> None:
    for shape in [(4, 27), (27, 4), (8, 8)]:
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = torch.linalg.svdvals(orthogonal(matrix, 5))
        assert found.min() > 0.6 and found.max() < 1.25
    assert_close(orthogonal(torch.zeros(3, 4), 5), torch.zeros(3, 4))


@pytest.mark.parametrize("shape", [(4, 27), (27, 4), (8, 8), (1, 9)])
def test_it_is_the_iteration_of_newton_and_schulz(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    expected = matrix / matrix.norm()
    for _ in range(5):
        square = expected @ expected.T
        a, b, c = COEFFICIENTS
        expected = a * expected + (b * square + c * square @ square) @ expected
    assert_close(orthogonal(matrix, 5), expected)
    assert_close(orthogonal(matrix, 0), matrix / matrix.norm())
    flat = matrix[:1].expand(shape) * (1 + 1e-3 * matrix)  # nearly of rank one
    single = orthogonal(flat.float(), 5)
    assert_close(single.double(), orthogonal(flat, 5), atol=1e-3, rtol=0)


@pytest.mark.parametrize("iterations", [5, 12, 20])
def test_rounding_errors_of_a_gradient_of_low_rank_do_not_grow(iterations: int) -> None:
    """A kernel over few voxels has a gradient of low rank: 8 of 64 here."""
    torch.manual_seed(3)
    conv = nn.Conv2d(64, 64, 3, padding=1)
    conv(torch.randn(2, 64, 2, 2)).tanh().square().mean().backward()
    assert conv.weight.grad is not None
    gradient = conv.weight.grad.flatten(1)
    found, exact = orthogonal(gradient, iterations), orthogonal(gradient.double(), iterations)
    values = torch.linalg.svdvals(found)
    assert found.isfinite().all() and values.max() < 1.3 and values[:8].min() > 0.5
    if iterations == 5:
        assert (found - exact).norm() < 1e-3 * exact.norm()


@pytest.mark.parametrize("allowed", ["high", "medium"])
def test_products_in_fewer_bits_do_not_spoil_the_steps(
    allowed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning advises this setting; CPUs with instructions for bfloat16 follow it.

    Then each iteration begins with the matrix itself.
    """
    at_once: list[int] = []

    def noted(wide: Tensor, iterations: int) -> Tensor:
        at_once.append(iterations)
        return _iterated(wide, iterations)

    monkeypatch.setattr("segkit.nn.muon._iterated", noted)
    matrix = torch.randn(128, 8, generator=torch.Generator().manual_seed(6)) @ torch.randn(
        8, 1152, generator=torch.Generator().manual_seed(7)
    )
    exact = orthogonal(matrix, 5)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(allowed)
    try:
        found = orthogonal(matrix, 5)
    finally:
        torch.set_float32_matmul_precision(before)
    assert at_once == [5, 1, 1, 1, 1, 1]
    assert torch.linalg.svdvals(found).max() < 1.3
    assert (found - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_round_only_the_result(dtype: torch.dtype) -> None:
    matrix = torch.randn(16, 3, generator=torch.Generator().manual_seed(4)) @ torch.randn(
        3, 144, generator=torch.Generator().manual_seed(5)
    )
    rounded = matrix.to(dtype)
    exact = orthogonal(rounded.float(), 5)
    assert_close(orthogonal(rounded, 5), exact.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert_close(orthogonal(rounded.float(), 5), exact)


@pytest.mark.parity
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_torchs_muon_on_matrices_and_of_adamw_on_the_rest(
    nesterov: bool,
) -> None:
    """torch's works in bfloat16, of 8 bits: a step differs by a few per cent of its length."""
    ours, theirs = list(layers().parameters()), list(layers().parameters())
    shared: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1}
    muon = MuonForKernels(ours, **shared, momentum=0.9, nesterov=nesterov, betas=(0.95, 0.99))
    matrices = [nn.Parameter(each.detach().flatten(1)) for each in theirs if is_kernel(each)]
    others = [each for each in theirs if not is_kernel(each)]
    peers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, **shared, momentum=0.9, nesterov=nesterov, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, **shared, betas=(0.95, 0.99)),
    ]
    before = [each.detach().clone() for each in ours if is_kernel(each)]
    for step in range(3):
        for weight, gradient in zip(ours, gradients(ours, step), strict=True):
            weight.grad = gradient
        for weight, gradient in zip(theirs, gradients(theirs, step), strict=True):
            weight.grad = gradient
        kernels = [each for each in theirs if is_kernel(each)]
        for matrix, kernel in zip(matrices, kernels, strict=True):
            assert kernel.grad is not None
            matrix.grad = kernel.grad.flatten(1)
        muon.step()
        for peer in peers:
            peer.step()
    found = [each for each in ours if is_kernel(each)]
    for kernel, matrix, first in zip(found, matrices, before, strict=True):
        moved = matrix - first.flatten(1)
        assert (kernel.flatten(1) - matrix).norm() < 0.03 * moved.norm()
        assert moved.norm() > 0
    for own, other in zip([each for each in ours if not is_kernel(each)], others, strict=True):
        assert_close(own, other, rtol=0, atol=1e-6)


def test_a_step_without_momentum_is_worked_out_by_hand() -> None:
    """One number: its orthogonal matrix is p(p(x)) of x = 1, times 0.2 * sqrt(2)."""
    kernel = nn.Parameter(torch.full((1, 1, 2, 1), 3.0))
    kernel.grad = torch.tensor([[[[4.0], [3.0]]]])
    MuonForKernels(
        [kernel], lr=0.1, weight_decay=0.5, momentum=0.0, nesterov=False, iterations=1
    ).step()
    # (4, 3) / 5 has length 1, and one iteration makes of it 3.4445 - 4.7750 + 2.0315 = 0.7010.
    expected = 3.0 * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 2**0.5 * 0.7010 * torch.tensor([0.8, 0.6])
    assert_close(kernel.detach().flatten(), expected)


def test_a_step_of_a_transposed_convolution_is_that_of_the_map_from_a_voxel_to_its_block() -> None:
    layer = nn.ConvTranspose2d(3, 2, kernel_size=2, stride=2, bias=False)
    voxels = torch.eye(3)[..., None, None]

    def matrix_of(kernel: Tensor) -> Tensor:
        """Its columns are the blocks of the unit vectors: (2 channels x 4 voxels) x 3."""
        return F.conv_transpose2d(voxels, kernel, stride=2).flatten(1).T

    before = matrix_of(layer.weight.detach())
    layer.weight.grad = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(2))
    MuonForKernels([layer.weight], lr=0.1, weight_decay=0.0, momentum=0.0, nesterov=False).step()
    moved = matrix_of(layer.weight.detach()) - before
    assert before.shape == (8, 3)
    expected = -0.1 * 0.2 * 8**0.5 * orthogonal(matrix_of(layer.weight.grad), 5)
    assert_close(moved, expected, atol=1e-5, rtol=1e-4)


def test_its_state_is_saved_and_loaded_whole() -> None:
    def stepped(weights: list[nn.Parameter], muon: MuonForKernels, steps: range) -> None:
        for step in steps:
            for weight, gradient in zip(weights, gradients(weights, step), strict=True):
                weight.grad = gradient
            muon.step()

    whole = list(layers().parameters())
    optimiser = MuonForKernels(whole, lr=0.01, weight_decay=0.1)
    stepped(whole, optimiser, range(2))
    state = copy.deepcopy(optimiser.state_dict())
    again = [nn.Parameter(each.detach().clone()) for each in whole]
    resumed = MuonForKernels(again, lr=1.0, weight_decay=0.0)
    resumed.load_state_dict(state)
    stepped(whole, optimiser, range(2, 4))
    stepped(again, resumed, range(2, 4))
    for one, other in zip(whole, again, strict=True):
        assert torch.equal(one, other)


def test_a_schedule_moves_the_rate_of_kernels_and_of_the_rest() -> None:
    config = TrainConfig(steps=10, optimiser="muon", learning_rate=0.5, weight_decay=0.0)
    optimiser = make_optimiser(config)(layers().parameters())
    schedule = make_schedule(config)(optimiser)
    kernels, rest = optimiser.param_groups
    assert (len(kernels["params"]), len(rest["params"])) == (2, 6)
    assert kernels["lr"] == rest["lr"] == pytest.approx(0.5 / 25)
    assert rest["betas"] == (0.95, 0.999) and kernels["momentum"] == 0.95
    for _ in range(3):
        optimiser.step()
        schedule.step()
    assert kernels["lr"] == rest["lr"] == pytest.approx(0.5, rel=0.05)
    assert rest["betas"] == (0.95, 0.999) and kernels["momentum"] == 0.95


@pytest.mark.parametrize("kind", ["kernels", "others"])
def test_a_network_may_have_kernels_only_or_none(kind: str) -> None:
    weights = [each for each in layers().parameters() if is_kernel(each) == (kind == "kernels")]
    before = [each.detach().clone() for each in weights]
    optimiser = MuonForKernels(weights, lr=0.1, weight_decay=0.0)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimiser.step()
    assert len(optimiser.param_groups) == 1
    assert not any(torch.equal(one, other) for one, other in zip(weights, before, strict=True))
