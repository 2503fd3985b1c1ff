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
        pytest.param(
            unetr, [f"vit.blocks.{n}" for n in range(12)], marks=[needs_einops, pytest.mark.slow]
        ),
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


def test_pytorchs_attention_without_its_shortcut_becomes_0() -> None:
    torch.manual_seed(0)
    network, image = Tokens().eval(), torch.randn(2, 1, 8, 8)
    with as_identity(network, [f"layers.{n}.mix" for n in range(2)]):
        without = network(image)
    for layer in network.layers:
        silent(layer.mix)
    assert torch.equal(without, network(image))


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


class Mixed(nn.Module):
    """PyTorch's attention beside a convolution, on features of a grid."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.MultiheadAttention(8, 2, batch_first=True)
        self.out = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.mix(tokens, tokens, tokens)[0]
        return self.out(tokens.transpose(1, 2).reshape(x.shape))


def test_pytorchs_attention_beside_a_convolution_is_a_block() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(Mixed()).eval()
    assert attention_blocks(network, FEATURES) == {"0.mix": "0.mix"}
    whole, out = network(FEATURES), network[0].out
    with as_identity(network, ["0.mix"]):
        assert_close(network(FEATURES), out(FEATURES))
    assert torch.equal(network(FEATURES), whole)
    share = attention_share(network, FEATURES)
    assert share.parameters_outside == count_parameters(out)
    assert share.multiply_adds_outside == 2 * 36 * 8 * 8 * 9


class PixelAttention(nn.Module):
    """A map with a value for each channel and cell, which the caller uses."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.logits(x))


class ChannelAttention(PixelAttention):
    """A map with a value for each channel."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mean((2, 3), keepdim=True))


class SpatialAttention(PixelAttention):
    """A map with a value for each cell."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).mean(1, keepdim=True)


class MappedAttention(PixelAttention):
    """Features and a map, as a tuple."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return self.logits(x), super().forward(x)


class Used(nn.Module):
    """Attention whose output is used by a function of it, its features and others."""

    def __init__(self, attention: nn.Module, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.attention = attention
        self.norm = nn.InstanceNorm2d(8, affine=True)
        self.use = use

    def forward(self, image: Tensor) -> Tensor:
        x = torch.relu(self.first(image))
        return self.last(self.use(self, x, image))


def itself(x: Tensor, other: Tensor) -> Tensor:
    return x


@pytest.mark.parametrize(
    "attention",
    [ChannelAttention, SpatialAttention, PixelAttention],
    ids=lambda kind: kind.__name__,
)
@pytest.mark.parametrize(
    ("use", "without"),
    [
        (lambda own, x, y: x * own.attention(x), itself),
        (lambda own, x, y: own.attention(x).expand_as(x) * x + y, lambda x, y: x + y),
        (lambda own, x, y: x + x * own.attention(x), itself),
        (lambda own, x, y: x + 0.5 * own.attention(own.norm(x)), itself),
        (lambda own, x, y: x * (1 + own.attention(x)), itself),
        (lambda own, x, y: y + x * (1 - 0.5 * own.attention(x)), lambda x, y: y + x),
        (lambda own, x, y: x + 2 * torch.sigmoid(own.attention(x)) * x, lambda x, y: 2 * x),
    ],
    ids=["factor", "factor of one of two", "factor in a branch", "branch", "1 +", "1 -", "2 s"],
)
def test_attention_that_only_returns_a_map_lets_its_features_through(
    attention: type[nn.Module], use: Callable[..., Tensor], without: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    network = Used(attention(), use).eval()
    assert list(attention_blocks(network, FEATURES)) == ["attention"]
    whole = network(FEATURES)
    expected = network.last(without(torch.relu(network.first(FEATURES)), FEATURES))
    assert not torch.allclose(whole, expected, atol=1e-3)
    with as_identity(network, ["attention"]):
        assert torch.equal(network(FEATURES), expected)
        half = FEATURES[:1, :, :4]
        expected = network.last(without(torch.relu(network.first(half)), half))
        assert_close(network(half), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda own, x, y: own.cells(own.channels(x) * x) * x + y,
        lambda own, x, y: own.cells(x) * own.channels(x) * x + y,
        lambda own, x, y: (1 + own.cells(x) * own.channels(x)) * x + y,
    ],
    ids=["one after the other", "product", "1 + product"],
)
def test_both_parts_of_cbam_let_their_features_through(use: Callable[..., Tensor]) -> None:
    network = Used(nn.Identity(), use)
    network.channels, network.cells = ChannelAttention(), SpatialAttention()
    assert list(attention_blocks(network.eval(), FEATURES)) == ["channels", "cells"]
    with as_identity(network, ["channels", "cells"]):
        expected = network.last(torch.relu(network.first(FEATURES)) + FEATURES)
        assert torch.equal(network(FEATURES), expected)


def test_attention_that_also_returns_its_map_has_an_unknown_map_as_identity() -> None:
    kept = []

    def use(own: Used, x: Tensor, y: Tensor) -> Tensor:
        found, weights = own.attention(x)
        kept.append(weights)
        return x + found

    network = Used(MappedAttention(), use).eval()
    assert list(attention_blocks(network, FEATURES)) == ["attention"]
    with as_identity(network, ["attention"]):
        expected = network.last(torch.relu(network.first(FEATURES)))
        assert torch.equal(network(FEATURES), expected)
    assert kept[-1].shape == FEATURES.shape and kept[-1].isnan().all()


@pytest.mark.parametrize(
    "use",
    [
        lambda own, x, y: x * torch.tanh(own.attention(x)),
        lambda own, x, y: (lambda found: own.norm(x * found) + x * (1 - found))(own.attention(x)),
        lambda own, x, y: x * (own.attention(x) + own.attention(y)),
        lambda own, x, y: x + own.norm(own.attention(x)),
        lambda own, x, y: x + own.attention(x) + y * own.attention(y),
    ],
    ids=["factor after a function", "share and rest", "sum", "branch after a norm", "two roles"],
)
def test_attention_that_no_value_can_replace_is_named_and_refused(
    use: Callable[..., Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    network = Used(PixelAttention(), use).eval()
    assert attention_blocks(network, FEATURES) == {}
    assert "attention that is not counted" in caplog.text and ": attention; name" in caplog.text
    with (
        pytest.raises(ValueError, match=r"attention: expected a module whose output has the "),
        as_identity(network, ["attention"]),
    ):
        network(FEATURES)


def test_blocks_around_pytorchs_attention_are_found_without_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert attention_blocks(nn.Sequential(Layer()), torch.randn(2, 5, 8)) == {"0": "0"}
    assert not caplog.records


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


def named(*kinds: str) -> nn.Module:
    """A row of modules whose classes have these names; each weighs its features."""
    return nn.Sequential(*(type(kind, (SELayer,), {})() for kind in kinds)).eval()


def test_non_local_blocks_mhsa_and_coordinate_attention_are_found_by_their_names() -> None:
    blocks = ("NonLocalBlock", "NONLocalBlock2D", "_NonLocalBlockND", "NonLocal2d", "MHSA", "W_MSA")
    network = named(*blocks, "EMSA", "MHSABlock", "CoordAtt", "CoordAttBlock", "Attention")
    found = attention_blocks(network, FEATURES)
    assert list(found) == [str(number) for number in range(11)]
    with as_identity(network, found):
        assert torch.equal(network(FEATURES), FEATURES)


def test_attention_of_3d_networks_is_found_by_names_that_say_so() -> None:
    others = ("CBAM3D", "CBAMLayer", "ECA3D", "SqueezeAndExcitation3D", "SelfAttentionLayer")
    network = named(*others, "_GridAttentionBlockND", "AttentionGateBlock", "CAM_Module", "ECA")
    network.append(named("SwinTransformerBlock3D"))
    blocks = [*map(str, range(9)), "9.0"]
    assert list(attention_blocks(network, FEATURES)) == blocks


def test_names_that_only_look_like_attention_are_not_found() -> None:
    others = ("NonLocalMeansFilter", "LocalBlock", "ConcatBlock", "Flatten", "Format", "Alpha")
    assert attention_blocks(named(*others, "Gamma", "RMSNorm", "Attenuation"), FEATURES) == {}
