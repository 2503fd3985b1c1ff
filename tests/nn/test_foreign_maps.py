"""Laws of maps that are read out of networks that segkit did not build."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets import AttentionUnet, SwinUNETR
from numpy.testing import assert_allclose
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from segkit.config.network import NetworkConfig
from segkit.errors import ModelError
from segkit.geometry.grid import Grid, Placement
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import described_model
from segkit.nn.foreign_maps import record
from segkit.nn.map_tap import editing, maps_of, recording
from tests.models import description

IMAGE = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(0))


class Tokens(nn.Module):
    """Tokens of 4 x 4 voxels, two layers of PyTorch's, attention by a softmax, and classes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.over_keys, self.idle = nn.Softmax(dim=-1), nn.Softmax(dim=-1)
        self.squeeze = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 8, 1), nn.Sigmoid())
        self.out = nn.ConvTranspose2d(8, 2, 4, stride=4)
        self.over_classes = nn.Softmax(dim=1)
        self.weights: Tensor | None = None

    def forward(self, image: Tensor) -> Tensor:
        features = self.embed(image)
        tokens = self.layers(features.flatten(2).transpose(1, 2))
        heads = tokens.reshape(*tokens.shape[:2], 2, 4).transpose(1, 2)
        self.weights = self.over_keys(heads @ heads.transpose(2, 3))
        tokens = tokens + (self.weights @ heads).transpose(1, 2).reshape(tokens.shape)
        features = tokens.transpose(1, 2).reshape(features.shape)
        features = features * self.squeeze(features)
        return self.over_classes(self.out(features))


def test_gates_of_monais_attention_unet_are_read_and_can_be_changed() -> None:
    torch.manual_seed(0)
    network = AttentionUnet(2, 1, 2, channels=(4, 6, 8), strides=(2, 2)).eval()
    whole = network(IMAGE)
    names = ["model.1.attention.psi.2", "model.1.submodule.1.attention.psi.2"]
    infos = record(network, IMAGE, names)
    assert [info.placement for info in infos.values()] == [
        Placement((1, 1), (0, 0)),
        Placement((2, 2), (0, 0)),
    ]
    assert [info.level for info in infos.values()] == [0, 1] and maps_of(network) == infos
    kept: list[Tensor] = []
    inner = network.get_submodule(names[1])
    inner.register_forward_hook(lambda _, __, output: kept.append(output))
    with recording(network) as maps:
        assert torch.equal(network(IMAGE), whole)
    assert torch.equal(maps[f"{names[1]}/spatial"], kept[0])
    with editing(network, {f"{names[0]}/spatial": torch.ones_like}):
        assert not torch.allclose(network(IMAGE), whole, atol=1e-3)
    assert set(network.state_dict()) == set(
        AttentionUnet(2, 1, 2, channels=(4, 6, 8), strides=(2, 2)).state_dict()
    )


@pytest.mark.parametrize("inference", [False, True])
def test_recorded_attention_is_the_same_for_every_kernel(inference: bool) -> None:
    torch.manual_seed(0)
    network = Tokens().eval()
    with torch.inference_mode(inference):
        whole = network(IMAGE)
    name = "layers.layers.1.self_attn"
    infos = record(network, IMAGE, [name, "over_keys", "over_classes", "squeeze.2"])
    assert [(key, info.placement) for key, info in infos.items()] == [
        (f"{name}/received", Placement((4, 4), (1.5, 1.5))),
        ("over_keys/received", Placement((4, 4), (1.5, 1.5))),
        ("over_classes/spatial", Placement((1, 1), (0, 0))),
        ("squeeze.2/channel", None),
    ]
    with torch.inference_mode(inference), recording(network) as maps:
        torch.testing.assert_close(network(IMAGE), whole)
    assert network.weights is not None
    expected = network.weights.mean(dim=2).reshape(2, 2, 4, 4) * 16
    torch.testing.assert_close(maps["over_keys/received"], expected)
    torch.testing.assert_close(maps["over_classes/spatial"], whole)
    assert maps["squeeze.2/channel"].shape == (2, 8, 1, 1)
    # PyTorch's own weights of the tokens that the layer is given.
    layer = network.layers.layers[1]
    tokens = network.layers.layers[0](network.embed(IMAGE).flatten(2).transpose(1, 2))
    _, weights = layer.self_attn(tokens, tokens, tokens, average_attn_weights=False)
    received = weights.mean(dim=2).reshape(2, 2, 4, 4) * 16
    torch.testing.assert_close(maps[f"{name}/received"], received, atol=1e-5, rtol=1e-4)


class Pooled(nn.Module):
    """A map of stride 4: the sigmoid of the mean of 4 x 4 x 4 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.Sequential(nn.AvgPool3d(2), nn.AvgPool3d(2))
        self.map = nn.Sigmoid()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, image: Tensor) -> Tensor:
        maps = self.map(self.pool(image))
        fine = F.interpolate(maps, size=image.shape[2:])
        return self.scale * fine[:, :2]


def test_a_recorded_map_of_stride_4_lies_in_the_world_in_an_oblique_volume() -> None:
    turned = Rotation.from_euler("xyz", [20, -15, 25], degrees=True).as_matrix()
    affine = np.eye(4)
    affine[:3, :3] = turned @ np.diag([-0.8, 1.1, 1.7])
    affine[:3, 3] = [-11.0, 23.0, 5.0]
    grid = Grid((20, 16, 12), affine)
    # Each channel is a world coordinate, which pooling takes to the middle of a cell.
    scan = Volume((grid.centres() / 20).astype(np.float32), grid)
    network = NetworkConfig.model_validate({"given": {"multiple": [4, 4, 4], "name": "pooled"}})
    told = description(channels=3, spacing=(0.8, 1.1, 1.7), network=network)
    module = Pooled()
    record(module, torch.zeros(1, 3, 8, 8, 8), ["map"])
    predictor = Predictor(described_model(told, module.eval()), device="cpu", engine="torch")
    (found,) = predictor(scan, maps=True).maps.values()
    assert found.info.key == "map/spatial" and found.volume is not None
    values = np.asarray(found.volume.data, dtype=np.float64)
    assert values.shape == (5, 4, 3, 3)
    assert_allclose(20 * np.log(values / (1 - values)), found.volume.grid.centres(), atol=0.01)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)
        self.mix = nn.Linear(1, 1)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.mix(image.flatten(2).transpose(1, 2))[:, None]
        mixed = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return mixed[:, 0].transpose(1, 2).reshape(image.shape)


def test_a_module_without_readable_attention_is_refused_by_name() -> None:
    network = Tokens().eval()
    for names, reason in (
        (["nothing"], "expected names of modules, found nothing"),
        (["layers"], "layers: expected an nn.Softmax.*found a TransformerEncoder"),
        (["idle"], "idle: this Softmax is not called when the network runs; name"),
    ):
        with pytest.raises(ModelError, match=reason):
            record(network, IMAGE, names)
    assert maps_of(network) == {}
    fused = nn.Sequential(Fused())
    small = IMAGE[..., :4, :4]
    with pytest.raises(ModelError, match=r"^0: Fused computes fused attention \(scaled_dot"):
        record(fused, small, ["0"])
    with pytest.raises(ModelError, match=r"0\.softmax: this Softmax is not called.*; 0 computes"):
        record(fused, small, ["0.softmax"])
    twice = nn.Sequential(shared := nn.Sigmoid(), nn.ReLU(), shared)
    with pytest.raises(ModelError, match="0: this Sigmoid is called 2 times in one run"):
        record(twice, IMAGE, ["0"])
    rolled = nn.Sequential(Rolled(), nn.Sigmoid())
    with pytest.raises(ModelError, match=r"1: the positions of its output's cells"):
        record(rolled, IMAGE, ["1"])
    place = Placement((1, 1), (0, 0))
    assert record(rolled, IMAGE, ["1"], placements={"1": place})["1/spatial"].placement == place
    with pytest.raises(ModelError, match="1: is recorded already"):
        record(rolled, IMAGE, ["1"], placements={"1": place})


class Rolled(nn.Module):
    def forward(self, image: Tensor) -> Tensor:
        return image.roll(1, dims=2)


class Windows(nn.Module):
    """Attention within windows of 4 x 4."""

    def __init__(self) -> None:
        super().__init__()
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        windows = image.reshape(2, 1, 4, 4, 4, 4).transpose(3, 4).reshape(32, 1, 16, 1)
        self.softmax(windows @ windows.transpose(2, 3))
        return image


def test_attention_within_windows_has_no_place_and_is_refused() -> None:
    with pytest.raises(ModelError, match=r"a batch of 2, found \(32, 1, 16, 16\); choose"):
        record(Windows(), IMAGE, ["softmax"])


class Mixed(nn.Module):
    """16 cells of features: attention from them to `keys`, by a softmax and by several heads."""

    def __init__(self, keys: str) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, 8, 4, stride=4)
        self.latents = nn.Parameter(torch.randn(1, 16, 8))
        self.keys = keys
        self.softmax = nn.Softmax(dim=-1)
        self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.embed(image).flatten(2).transpose(1, 2)
        latents = self.latents.expand(len(image), -1, -1)
        shifted = self.embed(F.pad(image, (0, 2, 0, 2))[:, :, 2:, 2:]).flatten(2).transpose(1, 2)
        keys = {"latents": latents, "shifted": shifted, "channels": tokens}[self.keys]
        query, key = (part.reshape(-1, 16, 2, 4).transpose(1, 2) for part in (tokens, keys))
        if self.keys == "channels":  # 16 channels and 16 cells
            wide = torch.cat([tokens, tokens], dim=2)[:, None]
            self.softmax(wide.transpose(2, 3) @ wide)
        else:
            self.softmax(query @ key.transpose(2, 3))
        return self.heads(tokens, keys, keys)[0]


@pytest.mark.parametrize("name", ["softmax", "heads"])
def test_keys_lie_where_the_keys_lie_not_the_queries(name: str) -> None:
    (info,) = record(nn.Sequential(Mixed("shifted")), IMAGE, [f"0.{name}"]).values()
    assert info.placement == Placement((4, 4), (3.5, 3.5))


@pytest.mark.parametrize(
    ("keys", "name"), [("latents", "softmax"), ("latents", "heads"), ("channels", "softmax")]
)
def test_keys_that_are_no_cells_are_refused_although_they_are_as_many(keys: str, name: str) -> None:
    network = nn.Sequential(Mixed(keys))
    with pytest.raises(ModelError, match=rf"0\.{name}: the positions of its 16 keys in the input"):
        record(network, IMAGE, [f"0.{name}"])
    with pytest.raises(ModelError, match=rf"0\.{name}: the positions of its 16 keys in the input"):
        record(network, IMAGE, [f"0.{name}"], placements={f"0.{name}": Placement((2, 2), (0, 0))})
    place = Placement((4, 4), (1.5, 1.5))
    record(network, IMAGE, [f"0.{name}"], placements={f"0.{name}": place})
    with recording(network) as maps:
        network(IMAGE)
    assert maps[f"0.{name}/received"].shape[2:] == (4, 4)


class SingleHead(nn.Module):
    """Attention of SAGAN: from each cell to the cells of a grid twice as coarse, without heads."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        convolution = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        pooling = (nn.MaxPool2d, nn.MaxPool3d)[spatial_dims - 2]
        self.embed = convolution(1, 8, 2, stride=2)
        self.query, self.out = convolution(8, 4, 1), convolution(8, 2, 1)
        self.key = nn.Sequential(convolution(8, 4, 1), pooling(2))
        self.value = nn.Sequential(convolution(8, 8, 1), pooling(2))
        self.softmax = nn.Softmax(dim=-1)
        self.over_classes, self.over_space = nn.Softmax(dim=-1), nn.Softmax(dim=-1)
        self.over_channels = nn.Softmax(dim=-1)

    def forward(self, image: Tensor) -> Tensor:
        features = self.embed(image)
        queries = self.query(features).flatten(2).permute(0, 2, 1)
        weights = self.softmax(torch.bmm(queries, self.key(features).flatten(2)))
        values = self.value(features).flatten(2) @ weights.permute(0, 2, 1)
        features = features + values.view(features.shape)
        flat = features.flatten(2)
        self.over_channels(flat @ flat.transpose(1, 2))
        self.over_space(flat)
        self.over_classes(flat.transpose(1, 2))
        return self.out(features)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_attention_without_an_axis_of_heads_is_recorded_as_one_head(spatial_dims: int) -> None:
    torch.manual_seed(0)
    network = SingleHead(spatial_dims).eval()
    image = torch.randn(2, 1, *(8, 12, 4)[:spatial_dims])
    whole = network(image)
    (info,) = record(network, image, ["softmax"]).values()
    assert info.key == "softmax/received"
    assert info.placement == Placement((4,) * spatial_dims, (1.5,) * spatial_dims)
    with recording(network) as maps:
        assert torch.equal(network(image), whole)
    features = network.embed(image)
    keys, queries = network.key(features), network.query(features).flatten(2)
    for place in np.ndindex(*keys.shape[2:]):
        at = keys[(..., *place)]
        share = sum(
            torch.exp((query * at).sum(1))
            / torch.exp((query[..., None] * keys.flatten(2)).sum(1)).sum(1)
            for query in queries.unbind(2)
        )
        expected = share / queries.shape[2] * keys[0, 0].numel()
        torch.testing.assert_close(maps[info.key][(slice(None), 0, *place)], expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("over_space", r"queries are the cells of one grid, found \(2, 8, 16\)"),
        ("over_classes", r"the positions of its 8 keys"),
        ("over_channels", r"the positions of its 8 keys"),
    ],
)
def test_three_axes_of_which_the_last_two_are_not_queries_and_keys_are_refused(
    name: str, reason: str
) -> None:
    with pytest.raises(ModelError, match=f"{name}: .*{reason}"):
        record(SingleHead(2), torch.zeros(2, 1, 8, 8), [name])


class Weighing(nn.Module):
    """Features weighed by a map of cells that are tokens, or come before the channels."""

    def __init__(self, spatial_dims: int) -> None:
        super().__init__()
        convolution = (nn.Conv2d, nn.Conv3d)[spatial_dims - 2]
        self.embed = convolution(1, 8, 3, stride=2, padding=1)
        self.logits = nn.Linear(8, 1)
        self.tokens, self.grid, self.flat = nn.Sigmoid(), nn.Sigmoid(), nn.Sigmoid()
        self.context, self.branches = nn.Softmax(dim=-1), nn.Softmax(dim=1)
        self.mixed = nn.Sigmoid()

    def forward(self, image: Tensor) -> Tensor:
        features = self.embed(image)
        tokens, last = features.flatten(2).transpose(1, 2), features.movedim(1, -1)
        token_map = self.tokens(self.logits(tokens))
        grid_map = self.grid(self.logits(last))
        flat_map = self.flat(self.logits(tokens).squeeze(-1))
        context = self.context(self.logits(tokens).transpose(1, 2))
        self.branches(tokens.mean(1).view(len(image), 2, 4))
        self.mixed(self.logits(tokens.flatten(0, 1)))
        self.maps = token_map[..., 0], grid_map.flatten(1), flat_map, context[:, 0]
        weighed = tokens * token_map + tokens * flat_map[..., None]
        pooled = context @ tokens + (last * grid_map).flatten(1, -2)
        return (weighed + pooled).transpose(1, 2).reshape(features.shape)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_maps_of_tokens_and_of_cells_before_channels_are_read_and_can_be_changed(
    spatial_dims: int,
) -> None:
    torch.manual_seed(0)
    network, names = Weighing(spatial_dims).eval(), ["tokens", "grid", "flat", "context"]
    image = torch.randn(2, 1, *(8, 12, 4)[:spatial_dims])
    whole = network(image)
    infos = record(network, image, names)
    assert list(infos) == [f"{name}/spatial" for name in names]
    place = Placement((2,) * spatial_dims, (0,) * spatial_dims)
    assert {info.placement for info in infos.values()} == {place}
    with recording(network) as maps:
        assert torch.equal(network(image), whole)
    for key, expected in zip(infos, network.maps, strict=True):
        assert maps[key].shape == (2, 1, *(4, 6, 2)[:spatial_dims])
        assert torch.equal(maps[key].flatten(1), expected)
    with editing(network, dict.fromkeys(infos, torch.zeros_like)):
        assert torch.equal(network(image), torch.zeros_like(whole))


@pytest.mark.parametrize(("name", "shape"), [("branches", "2, 2, 4"), ("mixed", "32, 1")])
def test_weights_of_branches_and_cells_of_several_images_are_no_map(name: str, shape: str) -> None:
    with pytest.raises(ModelError, match=rf"{name}: expected a map of cells, .*\({shape}\)"):
        record(Weighing(2), torch.zeros(2, 1, 8, 8), [name])


def test_a_window_of_monais_swin_unetr_that_is_the_whole_grid_is_recorded() -> None:
    network = SwinUNETR(1, 2, feature_size=12, spatial_dims=2, patch_size=2)
    name = "swinViT.layers4.0.blocks.0.attn.softmax"
    (info,) = record(network.eval(), torch.zeros(1, 1, 64, 64), [name]).values()
    assert info.placement == Placement((16, 16), (7.5, 7.5))
