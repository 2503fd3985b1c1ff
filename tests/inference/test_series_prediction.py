"""From a DICOM series, or a folder of nnU-Net's, to labels and what goes beside them."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import highdicom
import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from segkit.checking.check import check
from segkit.config.data import ZScoreConfig
from segkit.config.dataset_files import LabelCodeConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.data.dataset import read_dataset
from segkit.errors import SegkitError, VolumeError
from segkit.geometry.grid import Grid
from segkit.inference import predict_files as prediction
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.inference.result_files import output_path
from segkit.io.dicom import read_series
from segkit.io.dicom_listing import choose_series, list_series
from segkit.io.inputs import Input, find_inputs, read_input
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model, save_model
from tests.cli.command import run
from tests.dicom import write_series
from tests.helpers import affine_of
from tests.small import small_config, small_dataset

SHAPE = (9, 8, 7)
GRID = Grid(SHAPE, affine_of("LPS", spacing=(1.0, 1.1, 2.0)))
LIVER = LabelCodeConfig(scheme="SCT", value="10200004", meaning="Liver")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model that has learned nothing and so labels voxels of every class."""
    torch.manual_seed(3)
    description = ModelDescription(
        segkit="test",
        run="nothing",
        channels=["CT"],
        labels={"background": 0, "liver": 1, "lesion": 2},
        codes={"liver": LIVER},
        network=NetworkConfig(channels=[2, 4]),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[ZScoreConfig()],
        slices="axial",
        patch_size=[8, 8, 8],
    )
    folder = tmp_path_factory.mktemp("model")
    save_model(folder, Model(description, build_network(description)))
    return folder


@pytest.fixture
def series(tmp_path: Path) -> Path:
    stored = np.random.default_rng(0).integers(0, 3000, SHAPE).astype(np.uint16)
    write_series(tmp_path / "thorax", stored, GRID)
    return tmp_path / "thorax"


def expected(model: Path, series: Path) -> Volume:
    return Predictor(load_model(model), device="cpu")(read_series(choose_series(series))).labels


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_series_is_segmented_on_its_own_grid(
    model: Path, series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("predict", series, "--model", model, "--device", "cpu", capsys=capsys)
    assert (code, err) == (0, "")
    labels = expected(model, series)
    assert len(np.unique(labels.data)) == 3
    image = nib.load(tmp_path / "thorax_seg.nii.gz")
    assert_array_equal(np.asarray(image.dataobj), labels.data)
    assert_allclose(Grid(SHAPE, image.affine).centres(), GRID.centres(), atol=1e-4)


def test_a_dicom_segmentation_has_the_labels_of_the_prediction_in_their_places(
    model: Path, series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", model, "--device", "cpu", "--out", tmp_path / "x.dcm")
    extras = ("--statistics", "--preview", "--probabilities")
    code, out, err = run("predict", series, *words, *extras, capsys=capsys)
    assert (code, err) == (0, "") and f"wrote {tmp_path / 'x.dcm'}" in out
    assert names_in(tmp_path) == [
        "thorax",
        "x.dcm",
        "x.json",
        "x_preview.png",
        "x_prob.json",
        "x_prob.nii.gz",
        "x_statistics.json",
    ]
    labels = expected(model, series)
    read = highdicom.seg.segread(tmp_path / "x.dcm")
    volume = read.get_volume(combine_segments=True)
    places = np.argwhere(volume.array > 0)
    world = (places @ volume.affine[:3, :3].T + volume.affine[:3, 3]) * (-1, -1, 1)
    index = labels.grid.index(world)
    assert_allclose(index, index.round(), atol=1e-3)
    found = np.zeros(SHAPE, np.uint8)
    found[tuple(index.round().astype(int).T)] = volume.array[tuple(places.T)]
    assert_array_equal(found, labels.data)
    assert read.get_segment_description(1).segmented_property_type.meaning == "Liver"
    # Nothing is written over, and a flag gives the name.
    code, _, err = run("predict", series, *words, capsys=capsys)
    assert code == 2 and "x.dcm: exists already" in err
    code, _, err = run("predict", series, *words[:4], "--dicom-seg", capsys=capsys)
    assert (code, err) == (0, "") and (tmp_path / "thorax_seg.dcm").is_file()


def test_statistics_and_preview_are_of_the_labels(
    model: Path, series: Path, tmp_path: Path
) -> None:
    predictor = Predictor(load_model(model), device="cpu")
    (outcome,) = predict_files(
        predictor, find_inputs([series], 1), out=tmp_path / "out", statistics=True, preview=True
    )
    assert outcome.error is None
    labels = read_volume(tmp_path / "out" / "thorax.nii.gz")
    content = json.loads((tmp_path / "out" / "thorax_statistics.json").read_text())
    assert content["case"] == "thorax"
    assert content["provenance"]["models"][0]["run"] == "nothing"
    image = read_series(choose_series(series))
    for number, name in ((1, "liver"), (2, "lesion")):
        inside = image.data[labels.data == number]
        said = content["structures"][name]
        assert said["voxels"] == inside.size
        assert_allclose(said["ml"], inside.size * 1.0 * 1.1 * 2.0 / 1000)
        assert_allclose((said["mean"]["CT"], said["sd"]["CT"]), (inside.mean(), inside.std()))
    picture = np.asarray(Image.open(tmp_path / "out" / "thorax_preview.png").convert("RGB"))
    assert np.ptp(picture.astype(int), axis=2).max() > 60, "labels are in colour"


def test_a_preview_goes_through_the_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from segkit.io import pictures

    cuts = []
    seen = pictures._cut

    def watched(values: np.ndarray, axis: int, index: int) -> np.ndarray:
        cuts.append((axis, index))
        return seen(values, axis, index)

    monkeypatch.setattr(pictures, "_cut", watched)
    labels = np.zeros(SHAPE, np.uint8)
    labels[1, 6, 2] = 1
    panels: list[pictures.Panel] = [("labels", labels, "labels")]
    names: Mapping[int, str] = {1: "spot"}
    for code, place in (("RAS", (1, 6, 2)), ("LPS", (SHAPE[0] - 2, SHAPE[1] - 7, 2))):
        cuts.clear()
        grid = Grid(SHAPE, affine_of(code))
        pictures.write_montage(
            tmp_path / "x.png", np.ones(SHAPE), grid, panels, label_names=names, through=labels
        )
        assert set(cuts) == set(enumerate(place))


def test_only_a_series_can_have_a_dicom_segmentation(series: Path, tmp_path: Path) -> None:
    scan = Input("scan", (tmp_path / "scan.nii.gz",))
    with pytest.raises(VolumeError, match="a DICOM segmentation needs a DICOM series"):
        output_path(scan, out=tmp_path / "x.dcm", single=True)
    with pytest.raises(VolumeError, match="needs a DICOM series"):
        output_path(scan, out=None, single=True, as_dicom=True)
    (source,) = find_inputs([series], 1)
    with pytest.raises(VolumeError, match=r"expected a name ending in \.dcm for a DICOM"):
        output_path(source, out=tmp_path / "x.nii.gz", single=True, as_dicom=True)
    assert output_path(source, out=tmp_path, single=False, as_dicom=True) == tmp_path / "thorax.dcm"


@pytest.mark.parametrize(
    ("package", "keys"), [("PIL", {"preview": True}), ("highdicom", {"as_dicom": True})]
)
def test_a_missing_package_is_reported_before_anything_is_segmented(
    package: str,
    keys: dict[str, bool],
    model: Path,
    series: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(prediction, "find_spec", lambda name: None if name == package else sys)
    predictor = Predictor(load_model(model), device="cpu")
    with pytest.raises(SegkitError, match=r"run pip install 'segkit\["):
        next(predict_files(predictor, find_inputs([series], 1), **keys))
    assert names_in(series.parent) == ["thorax"]


# Which series


def test_of_several_series_in_a_folder_one_is_segmented(
    model: Path, series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uid = choose_series(series).uid
    stored = np.zeros((4, 4, 2), np.uint16)
    for number, path in enumerate(write_series(tmp_path / "b", stored, Grid((4, 4, 2), np.eye(4)))):
        path.rename(series / f"other{number}")
    words = ("--model", model, "--device", "cpu", "--out", tmp_path / "x.nii.gz")
    code, _, err = run("predict", series, *words, capsys=capsys)
    assert code == 2 and err.startswith(f"segkit: {series}: holds 2 series; pass the UID of one")
    assert err.count("\n") == 1 and uid in err
    code, _, err = run("predict", series, *words, "--series", uid, capsys=capsys)
    assert (code, err) == (0, "")
    assert read_volume(tmp_path / "x.nii.gz").grid.shape == SHAPE
    code, out, _ = run("check", series, capsys=capsys)
    assert code == 0 and "2 DICOM series; pass the UID of one as --series" in out and uid in out
    code, out, _ = run("check", series, "--series", uid, capsys=capsys)
    assert code == 0 and f"DICOM series {uid} (thorax, CT, 7 slices)" in out
    assert "9 x 8 x 7 voxels of 1 x 1.1 x 2 mm" in out and "axes run to LPS" in out
    with pytest.raises(VolumeError, match=r"expected the folder of the DICOM series 1\.2"):
        find_inputs([tmp_path / "x.nii.gz"], 1, series="1.2")


def test_a_folder_of_series_is_a_cohort(model: Path, series: Path, tmp_path: Path) -> None:
    write_series(tmp_path / "abdomen", np.zeros((4, 4, 2), np.uint16), Grid((4, 4, 2), np.eye(4)))
    (tmp_path / "notes").mkdir()
    found = find_inputs([tmp_path], 1)
    assert [(source.name, source.of_folder) for source in found] == [
        ("abdomen", True),
        ("thorax", True),
    ]
    next(series.iterdir()).unlink()
    predictor = Predictor(load_model(model), device="cpu")
    outcomes = list(predict_files(predictor, found, out=tmp_path / "out"))
    assert outcomes[0].error is None
    assert outcomes[1].error is None or "complete the series" in outcomes[1].error
    again = list(predict_files(predictor, find_inputs([tmp_path / "abdomen", tmp_path], 1)))
    assert all(outcome.input.is_series for outcome in again)


def test_a_single_dicom_file_is_no_volume(series: Path) -> None:
    one = series / "one.dcm"
    one.touch()
    with pytest.raises(VolumeError, match="is one file of a DICOM series; pass the folder"):
        find_inputs([one], 1)


def test_explain_takes_a_series(
    model: Path, series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--model", model, "--device", "cpu", "--out", tmp_path / "explained")
    code, _, err = run("explain", series, *words, capsys=capsys)
    assert (code, err) == (0, "")
    labels = read_volume(tmp_path / "explained" / "thorax_seg.nii.gz")
    assert_array_equal(labels.data, expected(model, series).data)


# Folders of nnU-Net's


def test_the_first_channel_of_a_one_channel_model_is_no_part_of_a_name(tmp_path: Path) -> None:
    for name in ("a_0000", "b_0000", "a_seg", "b_0000_seg", "a_prob"):
        write_volume(tmp_path / f"{name}.nii.gz", Volume(np.zeros((2, 2, 2), np.uint8), GRID_2))
    found = find_inputs([tmp_path], 1)
    assert [source.name for source in found] == ["a", "b"]
    assert read_input(found[0]).data.shape == (2, 2, 2)
    # A file that is named itself is called the same.
    for source in found:
        assert find_inputs(source.files, 1) == [source]


def test_numbers_of_files_that_hold_all_channels_are_those_of_cases(tmp_path: Path) -> None:
    both = Volume(np.zeros((2, 2, 2, 2), np.uint8), GRID_2)
    one = Volume(np.zeros((2, 2, 2), np.uint8), GRID_2)
    for name in ("BRATS_0000", "BRATS_0001", "BRATS_0011", "BRATS_0012"):
        write_volume(tmp_path / f"{name}.nii.gz", both)
    for name in ("a_0000", "a_0001", "b.c_0000", "b.c_0001"):
        write_volume(tmp_path / f"{name}.nrrd", one)
    (tmp_path / "._BRATS_0013.nii.gz").touch()
    found = {source.name: source for source in find_inputs([tmp_path], 2)}
    assert sorted(found) == ["BRATS_0000", "BRATS_0001", "BRATS_0011", "BRATS_0012", "a", "b.c"]
    assert [len(source.files) for source in found.values()] == [1, 1, 1, 1, 2, 2]
    for source in found.values():
        assert find_inputs(source.files[:1], 2) == [source]
        assert read_input(source).data.shape == (2, 2, 2, 2)
    # A file that cannot be read stands for itself, unless it may be a channel.
    (tmp_path / "BRATS_0014.nii.gz").write_bytes(b"")
    (tmp_path / "a_0001.nrrd").write_bytes(b"")
    found = {source.name: source for source in find_inputs([tmp_path], 2)}
    assert found["BRATS_0014"].files == (tmp_path / "BRATS_0014.nii.gz",)
    assert found["a"].files == (tmp_path / "a_0000.nrrd", tmp_path / "a_0001.nrrd")


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a.b.nii.gz", "a b.NII.GZ", "é.nii", "x_seg.mha"], ["a b", "a.b", "x_seg", "é"]),
        (["c_0000.nii", "c_0001.nii"], ["c_0000", "c_0001"]),
        (["c_0000.nii", "d_0000.nii"], ["c", "d"]),
        (["c_0000.nii"], ["c"]),
    ],
)
def test_a_volume_has_the_same_name_on_its_own_and_in_a_folder(
    tmp_path: Path, files: list[str], names: list[str]
) -> None:
    for name in files:
        (tmp_path / name).touch()
    found = find_inputs([tmp_path], 1)
    assert sorted(source.name for source in found) == names
    for source in found:
        assert find_inputs(source.files, 1) == [source]
        assert output_path(source, out=tmp_path / "out", single=True).name.startswith(source.name)


def test_a_series_beside_volumes_is_refused_unless_it_is_named(
    series: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_volume(series / "old.nii.gz", Volume(np.zeros((2, 2, 2), np.uint8), GRID_2))
    for folder in (series, series.parent):
        with pytest.raises(VolumeError, match=r"thorax: holds a DICOM series and old\.nii\.gz;"):
            find_inputs([folder], 1)
    assert [source.files for source in find_inputs([series / "old.nii.gz"], 1)] == [
        (series / "old.nii.gz",)
    ]
    (uid,) = (each.uid for each in list_series(series))
    assert find_inputs([series], 1, series=uid)[0].is_series
    code, _, err = run("check", series, capsys=capsys)
    assert code == 2 and "holds a DICOM series and old.nii.gz" in err
    code, out, _ = run("check", series, "--series", uid, capsys=capsys)
    assert code == 0 and "DICOM series" in out


GRID_2 = Grid((2, 2, 2), np.eye(4))


# Datasets by patterns, from the command line


def test_a_yaml_of_patterns_is_checked_planned_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_dataset(tmp_path / "data")
    (data / "dataset.json").unlink()
    for path in sorted((data / "labelsTr").iterdir()):
        path.rename(path.with_name(path.name.replace("case", "mask")))
    files = {
        "images": {"MRI": "imagesTr/case_*.nii.gz"},
        "label": "labelsTr/mask_*.nii.gz",
        "labels": {"background": 0, "ball": 1},
        "codes": {"ball": {"scheme": "99X", "value": 7, "meaning": "Ball"}},
    }
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"data": {"folder": str(data), "files": files}}))
    monkeypatch.chdir(tmp_path)
    code, out, err = run("check", study, capsys=capsys)
    assert (code, err) == (0, "")
    assert f"{data}: 4 cases, all readable" in out and "label 1 ball: in 4 cases" in out
    code, out, err = run(
        "plan", study, "--minutes", 0.1, "--dims", 3, "--device", "cpu", capsys=capsys
    )
    assert (code, err) == (0, "") and "next: segkit train data.yaml" in out
    short = ("train.steps=1", "network.channels=[4,8,8]", "network.strides=null")
    shape = ("network.kernels=null", "data.patch_size=[8,8,8]", "train.validate_every=1")
    code, out, err = run("train", "data.yaml", *short, *shape, capsys=capsys)
    assert code == 0, err
    description = load_model(tmp_path / "runs" / "data").description
    assert description.labels == {"background": 0, "ball": 1}
    assert description.codes["ball"].value == "7"
    dataset = read_dataset(data, small_config(data, data={"files": files}).data.files)
    assert [case.name for case in dataset.cases] == ["0", "1", "2", "3"]
    code, _, err = run("plan", "data.yaml", capsys=capsys)
    assert (
        code == 2
        and "data.yaml: expected a dataset (YAML with only its data and split), found a config"
        in err
    )


def test_a_bad_case_of_a_yaml_of_patterns_is_reported(tmp_path: Path) -> None:
    write_volume(tmp_path / "a_image.nii.gz", Volume(np.zeros((2, 2, 2), np.float32), GRID_2))
    write_volume(tmp_path / "a_label.nii.gz", Volume(np.full((2, 2, 2), 7, np.uint8), GRID_2))
    files = {
        "images": {"CT": "*_image.nii.gz"},
        "label": "*_label.nii.gz",
        "labels": {"background": 0, "liver": 1},
    }
    study = tmp_path / "study.yml"
    study.write_text(json.dumps({"data": {"folder": str(tmp_path), "files": files}}))
    with pytest.raises(SegkitError, match=r"holds label 7, which the dataset does not declare"):
        check(study)
