"""What a training mirrors follows from the settings and the names of labels."""

import pytest

from segkit.config.data import DataConfig, SynthesisConfig


def data_config(**settings: object) -> DataConfig:
    return DataConfig.model_validate({"folder": "x", "patch_size": [8, 8, 8], **settings})


def test_a_model_knows_the_axes_that_training_mirrors() -> None:
    plain, sides = ["background", "liver"], ["background", "left lung", "right lung"]
    assert data_config().mirrored(plain) == ["x"]
    assert data_config().mirrored(sides) == []
    assert data_config(mirror=["x", "z"]).mirrored(sides) == ["x", "z"]
    assert data_config(augment=False, mirror=["x"]).mirrored(plain) == []
    drawn = data_config(augment=False, mirror=["y"], synthesis=SynthesisConfig())
    assert drawn.mirrored(plain) == ["y"]


@pytest.mark.parametrize(
    ("labels", "axes"),
    [
        (["background", "liver", "spleen"], ["x"]),
        (["background", "Left Kidney", "Right Kidney"], []),
        (["background", "kidney_left"], []),
        (["background", "lh.cortex"], []),
        (["background", "hippocampus-R"], []),
        (["background", "cleft", "bright", "central"], ["x"]),
    ],
)
def test_labels_that_tell_left_from_right_are_not_mirrored(
    labels: list[str], axes: list[str]
) -> None:
    assert data_config().mirrored(labels) == axes


@pytest.mark.parametrize(
    ("labels", "settings", "said"),
    [
        (["liver"], {}, "Patches are mirrored along x; no label's name tells left from right."),
        (
            ["kidneyL", "kidneyR", "liver"],
            {},
            "Patches are not mirrored; 'kidneyL' and 'kidneyR' tell left from right.",
        ),
        (
            ["rein gauche"],
            {"mirror": ["x", "y", "z"]},
            "Patches are mirrored along x, y and z, although 'rein gauche' tells left from right.",
        ),
        (
            [f"rib {number} {side}" for number in range(3) for side in "LR"],
            {"mirror": ["y"]},
            "Patches are mirrored along y; 'rib 0 L', 'rib 0 R', 'rib 1 L', 'rib 1 R' and 2 "
            "more tell left from right.",
        ),
        (
            ["liver"],
            {"augment": False},
            "Patches are not mirrored; no label's name tells left from right.",
        ),
    ],
)
def test_the_mirrored_axes_are_explained_by_names_of_labels(
    labels: list[str], settings: dict[str, object], said: str
) -> None:
    assert data_config(**settings).mirrored_because(["background", *labels]) == said
