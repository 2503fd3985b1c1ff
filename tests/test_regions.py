"""Regions and ignored voxels, from a folder to training, prediction and scores."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from segkit.checking.check_dataset import check_dataset
from segkit.cli.main import main
from segkit.config.data import CtWindowConfig
from segkit.config.dataset_files import DatasetConfig
from segkit.config.labels import Labelling
from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.config.training import Config
from segkit.data.augment_spatial import SpatialVariation
from segkit.data.dataset import Dataset, read_dataset
from segkit.data.dataset_json import read_labelling
from segkit.data.split import Split
from segkit.errors import ConfigError
from segkit.evaluation.evaluate import score_pairs
from segkit.evaluation.tolerance import Tolerance
from segkit.explain.heads.study import ScoredVolume, case_dice
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.inference.segment_prepared import segment_prepared
from segkit.inference.source_rows import written_regions
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.folder import Model, load_model
from segkit.nn.unet import UNet
from segkit.planning.fingerprint import fingerprint
from segkit.training.fit import train
from segkit.training.resolve import describe, resolve
from tests.helpers import affine_of
from tests.small import small_config

REGIONS = {"whole": [1, 2, 3], "core": [2, 3], "enhancing": [3]}
NESTED = Labelling(
    {"background": 0, "whole": 1, "core": 2, "enhancing": 3},
    {name: tuple(numbers) for name, numbers in REGIONS.items()},
)

# From logits to labels


def planted(label: Tensor, groups: dict[str, Any] = REGIONS, size: float = 3.0) -> Tensor:
    """Logits that are sure of the regions of a label map."""
    inside = [torch.isin(label, torch.tensor(group)) for group in groups.values()]
    return size * (2 * torch.stack(inside).float() - 1)


@given(st.integers(0, 99))
def test_planted_logits_become_labels_and_these_the_regions(seed: int) -> None:
    label = torch.from_numpy(np.random.default_rng(seed).integers(0, 4, (3, 4, 2)))
    logits = planted(label)
    written = written_regions(logits, (1, 2, 3))
    assert torch.equal(written, label)
    assert torch.equal(planted(written), logits)


def test_later_regions_are_written_over_earlier_ones_each_by_its_number() -> None:
    # Region a at voxels 0, 1, 3; b at 1, 2; c at 3. A logit of 0 is one half, and not above it.
    logits = torch.tensor([[1.0, 1, 0, 1, 0], [-1, 2, 1, -1, 0], [-1, -1, -1, 0.1, 0]])
    assert written_regions(logits, (1, 3, 2)).tolist() == [1, 3, 3, 2, 0]


class PlantedRegions(UNet):
    """Logits that are sure of the regions that the image itself holds as labels."""

    def forward(self, image: Tensor) -> Tensor:
        return planted(image[:, 0].round()).movedim(0, 1)


def description(**changes: Any) -> ModelDescription:
    tree = {
        "segkit": "test",
        "run": "test",
        "channels": ["labels"],
        "labels": dict(NESTED.numbers),
        "regions": REGIONS,
        "network": NetworkConfig(channels=[2, 2, 2]),
        "spacing": (0.7, 1.3, 4.0),
        "normalisation": [CtWindowConfig(lower=-1e6, upper=1e6, mean=0.0, std=1.0)],
        "slices": "axial",
        "patch_size": [8, 8, 8],
        **changes,
    }
    return ModelDescription.model_validate(tree)


def planted_model() -> Model:
    return Model(description(), PlantedRegions(3, 1, out_channels=3, channels=(2, 2, 2)))


def label_volume(code: str = "RAS") -> Volume:
    label = np.random.default_rng(3).integers(0, 4, (11, 9, 10)).astype(np.uint8)
    label[[0, -1], [0, -1], [0, -1]] = 1  # the body's box is all of it
    return Volume(label, Grid(label.shape, affine_of(code, rotation=(0, 0, 0))))


def test_a_volume_of_regions_comes_back_voxel_for_voxel() -> None:
    volume = label_volume()
    prediction = Predictor(planted_model(), device="cpu")(volume, probabilities=True)
    assert_array_equal(prediction.labels.data, volume.data)
    assert prediction.labels.data.dtype == np.uint8
    assert prediction.probabilities is not None
    expected = torch.sigmoid(planted(torch.from_numpy(volume.data))).movedim(0, -1)
    assert_allclose(prediction.probabilities.data, expected, atol=1e-3)


def test_voxels_that_the_network_skips_are_in_no_region() -> None:
    volume = label_volume()
    data = np.pad(volume.data, 3)
    padded = Volume(data, Grid(data.shape, volume.grid.affine))
    prediction = Predictor(planted_model(), device="cpu")(padded, probabilities=True)
    assert_array_equal(prediction.labels.data, data)
    assert prediction.probabilities is not None
    assert not prediction.probabilities.data[:3].any()


def test_validation_during_training_sees_the_same_labels() -> None:
    volume, network = label_volume(), planted_model().network
    image = torch.from_numpy(volume.data[None].astype(np.float32))
    labels = segment_prepared(network, image, patch_size=(8, 8, 8), written=NESTED.written)
    assert_array_equal(labels, volume.data)


def test_explanations_score_regions_and_leave_out_what_is_ignored() -> None:
    volume = label_volume()
    reference = volume.data.copy()
    reference[:5] = 4
    model = Model(description(ignore=4), planted_model().network)
    case = ScoredVolume("one", volume, volume.like(reference))
    assert case_dice(Predictor(model, device="cpu"), case) == 1


def test_a_description_from_before_regions_is_one_of_classes() -> None:
    tree = description(labels={"background": 0, "ball": 1}, regions={}).model_dump(mode="json")
    del tree["regions"], tree["ignore"]
    told = validated(ModelDescription, tree, "model.json").labelling
    assert told == Labelling({"background": 0, "ball": 1})
    assert told.outputs == ("background", "ball") and told.written is None


def test_a_description_whose_regions_have_no_number_is_refused() -> None:
    tree = description().model_dump(mode="json") | {"labels": {"background": 0, "whole": 1}}
    with pytest.raises(ConfigError, match="regions has 'core', which has no number in labels"):
        validated(ModelDescription, tree, "model.json")


# From a folder to a model


def nested_dataset(folder: Path, labels: dict[str, Any], *, cases: int = 4) -> Path:
    """nnU-Net's form: a bright ball (1) with a brighter core (2), and a second channel of noise.

    Where `labels` have `ignore`, it is what lies beyond a plane in each label, ball or not.
    """
    random = np.random.default_rng(0)
    grid = Grid((16, 16, 16), np.eye(4))
    for number in range(cases):
        centre, radius = random.uniform(6, 10, 3), random.uniform(4, 6)
        distance = np.linalg.norm(grid.centres() - centre, axis=-1)
        label = (distance < radius).astype(np.uint8) + (distance < radius / 2)
        for channel, values in enumerate((label, np.zeros(grid.shape))):
            image = (values + random.normal(0, 0.2, grid.shape)).astype(np.float32)
            name = f"case{number}_{channel:04d}.nii.gz"
            write_volume(folder / "imagesTr" / name, Volume(image, grid))
        if "ignore" in labels:
            label[10:] = labels["ignore"]
        write_volume(folder / "labelsTr" / f"case{number}.nii.gz", Volume(label, grid))
    content = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": labels,
        "regions_class_order": [1, 2],
        "numTraining": cases,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(content))
    return folder


REGION_LABELS = {"background": 0, "ball": [1, 2], "core": 2}


@pytest.fixture(scope="module")
def regions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nested_dataset(tmp_path_factory.mktemp("regions"), REGION_LABELS)


@pytest.fixture(scope="module")
def ignoring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nested_dataset(tmp_path_factory.mktemp("ignoring"), {**REGION_LABELS, "ignore": 3})


@pytest.mark.slow
def test_training_learns_regions(regions: Path, tmp_path: Path) -> None:
    config = small_config(
        regions,
        train={"steps": 80, "validate_every": 40},
        network={"channels": [8, 16, 16], "attention": {"head": {"kind": "mean"}}},
    )
    run = train(config, runs=tmp_path)
    scores = run.summary["validation"]
    assert list(scores["dice"]) == ["ball", "core"]
    assert scores["dice"]["ball"] > 0.8 and scores["dice"]["core"] > 0.6
    assert scores["best_mean_dice_during_training"] > 0.6
    loaded = load_model(run.folder)
    assert loaded.description.labelling == read_dataset(regions).labelling
    assert loaded.network.heads[0].out_channels == 2
    # The summary's Dice is that of the regions of the labels that are written.
    (name,) = scores["dice_of_cases"]
    label = read_volume(regions / "labelsTr" / f"{name}.nii.gz").data
    channels = [
        read_volume(regions / "imagesTr" / f"{name}_{channel:04d}.nii.gz") for channel in range(2)
    ]
    image = channels[0].like(np.stack([channel.data for channel in channels], axis=3))
    found = Predictor(loaded, device="cpu")(image)
    for region, numbers in read_dataset(regions).regions.items():
        a, b = np.isin(found.labels.data, numbers), np.isin(label, numbers)
        expected = 2 * (a & b).sum() / (a.sum() + b.sum())
        assert scores["dice_of_cases"][name][region] == pytest.approx(expected)
    assert found.presence is not None and list(found.presence) == ["ball", "core"]


def test_a_network_trains_on_images_synthesised_from_regions_and_ignored_voxels(
    tmp_path: Path,
) -> None:
    folder = nested_dataset(tmp_path / "data", {**REGION_LABELS, "ignore": 3})
    content = json.loads((folder / "dataset.json").read_text()) | {"channel_names": {"0": "T1"}}
    (folder / "dataset.json").write_text(json.dumps(content))
    run = train(small_config(folder, data={"synthesis": {}}), runs=tmp_path / "runs")
    assert run.model.description.ignore == 3
    told = Labelling({"background": 0, "ball": 1, "core": 2}, {"ball": (1, 2), "core": (2,)}, 3)
    assert run.model.description.labelling == told
    for row in run.summary["validation"]["dice_of_cases"].values():
        assert all(0 <= dice <= 1 for dice in row.values())


def test_training_on_classes_with_ignored_voxels_scores_the_others_alone(tmp_path: Path) -> None:
    labels = {"background": 0, "ball": 1, "core": 2, "ignore": 3}
    folder = nested_dataset(tmp_path / "data", labels)
    run = train(small_config(folder, train={"steps": 40, "validate_every": 40}), runs=tmp_path)
    assert run.model.network.heads[0].out_channels == 3
    (name,) = run.summary["validation"]["dice_of_cases"]
    label = read_volume(folder / "labelsTr" / f"{name}.nii.gz").data
    parts = [read_volume(folder / "imagesTr" / f"{name}_{c:04d}.nii.gz") for c in range(2)]
    image = parts[0].like(np.stack([part.data for part in parts], axis=3))
    found = Predictor(run.model, device="cpu")(image).labels.data
    assert found.max() <= 2
    a, b = found[:10] == 1, label[:10] == 1
    expected = 2 * (a & b).sum() / (a.sum() + b.sum())
    score = run.summary["validation"]["dice_of_cases"][name]["ball"]
    assert expected > 0 and score == pytest.approx(expected)


def test_ignored_voxels_stay_ignored_in_rotated_patches() -> None:
    label = torch.zeros(4, 20, 20, 20, dtype=torch.uint8)
    label[:, 10:] = 3
    # No margin, so that corners look beyond the cut: there, too, what is ignored goes on.
    vary = SpatialVariation((20, 20, 20), (), rotation_probability=1.0, scale_probability=1.0)
    seen, turned = vary(label[:, None].float(), label, torch.Generator().manual_seed(0))
    assert set(turned.unique().tolist()) == {0, 3}
    assert (turned[seen[:, 0] > 2] == 3).all() and (turned[seen[:, 0] < 1] == 0).all()


def described_by(config: Config, dataset: Dataset) -> ModelDescription:
    """The model that all cases of a dataset would train."""
    return describe(resolve(config, dataset, Split(dataset.cases, ())), dataset)


def test_intensities_and_classes_are_measured_without_what_is_ignored(
    ignoring: Path, tmp_path: Path
) -> None:
    dataset = read_dataset(ignoring)
    measured = fingerprint(dataset, cache=tmp_path, workers=0)
    assert all(set(case.classes) <= {1, 2} for case in measured.cases)
    assert measured.numbers().num_classes == 2  # an output for each region
    config = small_config(ignoring, data={"normalisation": "ct"})
    (window, _) = described_by(config, dataset).normalisation
    assert isinstance(window, CtWindowConfig) and window.mean is not None
    # Foreground has intensities 1 and 2 here; beyond the plane, where none counts, many are 0.
    assert 1.0 < window.mean < 2.0


def test_check_and_plan_speak_of_regions(
    ignoring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = check_dataset(DatasetConfig(folder=ignoring), lambda cases, what, count: cases).text
    assert "region ball (1, 2, written as 1): in 4 cases" in said
    assert "region core (2, written as 2): in" in said
    assert "label 3 ignore, left out: in 4 cases, 37.50% of voxels" in said
    config = tmp_path / "c.yaml"
    words = ["plan", str(ignoring), "--out", str(config), "--device", "cpu", "--no-race"]
    assert run(words) == 0 and run(["check", str(config)]) == 0
    assert "# regions: ball, core" in capsys.readouterr().out


def run(words: list[str]) -> int:
    argv, sys.argv = sys.argv, ["segkit", *words]
    try:
        main()
    except SystemExit as exit_:
        return int(exit_.code or 0)
    finally:
        sys.argv = argv


# Scores


def test_evaluate_scores_regions_and_leaves_ignored_voxels_out(
    ignoring: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    references = ignoring / "labelsTr"
    for path in references.iterdir():
        label = read_volume(path)
        data = label.data.copy()
        data[10:] = 2  # wrong, were it not ignored
        data[data[:10].nonzero()[0].min()] = 0
        write_volume(tmp_path / "found" / path.name, label.like(data))
    out = tmp_path / "scores.json"
    assert run(["evaluate", str(tmp_path / "found"), str(references), "--out", str(out)]) == 0
    scores = {(row["case"], row["name"]): row for row in json.loads(out.read_text())["cases"]}
    assert {name for _, name in scores} == {"ball", "core"}
    for path in references.iterdir():
        name = path.name.removesuffix(".nii.gz")
        found = read_volume(tmp_path / "found" / path.name).data[:10]
        label = read_volume(path).data[:10]
        row = scores[name, "ball"]
        assert row["tp"] == ((found > 0) & (label > 0)).sum()
        assert row["fp"] == ((found > 0) & (label == 0)).sum()
        assert row["fn"] == ((found == 0) & (label > 0)).sum() > 0
        assert row["reference_ml"] == pytest.approx((label > 0).sum() / 1000)
        assert scores[name, "core"]["tp"] == ((found == 2) & (label == 2)).sum()


def test_labels_in_the_ignored_part_do_not_change_surface_distances(
    ignoring: Path, tmp_path: Path
) -> None:
    references = ignoring / "labelsTr"
    paths = sorted(references.iterdir())
    pairs = []
    for path in paths:
        label = read_volume(path)
        data = label.data.copy()
        data[10:] = np.random.default_rng(0).integers(0, 3, data[10:].shape)
        write_volume(tmp_path / path.name, label.like(data))
        pairs.append((path.name, tmp_path / path.name, path))
    rows, failures = score_pairs(
        pairs, read_labelling(ignoring / "dataset.json"), tolerance=Tolerance(mm=1.0)
    )
    assert len(rows) == 2 * len(pairs) and failures == {}
    for row in rows:
        assert [row.metrics[key] for key in ("dice", "hd95_mm", "nsd")] == [1, 0, 1]


def test_the_datasets_labelling_is_the_models(regions: Path) -> None:
    dataset = read_dataset(regions)
    told = described_by(small_config(regions), dataset)
    assert told.labelling == dataset.labelling
    assert Dataset(regions, (), ("T1",), {"background": 0}).labelling.members == {}
