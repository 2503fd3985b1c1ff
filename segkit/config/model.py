"""The description of a trained model: the content of `model.json`."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from segkit.config.base import Millimetres, Name, Positive, Section
from segkit.config.data import NormalisationConfig
from segkit.config.dataset_files import LabelCodeConfig
from segkit.config.labels import Labelling
from segkit.config.network import NetworkConfig


class FirstStageConfig(Section):
    """Models whose labels a network is given beside the image."""

    models: Positive
    """How many there are; they lie in `first/0`, `first/1`, … of the model folder."""
    classes: Annotated[list[str], Field(min_length=1)]
    """Names of their labels 1, 2, …; the network makes a channel of 0 and 1 of each."""


class PostprocessingConfig(Section):
    """What is done to predicted labels, adopted by cross-validation alone; nothing by default."""

    largest_foreground: bool = False
    """Whether of all that is not background only the largest component stays."""
    largest_of: tuple[Positive, ...] = ()
    """The numbers of the labels of which, after that, only the largest component stays."""


LabelNumber = Annotated[int, Field(ge=0, lt=2**16)]


class ModelDescription(Section):
    """All that prediction needs beside the weights; the content of `model.json`."""

    format: Literal[1] = 1
    segkit: str
    """The version that wrote it."""
    run: Name
    channels: list[Name]
    """Names of the input's channels, in order."""
    labels: Annotated[dict[Name, LabelNumber], Field(min_length=2)]
    """Names of the classes or regions and the numbers they are written as, 0 the background."""
    regions: dict[str, Annotated[list[LabelNumber], Field(min_length=1)]] = Field({})
    """In the order they are written, the numbers in label files of each region; classes if none."""
    ignore: LabelNumber | None = None
    """The number in label files of voxels that nobody labelled."""
    codes: dict[str, LabelCodeConfig] = Field({})
    """Of labels by name, the concept of a terminology that DICOM segmentations give."""
    network: NetworkConfig
    spacing: tuple[Millimetres, Millimetres, Millimetres]
    interpolation: Literal["linear", "cubic"] = "linear"
    """Linear in models from before there was another."""
    normalisation: list[NormalisationConfig]
    """One per channel."""
    slices: Literal["sagittal", "coronal", "axial"]
    patch_size: list[Positive]
    mirror: list[Literal["x", "y", "z"]] = Field([])
    """World axes along which it was trained on mirror images as well."""
    first_stage: FirstStageConfig | None = None
    """Whose labels, where there is one, are one more channel of the input behind the image's."""
    postprocessing: PostprocessingConfig = PostprocessingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if unknown := [name for name in self.regions if name not in self.labels]:
            raise ValueError(f"regions holds {unknown[0]!r}, for which labels has no number")
        numbers = list(self.labels.values())
        if not self.regions and numbers != list(range(len(numbers))):
            raise ValueError(f"labels must be numbered 0, 1, 2, … in order, found {numbers}")
        named = list(self.labels)
        if self.regions and (numbers[0] != 0 or named[1:] != list(self.regions)):
            raise ValueError(f"labels must be the background, 0, and the regions, found {named}")
        self.network.check_patch(self.patch_size, "patch_size")
        return self

    @property
    def labelling(self) -> Labelling:
        """What the model tells apart."""
        regions = {name: tuple(numbers) for name, numbers in self.regions.items()}
        return Labelling(self.labels, regions, self.ignore)
