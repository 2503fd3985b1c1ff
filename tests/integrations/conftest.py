"""A model that has learned nothing, which labels voxels of every class, and an oblique scan."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.config.data import ZScoreConfig
from segkit.config.dataset_files import LabelCodeConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, save_model
from tests.helpers import affine_of

LIVER = LabelCodeConfig(scheme="SCT", value="10200004", meaning="Liver")
OBLIQUE = Grid((19, 17, 14), affine_of("LPS", spacing=(1.0, 1.2, 2.0)))


@pytest.fixture(scope="session")
def untrained_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a gated 3D model; its labels are numbered 0, 3 and 7 in files."""
    torch.manual_seed(3)
    description = ModelDescription(
        segkit="test",
        run="nothing",
        channels=["CT"],
        labels={"background": 0, "liver": 1, "lesion": 2},
        in_files=[[0], [3], [7]],
        codes={"liver": LIVER},
        network=NetworkConfig.model_validate(
            {"channels": [2, 4, 4], "attention": {"skip": "additive_grid"}}
        ),
        spacing=(1.0, 1.2, 2.0),
        normalisation=[ZScoreConfig()],
        slices="axial",
        patch_size=[8, 8, 8],
    )
    folder = tmp_path_factory.mktemp("untrained")
    save_model(folder, Model(description, build_network(description)))
    return folder


@pytest.fixture(scope="session")
def oblique_scan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan whose axes are turned by some 25 degrees; its corner is 0."""
    values = np.random.default_rng(0).normal(size=OBLIQUE.shape).astype(np.float32)
    path = tmp_path_factory.mktemp("oblique") / "scan.nrrd"
    write_volume(path, Volume(values, OBLIQUE))
    return path


@pytest.fixture(scope="session")
def predicted(
    tmp_path_factory: pytest.TempPathFactory, untrained_model: Path, oblique_scan: Path
) -> tuple[Path, str]:
    """A folder with the scan, also as NIfTI, and its results; and what `predict --json` prints."""
    folder = tmp_path_factory.mktemp("predicted")
    scan = folder / "scan.nrrd"
    shutil.copy(oblique_scan, scan)
    predictor = Predictor.load(untrained_model, device="cpu", engine="torch")
    (outcome,) = predict_files(
        predictor,
        find_inputs([scan], 1),
        out=folder / "labels.nrrd",
        maps=folder / "maps",
        probabilities=True,
    )
    assert outcome.error is None
    write_volume(folder / "scan.nii.gz", read_volume(scan))
    return folder, json.dumps({"models": [], "volumes": [outcome.to_json()]})
