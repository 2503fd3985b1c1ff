"""A run's config.yaml and model.json mean the same whatever defaults the code has by then."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from numpy.testing import assert_array_equal
from safetensors.torch import load_file

from segkit.config.data import CtWindowConfig
from segkit.config.load import load_config
from segkit.config.training import Config
from segkit.data.dataset import read_case, read_dataset
from segkit.data.split import split_of
from segkit.errors import ConfigError
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.training.fit import train
from segkit.training.resolve import check_plane, describe, resolve
from tests.conftest import ROOT
from tests.small import small_config, small_dataset
from tests.training.changed_defaults import module

SETTINGS: dict[str, dict[str, dict[str, object]]] = {
    "plain": {"trainer": {"accelerator": "auto", "precision": "auto"}},
    "sgd": {"train": {"optimiser": "sgd", "averaging": 0.9}, "data": {"fold": 2}},
    "attentive": {
        "network": {
            "channels": [8, 8, 8],
            "attention": {
                "skip": "cross_attention",
                "bottleneck": "self_attention",
                "encoder": "cbam",
                "head": "gated",
            },
        }
    },
    "gating": {
        "network": {
            "channels": [8, 8, 8],
            "attention": {
                "skip": "u_transformer",
                "bottleneck": {"kind": "self_attention", "positions": "rotary"},
            },
        }
    },
    "drawn": {"data": {"synthesis": {"intensities": {"ball": [0.7, 1.0]}}}},
    "given": {"network": {"given": {"multiple": [1, 1, 1]}}},
    "window": {},
}
MEAN_NOT_USED = {
    "labels",  # of the dataset.json
    "regions_class_order",
    "case_table",
    "dicom",
    "labelled",
    "test",
    "splits",
    "group_by",
    "stratify_by",
    "draw_cases",
    "level_weights", "pictures",
    "minutes",
    "validation_cases",
    "averaging", "bottleneck", "codes", "decoder", "encoder", "files", "first_stage", "fold",
    "given", "head", "max_time", "patience", "skip", "start_from", "synthesis", "window",
}  # fmt: skip
"""Settings whose null stands for no number: what they ask for is left out."""


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One of MRI, and one of CT, whose window is measured."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("mri", "ct")}
    for folder in folders.values():
        small_dataset(folder, num_cases=5)
    file = folders["ct"] / "dataset.json"
    content = json.loads(file.read_text())
    content["modality"] = {"0": "CT"}
    file.write_text(json.dumps(content))
    return folders


def config_of(name: str, datasets: dict[str, Path]) -> Config:
    sections = SETTINGS[name]
    folder = datasets["ct" if name == "window" else "mri"]
    if name == "given":  # which stands beside no setting of a U-Net
        tree = {
            "data": {"folder": folder, "patch_size": [16, 16, 16]},
            "train": {"steps": 4},
            "trainer": {"accelerator": "cpu"},
            **sections,
        }
        return Config.model_validate({"name": name, **tree})
    return small_config(folder, **sections).model_copy(update={"name": name})


@pytest.fixture(scope="module")
def runs(datasets: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of each of the settings."""
    folder = tmp_path_factory.mktemp("runs")
    for name in SETTINGS:
        config = config_of(name, datasets)
        train(config, runs=folder, network=module() if config.network.given else None)
    return folder


def leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}.{key}" if path else key)
    else:
        yield path, tree


@pytest.mark.parametrize("name", SETTINGS)
def test_a_runs_config_holds_every_value_that_is_a_number(name: str, runs: Path) -> None:
    tree = yaml.safe_load((runs / name / "config.yaml").read_text())
    empty = {path for path, value in leaves(tree) if value is None}
    assert {path.rpartition(".")[2] for path in empty} <= MEAN_NOT_USED, empty
    assert isinstance(tree["data"]["validation"], list) or tree["data"]["fold"] is not None
    assert tree["trainer"]["accelerator"] != "auto" and tree["trainer"]["precision"] != "auto"
    assert tree["train"]["weight_decay"] in (0.05, 3e-5)
    assert tree["train"]["sgd"]["momentum"] == 0.99 and tree["train"]["one_cycle"]["rise"] == 0.3
    own = {"adamw": "one_cycle", "sgd": "polynomial", "muon": "one_cycle"}
    assert tree["train"]["schedule"] == own[tree["train"]["optimiser"]]


def test_values_are_those_that_were_used(runs: Path) -> None:
    attentive = load_config(runs / "attentive" / "config.yaml").network
    assert attentive.strides == [[2, 2, 2]] * 2 and attentive.kernels == [[3, 3, 3]] * 3
    skip, bottleneck = attentive.attention.skip, attentive.attention.bottleneck
    assert skip is not None and bottleneck is not None
    assert skip.model_dump()["levels"] == [1] and skip.model_dump()["heads"] == [1]
    assert bottleneck.model_dump()["window"] == [4, 4, 4] and bottleneck.model_dump()["heads"] == 1
    drawn = load_config(runs / "drawn" / "config.yaml").data
    assert drawn.synthesis is not None and drawn.synthesis.intensities is not None
    assert drawn.synthesis.intensities == {"background": (0.0, 1.0), "ball": (0.7, 1.0)}
    assert drawn.mirror == ["x"] and drawn.spacing == (1.0, 1.0, 1.0)
    (window,) = load_config(runs / "window" / "config.yaml").data.normalisation or []
    assert None not in window.model_dump().values()
    assert set(yaml.safe_load((runs / "given" / "config.yaml").read_text())["network"]) == {
        "spatial_dims",
        "given",
    }


@pytest.mark.parametrize("name", SETTINGS)
def test_a_resolved_config_resolves_to_itself_and_splits_alike(
    name: str, runs: Path, datasets: dict[str, Path]
) -> None:
    config = load_config(runs / name / "config.yaml")
    dataset = read_dataset(config.data.folder)
    assert resolve(config, dataset) == config
    asked = config_of(name, datasets)
    assert split_of(dataset, config) == split_of(dataset, asked)
    assert describe(config, dataset).network == config.network


@pytest.mark.slow
def test_whatever_the_defaults_a_run_trains_to_the_same_weights_and_its_model_labels_alike(
    runs: Path, datasets: dict[str, Path], tmp_path: Path
) -> None:
    scan = datasets["mri"] / "imagesTr" / "case_0.nii.gz"
    words = ["-m", "tests.training.changed_defaults", scan, runs, tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for name in SETTINGS:
        first, again = (
            load_file(folder / name / "model" / "weights.safetensors")
            for folder in (runs, tmp_path)
        )
        assert first.keys() == again.keys()
        assert all(torch.equal(again[key], value) for key, value in first.items()), name
        labels = read_volume(tmp_path / name / "labels.nii.gz").data
        network = module() if name == "given" else None
        expected = Predictor.load(runs / name, network=network, device="cpu")(read_volume(scan))
        assert_array_equal(labels, expected.labels.data, err_msg=name)
        before, after = (
            json.loads((folder / name / "model" / "model.json").read_text())
            for folder in (runs, tmp_path)
        )
        assert before == after


def test_as_many_normalisations_as_channels_are_taken(datasets: dict[str, Path]) -> None:
    dataset = read_dataset(datasets["mri"])
    one = small_config(datasets["mri"], data={"normalisation": ["zscore"]})
    each = resolve(one, dataset).data.normalisation
    assert each == resolve(small_config(datasets["mri"]), dataset).data.normalisation
    two = small_config(datasets["mri"], data={"normalisation": ["zscore", "ct"]})
    with pytest.raises(ConfigError, match=r"expected one for each of the 1 channel of .*, found 2"):
        resolve(two, dataset)


@pytest.mark.parametrize(("axis", "plane"), [(0, "sagittal"), (1, "coronal"), (2, "axial")])
def test_single_slices_are_trained_in_their_own_plane_only(
    axis: int, plane: str, tmp_path: Path
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    for path in sorted(folder.glob("*Tr/*.nii.gz")):
        volume = read_volume(path)
        values = np.take(volume.data, [8], axis)
        x, y, z = values.shape
        # Stored along another axis of the array: what counts is the axis of the patient.
        grid = Grid((z, y, x), volume.grid.affine[:, [2, 1, 0, 3]])
        write_volume(path, Volume(np.ascontiguousarray(values.transpose(2, 1, 0)), grid))
    dataset = read_dataset(folder)

    def checked(dims: int, slices: str) -> None:
        data = {"patch_size": [16] * dims, "slices": slices}
        config = small_config(folder, data=data, network={"spatial_dims": dims})
        check_plane(config, dataset, dataset.cases)

    checked(2, plane)
    others = [name for name in ("sagittal", "coronal", "axial") if name != plane]
    expected = rf"one voxel along {'xyz'[axis]} \(RAS\+\), so expected .* data.slices {plane}, "
    with pytest.raises(ConfigError, match=expected + "found network.spatial_dims 3"):
        checked(3, plane)
    for other in others:
        with pytest.raises(ConfigError, match=f"found data.slices {other}; set both"):
            checked(2, other)


def test_single_slices_in_different_planes_are_refused(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    for path, axis in zip(sorted(folder.glob("*Tr/*.nii.gz")), (1, 2, 1, 2), strict=True):
        volume = read_volume(path)
        values = np.ascontiguousarray(np.take(volume.data, [8], axis))
        write_volume(path, Volume(values, Grid(values.shape, volume.grid.affine)))
    dataset = read_dataset(folder)
    for dims in (2, 3):
        config = small_config(
            folder, data={"patch_size": [16] * dims}, network={"spatial_dims": dims}
        )
        with pytest.raises(ConfigError, match="1 case along y, 1 case along z"):
            check_plane(config, dataset, dataset.cases)


def test_volumes_among_slices_may_be_trained_in_any_way(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    dataset = read_dataset(folder)
    check_plane(small_config(folder), dataset, dataset.cases)
    check_plane(small_config(folder), dataset, ())


def test_a_ct_window_does_not_depend_on_the_number_of_processes(
    datasets: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More foreground values than a case may give, so that some are drawn."""
    dataset = read_dataset(datasets["ct"])
    config = small_config(datasets["ct"], data={"normalisation": None})
    monkeypatch.setattr("segkit.training.ct_window.VALUES_FOR_WINDOW", 100)
    monkeypatch.setattr("segkit.training.ct_window.FEWEST_VALUES", 30)
    alone = resolve(config, dataset, runs=tmp_path).data.normalisation
    monkeypatch.setattr("segkit.training.ct_window.reading_processes", lambda *_: 2)
    assert resolve(config, dataset, runs=tmp_path).data.normalisation == alone
    monkeypatch.setattr("segkit.training.ct_window.VALUES_FOR_WINDOW", 10**6)
    (drawn,), (whole,) = (
        alone or [],
        resolve(config, dataset, runs=tmp_path).data.normalisation or [],
    )
    assert isinstance(drawn, CtWindowConfig) and isinstance(whole, CtWindowConfig)
    values = np.concatenate(
        [
            image.data[..., 0][label.data > 0]
            for image, label in (
                read_case(case, dataset) for case in split_of(dataset, config).train
            )
        ]
    )
    assert whole.mean == pytest.approx(values.mean()) != drawn.mean
    assert drawn.mean == pytest.approx(values.mean(), abs=4 * float(values.std()) / 90**0.5)
