"""What every kind of attention keeps, at every place, in two and three dimensions.

A kind is a subclass with its settings; all laws are inherited.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import jaxtyping
import pytest
import torch
from torch import Tensor, nn

from segkit.nn.attention_blocks import as_identity, attention_blocks
from segkit.nn.map_tap import Edit, editing, recording, taps
from tests.networks import FAMILIES, SPACE, image_of, network_of

ROOT = Path(__file__).parents[2]


def opened(attention_map: Tensor) -> Tensor:
    return torch.ones_like(attention_map)


def halved(attention_map: Tensor) -> Tensor:
    return torch.full_like(attention_map, 0.5)


def switched_off(switches: Tensor) -> Tensor:
    return torch.zeros_like(switches)


def shifts_that_are_normalised_away(network: nn.Module) -> set[str]:
    """Biases right before a normalisation, whose gradients are nothing but rounding."""
    return {
        f"{name}.{number}.bias"
        for name, layers in network.named_modules()
        if isinstance(layers, nn.Sequential)
        for number, following in enumerate(layers[1:])
        if isinstance(following, nn.modules.batchnorm._NormBase)
    }


@pytest.mark.parametrize("spatial_dims", [2, 3])
class Contract:
    """The laws. `attention` is the settings of a kind at a place."""

    attention: ClassVar[dict[str, Any]]
    undone_by: ClassVar[dict[str, Edit]] = {}
    """By the kind of a map, the edit with which there is no attention; empty where none can be."""
    has_maps: ClassVar[bool] = True

    def test_the_output_lies_on_the_images_grid(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        assert network(image_of(spatial_dims)).shape == (2, 3, *SPACE[spatial_dims])

    def test_every_map_has_a_key_a_kind_and_a_place_and_keeps_to_its_range(
        self, spatial_dims: int
    ) -> None:
        network = network_of(self.attention, spatial_dims)
        with recording(network) as maps:
            network(image_of(spatial_dims))
        infos = network.maps()
        assert bool(infos) == self.has_maps
        assert set(maps) == set(infos)
        for key, info in infos.items():
            assert key == info.key == f"{key.split('/')[0]}/{info.kind}"
            assert maps[key].dtype == torch.float32
            assert maps[key].min() >= info.lowest and maps[key].max() <= info.highest
            if info.placement is None:
                assert info.kind == "channel"
                continue
            cells = maps[key].shape[2:]
            stride = [n // count for n, count in zip(SPACE[spatial_dims], cells, strict=True)]
            assert list(info.placement.stride) == stride
            # The centres of the first and the last cell lie in the image.
            for axis, size in enumerate(SPACE[spatial_dims]):
                assert 0 <= info.placement.offset[axis] <= stride[axis] / 2
                last = info.placement.offset[axis] + stride[axis] * (cells[axis] - 1)
                assert last <= size - 1

    def test_a_map_depends_on_the_image(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        with recording(network) as first:
            network(image_of(spatial_dims))
        with recording(network) as second:
            network(image_of(spatial_dims, seed=2))
        for key in first:
            assert not torch.equal(first[key], second[key]), key

    def test_recording_changes_no_bit_of_the_output(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        plain = network(image_of(spatial_dims))
        with recording(network):
            assert torch.equal(network(image_of(spatial_dims)), plain)
        assert torch.equal(network(image_of(spatial_dims)), plain)

    def test_attention_that_is_undone_leaves_the_plain_network(self, spatial_dims: int) -> None:
        if not self.undone_by:
            pytest.skip("has weights of its own after the product")
        network = network_of(self.attention, spatial_dims)
        plain = network_of({}, spatial_dims)
        plain.load_state_dict(network.state_dict(), strict=False)
        edits = {
            key: self.undone_by[tap.kind]
            for key, tap in taps(network).items()
            if tap.kind in self.undone_by
        }
        assert edits
        assert not torch.equal(network(image_of(spatial_dims)), plain(image_of(spatial_dims)))
        with editing(network, edits):
            assert torch.equal(network(image_of(spatial_dims)), plain(image_of(spatial_dims)))

    def test_attention_that_is_the_identity_leaves_the_plain_network(
        self, spatial_dims: int
    ) -> None:
        network, plain = network_of(self.attention, spatial_dims), network_of({}, spatial_dims)
        blocks = attention_blocks(network)
        assert bool(blocks) == bool(set(self.attention) - {"head"})
        image = image_of(spatial_dims)
        before = network(image)
        weights = network.state_dict()
        plain.load_state_dict({name: weights[name] for name in plain.state_dict()})
        with as_identity(network, blocks):
            assert torch.equal(network(image), plain(image))
        assert torch.equal(network(image), before)

    def test_the_state_survives_a_round_trip(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        other = network_of(self.attention, spatial_dims)
        for parameter in other.parameters():
            nn.init.normal_(parameter)
        other.load_state_dict(network.state_dict())
        assert torch.equal(other(image_of(spatial_dims)), network(image_of(spatial_dims)))

    @pytest.mark.parametrize("deep_supervision", [False, True])
    def test_every_weight_learns(self, spatial_dims: int, deep_supervision: bool) -> None:
        network = network_of(self.attention, spatial_dims, deep_supervision=deep_supervision)
        for module in network.modules():
            if isinstance(module, nn.ReLU | nn.LeakyReLU):
                module.inplace = False
        levels, presence = network.train().supervised(image_of(spatial_dims))
        loss = torch.stack([(level * level.detach().roll(1)).mean() for level in levels]).sum()
        if presence is not None:
            loss = loss + presence.square().sum()
        loss.backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.any() or name in shifts_that_are_normalised_away(network), name

    def test_a_sample_does_not_depend_on_its_batch(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        images = image_of(spatial_dims)
        torch.testing.assert_close(network(images[:1]), network(images)[:1])

    def test_a_batch_of_one_trains(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims).train()
        levels, _ = network.supervised(image_of(spatial_dims, batch_size=1))
        assert all(level.isfinite().all() for level in levels)

    def test_bfloat16_agrees_with_float32(self, spatial_dims: int) -> None:
        network = network_of(self.attention, spatial_dims)
        image = image_of(spatial_dims, batch_size=1)
        exact = network(image)
        with torch.autocast("cpu", dtype=torch.bfloat16), recording(network) as maps:
            rough = network(image)
        assert rough.dtype == torch.bfloat16
        # Three digits, of what is normalised to a spread of about one.
        assert (rough.float() - exact).abs().mean() < 0.05 * exact.std()
        assert all(recorded.dtype == torch.float32 for recorded in maps.values())


class TestAdditiveGridGate(Contract):
    attention: ClassVar = {"skip": "additive_grid"}
    undone_by: ClassVar = {"gate": opened}


class TestAdditiveGridGateAtEveryLevel(Contract):
    attention: ClassVar = {"skip": {"kind": "additive_grid", "levels": [0, 1]}}
    undone_by: ClassVar = {"gate": opened}


class TestSoftmaxGate(Contract):
    attention: ClassVar = {"skip": {"kind": "additive_grid", "coefficients": "softmax"}}
    undone_by: ClassVar = {"gate": opened}


class TestMeanFlowGate(Contract):
    attention: ClassVar = {"skip": {"kind": "additive_grid", "coefficients": "mean_flow"}}
    undone_by: ClassVar = {"gate": opened}


class TestHardGate(Contract):
    # From a bias of 3, all gates would stand open for one image as for the other.
    attention: ClassVar = {
        "skip": {"kind": "additive_grid", "coefficients": "hard", "initial_bias": 0.0}
    }
    undone_by: ClassVar = {"gate": opened}


class TestSeveralGates(Contract):
    attention: ClassVar = {"skip": {"kind": "additive_grid", "gates": 2}}


class TestOutputTransform(Contract):
    attention: ClassVar = {"skip": {"kind": "additive_grid", "output_transform": True}}


class TestAdditiveSameLevelGate(Contract):
    attention: ClassVar = {"skip": "additive_same_level"}
    undone_by: ClassVar = {"gate": opened}


class TestHardSameLevelGate(Contract):
    attention: ClassVar = {
        "skip": {"kind": "additive_same_level", "coefficients": "hard", "initial_bias": 0.0}
    }
    undone_by: ClassVar = {"gate": opened}


class TestCrossAttention(Contract):
    attention: ClassVar = {"skip": {"kind": "cross_attention", "heads": 2, "head_channels": 6}}
    undone_by: ClassVar = {"branch": switched_off}


class TestUTransformer(Contract):
    attention: ClassVar = {"skip": {"kind": "u_transformer", "heads": 2, "head_channels": 6}}
    undone_by: ClassVar = {"gate": opened}


class TestSqueezeExcitation(Contract):
    attention: ClassVar = {"encoder": "se"}
    undone_by: ClassVar = {"channel": opened}


class TestSqueezeExcitationInTheDecoder(Contract):
    attention: ClassVar = {"decoder": "se"}
    undone_by: ClassVar = {"channel": opened}


class TestEfficientChannelAttention(Contract):
    attention: ClassVar = {"encoder": "eca"}
    undone_by: ClassVar = {"channel": opened}


class TestConvolutionalBlockAttention(Contract):
    attention: ClassVar = {"encoder": {"kind": "cbam", "reduction": 2, "kernel_size": 3}}
    undone_by: ClassVar = {"channel": opened, "spatial": opened}


class TestBottleneckAttention(Contract):
    attention: ClassVar = {"decoder": {"kind": "bam", "dilation": 2}}
    undone_by: ClassVar = {"spatial": opened}


class TestConcurrentExcitationByMaximum(Contract):
    attention: ClassVar = {"encoder": "scse"}
    undone_by: ClassVar = {"channel": opened, "spatial": opened}


class TestConcurrentExcitationBySum(Contract):
    attention: ClassVar = {"decoder": {"kind": "scse", "aggregation": "add"}}
    undone_by: ClassVar = {"channel": halved, "spatial": halved}


class TestConcurrentExcitationByConcatenation(Contract):
    attention: ClassVar = {"encoder": {"kind": "scse", "aggregation": "concat"}}


class TestPooledSpatialAttention(Contract):
    attention: ClassVar = {"decoder": {"kind": "spatial", "kernel_size": 3}}
    undone_by: ClassVar = {"spatial": opened}


class TestSpatialExcitation(Contract):
    attention: ClassVar = {"encoder": "sse"}
    undone_by: ClassVar = {"spatial": opened}


class TestGlobalContext(Contract):
    attention: ClassVar = {"encoder": "gc"}
    undone_by: ClassVar = {"branch": switched_off}


class TestGlobalContextThatScales(Contract):
    attention: ClassVar = {"decoder": {"kind": "gc", "fusion": "scale"}}
    undone_by: ClassVar = {"channel": opened}


class TestSelfAttention(Contract):
    attention: ClassVar = {
        "bottleneck": {
            "kind": "self_attention",
            "heads": 2,
            "head_channels": 6,
            "positions": "none",
        }
    }
    undone_by: ClassVar = {"branch": switched_off}


class TestSelfAttentionWithSines(TestSelfAttention):
    attention: ClassVar = {
        "bottleneck": {**TestSelfAttention.attention["bottleneck"], "positions": "sincos"}
    }


class TestSelfAttentionWithOffsets(TestSelfAttention):
    attention: ClassVar = {
        "bottleneck": {**TestSelfAttention.attention["bottleneck"], "positions": "relative"}
    }


class TestSelfAttentionThatTurns(TestSelfAttention):
    attention: ClassVar = {
        "bottleneck": {**TestSelfAttention.attention["bottleneck"], "positions": "rotary"}
    }


class TestAdditiveSelfAttention(Contract):
    attention: ClassVar = {"bottleneck": "additive_self"}
    undone_by: ClassVar = {"branch": switched_off}


class TestTransformer(Contract):
    attention: ClassVar = {
        "bottleneck": {"kind": "transformer", "heads": 2, "head_channels": 12, "drop_path": 0.0}
    }


class TestLargeKernelAttention(Contract):
    attention: ClassVar = {"encoder": "lka"}
    undone_by: ClassVar = {"branch": switched_off}


class TestLargeKernelAttentionOfSomeDecoderLevels(TestLargeKernelAttention):
    attention: ClassVar = {"decoder": {"kind": "lka", "levels": [1]}}


class TestPairedAttention(Contract):
    attention: ClassVar = {"encoder": {"kind": "epa", "heads": 2, "projected": 5}}
    undone_by: ClassVar = {"branch": switched_off}


class TestPairedAttentionOfSomeDecoderLevels(TestPairedAttention):
    attention: ClassVar = {"decoder": {"kind": "epa", "heads": 3, "levels": [0]}}


class TestMeanPooling(Contract):
    attention: ClassVar = {"head": "mean"}
    has_maps: ClassVar = False

    def test_attention_that_is_undone_leaves_the_plain_network(self, spatial_dims: int) -> None:
        network, plain = network_of(self.attention, spatial_dims), network_of({}, spatial_dims)
        plain.load_state_dict(network.state_dict(), strict=False)
        assert torch.equal(network(image_of(spatial_dims)), plain(image_of(spatial_dims)))


class TestGatedPooling(TestMeanPooling):
    attention: ClassVar = {"head": "gated"}
    has_maps: ClassVar = True


class TestLearnedQueryPooling(TestMeanPooling):
    attention: ClassVar = {"head": "learned_query"}
    has_maps: ClassVar = True


class TestEverywhereAtOnce(Contract):
    attention: ClassVar = {
        "skip": "additive_grid",
        "encoder": "eca",
        "decoder": {"kind": "spatial", "kernel_size": 3},
        "bottleneck": {"kind": "self_attention", "heads": 2, "head_channels": 6},
        "head": "learned_query",
    }
    undone_by: ClassVar = {
        "gate": opened,
        "channel": opened,
        "spatial": opened,
        "branch": switched_off,
    }


class TestWindowedSelfAttention(TestSelfAttention):
    """Windows that do not divide the coarsest map."""

    attention: ClassVar = TestSelfAttention.attention

    @pytest.fixture(autouse=True)
    def windowed(self, spatial_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
        bottleneck = {**TestSelfAttention.attention["bottleneck"], "window": [2] * spatial_dims}
        monkeypatch.setattr(type(self), "attention", {"bottleneck": bottleneck})


class TestShiftedWindows(TestSelfAttention):
    """Windows of which the second attention's are moved, and that do not divide the map."""

    attention: ClassVar = TestSelfAttention.attention

    @pytest.fixture(autouse=True)
    def windowed(self, spatial_dims: int, monkeypatch: pytest.MonkeyPatch) -> None:
        bottleneck = {
            **TestSelfAttention.attention["bottleneck"],
            "positions": "relative",
            "window": [2] * spatial_dims,
            "shift": True,
        }
        monkeypatch.setattr(type(self), "attention", {"bottleneck": bottleneck})


def compile_whole(family: str) -> None:
    """Compile a network of this family in one graph; it and its maps must agree with eager."""
    network = network_of(FAMILIES[family], 2)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image_of(2)), network(image_of(2)))
    with recording(network) as eager:
        network(image_of(2))
    with recording(network) as traced:
        compiled(image_of(2))
    assert set(eager) == set(traced)
    for key in eager:
        torch.testing.assert_close(traced[key], eager[key])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_compiles_without_a_break(family: str) -> None:
    # In a process of its own, where shapes are not checked: the compiler cannot read the checks.
    code = f"from tests.nn.test_contract import compile_whole; compile_whole({family!r})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_exports(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    network = network_of(FAMILIES[family], 2)
    exported = torch.export.export(network, (image_of(2),))
    torch.testing.assert_close(exported.module()(image_of(2)), network(image_of(2)))
