"""The U-Net, in two and three dimensions, with or without attention.

    image ─▶ encoder.0 ────────────── skip.0 ──▶ decoder.0 ─▶ heads.0 ─▶ logits
                │ stride                            ▲ transposed convolution
             encoder.1 ────────────── skip.1 ──▶ decoder.1
                │                                   ▲
             encoder.2 ─▶ bottleneck ───────────────┘
                              └──▶ presence

Level 0 is the finest. Without attention this is the U-Net of Ronneberger et al. (2015,
arXiv:1505.04597) and Çiçek et al. (2016, arXiv:1606.06650), with padded convolutions.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.grid import Placement
from segkit.nn.blocks import CONV, MAX_POOL, TRANSPOSED_CONV, ConvolutionBlock, NormalisationKind
from segkit.nn.concatenation import concatenate_channels
from segkit.nn.map_tap import MapInfo, maps_of, place_taps


class SkipAttention(Protocol):
    """Attention of a skip: it changes the skip's features before they join the decoder.

    `signal` says which features of the decoder steer it: those of the coarser level, or the same
    features upsampled to the skip's grid.
    """

    signal: Literal["coarse", "upsampled"]

    def let_through(self, skip: Tensor, signal: Tensor) -> Tensor:
        """The features that join the decoder, in place of the skip's own."""


@runtime_checkable
class GateFactory(Protocol):
    """Function that makes the gate of one level, or None if the level has no gate."""

    def __call__(
        self,
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module | None:
        """The gate of a level. Its attribute `signal` says which features steer it.

        Args:
            level: level of the skip; 0 is the finest.
            skip_channels: number of channels of the skip.
            coarse_channels: number of channels of the coarser decoder features.
            upsampled_channels: number of channels of these features after upsampling.
            stride: stride from the skip's grid to the coarser grid.
            deepest: True if the coarser features are those of the bottleneck.
        """


BlockFactory = Callable[[int], nn.Module]
"""Function from a number of channels to a module f(x) -> x, attention over such features."""
LevelFactory = Callable[[int, int], nn.Module]
"""The same from a number of channels and a level; `nn.Identity` for a level without attention."""


@runtime_checkable
class ConvolutionsFactory(Protocol):
    """Makes the convolutions of a level, such as `ConvolutionBlock`."""

    def __call__(
        self,
        spatial_dims: int,
        in_channels: int,
        /,
        *,
        widths: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int] | None = None,
        norm: NormalisationKind = "instance",
    ) -> nn.Module:
        """Convolutions that give the last of the widths; the first has the stride.

        Args:
            spatial_dims: 2 or 3.
            in_channels: number of channels of the input.
            widths: number of channels of each convolution.
            kernel: kernel size along each axis.
            stride: stride of the first convolution; 1 if None.
            norm: kind of the normalisation.
        """


class Supervised(NamedTuple):
    """The outputs of a network in training."""

    levels: tuple[Tensor, ...]
    """Logits (batch, classes, *space) of every supervised level, the finest first. Prediction uses
    only the first."""
    presence: Tensor | None
    """Logits (batch, classes without the background) of each class's presence in the image; None
    without a presence head."""


class Join(nn.Module):
    """One decoder level: upsample the coarse features, gate the skip, and convolve both."""

    def __init__(
        self, upsample: nn.Module, gate: nn.Module | None, block: nn.Module, attention: nn.Module
    ) -> None:
        super().__init__()
        self.upsample = upsample
        self.gate = gate
        self.block = block
        self.attention = attention

    def forward(
        self,
        skip: Float[Tensor, "batch skip_channel *space"],
        coarse: Float[Tensor, "batch coarse_channel *coarse"],
    ) -> Float[Tensor, "batch out_channel *space"]:
        """The features of the decoder on the skip's grid."""
        upsampled = self.upsample(coarse)
        if self.gate is not None:
            gate = cast(SkipAttention, self.gate)
            signal = upsampled if gate.signal == "upsampled" else coarse
            skip = gate.let_through(skip, signal)
        features: Tensor = self.attention(self.block(concatenate_channels([upsampled, skip])))
        return features


class UNet(nn.Module):
    """Logits of every class at every voxel.

        network = UNet(3, 1, out_channels=3, channels=(32, 64, 128))
        logits = network(torch.zeros(1, 1, 64, 64, 64))  # (1, 3, 64, 64, 64)

    Args:
        spatial_dims: 2 or 3.
        in_channels: number of image channels.
        label_classes: number of foreground classes of an additional label channel, which follows
            the image channels; it is spread over one channel of 0 and 1 for each class.
        out_channels: number of classes, the background included.
        channels: number of features at each level, the finest first. A pair sets the widths of the
            two convolutions of the encoder; a number sets both.
        strides: stride along each axis, for each step to the next coarser level; 2 if not given.
        kernels: kernel size along each axis, for each level; odd; 3 if not given.
        norm: normalisation after each convolution.
        convolutions: makes the convolutions of each level of the encoder and of the decoder.
        downsampling: by the first convolution of a level ("stride"), or by max-pooling before it
            ("pool").
        upsampled_channels: number of channels after a transposed convolution: that of the finer
            level ("level", as in 2D by Ronneberger), or that of the coarser level ("keep", as in 3D
            by Çiçek).
        upsampling_bias: True if transposed convolutions have a bias.
        deep_supervision: True if coarser decoder levels have their own logits. The coarsest level
            has none (nnU-Net gives it no weight).
        skip_gate: makes the attention of each skip.
        encoder_attention, decoder_attention: make the attention after a level's convolutions,
            given their channels and the level.
        bottleneck_attention: makes the attention after the coarsest level.
        presence_head: makes the layer that computes, from the coarsest features, the logits of the
            presence of each class but the background.
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        *,
        out_channels: int,
        channels: Sequence[int | tuple[int, int]],
        strides: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
        norm: NormalisationKind = "instance",
        convolutions: ConvolutionsFactory = ConvolutionBlock,
        downsampling: Literal["stride", "pool"] = "stride",
        upsampled_channels: Literal["level", "keep"] = "level",
        upsampling_bias: bool = True,
        deep_supervision: bool = False,
        skip_gate: GateFactory | None = None,
        encoder_attention: LevelFactory | None = None,
        decoder_attention: LevelFactory | None = None,
        bottleneck_attention: BlockFactory | None = None,
        presence_head: BlockFactory | None = None,
        label_classes: int = 0,
    ) -> None:
        super().__init__()
        self.label_classes = label_classes
        pairs = [(width, width) if isinstance(width, int) else width for width in channels]
        widths = [last for _, last in pairs]
        steps = [tuple(step) for step in strides or [[2] * spatial_dims] * (len(pairs) - 1)]
        sizes = [tuple(size) for size in kernels or [[3] * spatial_dims] * len(pairs)]
        num_skips = len(pairs) - 1
        assert len(steps) == num_skips and len(sizes) == len(pairs)
        self.total_stride = tuple(math.prod(axis) for axis in zip(*steps, strict=True))

        pooled = downsampling == "pool"
        self.encoder = nn.ModuleList()
        placement = Placement.identity(spatial_dims)
        placements = []
        for level, (pair, size) in enumerate(zip(pairs, sizes, strict=True)):
            step = steps[level - 1] if level else None
            block = convolutions(
                spatial_dims,
                widths[level - 1] if level else in_channels + label_classes,
                widths=pair,
                kernel=size,
                stride=None if pooled else step,
                norm=norm,
            )
            attention = (encoder_attention or _identity)(pair[1], level)
            pool = MAX_POOL[spatial_dims](step) if pooled and step else nn.Identity()
            self.encoder.append(nn.Sequential(pool, block, attention))
            if step is not None:
                kernel, padding = (step, [0] * spatial_dims) if pooled else (size, _half(size))
                placement = placement.through(kernel, step, padding)
            placements.append(placement)
            place_taps(attention, f"encoder.{level}", level, placement)
        self.placements = tuple(placements)
        """Position of the features of each level, the same in encoder and decoder."""

        self.bottleneck = (bottleneck_attention or _identity)(widths[-1])
        place_taps(self.bottleneck, "bottleneck", num_skips, placement)

        self.decoder = nn.ModuleList()
        for level in range(num_skips):
            coarse, width, step = widths[level + 1], widths[level], steps[level]
            upsampled = width if upsampled_channels == "level" else coarse
            upsample = TRANSPOSED_CONV[spatial_dims](
                coarse, upsampled, kernel_size=step, stride=step, bias=upsampling_bias
            )
            gate = (
                None
                if skip_gate is None
                else skip_gate(
                    level=level,
                    skip_channels=width,
                    coarse_channels=coarse,
                    upsampled_channels=upsampled,
                    stride=step,
                    deepest=level == num_skips - 1,
                )
            )
            block = convolutions(
                spatial_dims,
                upsampled + width,
                widths=(width, width),
                kernel=sizes[level],
                norm=norm,
            )
            attention = (decoder_attention or _identity)(width, level)
            self.decoder.append(Join(upsample, gate, block, attention))
            if gate is not None:
                place_taps(gate, f"skip.{level}", level, placements[level])
            place_taps(attention, f"decoder.{level}", level, placements[level])

        num_heads = max(num_skips - 1, 1) if deep_supervision else 1
        self.heads = nn.ModuleList(
            CONV[spatial_dims](width, out_channels, kernel_size=1) for width in widths[:num_heads]
        )
        self.presence = presence_head(widths[-1]) if presence_head else None
        if self.presence is not None:
            place_taps(self.presence, "head", num_skips, placement)

    def maps(self) -> dict[str, MapInfo]:
        """Kind and position of each attention map of this network, by key."""
        return maps_of(self)

    def forward(
        self, image: Float[Tensor, "batch in_channel *space"]
    ) -> Float[Tensor, "batch out_channel *space"]:
        """Logits on the image's grid.

        Raises:
            ValueError: the image's size is not a multiple of the total stride.
        """
        skips = self._encode(image)
        if self.presence is not None:
            self.presence(skips[-1])  # its tap may record a map
        logits: Tensor = self.heads[0](self._decode(skips)[0])
        return logits

    def classified(
        self, image: Float[Tensor, "batch in_channel *space"]
    ) -> tuple[Float[Tensor, "batch out_channel *space"], Float[Tensor, "batch classes"]]:
        """Logits of `forward`, and logits of the presence of each class but the background.

        Raises:
            ValueError: the network has no presence head.
        """
        if self.presence is None:
            raise ValueError("the network has no presence head; build it with one")
        skips = self._encode(image)
        return self.heads[0](self._decode(skips)[0]), self.presence(skips[-1])

    def features(
        self, image: Float[Tensor, "batch in_channel *space"]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Features of each encoder level and of each decoder level, the finest first.

        The last features of the encoder are those after the bottleneck. `heads[0]` computes the
        logits from the first features of the decoder.
        """
        skips = self._encode(image)
        return skips, self._decode(skips)

    def supervised(self, image: Float[Tensor, "batch in_channel *space"]) -> Supervised:
        """The outputs that are trained: logits of every supervised level and of presence."""
        skips = self._encode(image)
        features = self._decode(skips)
        levels = tuple(head(level) for head, level in zip(self.heads, features, strict=False))
        return Supervised(levels, self.presence(skips[-1]) if self.presence is not None else None)

    def _encode(self, image: Tensor) -> list[Tensor]:
        space = tuple(image.shape[2:])
        sides = zip(space, self.total_stride, strict=True)
        padded = tuple(-(-size // stride) * stride for size, stride in sides)
        if padded != space:
            raise ValueError(
                f"image space {space} must be multiples of {self.total_stride}; "
                f"pad to {padded} or use slide()"
            )
        skips: list[Tensor] = []
        features = spread_labels(image, self.label_classes) if self.label_classes else image
        for encoder_level in self.encoder:
            features = encoder_level(features)
            skips.append(features)
        skips[-1] = self.bottleneck(features)
        return skips

    def _decode(self, skips: Sequence[Tensor]) -> list[Tensor]:
        features = skips[-1]
        decoded: list[Tensor] = []
        for level in reversed(range(len(self.decoder))):
            features = self.decoder[level](skips[level], features)
            decoded.insert(0, features)
        return decoded


def _identity(channels: int, level: int = 0) -> nn.Module:
    """The identity, instead of attention."""
    return nn.Identity()


def _half(size: Sequence[int]) -> list[int]:
    """Padding with which a convolution of odd kernel size keeps the grid."""
    return [length // 2 for length in size]


def spread_labels(
    image: Float[Tensor, "batch channel *space"], num_classes: int
) -> Float[Tensor, "batch wider *space"]:
    """The image, with its last channel, labels, replaced by one channel for each class.

    The channel of class k (1, 2, …) is 1 at voxels with label k and 0 elsewhere. The network does
    this itself, so that a volume's labels take up only one channel in memory and in files.
    """
    numbers = torch.arange(1, num_classes + 1, device=image.device, dtype=image.dtype)
    is_class = image[:, -1:] == numbers.view(-1, *[1] * (image.ndim - 2))
    return torch.cat([image[:, :-1], is_class.to(image.dtype)], dim=1)
