"""Attention blocks by name, as the identity, and their share of a network."""

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.attention_blocks import (
    AttentionShare,
    as_identity,
    attention_blocks,
    attention_share,
)
from segkit.nn.cost import count_multiply_adds, count_parameters
from segkit.nn.map_tap import edited
from segkit.nn.slicewise import SlicewiseNetwork
from tests.networks import image_of, network_of

EVERYWHERE = {
    "skip": "additive_grid",
    "encoder": {"kind": "lka", "levels": [1]},
    "decoder": "se",
    "bottleneck": {"kind": "transformer", "heads": 2, "head_channels": 12},
    "head": "gated",
}


class Foreign(nn.Module):
    """A network that segkit did not build, of a transformer layer that changes no shape."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
        self.out = nn.Linear(8, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        embedded = self.embed(tokens)
        return self.out(self.layer(embedded, None))


def test_blocks_have_the_positions_of_their_maps() -> None:
    network = network_of(EVERYWHERE, 2)
    assert attention_blocks(network) == {
        "encoder.1": "encoder.1.2",
        "bottleneck.0": "bottleneck.0",
        "bottleneck.1": "bottleneck.1",
        "skip.1": "decoder.1.gate",
        "decoder.0": "decoder.0.attention",
        "decoder.1": "decoder.1.attention",
    }
    assert attention_blocks(network_of({}, 3)) == {}


def test_blocks_of_planes_are_those_of_their_network() -> None:
    network = SlicewiseNetwork(network_of({"skip": "additive_grid"}, 2), axis=2)
    assert attention_blocks(network) == {"skip.1": "network.decoder.1.gate"}
    image = image_of(2)[..., None].expand(-1, -1, -1, -1, 3)
    whole = network(image)
    with as_identity(network, ["skip.1"]):
        assert not torch.allclose(network(image), whole)
    assert torch.equal(network(image), whole)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_one_block_after_another_can_be_the_identity(spatial_dims: int) -> None:
    network = network_of(EVERYWHERE, spatial_dims)
    image, state = image_of(spatial_dims), set(network.state_dict())
    whole = network(image)
    seen = []
    for block in attention_blocks(network):
        assert not edited(network)
        with as_identity(network, [block]):
            assert edited(network)
            seen.append(network(image))
        assert not torch.allclose(seen[-1], whole, atol=1e-6), block
    assert all(not torch.equal(a, b) for n, a in enumerate(seen) for b in seen[:n])
    assert torch.equal(network(image), whole) and set(network.state_dict()) == state


def test_a_network_is_whole_again_after_an_error() -> None:
    network = network_of(EVERYWHERE, 2)
    whole = network(image_of(2))
    with pytest.raises(RuntimeError, match="stop"), as_identity(network, attention_blocks(network)):
        raise RuntimeError("stop")
    assert torch.equal(network(image_of(2)), whole)


def test_blocks_within_blocks_are_put_back() -> None:
    network = network_of(EVERYWHERE, 2)
    whole, names = network(image_of(2)), [name for name, _ in network.named_modules()]
    with as_identity(network, ["encoder.1", "encoder.1.2.mix", "bottleneck", "bottleneck.1"]):
        network(image_of(2))
    assert torch.equal(network(image_of(2)), whole)
    assert [name for name, _ in network.named_modules()] == names


def test_a_block_that_is_not_there_is_refused_with_those_that_are() -> None:
    network = network_of({"skip": "additive_grid"}, 2)
    for block in ("skip.0", ""):
        with (
            pytest.raises(ValueError, match=rf"no attention block '{block}'; it has skip\.1, and"),
            as_identity(network, [block]),
        ):
            pass


def test_a_module_of_any_network_can_be_named() -> None:
    torch.manual_seed(0)
    network = Foreign().eval()
    tokens = torch.randn(2, 5, 3)
    whole = network(tokens)
    with as_identity(network, ["layer"]):
        assert_close(network(tokens), network.out(network.embed(tokens)))
    assert torch.equal(network(tokens), whole)


class Held(nn.Module):
    """A network that calls its layers from a plain list, which holds the first one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(2)
        )
        self.also = nn.ModuleList([self.first])
        self.listed = [self.first, self.second, self.first]
        self.unused = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        for layer in self.listed:
            tokens = layer(tokens)
        return tokens


def test_a_block_is_replaced_wherever_it_is_held() -> None:
    torch.manual_seed(0)
    network, tokens = Held().eval(), torch.randn(2, 5, 8)
    whole = network(tokens)
    assert list(attention_blocks(network, tokens)) == ["first", "second"]
    for names in (["first", "second"], ["also.0", "second"]):
        with as_identity(network, names):
            assert torch.equal(network(tokens), tokens)
    with as_identity(network, ["first"]):
        assert torch.equal(network(tokens), network.second(tokens))
    assert torch.equal(network(tokens), whole) and not edited(network)
    assert attention_share(network, tokens).parameters_outside == 8 * 8 + 8


def test_blocks_can_be_replaced_within_blocks_that_are_replaced() -> None:
    network, tokens = Held().eval(), torch.randn(2, 5, 8)
    whole = network(tokens)
    with as_identity(network, ["first"]):
        with as_identity(network, ["first", "second"]):
            assert torch.equal(network(tokens), tokens)
        assert torch.equal(network(tokens), network.second(tokens))
    assert torch.equal(network(tokens), whole) and not edited(network)


def test_a_module_that_is_not_called_is_refused() -> None:
    network = Held().eval()
    with (
        pytest.raises(ValueError, match="unused: expected a module that the network calls"),
        as_identity(network, ["unused"]),
    ):
        network(torch.randn(2, 5, 8))


def test_multiply_adds_are_those_worked_out_by_hand() -> None:
    # 5 x 7 voxels, 2 channels to 3, 3 x 3 cells: 35 * 2 * 3 * 9; then 3 to 4, 1 x 1: 35 * 12.
    layers = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 4, 1)).train()
    assert count_multiply_adds(layers, torch.zeros(1, 2, 5, 7)) == 35 * 2 * 3 * 9 + 35 * 12
    assert all(layer.training for layer in layers)
    assert count_parameters(layers) == 2 * 3 * 9 + 3 + 3 * 4 + 4


def test_fused_attention_is_counted_as_its_two_products() -> None:
    class Attention(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)

    # 6 x 6 pairs of 4 channels, twice, of 2 heads.
    assert count_multiply_adds(Attention(), torch.zeros(1, 2, 6, 4)) == 2 * 2 * 6 * 6 * 4


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_the_part_outside_attention_equals_the_plain_network(spatial_dims: int) -> None:
    attention = {name: kind for name, kind in EVERYWHERE.items() if name != "head"}
    network, plain = network_of(attention, spatial_dims), network_of({}, spatial_dims)
    image = image_of(spatial_dims)
    found = attention_share(network, image)
    assert found.parameters == count_parameters(network)
    assert found.parameters_outside == count_parameters(plain)
    assert found.multiply_adds == count_multiply_adds(network, image)
    assert found.multiply_adds_outside == count_multiply_adds(plain, image)
    assert found.parameters_share_outside == count_parameters(plain) / count_parameters(network)
    assert 0 < found.multiply_adds_share_outside < 1
    assert found.unet_index(count_parameters(plain)) == 1
    none = attention_share(plain, image)
    assert none.parameters_share_outside == none.multiply_adds_share_outside == 1


def test_shares_of_a_foreign_network_are_of_the_blocks_that_are_named() -> None:
    network = Foreign()
    found = attention_share(network, torch.zeros(1, 5, 3), ["layer"])
    # Linear layers of 3 to 8 and 8 to 2, on 5 tokens.
    assert found.parameters_outside == (3 * 8 + 8) + (8 * 2 + 2)
    assert found.multiply_adds_outside == 5 * (3 * 8 + 8 * 2)
    assert found.parameters > found.parameters_outside


def test_the_share_of_nothing_is_not_a_number() -> None:
    none = AttentionShare(0, 0, 0.0, 0.0)
    assert none.parameters_share_outside != none.parameters_share_outside
    assert none.multiply_adds_share_outside != none.multiply_adds_share_outside


def test_pytorchs_attention_counts_as_its_matrix_products() -> None:
    """Without the fused path of prediction, which is one call that no counter knows."""
    layer = nn.TransformerEncoderLayer(8, 2, dim_feedforward=16, batch_first=True)
    cells, width, hidden = 10, 8, 16
    products = 4 * cells * width**2 + 2 * cells**2 * width + 2 * cells * width * hidden
    fast = torch.backends.mha.get_fastpath_enabled()
    assert count_multiply_adds(layer, torch.zeros(1, cells, width)) == products
    assert torch.backends.mha.get_fastpath_enabled() == fast
