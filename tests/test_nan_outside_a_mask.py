"""With `data.nan: background`, a scan that is NaN outside a mask is the same scan with 0 there."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy import ndarray
from numpy.testing import assert_array_equal

import segkit
from segkit.checking.check_dataset import check_dataset
from segkit.config.dataset_files import DatasetConfig
from segkit.config.network import NetworkConfig
from segkit.config.training import Config
from segkit.data.dataset import dataset_of, read_case
from segkit.errors import DatasetError, SegkitError, VolumeError
from segkit.explain.explain_scan import explain_volume
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.nan_values import nan_as_zero, value_problem
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.folder import Model, load_model, save_model
from segkit.planning.make_plan import plan_dataset
from segkit.system.progress import untracked
from tests.models import random_model
from tests.small import small_config, small_dataset

ADVICE = "train with data.nan: background"


def outside(shape: tuple[int, ...]) -> ndarray:
    """Two slabs, so that the body's box is smaller than the image."""
    found = np.zeros(shape, bool)
    found[:3] = found[:, :, -2:] = True
    return found


def dataset_with(folder: Path, value: float) -> Path:
    """A small dataset with the value outside a mask; two NaN also lie within, or two zeros."""
    data = small_dataset(folder)
    for path in sorted((data / "imagesTr").iterdir()):
        image = read_volume(path)
        image.data[outside(image.data.shape)] = value
        image.data[6, 6, 5:7] = value
        write_volume(path, image)
    return data


@pytest.fixture
def strange(tmp_path: Path) -> Path:
    return dataset_with(tmp_path / "strange", np.nan)


@pytest.fixture
def zeroed(tmp_path: Path) -> Path:
    return dataset_with(tmp_path / "zeroed", 0)


def background(data: Path) -> Config:
    return small_config(data, data={"nan": "background"})


def scans_of(model: Model) -> tuple[Volume, Volume]:
    """A scan with NaN and infinite values, and the same one with 0 in their place."""
    random = np.random.default_rng(0)
    grid = segkit.Grid((12, 11, 10), np.diag([*model.description.spacing, 1.0]))
    plain = random.normal(size=grid.shape).astype(np.float32)
    strange = plain.copy()
    plain[outside(grid.shape)] = 0
    strange[outside(grid.shape)] = np.nan
    strange[0], strange[1] = np.inf, -np.inf
    return Volume(strange, grid), Volume(plain, grid)


@pytest.fixture
def refusing() -> Model:
    return random_model(NetworkConfig(channels=[2, 2], deep_supervision=False))


@pytest.fixture
def lenient(refusing: Model) -> Model:
    told = refusing.description.model_copy(update={"nan": "background"})
    return replace(refusing, description=told)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(4, 5, 6), (4, 5, 6, 2)])
def test_nan_values_become_0_and_others_stay(shape: tuple[int, ...], order: str) -> None:
    values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    values = np.asarray(values, order="F" if order == "F" else "C")
    assert nan_as_zero(values) is values
    for strange in (np.nan, np.inf, -np.inf):
        holed = values.copy(order="K")
        holed[outside(shape)] = strange
        given = holed.copy(order="K")
        found = nan_as_zero(holed)
        assert_array_equal(found, np.where(outside(shape), 0, values))
        assert found.dtype == np.float32 and found.strides == holed.strides
        assert_array_equal(holed, given)


def test_an_image_of_nan_only_is_unchanged_and_refused() -> None:
    values = np.full((3, 4, 5), np.nan, np.float32)
    assert nan_as_zero(values) is values
    assert (value_problem(values) or "").startswith("holds only NaN or infinite values; make")
    both = np.stack([values, np.ones_like(values)], axis=3)
    assert nan_as_zero(both) is both
    assert "only NaN or infinite values in one of its channels" in (value_problem(both) or "")


def test_by_default_every_reader_refuses_nan_and_names_the_setting(strange: Path) -> None:
    asked: list[Callable[[], object]] = [
        lambda: check_dataset(DatasetConfig(folder=strange), untracked),
        lambda: segkit.prepare(small_config(strange), runs=strange / "runs"),
    ]
    for ask in asked:
        with pytest.raises(SegkitError, match=ADVICE):
            ask()


def test_prepared_cases_are_those_of_the_image_with_0(strange: Path, zeroed: Path) -> None:
    made = segkit.prepare(background(strange), runs=strange / "runs")
    expected = segkit.prepare(small_config(zeroed), runs=zeroed / "runs")
    assert made.description.nan == "background" and expected.description.nan == "refuse"
    cases = [parts.cases for parts in (made, expected)]
    assert len(cases[0]) == 3
    for one, other in zip(*cases, strict=True):
        assert one.image.shape[1] == 13 and one.image.shape[3] == 14  # the body's box
        assert_array_equal(one.image, other.image)
        assert_array_equal(one.label, other.label)
        assert_array_equal(one.positions[1], other.positions[1])
    with pytest.raises(DatasetError, match=ADVICE):  # whatever the cache holds
        segkit.prepare(small_config(strange), runs=strange / "runs")


def test_check_and_plan_take_the_setting(strange: Path, zeroed: Path, tmp_path: Path) -> None:
    source = DatasetConfig(folder=strange, nan="background")
    told, expected = (
        check_dataset(each, untracked) for each in (source, DatasetConfig(folder=zeroed))
    )
    assert told.facts == expected.facts
    planned, plain = (
        plan_dataset(each, cache=tmp_path / "cache", device="cpu", preset="nnunet")
        for each in (source, DatasetConfig(folder=zeroed))
    )
    assert planned.plan == plain.plan
    assert yaml.safe_load(planned.text)["data"]["nan"] == "background"


def test_images_of_nan_only_and_labels_of_nan_are_always_refused(strange: Path) -> None:
    dataset = dataset_of(DatasetConfig(folder=strange, nan="background"))
    read_case(dataset.cases[0], dataset)
    first, second = dataset.cases[:2]
    for case, path, rows, message in (
        (first, first.images[0], slice(None), "holds only NaN or infinite values"),
        (second, second.label, slice(1), "holds label nan"),
    ):
        volume = read_volume(path)
        values = volume.data.astype(np.float32)
        values[rows] = np.nan
        write_volume(path, Volume(values, volume.grid))
        with pytest.raises(DatasetError, match=message):
            read_case(case, dataset)


def test_predictions_are_those_of_the_scan_with_0_bit_for_bit(
    refusing: Model, lenient: Model
) -> None:
    strange, plain = scans_of(refusing)
    found, expected = (
        Predictor(model, device="cpu", engine="torch", tta=False)(
            scan, probabilities=True, uncertainty=True, maps=True
        )
        for model, scan in ((lenient, strange), (refusing, plain))
    )
    assert len(np.unique(expected.labels.data)) > 1
    assert_array_equal(found.labels.data, expected.labels.data)
    assert found.probabilities and expected.probabilities and found.entropy and expected.entropy
    assert_array_equal(found.probabilities.data, expected.probabilities.data)
    assert_array_equal(found.entropy.data, expected.entropy.data)
    assert np.isnan(strange.data).any()  # nobody wrote to the scan


def test_several_models_take_it_only_if_all_do(refusing: Model, lenient: Model) -> None:
    strange, _ = scans_of(refusing)
    Predictor([lenient, lenient], device="cpu", engine="torch")(strange)
    for models in ([refusing], [lenient, refusing], [refusing, lenient]):
        with pytest.raises(VolumeError, match=ADVICE):
            Predictor(models, device="cpu", engine="torch")(strange)
    whole = Volume(np.full_like(strange.data, np.nan), strange.grid)
    with pytest.raises(VolumeError, match="holds only NaN or infinite values"):
        Predictor(lenient, device="cpu", engine="torch")(whole)


def test_an_explanation_is_that_of_the_scan_with_0(refusing: Model, lenient: Model) -> None:
    strange, plain = scans_of(refusing)
    found, expected = (
        explain_volume(Predictor(model, device="cpu", engine="torch"), scan)
        for model, scan in ((lenient, strange), (refusing, plain))
    )
    assert str(found.measures) == str(expected.measures)  # NaN is itself
    assert_array_equal(found.scan.data, plain.data)


def test_a_model_folder_keeps_the_rule_and_old_ones_refuse(
    tmp_path: Path, refusing: Model, lenient: Model
) -> None:
    save_model(tmp_path / "new", lenient)
    assert load_model(tmp_path / "new").description.nan == "background"
    save_model(tmp_path / "old", refusing)
    path = tmp_path / "old" / "model.json"
    told = json.loads(path.read_text())
    assert told.pop("nan") == "refuse"
    path.write_text(json.dumps(told))
    assert load_model(tmp_path / "old").description.nan == "refuse"


def test_files_and_their_statistics_are_those_of_the_scan_with_0(
    tmp_path: Path, refusing: Model, lenient: Model
) -> None:
    told = []
    for name, model, scan in zip("ab", (lenient, refusing), scans_of(refusing), strict=True):
        write_volume(tmp_path / name / "scan.nii.gz", scan)
        (outcome,) = predict_files(
            Predictor(model, device="cpu", engine="torch"),
            find_inputs([tmp_path / name / "scan.nii.gz"], 1),
            out=tmp_path / name / "out",
            statistics=True,
        )
        assert outcome.error is None
        (figures,) = [path for path in outcome.written if path.name.endswith("_statistics.json")]
        told.append(json.loads(figures.read_text())["structures"])
    assert told[0] == told[1]
