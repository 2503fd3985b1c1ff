"""Laws of gates in the skips of networks that segkit did not build."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
from monai.networks.nets import BasicUNet, BasicUNetPlusPlus, DynUNet, UNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from segkit.errors import ModelError
from segkit.explain.explain_scan import explain_volume
from segkit.explain.verdicts.identity import judge_attention
from segkit.explain.verdicts.judge import judge_gates
from segkit.geometry.grid import Placement
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_labels, read_volume
from segkit.model.build import wrap_network
from segkit.nn.attention_blocks import as_identity, attention_blocks
from segkit.nn.foreign_gates import gate
from segkit.nn.gated_skip import OpenGate
from segkit.nn.map_tap import editing, maps_of, recording
from segkit.nn.network import SegmentationNetwork
from segkit.training.fit import train
from tests.nn.test_external import config_for
from tests.small import small_dataset


class SmpBlock(nn.Module):
    """A decoder block with the signature of segmentation_models_pytorch 0.5."""

    def __init__(self, below: int, skip: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(below + skip, out, 3, padding=1)

    def forward(
        self, feature_map: Tensor, height: int, width: int, skip_connection: Tensor | None = None
    ) -> Tensor:
        features = nn.functional.interpolate(feature_map, size=(height, width), mode="nearest")
        if skip_connection is not None:
            features = torch.cat([features, skip_connection], dim=1)
        return self.conv(features).relu()


class SmpUnet(nn.Module):
    """A stand-in with the names of a U-Net of segmentation_models_pytorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 7, stride=2, padding=3)
        self.layer = nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Conv2d(4, 6, 3, padding=1))
        self.deep = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList([SmpBlock(8, 6, 6), SmpBlock(6, 4, 4), SmpBlock(4, 0, 4)])
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        skips = [image, self.stem(image)]
        skips.append(self.layer(skips[-1]))
        features = self.deep(skips[-1])
        for block, above, skip in zip(
            self.blocks, (skips[2], skips[1], image), (skips[2], skips[1], None), strict=True
        ):
            features = block(features, *above.shape[2:], skip_connection=skip)
        return self.head(features)


class Decoder(nn.Module):
    """A stand-in with the names of nnU-Net's UNetDecoder."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([nn.Conv3d(12, 6, 3, padding=1), nn.Conv3d(8, 4, 3, padding=1)])
        self.transpconvs = nn.ModuleList(
            [nn.ConvTranspose3d(8, 6, (1, 2, 2), (1, 2, 2)), nn.ConvTranspose3d(6, 4, 2, 2)]
        )
        self.seg_layers = nn.ModuleList([nn.Conv3d(6, 2, 1), nn.Conv3d(4, 2, 1)])

    def forward(self, skips: list[Tensor]) -> Tensor:
        features = skips[-1]
        for number, stage in enumerate(self.stages):
            up = self.transpconvs[number](features)
            features = stage(torch.cat((up, skips[-(number + 2)]), 1)).relu()
        return self.seg_layers[-1](features)


class PlainConvUNet(nn.Module):
    """A stand-in with the names of nnU-Net's network (dynamic_network_architectures)."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.stages = nn.ModuleList(
            [
                nn.Conv3d(1, 4, 3, padding=1),
                nn.Conv3d(4, 6, 3, 2, 1),
                nn.Conv3d(6, 8, 3, (1, 2, 2), 1),
            ]
        )
        self.decoder = Decoder()

    def forward(self, image: Tensor) -> Tensor:
        skips, features = [], image
        for stage in self.encoder.stages:
            features = stage(features)
            skips.append(features)
        return self.decoder(skips)


def dyn_unet() -> DynUNet:
    return DynUNet(2, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8])


IMAGE = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
BUILT: dict[str, tuple[Callable[[], nn.Module], Tensor, dict[str, str], list[Placement]]] = {
    "dynunet": (
        dyn_unet,
        IMAGE,
        {"skip.1": "upsamples.0"},
        # Level 1 lies at 2 j; two of its cells make one of the gate's.
        [Placement((4, 4), (1, 1))],
    ),
    "basicunet": (
        lambda: BasicUNet(2, 1, 2, features=(4, 4, 6, 6, 8, 4)),
        IMAGE,
        {"skip.1": "upcat_2", "skip.2": "upcat_3", "skip.3": "upcat_4"},
        [Placement((step, step), ((step - 1) / 2,) * 2) for step in (4, 8, 16)],
    ),
    "unet": (
        lambda: UNet(2, 1, 2, channels=(4, 6, 8), strides=(2, 2), num_res_units=1),
        IMAGE,
        {"skip.1": "model.1.submodule.1"},
        # Skip and signal are on one grid, that of level 1... whose features were halved once more.
        [Placement((4, 4), (0, 0))],
    ),
    "smp": (SmpUnet, IMAGE, {"skip.1": "blocks.0"}, [Placement((8, 8), (2, 2))]),
    "nnunet": (
        PlainConvUNet,
        torch.randn(1, 1, 8, 16, 16, generator=torch.Generator().manual_seed(0)),
        {"skip.1": "decoder.stages.0"},
        [Placement((2, 4, 4), (0, 1, 1))],
    ),
}
each_network = pytest.mark.parametrize("name", BUILT)


def built(name: str) -> tuple[nn.Module, Tensor, dict[str, str]]:
    torch.manual_seed(0)
    build, image, _, _ = BUILT[name]
    network = build().eval()
    return network, image, gate(network, image)


def partly_open(network: nn.Module) -> None:
    """Gates that are neither open nor shut."""
    for module in network.modules():
        if isinstance(module, OpenGate):
            nn.init.normal_(module.coefficients.weight, std=2.0)


@each_network
def test_a_gate_starts_open_and_changes_nothing_and_is_then_the_only_difference(name: str) -> None:
    torch.manual_seed(0)
    build, image, expected, places = BUILT[name]
    network = build().eval()
    whole, state = network(image), {k: v.clone() for k, v in network.state_dict().items()}
    assert gate(network, image) == expected
    with recording(network) as maps:
        assert torch.equal(network(image), whole)
    assert maps.keys() == {f"{position}/gate" for position in expected} and all(
        torch.equal(one, torch.ones_like(one)) for one in maps.values()
    )
    infos = maps_of(network)
    assert [infos[f"{position}/gate"].placement for position in expected] == places
    # Weights keep their names and values.
    gated = network.state_dict()
    assert all(torch.equal(gated[key], value) for key, value in state.items())
    assert all("segkit_gate" in key for key in gated.keys() - state.keys())
    partly_open(network)
    with recording(network) as maps:
        assert not torch.allclose(network(image), whole, atol=1e-5)
    assert all(one.min() >= 0 and one.max() <= 1.0625 for one in maps.values())
    with editing(network, dict.fromkeys(maps, torch.ones_like)):
        assert torch.equal(network(image), whole)
    assert set(attention_blocks(network, image)) == set(expected)
    with as_identity(network, list(expected)):
        assert torch.equal(network(image), whole)


@pytest.mark.parametrize("name", ["dynunet", "unet", "nnunet"])
def test_gates_learn_are_copied_saved_and_loaded(name: str) -> None:
    network, image, gated = built(name)
    network.train()(image).square().mean().backward()
    for position in gated.values():
        coefficients = network.get_submodule(position).segkit_gate.coefficients
        assert coefficients.weight.grad.abs().sum() > 0
    network.eval()
    whole, other = network(image), copy.deepcopy(network)
    partly_open(other)
    assert torch.equal(network(image), whole) and not torch.equal(other(image), whole)
    assert torch.equal(pickle.loads(pickle.dumps(other))(image), other(image))
    network.load_state_dict(other.state_dict())
    assert torch.equal(network(image), other(image))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dynunet", "unet", "smp", "nnunet"])
def test_gates_are_compiled_and_exported_with_their_network(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Dynamo cannot trace through the checks of shapes, which are here only in tests.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    torch.compiler.reset()
    network, image, _ = built(name)
    partly_open(network)
    with torch.no_grad():
        expected = network(image)
        compiled = torch.compile(network, fullgraph=True, backend="eager")(image)
        torch.testing.assert_close(compiled, expected)
        exported = torch.export.export(network, (image,)).module()(image)
        torch.testing.assert_close(exported, expected)


def test_skips_are_chosen_by_name_and_a_gate_is_that_of_its_formula() -> None:
    torch.manual_seed(0)
    network = dyn_unet().eval()
    assert gate(network, IMAGE, skips=["upsamples.1"]) == {"skip.0": "upsamples.1"}
    made = network.get_submodule("upsamples.1").segkit_gate
    # σ(q + log 16) / σ(log 16) for logits q of -1, 0 and 3.
    logits = torch.tensor([-1.0, 0.0, 3.0])
    made.coefficients.weight.data[:] = 0
    for logit in logits:
        made.coefficients.bias.data[:] = logit
        with recording(network) as maps:
            network(IMAGE)
        expected = torch.sigmoid(logit + np.log(16)) / torch.sigmoid(torch.tensor(np.log(16)))
        torch.testing.assert_close(maps["skip.0/gate"].mean(), expected.float())


def test_all_joins_of_the_finest_level_are_left_out_by_default() -> None:
    network, image = BasicUNetPlusPlus(2, 1, 2, features=(2,) * 6), torch.zeros(1, 1, 32, 32)
    # Joins 0_1 to 0_4 of a U-Net++ lie on the image's grid.
    assert set(gate(network, image).values()) == {
        *("upcat_1_1", "upcat_1_2", "upcat_1_3", "upcat_2_1", "upcat_2_2", "upcat_3_1")
    }


def test_a_network_that_cannot_be_gated_is_refused_and_unchanged() -> None:
    network = dyn_unet().eval()
    with pytest.raises(ModelError, match=r"found upsamples\.7; correct"):
        gate(network, IMAGE, skips=["upsamples.0", "upsamples.7"])
    with pytest.raises(ModelError, match="found no skip connection to gate"):
        gate(nn.Sequential(nn.Conv2d(1, 2, 1)), IMAGE)
    with pytest.raises(ModelError, match="not a multiple of the"):
        gate(BasicUNet(2, 1, 2, features=(4,) * 6), torch.zeros(1, 1, 36, 36))
    assert not any(isinstance(module, OpenGate) for module in network.modules())
    gate(network, IMAGE)
    with pytest.raises(ModelError, match="has a segkit gate already"):
        gate(network, IMAGE)
    smp, image, _ = built("smp")
    assert torch.isfinite(smp(image[..., :24])).all()
    with pytest.raises(ValueError, match=r"expected a skip of .*give the network an image"):
        smp(image[..., :20])


class Shuffled(SmpUnet):
    """Puts the voxels of an image in another order."""

    def forward(self, image: Tensor) -> Tensor:
        return super().forward(image.roll(3, dims=3))


def test_a_skip_that_cannot_be_followed_needs_a_placement() -> None:
    torch.manual_seed(0)
    network = Shuffled().eval()
    with pytest.raises(ModelError, match=r"blocks\.0: the position of this skip's features"):
        gate(network, IMAGE)
    gate(network, IMAGE, placements={"blocks.0": Placement((4, 4), (1, 1))})
    assert maps_of(network)["skip.1/gate"].placement == Placement((8, 8), (3, 3))


@pytest.mark.slow
def test_a_gated_network_is_trained_read_explained_and_judged(tmp_path: Path) -> None:
    def network(seed: int) -> DynUNet:
        torch.manual_seed(seed)
        made = DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 6, 8])
        gate(made, torch.zeros(1, 1, 16, 16, 16))
        return made

    data = small_dataset(tmp_path / "data")
    run = train(config_for(data), runs=tmp_path / "runs", network=network(0))
    gates = [module for module in run.model.network.modules() if isinstance(module, OpenGate)]
    assert any(module.coefficients.weight.abs().sum() > 0 for module in gates)
    predictor = Predictor.load(run.folder, network=network(9), device="cpu")
    scan = read_volume(data / "imagesTr" / "case_0.nii.gz")
    label = read_labels(data / "labelsTr" / "case_0.nii.gz")
    explanation = explain_volume(predictor, scan, label, identity=True)
    assert explanation.maps["skip.1/gate"].volume is not None
    assert explanation.attention is not None and explanation.attention.blocks == ("skip.1",)

    def untrained(seed: int) -> SegmentationNetwork:
        return wrap_network(run.model.description, network(seed)).eval()

    (verdict, *_) = judge_gates(predictor, [(scan, label)], untrained=untrained)
    assert verdict.map == "skip.1/gate" and verdict.word == "cannot tell"
    assert judge_attention(predictor, [(scan, label)]).verdicts[0].block == "skip.1"


class Turned(Decoder):
    """Concatenates the skip and then the upsampled features, which are resampled and convolved."""

    def __init__(self) -> None:
        super().__init__()
        for number, (below, channels, step) in enumerate([(8, 6, (1, 2, 2)), (6, 4, (2, 2, 2))]):
            self.transpconvs[number] = nn.Sequential(
                nn.Upsample(scale_factor=step), nn.Conv3d(below, channels, 1)
            )

    def forward(self, skips: list[Tensor]) -> Tensor:
        features = skips[-1]
        for number, stage in enumerate(self.stages):
            up = self.transpconvs[number](features)
            features = stage(torch.cat((skips[-(number + 2)], up), 1)).relu()
        return self.seg_layers[-1](features)


class DoubleConv(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, dims: int, before: int, after: int) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        self.layers = nn.Sequential(
            conv(before, after, 3, padding=1), nn.ReLU(), conv(after, after, 1)
        )
        self.shortcut = conv(before, after, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features) + self.shortcut(features)


class ByHand(nn.Module):
    """A U-Net as many write it: the concatenation is in its forward."""

    def __init__(self, dims: int, *, up: str, block: str) -> None:
        super().__init__()
        conv = nn.Conv3d if dims == 3 else nn.Conv2d
        transposed = nn.ConvTranspose3d if dims == 3 else nn.ConvTranspose2d
        step = (2,) * (dims - 1) + (1,)

        def double(before: int, after: int) -> nn.Module:
            if block == "module":
                return DoubleConv(dims, before, after)
            return nn.Sequential(nn.Sequential(conv(before, after, 3, padding=1), nn.ReLU()))

        def raising(before: int, after: int) -> nn.Module:
            if up == "transposed":
                return transposed(before, after, step, step)
            if up == "function":  # `forward` interpolates, and this comes after it
                return conv(before, after, 1)
            return nn.Sequential(nn.Upsample(scale_factor=step), conv(before, after, 1))

        self.e0, self.e1, self.e2 = double(1, 3), double(3, 4), double(4, 6)
        self.pool = (nn.MaxPool3d if dims == 3 else nn.MaxPool2d)(step)
        self.nearest = nn.Upsample(scale_factor=step)  # shared by both levels
        self.up1, self.up0 = raising(6, 4), raising(5, 3)
        below = (6, 5) if up in ("shared", "relu") else (4, 3)
        self.d1, self.d0 = double(below[0] + 4, 5), double(below[1] + 3, 3)
        self.up, self.out, self.step = up, conv(3, 2, 1), step

    def raised(self, features: Tensor, layer: nn.Module) -> Tensor:
        if self.up == "relu":
            return nn.functional.interpolate(features.relu(), scale_factor=self.step)
        if self.up == "function":
            size = [cells * step for cells, step in zip(features.shape[2:], self.step, strict=True)]
            mode = "bilinear" if len(size) == 2 else "trilinear"
            return layer(nn.functional.interpolate(features, size=size, mode=mode))
        return (self.nearest if self.up == "shared" else layer)(features)

    def forward(self, image: Tensor) -> Tensor:
        fine = self.e0(image)
        middle = self.e1(self.pool(fine))
        deep = self.e2(self.pool(middle))
        features = self.d1(torch.cat([self.raised(deep, self.up1), middle], 1))
        return self.out(self.d0(torch.cat([fine, self.raised(features, self.up0)], 1)))


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("up", ["transposed", "sequential", "shared", "relu", "function"])
@pytest.mark.parametrize("block", ["module", "sequential"])
def test_skips_of_a_network_written_by_hand_are_gated(dims: int, up: str, block: str) -> None:
    torch.manual_seed(0)
    network = ByHand(dims, up=up, block=block).eval()
    image = torch.randn(1, 1, *[8] * (dims - 1), 4)
    before = network(image)
    inner = ".0.0" if block == "sequential" else ""
    names = {"skip.0": f"d0{inner}", "skip.1": f"d1{inner}"}
    assert gate(network, torch.zeros_like(image), skips=list(names.values())) == names
    assert torch.equal(network(image), before)
    # A gate's map lies on the grid of the coarser features, whose cells are two of the skip's.
    for level, key in enumerate(names):
        step = 2 ** (level + 1)
        expected = Placement((*[step] * (dims - 1), 1), (*[(step - 1) / 2] * (dims - 1), 0))
        assert maps_of(network)[f"{key}/gate"].placement == expected
    received: dict[str, Tensor] = {}
    first = network.get_submodule(names["skip.1"])
    first.register_forward_hook(lambda _, args, __: received.update(both=args[0]))
    for shut, key in (("middle", "skip.1/gate"), ("fine", "skip.0/gate")):
        with recording(network) as maps:
            network(image)
        assert set(maps) >= {"skip.0/gate", "skip.1/gate"}
        with editing(network, {key: torch.zeros_like}):
            assert not torch.equal(network(image), before), shut
            if key == "skip.1/gate":
                assert received["both"][:, -4:].count_nonzero() == 0
                assert received["both"][:, :-4].count_nonzero() > 0


def test_without_an_upsampling_module_the_signal_is_the_mean_of_the_upsampled_features() -> None:
    """If the nearest cell was taken, these are the coarse features themselves."""
    torch.manual_seed(0)
    network = ByHand(2, up="relu", block="module").eval()
    gate(network, IMAGE)
    kept: dict[str, Tensor] = {}
    network.e2.register_forward_hook(lambda _, __, output: kept.update(deep=output.relu()))
    found = network.get_submodule("d1.segkit_gate")
    assert isinstance(found, OpenGate)
    let_through = found.let_through

    def keep(skip: Tensor, signal: Tensor) -> Tensor:
        kept["signal"] = signal
        return let_through(skip, signal)

    found.let_through = keep  # type: ignore[method-assign]
    network(torch.randn(IMAGE.shape))
    torch.testing.assert_close(kept["signal"], kept["deep"])


class UpsampledOnce(nn.Module):
    """Two skips are concatenated with the same upsampled features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(1, 3, 3, padding=1) for _ in range(2))
        self.down, self.up = nn.Conv2d(3, 4, 2, 2), nn.ConvTranspose2d(4, 4, 2, 2)
        self.one, self.two = (nn.Conv2d(7, 2, 3, padding=1) for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        first, second = self.first(image), self.second(image)
        raised = self.up(self.down(first))
        return self.one(torch.cat([raised, first], 1)) + self.two(torch.cat([second, raised], 1))


def test_two_gates_read_the_same_signal_which_is_then_forgotten() -> None:
    torch.manual_seed(0)
    network, image = UpsampledOnce().eval(), torch.randn(IMAGE.shape)
    whole = network(image)
    assert gate(network, image) == {"skip.0": "one", "skip.1": "two"}
    assert torch.equal(network(image), whole)
    copy.deepcopy(network.train())(image).sum().backward()
    assert network.get_submodule("up.segkit_signal").value is None
    network.eval()
    for key in ("skip.0/gate", "skip.1/gate"):
        with editing(network, {key: torch.zeros_like}):
            assert not torch.equal(network(image), whole)


class Checkpointed(ByHand):
    """Parts of the decoder are computed again in the backward pass."""

    whole = True
    """Whether the upsampling is computed again too."""

    def forward(self, image: Tensor) -> Tensor:
        def step(coarse: Tensor, skip: Tensor) -> Tensor:
            return self.d1(torch.cat([self.up1(coarse), skip], 1))

        fine = self.e0(image)
        middle = self.e1(self.pool(fine))
        deep = self.e2(self.pool(middle))
        if self.whole:
            features = checkpoint(step, deep, middle, use_reentrant=False)
        else:
            both = torch.cat([self.up1(deep), middle], 1)
            features = checkpoint(self.d1, both, use_reentrant=False)
        return self.out(self.d0(torch.cat([fine, self.up0(features)], 1)))


def test_a_checkpointed_decoder_is_gated_if_it_upsamples_in_the_same_checkpoint() -> None:
    torch.manual_seed(0)
    network = Checkpointed(2, up="transposed", block="module")
    gate(network, IMAGE)
    image = torch.randn(IMAGE.shape)
    network(image).mean().backward()
    assert network.get_submodule("up1.segkit_signal").value is not None  # set once more
    copied = copy.deepcopy(network)
    assert copied.get_submodule("up1.segkit_signal").value is None
    assert torch.equal(copied(image), network(image))
    network.whole = False
    with pytest.raises(ModelError, match="checkpoint it together with the upsampling"):
        network(image).mean().backward()


class Later(nn.Module):
    """Its features are its second argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 2, 3, padding=1)

    def forward(self, level: int, features: Tensor) -> Tensor:
        return nn.functional.conv2d(features, self.conv.weight, padding=1)


class WithLater(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.join = nn.Conv2d(1, 4, 2, 2), nn.Upsample(scale_factor=2), Later()

    def forward(self, image: Tensor) -> Tensor:
        return self.join(0, torch.cat([self.up(self.down(image)), image], 1))


def test_features_that_are_not_the_first_argument_are_refused() -> None:
    with pytest.raises(ModelError, match="found no skip connection to gate"):
        gate(WithLater().eval(), IMAGE)


class InTwoPlaces(ByHand):
    """Two modules receive the same concatenation, so that no single one could gate the skip."""

    def forward(self, image: Tensor) -> Tensor:
        fine = self.e0(image)
        both = torch.cat([self.nearest(self.e1(self.pool(fine))), fine], 1)
        return self.d0(both) + self.d2(both)


def test_a_concatenation_for_two_modules_is_refused() -> None:
    network = InTwoPlaces(2, up="shared", block="module").eval()
    network.d0, network.d2 = DoubleConv(2, 7, 2), DoubleConv(2, 7, 2)
    with pytest.raises(ModelError, match="found no skip connection to gate"):
        gate(network, IMAGE)


class SkipConnection(nn.Module):
    """Concatenates the features from below and then the skip."""

    def __init__(self) -> None:
        super().__init__()
        self.below = nn.Sequential(nn.Conv2d(4, 3, 3, 2, 1), nn.Upsample(scale_factor=2))

    def forward(self, skip: Tensor) -> Tensor:
        return torch.cat([self.below(skip), skip], dim=1)


def test_a_shut_gate_takes_the_skip_away_in_whatever_order_it_is_concatenated() -> None:
    torch.manual_seed(0)
    unet = PlainConvUNet().eval()
    unet.decoder = Turned()
    image = BUILT["nnunet"][1]
    assert gate(unet, torch.zeros_like(image)) == {"skip.1": "decoder.stages.0"}
    own = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), SkipConnection(), nn.Conv2d(7, 2, 1)).eval()
    assert gate(own, torch.zeros_like(IMAGE)) == {"skip.0": "1"}
    kept: list[Tensor] = []
    unet.decoder.stages[0].register_forward_hook(lambda _, args, __: kept.append(args[0]))
    own[2].register_forward_hook(lambda _, args, __: kept.append(args[0]))
    for network, given, key in ((unet, image, "skip.1/gate"), (own, IMAGE, "skip.0/gate")):
        network(given)
        with editing(network, {key: torch.zeros_like}):
            network(given)
    (whole, shut, own_whole, own_shut) = kept
    assert torch.equal(shut[:, 6:], whole[:, 6:]) and shut[:, :6].count_nonzero() == 0
    assert torch.equal(own_shut[:, :3], own_whole[:, :3]) and own_shut[:, 3:].count_nonzero() == 0


class Like(nn.Module):
    """Resamples features to the size of others."""

    def forward(self, features: Tensor, like: Tensor) -> Tensor:
        return nn.functional.interpolate(features, size=like.shape[2:])


class Resampled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.up, self.out = nn.Conv2d(1, 4, 3, 2, 1), Like(), nn.Conv2d(5, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        return self.out(torch.cat([self.up(self.down(image), image), image], dim=1))


class Shared(SmpUnet):
    """One decoder block for two levels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(1, 6, 3, 2, 1), nn.Conv2d(6, 6, 3, 2, 1)
        self.layer = nn.Conv2d(6, 6, 3, 2, 1)
        block = SmpBlock(6, 6, 6)
        self.blocks = nn.ModuleList([block, block, SmpBlock(6, 0, 4)])


def test_an_argument_that_gives_only_a_size_and_a_block_of_several_levels_are_refused() -> None:
    torch.manual_seed(0)
    assert gate(Resampled(), IMAGE) == {"skip.0": "out"}  # and not "up", which uses only the size
    with pytest.raises(ModelError, match=r"blocks\.0: joins 2 skips in one run"):
        gate(Shared(), IMAGE)
    layered, image = PlainConvUNet(), BUILT["nnunet"][1]
    layered.decoder.stages[0] = nn.Sequential(layered.decoder.stages[0], nn.ReLU())
    assert gate(layered, image) == {"skip.1": "decoder.stages.0.0"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_gate_has_the_precision_of_its_network(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    network = SmpUnet().eval().to(dtype)
    image = IMAGE.to(dtype)
    whole = network(image)
    gate(network, image)
    assert torch.equal(network(image), whole) and whole.dtype == dtype
