"""Pictures on the road of every command: datasets, plans, predictions, scores."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import yaml
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from segkit.checking.check import check
from segkit.config.load import dataset_in
from segkit.config.network import NetworkConfig
from segkit.config.pictures import PicturesConfig
from segkit.data.dataset import read_case, read_dataset
from segkit.errors import DatasetError, VolumeError
from segkit.evaluation.evaluate import evaluate
from segkit.evaluation.score_table import to_table
from segkit.explain.explain_files import explain_files
from segkit.geometry.grid import Grid
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.pictures import write_montage
from segkit.io.volume import Volume, read_labels, read_volume, write_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, picture_rules_of
from segkit.planning.make_plan import plan_dataset
from tests.models import description

RNG = np.random.default_rng(0)
COLOURS = {"background": "#000000", "cell": [255, 0, 0]}


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values.astype(np.uint8)).save(path, **options)
    return path


def dataset(
    folder: Path,
    *,
    colour: bool = False,
    pictures: dict[str, object] | None = None,
    **saved: Any,
) -> Path:
    """Three pictures with labels in images/ and labels/, and the YAML that says so."""
    for number in range(3):
        shape = (20, 24, 3) if colour else (20, 24)
        save(folder / "images" / f"c{number}.png", RNG.integers(1, 256, shape), **saved)
        labels = np.zeros((20, 24), np.uint8)
        labels[4 + number : 12, 6:14] = 1
        if pictures and "label_colours" in pictures:
            labels = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)[labels]
        save(folder / "labels" / f"c{number}.png", labels)
    files = {
        "images": {"photo": "images/*.png"},
        "label": "labels/*.png",
        "labels": {"background": 0, "cell": 1},
    }
    data = {"folder": str(folder), "files": files, "pictures": pictures or {}}
    (folder / "data.yaml").write_text(yaml.safe_dump({"data": data}))
    return folder / "data.yaml"


def read(path: Path):
    source = dataset_in(path)
    assert source is not None
    return read_dataset(source.folder, source.files, source.pictures)


def test_a_folder_of_pictures_is_a_dataset_and_its_label_takes_its_images_pixel_size(
    tmp_path: Path,
) -> None:
    found = read(dataset(tmp_path, dpi=(25400, 25400)))
    image, label = read_case(found.cases[0], found)
    assert found.unit == "µm" and image.data.shape == (24, 20, 1, 1)
    assert_allclose(label.grid.spacing, (0.001, 0.001, 1))
    assert label.data.sum() == 64


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_a_resolution_that_only_labels_have_does_not_count(tmp_path: Path, suffix: str) -> None:
    config = dataset(tmp_path)
    for number in range(3):
        image, label = (tmp_path / f"{kind}/c{number}.png" for kind in ("images", "labels"))
        values = np.asarray(Image.open(image))
        image.unlink()
        save(image.with_suffix(suffix), values)
        save(label, np.asarray(Image.open(label)), dpi=(300, 300))
    config.write_text(config.read_text().replace("images/*.png", f"images/*{suffix}"))
    found = read(config)
    image, label = read_case(found.cases[0], found)
    assert found.unit == "pixel" and label.unit == "pixel"
    assert_allclose(label.grid.affine, image.grid.affine)
    assert label.data.sum() == 64
    assert "pixel size in pixels: 1, 1;" in str(check(config))


def test_red_green_and_blue_are_channels_with_names_of_their_own(tmp_path: Path) -> None:
    found = read(dataset(tmp_path, colour=True))
    assert found.channels == ("photo red", "photo green", "photo blue")
    assert read_case(found.cases[0], found)[0].data.shape == (24, 20, 1, 3)


def test_labels_may_be_colours(tmp_path: Path) -> None:
    found = read(dataset(tmp_path, pictures={"label_colours": COLOURS}))
    label = read_case(found.cases[1], found)[1].data
    assert_array_equal(np.argwhere(label[..., 0]).min(0), (6, 5))
    assert label.sum() == 56


def test_nnunets_layout_may_hold_pictures_with_all_colours_in_one_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / "imagesTr" / f"{name}_0000.png", RNG.integers(256, size=(6, 5, 3)))
        save(tmp_path / "labelsTr" / f"{name}.png", np.eye(6, 5))
    (tmp_path / "dataset.json").write_text(
        '{"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "road": 1}, '
        '"numTraining": 2, "file_ending": ".png", "overwrite_image_reader_writer": '
        '"NaturalImage2DIO", "pictures": {"pixel_size": "2 mm"}}'
    )
    found = read_dataset(tmp_path)
    assert found.channels == ("R", "G", "B") and found.unit == "mm"
    image, label = read_case(found.cases[1], found)
    assert image.grid.spacing == (2, 2, 1)
    assert_array_equal(label.data[..., 0], np.eye(5, 6))


def test_check_says_sizes_notes_and_where_the_pixel_size_is_from(tmp_path: Path) -> None:
    text = str(check(dataset(tmp_path, pictures={"pixel_size": "4 nm"})))
    assert "size in pixels (columns, rows): 24, 20" in text
    assert "pixel size in µm: 0.004, 0.004;" in text
    assert "from the settings (3 cases)" in text
    one = save(tmp_path / "rgba.png", RNG.integers(256, size=(4, 5, 4)))
    told = check(one)
    assert "5 x 4 pixels of 1 x 1 pixels (its file does not give a pixel size)" in told.text
    assert "its opacity (alpha) is left out" in told.facts["notes"]


def test_cases_with_and_without_a_pixel_size_do_not_mix(tmp_path: Path) -> None:
    config = dataset(tmp_path)
    save(tmp_path / "images" / "c1.png", RNG.integers(256, size=(20, 24)), dpi=(25400, 25400))
    with pytest.raises(DatasetError, match=r"c1\.png: has a pixel size .*data\.pictures"):
        check(config)


def test_a_colour_without_a_label_is_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="label_colours names nucleus, which is not a label"):
        read(dataset(tmp_path, pictures={"label_colours": {"nucleus": "#ffffff"}}))
    with pytest.raises(ValueError, match="must be a colour such as '#ff0000'"):
        PicturesConfig(label_colours={"cell": "red"})
    with pytest.raises(ValueError, match=r"expected a length such as"):
        PicturesConfig(pixel_size="4")


def test_pictures_are_planned_in_2d_at_their_own_scale(tmp_path: Path) -> None:
    source = dataset_in(dataset(tmp_path, pictures={"pixel_size": "3.7 nm"}))
    assert source is not None
    planned = plan_dataset(
        source.folder,
        source.files,
        pictures=source.pictures,
        runs=tmp_path / "runs",
        device="cpu",
        minutes=0.1,
        preset="nnunet",
    )
    assert planned.config.network.spatial_dims == 2
    assert planned.config.data.spacing == (3.7e-6, 3.7e-6, 1)
    assert planned.config.data.slices == "axial"
    assert planned.config.data.pictures == source.pictures


def model(channels: int, **changes: object) -> Model:
    """A small random model in 2D."""
    told = description(
        channels=channels,
        spacing=(1.0, 1.0, 1.0),
        patch_size=(8, 8),
        network=NetworkConfig(
            spatial_dims=2, channels=[2, 2, 2], attention={"skip": "additive_grid"}
        ),
    ).model_copy(update={"unit": "pixel", **changes})
    return Model(told, build_network(told).eval())


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp"])
def test_predictions_have_the_pictures_size_and_its_format_or_one_that_keeps_labels(
    tmp_path: Path, suffix: str
) -> None:
    values = RNG.integers(256, size=(13, 17, 3)).astype(np.uint8)
    path = save(tmp_path / f"photo{suffix}", values)
    made = model(3)
    predictor = Predictor(made, device="cpu", engine="torch")
    inputs = find_inputs([path], 3, rules=picture_rules_of(made.description))
    options = {"maps": tmp_path / "maps", "probabilities": True, "preview": True}
    (outcome,) = predict_files(predictor, inputs, **options)
    assert outcome.error is None
    written = {file.name for file in outcome.written}
    result = ".tif" if suffix == ".tif" else ".png"
    labels = tmp_path / f"photo_seg{result}"
    assert labels.name in written and "photo_prob.tif" in written
    with Image.open(labels) as image:
        assert image.size == (17, 13)
    expected = predictor(read_volume(path)).labels
    assert_array_equal(read_labels(labels).data, expected.data)
    shares = read_volume(tmp_path / "photo_prob.tif")
    assert shares.data.shape == (17, 13, 1, 2)
    assert_allclose(shares.data.sum(axis=3), 1, atol=2e-3)
    maps = [
        tmp_path / "maps" / name for name in written if name.endswith(".tif") and "_map-" in name
    ]
    assert maps and all(read_volume(one).grid.shape == (17, 13, 1) for one in maps)
    with Image.open(tmp_path / "photo_preview.png") as preview:
        assert preview.height < 480 * 13 / 17 + 60  # one plane, of 480 pixels across


@pytest.mark.parametrize(("suffix", "result"), [(".tif", ".tif"), (".bmp", ".png")])
def test_explained_labels_have_the_format_of_predicted_ones(
    tmp_path: Path, suffix: str, result: str
) -> None:
    path, made = save(tmp_path / f"a{suffix}", RNG.integers(256, size=(8, 8))), model(1)
    inputs = find_inputs([path], 1, rules=picture_rules_of(made.description))
    predictor = Predictor(made, device="cpu", engine="torch")
    (explained,) = explain_files(predictor, inputs, tmp_path / "out")
    assert explained.written[0].name == f"a_seg{result}"
    expected = predictor(read_volume(path)).labels
    assert_array_equal(read_labels(explained.written[0]).data, expected.data)


def test_a_model_trained_on_colours_writes_them(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", RNG.integers(256, size=(8, 8)))
    colours = PicturesConfig(label_colours={"label 0": "#ffffff", "label 1": "#0000ff"})
    made = model(1, pictures=colours)
    inputs = find_inputs([path], 1, rules=picture_rules_of(made.description))
    (outcome,) = predict_files(Predictor(made, device="cpu", engine="torch"), inputs)
    numbers = read_labels(outcome.written[0]).data[..., 0].T
    with Image.open(outcome.written[0]) as image:
        found = np.asarray(image.convert("RGB"))
    assert_array_equal(found, np.array([[255, 255, 255], [0, 0, 255]])[numbers])


def test_a_picture_without_a_pixel_size_is_refused_by_a_model_that_has_learned_one(
    tmp_path: Path,
) -> None:
    path = save(tmp_path / "a.png", RNG.integers(256, size=(8, 8)))
    made = model(1, unit="µm", spacing=(0.0005, 0.0005, 1.0))
    predictor = Predictor(made, device="cpu", engine="torch")
    with pytest.raises(VolumeError, match="has no pixel size, but the model was trained"):
        predictor(read_volume(path))
    rules = picture_rules_of(made.description, ["0.5 µm"])
    assert predictor(read_volume(path, rules=rules)).labels.data.shape == (8, 8, 1)
    # A model of pixels takes no file's pixel size.
    scaled = save(tmp_path / "b.png", RNG.integers(256, size=(8, 8)), dpi=(25400, 25400))
    assert read_volume(scaled, rules=picture_rules_of(model(1).description)).unit == "pixel"


def test_results_and_previews_beside_pictures_are_not_inputs(tmp_path: Path) -> None:
    for name in ("a.png", "a_seg.png", "a_preview.png", "b.png"):
        save(tmp_path / name, np.zeros((4, 4)))
    assert [one.name for one in find_inputs([tmp_path], 1)] == ["a", "b"]
    # Photographs of a camera carry numbers too.
    folder = tmp_path / "colour"
    for name in ("DSC_0000.png", "DSC_0001.png"):
        save(folder / name, np.zeros((4, 4, 3)))
    assert [one.name for one in find_inputs([folder], 3)] == ["DSC_0000", "DSC_0001"]


def two_squares(folder: Path, **options: object) -> tuple[Path, Path]:
    """A square of 10 x 10 pixels, and the same 3 pixels further right."""
    reference, prediction = np.zeros((2, 20, 30), np.uint8)
    reference[5:15, 5:15] = 1
    prediction[5:15, 8:18] = 1
    return (
        save(folder / "prediction.png", prediction, **options),
        save(folder / "reference.png", reference),
    )


def test_distances_are_in_pixels_if_no_file_has_a_scale(tmp_path: Path) -> None:
    scores = evaluate(*two_squares(tmp_path))
    told = scores.to_json()
    (case,) = told["cases"]
    assert told["unit"] == "pixel" and told["tolerance_px"] == 2
    # 3 of the 10 columns lie within the other square's width but 3 from its edge.
    assert case["hd95_px"] == 3 and "hd95_mm" not in case
    assert case["dice"] == pytest.approx(2 * 70 / 200)
    assert case["prediction_ml"] is None  # an area has no volume
    assert evaluate(*two_squares(tmp_path), tolerance="3 pixels").to_json()["cases"][0]["nsd"] == 1
    with pytest.raises(VolumeError, match="measured in pixels; give it as '2 pixels', or set"):
        evaluate(*two_squares(tmp_path), tolerance="1 µm")


def test_distances_are_in_micrometres_if_pixels_have_a_size(tmp_path: Path) -> None:
    pair = two_squares(tmp_path, dpi=(50800, 50800))  # 0.5 µm
    scores = evaluate(*pair, tolerance="1.5001 µm")
    told = scores.to_json()
    (case,) = told["cases"]
    assert told["unit"] == "µm" and told["tolerance_um"] == pytest.approx(1.5001)
    assert case["hd95_um"] == pytest.approx(1.5)
    assert case["nsd"] == 1
    assert scores.cases[0].metrics["hd95_mm"] == pytest.approx(0.0015)
    told = evaluate(*pair, pixel_size="4 nm").to_json()
    assert told["cases"][0]["hd95_um"] == pytest.approx(0.012)
    assert told["tolerance_um"] == pytest.approx(0.008)


@pytest.mark.parametrize("asked", [None, "2 pixels"])
@pytest.mark.parametrize("sizes", [(0.5, 5.0), (5.0, 0.5)])
def test_a_tolerance_in_pixels_is_that_of_each_pictures_own_pixels(
    tmp_path: Path, sizes: tuple[float, float], asked: str | None
) -> None:
    for case, size, shift in zip("ab", sizes, (2, 8), strict=True):
        labels = np.zeros((40, 40), np.uint8)
        labels[8:28, 8:28] = 1
        for part, values in (("r", labels), ("p", np.roll(labels, shift, axis=0))):
            save(tmp_path / part / f"{case}.png", values, dpi=(25400 / size, 25400 / size))
    scores = evaluate(tmp_path / "p", tmp_path / "r", tolerance=asked)
    near, far = scores.cases
    assert near.metrics["nsd"] == 1 and far.metrics["nsd"] < 0.8
    for row, size in zip(scores.cases, sizes, strict=True):
        alone = evaluate(
            tmp_path / "p" / f"{row.case}.png", tmp_path / "r" / f"{row.case}.png", tolerance=asked
        )
        assert alone.cases[0].metrics["nsd"] == row.metrics["nsd"]
        assert row.tolerance_mm == pytest.approx(2e-3 * size, rel=1e-3)
        told = alone.to_json()
        assert told["tolerance_um"] == pytest.approx(2 * size, rel=1e-3)
        assert told["tolerance_pixels"] == told["cases"][0]["tolerance_pixels"] == 2
    told = scores.to_json()
    assert told["tolerance_pixels"] == 2 and "tolerance_um" not in told
    assert str(to_table(scores.summary).caption).count("NSD: within 2 pixels. ") == 1
    fixed = evaluate(tmp_path / "p", tmp_path / "r", tolerance="10.1 µm")
    assert fixed.cases[0].tolerance_mm == fixed.cases[1].tolerance_mm == 0.0101
    assert "tolerance_pixels" not in fixed.to_json()


def test_pictures_and_volumes_need_one_tolerance_in_mm(tmp_path: Path) -> None:
    values = np.zeros((8, 8), np.uint8)
    values[2:4] = 1
    for folder in ("p", "r"):
        save(tmp_path / folder / "a.png", values, dpi=(254, 254))
    volume = Volume(values[..., None], Grid((8, 8, 1), np.eye(4)))
    write_volume(tmp_path / "r" / "b.nii.gz", volume)
    table = tmp_path / "table.csv"
    table.write_text("id,label\na,r/a.png\nb,r/b.nii.gz\n")
    with pytest.raises(VolumeError, match="the picture a and the volume b; give one tolerance"):
        evaluate(tmp_path / "p", table, missing="empty")
    found = evaluate(tmp_path / "p", table, missing="empty", tolerance_mm=1.0)
    assert found.summary.tolerance_mm == 1 and not found.failures
    found = evaluate(tmp_path / "p", table, missing="empty", tolerance="2 pixels")
    assert [row.case for row in found.cases] == ["a"]
    assert "b.nii.gz: expected a tolerance in mm, found 2 pixels" in found.failures["b"]


def test_a_dataset_of_pictures_scores_predictions_in_its_colours_or_as_numbers(
    tmp_path: Path,
) -> None:
    config = dataset(tmp_path / "data", pictures={"label_colours": COLOURS, "pixel_size": "4 nm"})
    for number in range(3):
        labels = np.zeros((20, 24), np.uint8)
        labels[4 + number : 12, 6:14] = 1
        if number:
            labels = np.array([[0, 0, 0], [255, 0, 0]], np.uint8)[labels]
        save(tmp_path / "predictions" / f"c{number}.png", labels)
    scores = evaluate(tmp_path / "predictions", config)
    assert scores.failures == {}
    assert scores.summary.overall.metrics["dice"].mean == 1
    assert scores.summary.unit == "µm"


def test_a_stack_of_pages_is_a_volume_with_a_voxel_in_ml(tmp_path: Path) -> None:
    stack = np.zeros((4, 10, 10), np.uint8)
    stack[1:3, 2:6, 2:6] = 1
    for name in ("a.tif", "b.tif"):
        metadata = {"axes": "ZYX", "spacing": 2.0, "unit": "mm"}
        options = {"resolution": (1.0, 1.0), "metadata": metadata}
        tifffile.imwrite(tmp_path / name, stack, imagej=True, **options)
    (case,) = evaluate(tmp_path / "a.tif", tmp_path / "b.tif").to_json()["cases"]
    assert case["prediction_ml"] == pytest.approx(32 * 2 / 1000)


def test_a_picture_is_drawn_as_its_file_shows_it(tmp_path: Path) -> None:
    values = np.zeros((24, 48), np.uint8)
    values += RNG.integers(1, 50, values.shape).astype(np.uint8)
    values[:12, :24] = 255  # the upper left quarter is white
    volume = read_volume(save(tmp_path / "a.png", values))
    write_montage(
        tmp_path / "m.png", volume.data, volume.grid, [("a", None, "labels")], label_names={}
    )
    with Image.open(tmp_path / "m.png") as image:
        drawn = np.asarray(image.convert("L"))
    panel = drawn[24 : 24 + 240, 4 : 4 + 480]
    assert panel[60, 120] == 255 and panel[180, 120] < 99 and panel[60, 360] < 99
