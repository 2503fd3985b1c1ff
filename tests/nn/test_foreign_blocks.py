"""Attention blocks of networks that segkit did not build."""

import importlib.util
from collections.abc import Callable

import pytest
import torch
from monai.networks.nets import UNETR, AttentionUnet, DynUNet, SwinUNETR
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.attention_blocks import as_identity, attention_blocks, attention_share
from segkit.nn.cost import count_parameters

needs_einops = pytest.mark.skipif(
    importlib.util.find_spec("einops") is None, reason="MONAI's transformers need einops"
)


def attention_unet() -> tuple[nn.Module, Tensor]:
    return AttentionUnet(2, 1, 2, channels=(4, 6, 8), strides=(2, 2)), torch.randn(2, 1, 16, 16)


def unetr() -> tuple[nn.Module, Tensor]:
    network = UNETR(
        1, 2, (32, 32), feature_size=4, hidden_size=12, mlp_dim=8, num_heads=2, spatial_dims=2
    )
    return network, torch.randn(2, 1, 32, 32)


def swin() -> tuple[nn.Module, Tensor]:
    network = SwinUNETR(
        in_channels=1,
        out_channels=2,
        feature_size=12,
        depths=(2, 1, 1, 1),
        num_heads=(1, 2, 2, 2),
        spatial_dims=2,
    )
    return network, torch.randn(1, 1, 64, 64)


GATES = ["model.1.attention", "model.1.submodule.1.attention"]
STAGES = ["layers1.0.blocks.0", "layers1.0.blocks.1"] + [f"layers{n}.0.blocks.0" for n in (2, 3, 4)]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (attention_unet, GATES),
        pytest.param(unetr, [f"vit.blocks.{n}" for n in range(12)], marks=needs_einops),
        pytest.param(swin, [f"swinViT.{name}" for name in STAGES], marks=needs_einops),
    ],
)
def test_blocks_of_monais_networks_are_found_and_each_changes_the_output(
    build: Callable[[], tuple[nn.Module, Tensor]], expected: list[str]
) -> None:
    torch.manual_seed(0)
    network, image = build()
    network.eval()
    whole, state = network(image), set(network.state_dict())
    assert attention_blocks(network, image) == {name: name for name in expected}
    for block in expected:
        with as_identity(network, [block]):
            assert not torch.allclose(network(image), whole, atol=1e-4), block
    assert torch.equal(network(image), whole) and set(network.state_dict()) == state
    share = attention_share(network, image)
    inside = sum(count_parameters(network.get_submodule(name)) for name in expected)
    assert share.parameters - share.parameters_outside == inside
    assert 0 < share.multiply_adds_share_outside < 1


def test_a_gate_gives_back_its_skip_and_not_its_signal() -> None:
    network, _ = attention_unet()
    skip, signal = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8)
    with as_identity(network, GATES):
        gate = network.get_submodule(GATES[0])
        assert gate(g=signal, x=skip) is skip and gate(signal, skip) is skip


def test_a_network_without_attention_has_no_blocks() -> None:
    network = DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 4, 4])
    assert attention_blocks(network, torch.zeros(1, 1, 16, 16)) == {}
    assert attention_share(network, torch.zeros(1, 1, 16, 16)).parameters_share_outside == 1


class Layer(nn.Module):
    """A block of a name that says nothing, around PyTorch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Linear(8, 8)

    def forward(self, tokens: Tensor) -> Tensor:
        normal = self.norm(tokens)
        tokens = tokens + self.mix(normal, normal, normal)[0]
        return tokens + self.out(tokens)


class Attention(nn.Module):
    """As in smp, attention of a kind, or none."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class SELayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weigh = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.weigh(x.mean((2, 3), keepdim=True)))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 2, stride=2)
        self.none = Attention(nn.Identity())
        self.channels = Attention(SELayer())
        self.layers = nn.ModuleList([Layer(), Layer()])
        self.stock = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
        self.out = nn.ConvTranspose2d(8, 2, 2, stride=2)

    def forward(self, image: Tensor) -> Tensor:
        features = self.channels(self.none(self.embed(image)))
        tokens = features.flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.stock(tokens)
        return self.out(tokens.transpose(1, 2).reshape(features.shape))


def test_a_block_around_attention_is_found_with_its_shortcuts() -> None:
    torch.manual_seed(0)
    network, image = Tokens().eval(), torch.randn(2, 1, 8, 8)
    found = attention_blocks(network, image)
    assert list(found) == ["channels", "layers.0", "layers.1", "stock.layers.0", "stock.layers.1"]
    whole = network(image)
    for block in found:
        with as_identity(network, [block]):
            assert not torch.allclose(network(image), whole, atol=1e-4), block
    with as_identity(network, found):
        assert_close(network(image), network.out(network.embed(image)))


def test_a_block_whose_output_is_zero_can_go() -> None:
    torch.manual_seed(0)
    network, image = Tokens().eval(), torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for layer in (network.layers[1].mix.out_proj, network.layers[1].out):
            layer.weight.zero_()
            layer.bias.zero_()
    whole = network(image)
    with as_identity(network, ["layers.1"]):
        assert torch.equal(network(image), whole)


def test_attention_without_its_shortcut_is_refused_with_the_block_around_it() -> None:
    network = Tokens()
    with (
        pytest.raises(ValueError, match=r"layers\.0\.mix is an nn.MultiheadAttention.*\(layers\.0"),
        as_identity(network, ["layers.0.mix"]),
    ):
        pass
