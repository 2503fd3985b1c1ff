"""Laws of the head that says which classes an image holds."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from segkit.nn.blocks import Modulated
from segkit.nn.channel_attention import SqueezeExcitation
from segkit.nn.map_tap import recording
from segkit.nn.pooling import GatedPooling, LearnedQueryPooling, MeanPooling
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import BlockFactory, UNet

HEADS: dict[str, BlockFactory] = {
    "mean": lambda channels: MeanPooling(channels, num_classes=2),
    "gated": lambda channels: GatedPooling(channels, num_classes=2, width=5),
    "learned_query": lambda channels: LearnedQueryPooling(channels, num_classes=2),
}
every_head = pytest.mark.parametrize("head", list(HEADS))


def unet(head: str | None, spatial_dims: int = 2) -> UNet:
    """Three classes from two channels, with attention after the coarsest level."""
    torch.manual_seed(0)
    return UNet(
        spatial_dims,
        2,
        out_channels=3,
        channels=(4, 6, 8),
        deep_supervision=True,
        bottleneck_attention=lambda channels: Modulated(SqueezeExcitation(channels)),
        presence_head=HEADS[head] if head else None,
    )


def image_of(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("spatial_dims", [2, 3])
@every_head
def test_classified_gives_the_logits_of_forward_and_the_presence_of_the_coarsest_features(
    head: str, spatial_dims: int, training: bool
) -> None:
    network = unet(head, spatial_dims).train(training)
    image = image_of(3, 2, *[8, 12, 8][:spatial_dims])
    logits, presence = network.classified(image)
    assert torch.equal(logits, network(image))
    features = image
    for level in network.encoder:
        features = level(features)
    attended = network.bottleneck(features)
    assert network.presence is not None
    assert torch.equal(presence, network.presence(attended))
    assert presence.shape == (3, 2)
    # Without the attention it would be another.
    assert not torch.allclose(presence, network.presence(features), atol=1e-4)


@every_head
def test_the_presence_that_is_trained_is_that_of_prediction(head: str) -> None:
    network = unet(head)
    image = image_of(2, 2, 8, 12)
    levels, presence = network.supervised(image)
    logits, predicted = network.classified(image)
    assert presence is not None and torch.equal(presence, predicted)
    assert torch.equal(levels[0], logits)


@every_head
def test_a_head_changes_no_bit_of_the_segmentation(head: str) -> None:
    network, plain = unet(head), unet(None)
    left_over = plain.load_state_dict(network.state_dict(), strict=False)
    assert not left_over.missing_keys
    assert all(name.startswith("presence.") for name in left_over.unexpected_keys)
    image = image_of(2, 2, 8, 12)
    assert torch.equal(network(image), plain(image))
    for level, expected in zip(
        network.supervised(image).levels, plain.supervised(image).levels, strict=True
    ):
        assert torch.equal(level, expected)


@pytest.mark.parametrize(
    "wrap", [lambda network: network, lambda network: SlicewiseNetwork(network, axis=2)]
)
def test_a_network_without_a_head_tells_no_presence(wrap: Callable[[UNet], nn.Module]) -> None:
    network = wrap(unet(None))
    image = image_of(1, 2, 8, 8) if isinstance(network, UNet) else image_of(1, 2, 8, 8, 3)
    assert network.presence is None
    assert network.supervised(image).presence is None
    with pytest.raises(ValueError, match="the network has no presence head; build it with one"):
        network.classified(image)


@pytest.mark.parametrize("head", ["gated", "learned_query"])
def test_forward_records_the_maps_of_the_head_too(head: str) -> None:
    network = unet(head)
    image = image_of(2, 2, 8, 12)
    with recording(network) as of_forward:
        network(image)
    with recording(network) as of_classified:
        network.classified(image)
    assert of_forward.keys() == of_classified.keys() == {"bottleneck/channel", "head/pool"}
    assert torch.equal(of_forward["head/pool"], of_classified["head/pool"])


@pytest.mark.parametrize("axis", [0, 1, 2])
@every_head
def test_the_volume_contains_every_class_of_every_slice(head: str, axis: int) -> None:
    network = SlicewiseNetwork(unet(head).eval(), axis=axis)
    space = [8, 12]
    space.insert(axis, 5)
    volumes = image_of(3, 2, *space)
    logits, presence = network.classified(volumes)
    planes = volumes.unbind(axis + 2)
    of_planes = torch.stack([network.network.classified(plane)[1] for plane in planes])
    assert_close(presence, of_planes.amax(dim=0))
    # Not always the first or the last.
    assert set(of_planes.argmax(dim=0).flatten().tolist()) - {0, 4}
    assert torch.equal(logits, network(volumes))
    supervised = network.supervised(volumes).presence
    assert supervised is not None and torch.equal(supervised, presence)


def test_the_gradient_of_presence_goes_to_the_slice_with_the_largest_logit() -> None:
    network = SlicewiseNetwork(unet("mean").eval(), axis=2)
    volume = image_of(1, 2, 8, 8, 6).requires_grad_()
    presence = network.classified(volume)[1]
    presence[0, 1].backward()
    assert volume.grad is not None
    touched = volume.grad.abs().amax(dim=(0, 1, 2, 3)).nonzero().flatten().tolist()
    planes = volume.detach().unbind(4)
    alone = torch.stack([network.network.classified(plane)[1][0, 1] for plane in planes])
    assert touched == [alone.argmax().item()]
