"""Settings of a network: a U-Net with its attention, or a module that Python code passes in."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from segkit.config.attention import (
    AttentionConfig,
    CrossAttentionConfig,
    SelfAttentionConfig,
    UTransformerGateConfig,
)
from segkit.config.base import Few, Positive, Section, Width

MOST_VOXELS = 2**27
"""The largest patch: 512 x 512 x 512."""

MOST_TOKENS = 2**16
"""The largest number of voxels in a window of attention."""


class GivenModuleConfig(Section):
    """A network that Python code passes in: `train(config, network=module)`.

    No file contains the module, and no file names its class.
    """

    multiple: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """Along each axis, the size of the input must be a multiple of this number."""
    name: str = ""
    """A note that helps to find the module again, such as the name of its class."""


class NetworkConfig(Section):
    """A U-Net in two or three dimensions, with its attention."""

    spatial_dims: Literal[2, 3] = 3
    channels: list[Width] = Field([16, 32, 64, 128], min_length=2, max_length=16)
    """Feature channels of each level, finest first."""
    strides: list[list[Few]] | None = None
    """For each step down, the stride along each axis. Default: 2 everywhere."""
    kernels: list[list[Few]] | None = None
    """For each level, the odd size of convolutions along each axis. Default: 3 everywhere."""
    normalisation: Literal["instance", "batch", "group", "none"] = "instance"
    downsampling: Literal["stride", "pool"] = "stride"
    """A strided convolution, as in nnU-Net, or max-pooling, as in the first U-Nets."""
    deep_supervision: bool = True
    """Whether coarser decoder levels are trained against the label as well."""
    attention: AttentionConfig = AttentionConfig()
    given: GivenModuleConfig | None = None
    """A module from Python that replaces the U-Net. Beside it only spatial_dims may be set."""

    @model_serializer(mode="wrap")
    def _without_a_unet(self, write: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """All settings; with a given module, only those that it allows."""
        written: dict[str, Any] = write(self)
        if self.given is None:
            return written
        return {name: written[name] for name in ("spatial_dims", "given") if name in written}

    @property
    def step_strides(self) -> list[list[int]]:
        """The stride of each step down, along each axis."""
        return self.strides or [[2] * self.spatial_dims for _ in self.channels[1:]]

    @property
    def level_kernels(self) -> list[list[int]]:
        """The convolution size of each level, along each axis."""
        return self.kernels or [[3] * self.spatial_dims for _ in self.channels]

    @property
    def total_stride(self) -> list[int]:
        """The factor between the finest and the coarsest level, along each axis."""
        if self.given is not None:
            return self.given.multiple
        total = [1] * self.spatial_dims
        for step in self.step_strides:
            total = [product * factor for product, factor in zip(total, step, strict=True)]
        return total

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.given is not None:
            return self._given_alone(self.given)
        for name, rows, wanted in (
            ("strides", self.step_strides, len(self.channels) - 1),
            ("kernels", self.level_kernels, len(self.channels)),
        ):
            if len(rows) != wanted or any(len(row) != self.spatial_dims for row in rows):
                raise ValueError(
                    f"network.{name} must have {wanted} lists of {self.spatial_dims} numbers "
                    f"for {len(self.channels)} levels"
                )
        if any(size % 2 == 0 for row in self.level_kernels for size in row):
            raise ValueError("network.kernels must be odd, so that convolutions keep the grid")
        self._attention_fits()
        return self

    def _given_alone(self, given: GivenModuleConfig) -> Self:
        if len(given.multiple) != self.spatial_dims:
            raise ValueError(
                f"network.given.multiple must have {self.spatial_dims} numbers, because "
                f"network.spatial_dims is {self.spatial_dims}"
            )
        fields = type(self).model_fields.items()
        if others := [
            name
            for name, setting in fields
            if name in self.model_fields_set - {"spatial_dims", "given"}
            and getattr(self, name) != setting.default
        ]:
            raise ValueError(
                f"network.{others[0]} is a setting of a U-Net, which network.given replaces; "
                f"remove one of the two"
            )
        return self

    def _attention_fits(self) -> None:
        deepest_skip = len(self.channels) - 2
        levels = self.attention.skip_levels(len(self.channels))
        if max(levels, default=0) > deepest_skip:
            raise ValueError(
                f"network.attention.skip.levels must be from 0 to {deepest_skip}, found {levels}"
            )
        heads = getattr(self.attention.skip, "heads", None)
        if isinstance(heads, list) and len(heads) != len(levels):
            raise ValueError(
                f"network.attention.skip.heads must be one number or a list of {len(levels)}, "
                f"one for each of the levels {levels}"
            )
        skip = self.attention.skip
        if skip is not None and skip.levels is None and not levels:
            raise ValueError(
                "network.attention.skip leaves out level 0 by default, but a network of two "
                "network.channels has no other skip; set levels: [0]"
            )
        placed: list[int] = []
        if isinstance(skip, CrossAttentionConfig):
            placed = [*levels, *(level + 1 for level in levels)]
        elif isinstance(skip, UTransformerGateConfig):
            placed = [level + 1 for level in levels]
        narrowest = min((self.channels[level] for level in placed), default=2 * self.spatial_dims)
        if narrowest < 2 * self.spatial_dims:
            raise ValueError(
                f"network.attention.skip needs network.channels of {2 * self.spatial_dims} or "
                f"more to encode positions, found {narrowest}"
            )
        bottleneck = self.attention.bottleneck
        if isinstance(bottleneck, SelfAttentionConfig):
            encoding = {"rotary": bottleneck.head_channels, "sincos": self.channels[-1]}
            if encoding.get(bottleneck.positions, 2 * self.spatial_dims) < 2 * self.spatial_dims:
                raise ValueError(
                    f"network.attention.bottleneck.positions: {bottleneck.positions} needs "
                    f"{2 * self.spatial_dims} channels or more (of each head, for rotary), "
                    f"found {encoding[bottleneck.positions]}"
                )
        window = getattr(bottleneck, "window", None)
        if window is not None and len(window) != self.spatial_dims:
            raise ValueError(
                f"network.attention.bottleneck.window must have {self.spatial_dims} numbers, "
                f"because network.spatial_dims is {self.spatial_dims}"
            )
        if math.prod(window or ()) > MOST_TOKENS:
            raise ValueError(
                f"network.attention.bottleneck.window {window} has more than {MOST_TOKENS:,} "
                f"voxels; make it smaller"
            )

    def check_patch(self, patch: Sequence[int], name: str) -> None:
        """Raise ValueError unless the network can work on such a patch."""
        total = self.total_stride
        if len(patch) != len(total):
            raise ValueError(
                f"{name} {patch} must have {len(total)} numbers, "
                f"because network.spatial_dims is {len(total)}"
            )
        if any(size % stride for size, stride in zip(patch, total, strict=True)):
            raise ValueError(
                f"{name} {patch} must be multiples of {total}, the product of network.strides"
            )
        if math.prod(patch) > MOST_VOXELS:
            raise ValueError(
                f"{name} {patch} has more than {MOST_VOXELS:,} voxels; make it smaller"
            )
