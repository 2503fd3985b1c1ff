import math

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.geometry.grid import Placement
from segkit.nn.map_tap import editing, place_taps, recording
from segkit.nn.pooling import GatedPooling, LearnedQueryPooling, MeanPooling

KEY = "bottleneck/pool"
SPACES = [(4, 5), (3, 2, 4)]
Pooling = MeanPooling | GatedPooling | LearnedQueryPooling
KINDS: tuple[type[Pooling], ...] = (MeanPooling, GatedPooling, LearnedQueryPooling)


def features_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def pooling_of(kind: type[Pooling], spatial_dims: int = 2) -> Pooling:
    """Pooling of 6 channels for 3 classes, which looks at some voxels far more than at others."""
    torch.manual_seed(0)
    pooling: Pooling
    if kind is GatedPooling:
        pooling = GatedPooling(6, num_classes=3, width=5)
        nn.init.normal_(pooling.energy.weight, std=3.0)
    else:
        pooling = kind(6, num_classes=3)
    if isinstance(pooling, LearnedQueryPooling):
        nn.init.normal_(pooling.queries, std=3.0)
        nn.init.normal_(pooling.bias)
    place_taps(pooling, "bottleneck", 0, Placement.identity(spatial_dims))
    return pooling


def uniform(shares: Tensor) -> Tensor:
    return torch.full_like(shares, 1 / shares.shape[2:].numel())


def test_mean_pooling_gives_the_logits_worked_out_by_hand() -> None:
    pooling = MeanPooling(2, num_classes=2)
    with torch.no_grad():
        pooling.classify.weight.copy_(torch.tensor([[1.0, -1.0], [2.0, 0.5]]))
        pooling.classify.bias.copy_(torch.tensor([0.5, 0.0]))
    # Means 2 and 4: 2 - 4 + 0.5 and 2*2 + 4/2.
    features = torch.tensor([[[[1.0, 3.0]], [[0.0, 8.0]]]])
    assert_close(pooling(features), torch.tensor([[-1.5, 6.0]]))


@pytest.mark.parametrize("space", SPACES)
def test_gated_pooling_without_energy_is_the_mean(space: tuple[int, ...]) -> None:
    gated, mean = pooling_of(GatedPooling, len(space)), pooling_of(MeanPooling)
    mean.classify.load_state_dict(gated.classify.state_dict())
    features = features_of(2, 6, *space)
    assert not torch.allclose(gated(features), mean(features), atol=1e-2)
    nn.init.zeros_(gated.energy.weight)
    with recording(gated) as maps:
        assert_close(gated(features), mean(features))
    assert_close(maps[KEY], torch.full((2, 1, *space), 1 / math.prod(space)))


@pytest.mark.parametrize("space", SPACES)
def test_queries_of_0_pool_the_mean(space: tuple[int, ...]) -> None:
    pooling = pooling_of(LearnedQueryPooling, len(space))
    features = features_of(2, 6, *space)
    before = pooling(features)
    nn.init.zeros_(pooling.queries)
    with recording(pooling) as maps:
        logits = pooling(features)
    values = pooling.value(features.flatten(2).transpose(1, 2))
    assert_close(logits, values.mean(dim=1) @ pooling.weight.T + pooling.bias)
    assert_close(maps[KEY], torch.full((2, 3, *space), 1 / math.prod(space)))
    assert not torch.allclose(logits, before, atol=1e-2)


@pytest.mark.parametrize("space", SPACES)
def test_gated_pooling_gives_the_weighted_mean_of_its_paper(space: tuple[int, ...]) -> None:
    pooling = pooling_of(GatedPooling, len(space))
    features = features_of(2, 6, *space)
    with recording(pooling) as maps:
        logits = pooling(features)
    # Ilse et al. (2018), Eq. 8 and 9, voxel by voxel.
    for sample, sample_features in enumerate(features.flatten(2)):
        energies = []
        for voxel in sample_features.T:
            content = torch.tanh(pooling.content.weight @ voxel + pooling.content.bias)
            opened = 1 / (1 + torch.exp(-(pooling.gate.weight @ voxel + pooling.gate.bias)))
            energies.append((pooling.energy.weight[0] * content * opened).sum())
        shares = torch.stack(energies).exp()
        shares = shares / shares.sum()
        assert_close(maps[KEY][sample, 0].flatten(), shares)
        pooled = sample_features @ shares
        assert_close(logits[sample], pooling.classify.weight @ pooled + pooling.classify.bias)


@pytest.mark.parametrize("space", SPACES)
def test_a_query_pools_the_values_by_the_softmax_of_its_scaled_products(
    space: tuple[int, ...],
) -> None:
    pooling = pooling_of(LearnedQueryPooling, len(space))
    features = features_of(2, 6, *space)
    with recording(pooling) as maps:
        logits = pooling(features)
    cells = features.flatten(2).transpose(1, 2)
    keys, values = cells @ pooling.key.weight.T, pooling.value(cells)
    for number in range(3):
        shares = ((keys @ pooling.queries[number]) / math.sqrt(6)).exp()
        shares = shares / shares.sum(dim=1, keepdim=True)
        assert_close(maps[KEY][:, number].flatten(1), shares)
        expected = torch.einsum("bn,bnc,c->b", shares, values, pooling.weight[number])
        assert_close(logits[:, number], expected + pooling.bias[number])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("space", SPACES)
def test_the_order_of_the_voxels_does_not_matter(
    kind: type[Pooling], space: tuple[int, ...]
) -> None:
    pooling = pooling_of(kind)
    features = features_of(2, 6, *space)
    order = torch.randperm(math.prod(space), generator=torch.Generator().manual_seed(2))
    logits = pooling(features)
    assert_close(pooling(features.flatten(2)[:, :, order].view(features.shape)), logits)
    # One that did not look at the features at all would pass so far.
    assert not torch.allclose(pooling(features.flip(1)), logits, atol=1e-2)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_single_voxel_is_its_own_mean(spatial_dims: int) -> None:
    features = features_of(2, 6, *[1] * spatial_dims)
    voxel = features.flatten(1)
    for kind in (MeanPooling, GatedPooling):
        pooling = pooling_of(kind, spatial_dims)
        assert_close(pooling(features), pooling.classify(voxel))
    pooling = pooling_of(LearnedQueryPooling, spatial_dims)
    assert_close(pooling(features), pooling.value(voxel) @ pooling.weight.T + pooling.bias)


@pytest.mark.parametrize(("kind", "num_maps"), [(GatedPooling, 1), (LearnedQueryPooling, 3)])
@pytest.mark.parametrize("space", SPACES)
def test_each_map_sums_to_1_and_its_recording_changes_no_bit(
    kind: type[Pooling], num_maps: int, space: tuple[int, ...]
) -> None:
    pooling = pooling_of(kind, len(space))
    features = features_of(2, 6, *space)
    logits = pooling(features)
    with recording(pooling) as maps:
        assert torch.equal(pooling(features), logits)
    assert maps[KEY].shape == (2, num_maps, *space)
    assert maps[KEY].std() > 0.02
    assert_close(maps[KEY].flatten(2).sum(dim=2), torch.ones(2, num_maps))


@pytest.mark.parametrize("kind", [GatedPooling, LearnedQueryPooling])
def test_a_voxel_whose_logit_is_higher_by_50_is_picked(kind: type[Pooling]) -> None:
    pooling = pooling_of(kind, 3)
    features = features_of(2, 6, 3, 2, 4)
    # The first channel says where to look, and is 0 but for one voxel of each sample.
    features[:, 0] = 0.0
    features[0, 0, 1, 0, 2] = features[1, 0, 2, 1, 3] = 1.0
    with torch.no_grad():
        if isinstance(pooling, GatedPooling):
            # tanh(20) = sigmoid(20) = 1, and tanh(0) = 0.
            for layer in (pooling.content, pooling.gate):
                layer.weight.zero_()
                layer.bias.zero_()
                layer.weight[:, 0] = 20.0
            pooling.energy.weight.fill_(50 / 5)
        else:
            pooling.key.weight.copy_(torch.eye(6))
            pooling.queries.zero_()
            pooling.queries[:, 0] = 50 * math.sqrt(6)
    with recording(pooling) as maps:
        logits = pooling(features)
    picked = torch.stack([features[0, :, 1, 0, 2], features[1, :, 2, 1, 3]])
    assert_close(logits, pooling(picked[:, :, None, None, None]))
    for sample, cell in enumerate(((1, 0, 2), (2, 1, 3))):
        expected = torch.zeros(3, 2, 4)
        expected[cell] = 1.0
        for pool_map in maps[KEY][sample]:
            assert_close(pool_map, expected, rtol=0, atol=1e-6)


def test_classes_with_queries_do_not_influence_one_another() -> None:
    pooling = pooling_of(LearnedQueryPooling)
    features = features_of(2, 6, 4, 5)
    before = pooling(features)
    of_first = torch.autograd.grad(pooling(features)[:, 0].sum(), pooling.queries)[0]
    assert (of_first[0] != 0).any() and (of_first[1:] == 0).all()
    with torch.no_grad():
        for of_class in (pooling.queries, pooling.weight, pooling.bias):
            of_class[1] += 1.0
    after = pooling(features)
    assert_close(after[:, [0, 2]], before[:, [0, 2]])
    assert not torch.allclose(after[:, 1], before[:, 1], atol=0.1)


def test_an_edit_of_one_classs_map_changes_only_its_logit() -> None:
    pooling = pooling_of(LearnedQueryPooling)
    features = features_of(2, 6, 4, 5)
    before = pooling(features)

    def only_second(maps: Tensor) -> Tensor:
        return torch.cat([maps[:, :1], uniform(maps)[:, 1:2], maps[:, 2:]], dim=1)

    with editing(pooling, {KEY: only_second}):
        after = pooling(features)
    assert_close(after[:, [0, 2]], before[:, [0, 2]])
    with editing(pooling, {KEY: uniform}):
        of_mean = pooling(features)
    assert_close(after[:, 1], of_mean[:, 1])
    mean = pooling.value(features.mean(dim=(2, 3)))
    assert_close(of_mean, mean @ pooling.weight.T + pooling.bias)
    assert not torch.allclose(of_mean, before, atol=1e-2)


def test_gated_pooling_edited_to_uniform_is_the_mean() -> None:
    pooling = pooling_of(GatedPooling)
    features = features_of(2, 6, 4, 5)
    with editing(pooling, {KEY: uniform}):
        assert_close(pooling(features), pooling.classify(features.mean(dim=(2, 3))))


@pytest.mark.parametrize("kind", [GatedPooling, LearnedQueryPooling])
def test_maps_of_bfloat16_features_are_float32(kind: type[Pooling]) -> None:
    pooling = pooling_of(kind)
    features = features_of(2, 6, 4, 5)
    expected = pooling(features)
    with recording(pooling) as maps, torch.autocast("cpu", dtype=torch.bfloat16):
        logits = pooling(features.bfloat16())
    assert_close(logits.float(), expected, rtol=0, atol=0.05 * expected.abs().max().item())
    assert not torch.equal(maps[KEY], maps[KEY].bfloat16().float()), "was rounded"
    total = maps[KEY].flatten(2).sum(dim=2)
    assert_close(total, torch.ones_like(total))
