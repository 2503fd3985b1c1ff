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


def silent(module: nn.Module) -> nn.Module:
    """The same module, whose weights are 0."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Branches(nn.Module):
    """x + branch(norm(x)) of several branches, one after another."""

    def __init__(self, **branches: nn.Module) -> None:
        super().__init__()
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.names = list(branches)
        for name, branch in branches.items():
            self.add_module(name, branch)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.names:
            x = x + getattr(self, name)(self.norm(x))
        return x


class ResidualBlock(nn.Module):
    """x + weigh(conv(x)): the features of the attention are not those of the shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.weigh = SELayer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.weigh(self.conv(x))


def attention_of(weight: int) -> Attention:
    torch.manual_seed(0)
    inner = nn.Conv2d(8, 8, 1)
    return Attention(inner if weight else silent(inner))


def convolution() -> nn.Module:
    return nn.Conv2d(8, 8, 3, padding=1)


FEATURES = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("weight", [0, 1])
def test_attention_beside_a_convolution_is_0_and_its_shortcut_stays(weight: int) -> None:
    block = Branches(attention=attention_of(weight), perceptron=convolution())
    network = nn.Sequential(block, nn.Conv2d(8, 2, 1)).eval()
    assert list(attention_blocks(network, FEATURES)) == ["0.attention"]
    expected = network[1](FEATURES + block.perceptron(block.norm(FEATURES)))
    with as_identity(network, ["0.attention"]):
        assert_close(network(FEATURES), expected, rtol=0, atol=0)
    assert torch.equal(network(FEATURES), expected) == (weight == 0)


def test_attention_that_weighs_a_residual_is_the_identity_and_not_0() -> None:
    network = nn.Sequential(ResidualBlock()).eval()
    assert list(attention_blocks(network, FEATURES)) == ["0.weigh"]
    with as_identity(network, ["0.weigh"]):
        assert torch.equal(network(FEATURES), FEATURES + network[0].conv(FEATURES))


def test_a_layer_of_two_attentions_is_one_block_and_two_layers_are_two() -> None:
    layers = {f"layer{n}": Branches(a=attention_of(1), b=attention_of(1)) for n in range(2)}
    network = nn.Sequential(Branches(**layers), nn.Conv2d(8, 2, 1)).eval()
    assert list(attention_blocks(network, FEATURES)) == ["0.layer0", "0.layer1"]


class Both(nn.Module):
    """PyTorch's attention twice, which returns tuples."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.MultiheadAttention(8, 2, batch_first=True)
        self.channels = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.space(x, x, x)[0]
        return x + self.channels(x, x, x)[0]


class Decoded(nn.Module):
    """A decoder layer whose memory has the shape of its features, and a layer of two attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.Linear(8, 8)
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.both = nn.ModuleList([Both()])

    def forward(self, tokens: Tensor) -> Tensor:
        return self.both[0](self.layer(tokens, self.memory(tokens)))


def test_layers_of_two_of_pytorchs_attentions_are_blocks() -> None:
    torch.manual_seed(0)
    network, tokens = Decoded().eval(), torch.randn(2, 5, 8)
    found = attention_blocks(network, tokens)
    assert list(found) == ["layer", "both.0"]
    with as_identity(network, found):
        assert torch.equal(network(tokens), tokens)
    assert attention_share(network, tokens).parameters_outside == 8 * 8 + 8


class Mixed(Layer):
    """PyTorch's attention beside a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Conv1d(5, 5, 3, padding=1)


def test_attention_that_cannot_be_counted_is_named(caplog: pytest.LogCaptureFixture) -> None:
    tokens = torch.randn(2, 5, 8)
    assert attention_blocks(nn.Sequential(Layer()), tokens) == {"0": "0"}
    assert not caplog.records
    assert attention_blocks(nn.Sequential(Mixed()), tokens) == {}
    assert "attention that is not counted" in caplog.text and ": 0.mix; name" in caplog.text


class AttentionGate(nn.Module):
    """Oktay's gate; `weight` is a convolution after the product."""

    def __init__(self, weight: nn.Module) -> None:
        super().__init__()
        self.map = nn.Conv2d(16, 1, 1)
        self.weight = weight

    def forward(self, gate: Tensor, skip_connection: Tensor) -> Tensor:
        both = torch.cat([gate, skip_connection], dim=1)
        return self.weight(skip_connection * torch.sigmoid(self.map(both)))


class AttentionModule(AttentionGate):
    """The same, with names that say nothing."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return super().forward(a, b)


class Gated(nn.Module):
    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.signal = convolution()
        self.gate = gate

    def forward(self, image: Tensor) -> Tensor:
        return self.gate(self.signal(image), image)


@pytest.mark.parametrize(
    "gate",
    [AttentionGate(nn.Identity()), AttentionModule(nn.Identity()), AttentionGate(convolution())],
)
def test_a_gate_gives_back_the_argument_that_passes_it_or_is_called_a_skip(gate: nn.Module) -> None:
    network = Gated(gate).eval()
    assert attention_blocks(network, FEATURES) == {"gate": "gate"}
    with as_identity(network, ["gate"]):
        assert torch.equal(network(FEATURES), FEATURES)


def test_a_gate_whose_skip_is_not_known_is_refused() -> None:
    network = Gated(AttentionModule(convolution())).eval()
    with (
        pytest.raises(ValueError, match=r"gate: expected one argument to be .*\(a, b\); name the"),
        as_identity(network, ["gate"]),
    ):
        network(FEATURES)
