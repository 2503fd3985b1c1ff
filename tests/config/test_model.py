"""What follows from a model's description, worked out by hand."""

from typing import Any, Literal

import pytest

from segkit.config.data import DataConfig, ZScoreConfig
from segkit.config.labels import Labelling
from segkit.config.model import FirstStageConfig, ModelDescription, description_of
from segkit.config.network import NetworkConfig
from segkit.config.training import Config


def described(**changes: Any) -> ModelDescription:
    tree = {"folder": "scans", "patch_size": [8, 12], "slices": "coronal", **changes}
    dims = len(tree["patch_size"])
    config = Config(
        name="seven",
        data=DataConfig.model_validate(tree),
        network=NetworkConfig(spatial_dims=dims, channels=[4, 8]),
    )
    return description_of(
        config,
        channels=("T1", "T2"),
        labelling=Labelling({"background": 0, "left lung": 1, "whole": 2}, ignore=3),
        codes={},
        spacing=(1.0, 2.0, 3.0),
        normalisation=[ZScoreConfig(), ZScoreConfig(nonzero=True)],
    )


@pytest.mark.parametrize(
    ("slices", "axis", "patch"),
    [("sagittal", 0, (1, 8, 12)), ("coronal", 1, (8, 1, 12)), ("axial", 2, (8, 12, 1))],
)
def test_a_plane_is_a_patch_of_one_voxel_across_it(
    slices: Literal["sagittal", "coronal", "axial"], axis: int, patch: tuple[int, int, int]
) -> None:
    flat = described(slices=slices)
    assert (flat.axis_across, flat.volume_patch) == (axis, patch)


@pytest.mark.parametrize(
    ("slices", "axes"), [("sagittal", (1, 2)), ("coronal", (0, 2)), ("axial", (0, 1))]
)
def test_planes_are_mirrored_only_within_themselves(
    slices: Literal["sagittal", "coronal", "axial"], axes: tuple[int, int]
) -> None:
    assert described(slices=slices, mirror=["x", "y", "z"]).mirror_axes == axes


def test_a_volume_has_no_axis_across_it() -> None:
    whole = described(patch_size=[8, 12, 16])
    assert (whole.axis_across, whole.volume_patch) == (None, (8, 12, 16))


def test_labels_of_a_first_stage_are_one_channel_more() -> None:
    model = described()
    assert model.channels_in == 2
    stage = FirstStageConfig(models=3, classes=["left lung", "whole"])
    assert model.model_copy(update={"first_stage": stage}).channels_in == 3


def test_cubic_is_of_order_3_and_linear_of_order_1() -> None:
    assert described().interpolation_order == 3
    assert described(interpolation="linear").interpolation_order == 1


def test_the_description_tells_settings_and_dataset() -> None:
    model = described(mirror=["x", "y", "z"])
    assert (model.run, model.channels) == ("seven", ["T1", "T2"])
    assert model.labels == {"background": 0, "left lung": 1, "whole": 2} and model.ignore == 3
    assert model.spacing == (1.0, 2.0, 3.0) and model.patch_size == [8, 12]
    assert model.mirror == ["x", "y", "z"] and model.mirror_axes == (0, 2)
    assert described().mirror == [] and described().mirror_axes == ()
    assert described(patch_size=[8, 8, 8], mirror=["z"]).mirror_axes == (2,)
