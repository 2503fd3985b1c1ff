"""Settings of a network: a U-Net with its attention, or a module that Python code passes in."""

import math
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from segkit.config.attention import AttentionConfig
from segkit.config.attention_limits import check_attention, check_attention_grids
from segkit.config.base import Few, Positive, Section, Width, section_of_kind
from segkit.errors import counted

MOST_VOXELS = 2**27
"""The largest patch: 512 x 512 x 512."""


class GivenModuleConfig(Section):
    """A network that Python code passes in: `train(config, network=module)`.

    No file contains the module, and no file names its class.
    """

    multiple: Annotated[list[Positive], Field(min_length=2, max_length=3)]
    """Along each axis, the size of the input must be a multiple of this number."""
    name: str = ""
    """A note that helps to find the module again, such as the name of its class."""


class ConvolutionBlockConfig(Section):
    """A level is two convolutions, each with a normalisation and a leaky ReLU, as in nnU-Net."""

    kind: Literal["convolution"] = "convolution"


class MedNeXtBlockConfig(Section):
    """A level is two blocks of MedNeXt (Roy et al. 2023), the convolutional control of
    transformers."""

    kind: Literal["mednext"] = "mednext"
    expansion: Few = 2
    """Width of each block's hidden layer, divided by its channels."""
    response_norm: bool = True
    """Whether blocks have global response normalisation, as in their second release."""


LevelBlockConfig = Annotated[
    Annotated[ConvolutionBlockConfig | MedNeXtBlockConfig, Field(discriminator="kind")],
    BeforeValidator(section_of_kind),
]


class NetworkConfig(Section):
    """A U-Net in two or three dimensions, with its attention."""

    spatial_dims: Literal[2, 3] = 3
    channels: list[Width] = Field([16, 32, 64, 128], min_length=2, max_length=16)
    """Feature channels of each level, finest first."""
    strides: list[list[Few]] | None = None
    """For each step down, the stride along each axis. Default: 2 everywhere."""
    kernels: list[list[Few]] | None = None
    """For each level, the odd size of convolutions along each axis. Default: 3 everywhere."""
    block: LevelBlockConfig = ConvolutionBlockConfig()
    """Kind of block in each level of the encoder and of the decoder."""
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

    def level_grids(self, patch: Sequence[int]) -> list[list[int]]:
        """The cells of a patch at each level, finest first, along each axis."""
        grids = [list(patch)]
        for step in self.step_strides:
            grids.append([size // stride for size, stride in zip(grids[-1], step, strict=True)])
        return grids

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
                    f"network.{name} must have {counted(wanted, 'list')} of "
                    f"{self.spatial_dims} numbers for {counted(len(self.channels), 'level')}, "
                    f"found {rows}; give one list for each "
                    f"{'halving' if name == 'strides' else 'level'}, or null for the default"
                )
        if any(size % 2 == 0 for row in self.level_kernels for size in row):
            raise ValueError(
                "network.kernels must be odd, so that convolutions keep the grid"
                "; use sizes such as 1, 3 or 5"
            )
        check_attention(self.attention, channels=self.channels, spatial_dims=self.spatial_dims)
        return self

    def _given_alone(self, given: GivenModuleConfig) -> Self:
        if len(given.multiple) != self.spatial_dims:
            raise ValueError(
                f"network.given.multiple must have {self.spatial_dims} numbers, because "
                f"network.spatial_dims is {self.spatial_dims}"
                "; give one number for each axis"
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

    def check_patch(self, patch: Sequence[int], name: str) -> None:
        """Raise ValueError unless the network can work on such a patch."""
        total = self.total_stride
        if len(patch) != len(total):
            raise ValueError(
                f"{name} {patch} must have {len(total)} numbers, "
                f"because network.spatial_dims is {len(total)}"
                "; give one number for each axis"
            )
        if any(size % stride for size, stride in zip(patch, total, strict=True)):
            raise ValueError(
                f"{name} {patch} must be multiples of {total}, the product of network.strides"
                "; round each number up or down"
            )
        if math.prod(patch) > MOST_VOXELS:
            raise ValueError(
                f"{name} {patch} has more than {MOST_VOXELS:,} voxels; make it smaller"
            )
        if self.given is None:
            check_attention_grids(
                self.attention, channels=self.channels, grids=self.level_grids(patch)
            )
