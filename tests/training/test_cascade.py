"""Laws of training in two stages: honest labels, no stale ones, and one folder that holds all."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from safetensors.torch import load_file, save_file
from torch import Tensor

from segkit.checking.check import check
from segkit.config.data import ZScoreConfig
from segkit.config.load import load_config
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset, read_dataset
from segkit.errors import ConfigError, ModelError
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume, read_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model, newest_model, save_model
from segkit.nn.unet import UNet
from segkit.training.cascade import FirstModel, described, first_models, label_cases
from segkit.training.final_scores import score
from segkit.training.fit import Run, train
from segkit.training.resume import resume
from segkit.training.two_stages import second_stage_config
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


def low_config(folder: Path, **data: object) -> Config:
    config = small_config(
        folder,
        data={"spacing": [2, 2, 2], "patch_size": [8, 8, 8], **data},
        network={"channels": [4, 8], "attention": {}},
    )
    return config.model_copy(update={"name": "small_low"})


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"), num_cases=5)


@pytest.fixture(scope="module")
def low(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(low_config(dataset), runs=tmp_path_factory.mktemp("runs"))


def described_model(**changes: object) -> Model:
    torch.manual_seed(0)
    told = ModelDescription.model_validate(
        {
            "segkit": "test",
            "run": "test",
            "channels": ["MRI"],
            "labels": {"background": 0, "ball": 1},
            "network": NetworkConfig(channels=[2, 2]),
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": [ZScoreConfig()],
            "slices": "axial",
            "patch_size": [8, 8, 8],
            **changes,
        }
    )
    return Model(told, build_network(told).eval())


def planted(folds: Sequence[Sequence[str]]) -> list[FirstModel]:
    """Models that held these cases out; their segmenters are `saying`."""
    return [
        FirstModel(Path(f"fold_{number}"), described_model(), frozenset(names), f"digest {number}")
        for number, names in enumerate(folds)
    ]


def saying(models: Sequence[FirstModel]) -> Callable[[FirstModel, str], object]:
    """The segmenter of each model writes its number everywhere."""

    def segmenter(model: FirstModel, device: str) -> Callable[[Volume], Volume]:
        assert device == "cpu"
        number = models.index(model)
        return lambda volume: volume.like(np.full(volume.grid.shape, number, np.uint8))

    return segmenter


def labelled(dataset: Dataset, models: Sequence[FirstModel], cache: Path) -> dict[str, Path]:
    files = label_cases(
        dataset.cases,
        dataset,
        models,
        cache=cache,
        device="cpu",
        segmenter=saying(models),  # type: ignore[arg-type]
    )
    assert files is not None
    return dict(files)


def test_each_case_is_labelled_by_the_models_that_held_it_out(
    dataset: Path, tmp_path: Path
) -> None:
    known = read_dataset(dataset)
    models = planted([["case_0"], ["case_1", "case_2"], ["case_2", "case_3"]])
    files = labelled(known, models, tmp_path)
    said = {name: np.unique(read_volume(path).data).tolist() for name, path in files.items()}
    # The first of two that differ; where none held a case out, all are asked.
    assert said == {"case_0": [0], "case_1": [1], "case_2": [1], "case_3": [2], "case_4": [0]}
    image = read_volume(known.cases[0].images[0])
    assert read_volume(files["case_0"]).grid.agrees_with(image.grid, tolerance=1e-3)


def test_labels_are_made_once_and_anew_for_another_model_or_image(
    dataset: Path, tmp_path: Path
) -> None:
    known = read_dataset(small_dataset(tmp_path / "data", num_cases=2))
    models = planted([["case_0"], ["case_1"]])
    first = labelled(known, models, tmp_path)
    untouched = {name: path.stat().st_mtime_ns for name, path in first.items()}
    assert labelled(known, models, tmp_path) == first
    assert {name: path.stat().st_mtime_ns for name, path in first.items()} == untouched

    retrained = [replace(models[0], digest="another"), models[1]]
    second = labelled(known, retrained, tmp_path)
    assert second["case_0"] != first["case_0"] and second["case_1"] == first["case_1"]

    (image,) = known.cases[1].images
    state = image.stat()
    os.utime(image, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    third = labelled(known, models, tmp_path)
    assert third["case_0"] == first["case_0"] and third["case_1"] != first["case_1"]


def test_a_runs_held_out_cases_are_known_by_its_summary(low: Run, dataset: Path) -> None:
    known = read_dataset(dataset)
    for path in (low.folder, low.folder / "model"):
        (model,) = first_models([path], known)
        assert model.held_out == set(low.summary["validation"]["dice_of_cases"])
        assert len(model.held_out) == 1 and model.folder == low.folder / "model"


def test_a_model_folder_without_its_run_has_no_known_held_out_cases(
    dataset: Path, tmp_path: Path
) -> None:
    save_model(tmp_path / "alone", described_model())
    (model,) = first_models([tmp_path / "alone"], read_dataset(dataset))
    assert model.held_out == frozenset()


def test_other_weights_have_another_digest(low: Run, dataset: Path, tmp_path: Path) -> None:
    known = read_dataset(dataset)
    copy = tmp_path / "copy"
    shutil.copytree(low.folder / "model", copy)
    first, same = first_models([low.folder, copy], known)
    assert first.digest == same.digest
    weights = load_file(copy / "weights.safetensors")
    name = next(iter(weights))
    save_file({**weights, name: weights[name] + 1e-6}, copy / "weights.safetensors")
    assert first_models([copy], known)[0].digest != first.digest


def test_models_that_do_not_fit_are_refused(dataset: Path, tmp_path: Path) -> None:
    known = read_dataset(dataset)
    save_model(tmp_path / "one", described_model())
    save_model(tmp_path / "lung", described_model(labels={"background": 0, "lung": 1}))
    save_model(
        tmp_path / "ct", described_model(channels=["CT", "PET"], normalisation=[ZScoreConfig()] * 2)
    )
    with pytest.raises(ModelError, match="expected the classes ball, found lung"):
        first_models([tmp_path / "one", tmp_path / "lung"], known)
    # Alone, a first stage may know other classes than the second.
    (lung,) = first_models([tmp_path / "lung"], known)
    told = described(described_model().description, [lung])
    assert told.first_stage is not None and told.first_stage.classes == ["lung"]
    with pytest.raises(ModelError, match=r"with the channels of .*, MRI, found CT, PET"):
        first_models([tmp_path / "ct"], known)
    with pytest.raises(ModelError, match="expected a run or a model folder"):
        first_models([tmp_path / "none"], known)


def test_scans_that_are_drawn_have_no_first_stage(dataset: Path) -> None:
    with pytest.raises(ConfigError, match=r"images that data\.synthesis draws"):
        small_config(dataset, data={"first_stage": ["runs/low"], "synthesis": {}})


def two_stages(model: Model) -> Model:
    told = model.description
    stage = {"models": 1, "classes": list(told.labels)[1:]}
    told = ModelDescription.model_validate({**told.model_dump(), "first_stage": stage})
    return Model(told, build_network(told).eval(), (model,))


def test_a_first_stage_of_a_first_stage_is_refused(dataset: Path, tmp_path: Path) -> None:
    second = two_stages(described_model())
    save_model(tmp_path / "two", second)
    with pytest.raises(ModelError, match="allows only two stages"):
        first_models([tmp_path / "two"], read_dataset(dataset))
    save_model(tmp_path / "three", Model(second.description, second.network, (second,)))
    with pytest.raises(ModelError, match=r"three/first/0: .* allows only two stages"):
        load_model(tmp_path / "three")


def test_a_saved_model_keeps_its_first_stage(tmp_path: Path) -> None:
    model = two_stages(described_model())
    save_model(tmp_path, model)
    loaded = load_model(tmp_path)
    assert loaded.description == model.description and len(loaded.first) == 1
    for mine, read in ((model, loaded), (model.first[0], loaded.first[0])):
        expected, found = mine.network.state_dict(), read.network.state_dict()
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert loaded.first[0].first == ()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda folder: shutil.rmtree(folder / "first"), "model.json: cannot be read"),
        (
            lambda folder: (folder / "first" / "0" / "weights.safetensors").unlink(),
            "expected weights.safetensors in it",
        ),
        (
            lambda folder: save_model(
                folder / "first" / "0", described_model(labels={"background": 0, "lung": 1})
            ),
            "expected the classes ball, found lung",
        ),
        (
            lambda folder: save_model(folder / "first" / "0", described_model(channels=["CT"])),
            "expected the channels of",
        ),
    ],
)
def test_a_model_folder_without_its_first_stage_is_refused(
    change: Callable[[Path], object], sentence: str, tmp_path: Path
) -> None:
    save_model(tmp_path, two_stages(described_model()))
    change(tmp_path)
    with pytest.raises(ModelError, match=sentence):
        load_model(tmp_path)


@dataclass(frozen=True)
class Stages:
    """Two stages that were trained in turn, and where."""

    runs: Path
    first: Run
    second: Run


@pytest.fixture(scope="module")
def stages(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Stages:
    runs = tmp_path_factory.mktemp("stages") / "runs"
    held_out = {"validation": ["case_1"]}
    first = train(low_config(dataset, **held_out), runs=runs)
    second = train(
        second_stage_config(small_config(dataset, data=held_out), first.folder), runs=runs
    )
    return Stages(runs, first, second)


def test_a_second_stage_says_what_it_was_trained_on(stages: Stages) -> None:
    assert stages.second.summary["first_stage"] == {
        "models": [str(stages.first.folder / "model")],
        "training_cases_held_out": 0,
        "validation_cases_held_out": 1,
    }
    kept = load_config(stages.second.folder / "config.yaml")
    assert kept.data.first_stage == [stages.first.folder.resolve()]
    assert newest_model(stages.runs) == stages.second.folder / "model"


def test_cached_labels_equal_those_of_the_first_stage(dataset: Path, stages: Stages) -> None:
    images = [np.load(path) for path in (stages.runs / ".cache").glob("case_1-*/image.npy")]
    ((image, labels),) = [image for image in images if len(image) == 2]
    scan = read_volume(dataset / "imagesTr" / "case_1.nii.gz")
    said = Predictor(stages.first.model, device="cpu")(scan).labels.data
    assert_array_equal(labels, said)  # at 1 mm, as the scan
    (plain,) = Predictor(stages.first.model, device="cpu").prepare(scan).image
    assert image.shape == scan.data.shape != plain.shape


def test_the_folder_of_the_second_stage_predicts_without_other_folders(
    dataset: Path, stages: Stages, tmp_path: Path
) -> None:
    scan = read_volume(dataset / "imagesTr" / "case_1.nii.gz")
    expected = Predictor(stages.second.model, device="cpu")(scan)
    said = Predictor(stages.first.model, device="cpu")(scan).labels
    alone, elsewhere = tmp_path / "alone", tmp_path / "elsewhere"
    shutil.copytree(stages.second.folder / "model", alone)
    stages.runs.rename(elsewhere)
    try:
        predictor = Predictor.load(alone, device="cpu")
        found = predictor(scan, maps=True)
        image = predictor.prepare(scan).image
        other = predictor.prepare(scan, scan.like(1 - said.data)).image
    finally:
        elsewhere.rename(stages.runs)
    assert_array_equal(found.labels.data, expected.labels.data)
    assert set(found.maps) == {"skip.1/gate"}  # those of the second stage
    assert_array_equal(image[1], said.data)
    assert_array_equal(predictor(scan, first_labels=said).labels.data, found.labels.data)
    with torch.inference_mode():
        seen, changed = (predictor.model.network(each[None]) for each in (image, other))
    assert not torch.allclose(seen, changed)


def test_a_second_stage_that_was_stopped_goes_on(
    dataset: Path, stages: Stages, tmp_path: Path
) -> None:
    config = load_config(stages.second.folder / "config.yaml")
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path, callbacks=[StopAfter(3)])
    gone_on = resume(tmp_path / "small")
    expected = load_file(stages.second.folder / "model" / "weights.safetensors")
    found = load_file(gone_on.folder / "model" / "weights.safetensors")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_check_counts_the_parameters_of_a_second_stage(stages: Stages) -> None:
    said = check(stages.second.folder / "config.yaml").text
    parameters = sum(weight.numel() for weight in stages.second.model.network.parameters())
    assert f"{parameters:,} parameters" in said


class Echo(UNet):
    """Logits that are largest for the class that the first stage gave."""

    def forward(self, image: Tensor) -> Tensor:
        return torch.cat([1 - image[:, -1:], image[:, -1:]], dim=1)


def test_held_out_cases_are_scored_with_the_labels_of_models_that_held_them_out(
    dataset: Path, tmp_path: Path
) -> None:
    model = two_stages(described_model())
    model.network.__class__ = Echo
    known = read_dataset(dataset)
    references = {case.name: case.label for case in known.cases}

    def track(cases: Iterable[CaseFiles], what: str, count: int) -> Iterable[CaseFiles]:
        return cases

    scores = score(model, known, known.cases[:2], track, device="cpu", first_labels=references)
    assert scores["dice_of_cases"] == {"case_0": {"ball": 1.0}, "case_1": {"ball": 1.0}}
    whole = score(model, known, known.cases[:2], track, device="cpu")
    assert whole["mean_dice"] < 1
