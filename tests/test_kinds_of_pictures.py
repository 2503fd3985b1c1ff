"""Pictures of each kind are predicted, scored and explained in their own pixels, with values."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from segkit.config.pictures import PicturesConfig
from segkit.evaluation.evaluate import evaluate
from segkit.explain.explain_files import explain_files
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import read_labels, read_volume
from segkit.model.folder import picture_rules_of
from tests.test_pictures_as_data import dataset, model

RNG = np.random.default_rng(0)
HEIGHT, WIDTH = 12, 16
INVERTED = 255 - np.arange(256).repeat(3).reshape(256, 3).astype(np.uint8)
COLOURS = {"label 0": "#ffffff", "label 1": "#0000ff"}


def drawn(*shape: int, kind: str = "uint8") -> ndarray:
    """Random values of a picture (row, column, …)."""
    return RNG.integers(np.iinfo(kind).max, size=(HEIGHT, WIDTH, *shape)).astype(kind)


def by_pillow(path: Path, values: ndarray, mode: str | None = None) -> ndarray:
    Image.fromarray(values, mode).save(path)
    return values


def with_palette(path: Path, values: ndarray) -> ndarray:
    image = Image.fromarray(values)
    image = image.convert("P")
    image.putpalette(INVERTED.tobytes())
    image.putdata(values.ravel().tolist())
    image.save(path)
    return 255 - values  # grey colours


def with_alpha(path: Path, values: ndarray) -> ndarray:
    by_pillow(path, np.stack([values, drawn()], axis=-1), "LA")
    return values


def lossy(path: Path, values: ndarray) -> ndarray:
    by_pillow(path, values)
    with Image.open(path) as image:
        return np.asarray(image)


def by_tifffile(path: Path, values: ndarray) -> ndarray:
    tifffile.imwrite(path, values)
    return values


KINDS: dict[str, tuple[str, Callable[[Path, ndarray], ndarray], ndarray]] = {
    "PNG of 8 bits": ("a.png", by_pillow, drawn()),
    "PNG of 16 bits": ("a.png", by_pillow, drawn(kind="uint16")),
    "PNG of a palette": ("a.png", with_palette, drawn()),
    "PNG of grey and alpha": ("a.png", with_alpha, drawn()),
    "PNG of colours": ("a.png", by_pillow, drawn(3)),
    "TIFF of 8 bits": ("a.tif", by_tifffile, drawn()),
    "TIFF of 16 bits": ("a.tif", by_tifffile, drawn(kind="uint16")),
    "TIFF of colours": ("a.tif", by_tifffile, drawn(3)),
    "BMP": ("a.bmp", by_pillow, drawn()),
    "JPEG": ("a.jpg", lossy, drawn()),
}


FAST = ("PNG of 16 bits", "PNG of a palette", "PNG of grey and alpha", "JPEG")


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[] if k in FAST else pytest.mark.slow) for k in KINDS]
)
def test_a_picture_is_predicted_in_its_pixels_and_scored(tmp_path: Path, kind: str) -> None:
    name, write, values = KINDS[kind]
    expected = write(tmp_path / name, values)
    volume = read_volume(tmp_path / name)
    shown = volume.data.reshape(WIDTH, HEIGHT, -1).swapaxes(0, 1)
    assert_array_equal(shown, expected.reshape(HEIGHT, WIDTH, -1))
    made = model(shown.shape[2])
    predictor = Predictor(made, device="cpu", engine="torch")
    inputs = find_inputs(
        [tmp_path / name], shown.shape[2], rules=picture_rules_of(made.description)
    )
    (outcome,) = predict_files(predictor, inputs, out=tmp_path / "out")
    assert outcome.error is None
    (labels,) = (path for path in outcome.written if path.suffix != ".json")
    assert labels.name == ("a.tif" if name == "a.tif" else "a.png")
    numbers = np.asarray(tifffile.imread(labels) if name == "a.tif" else Image.open(labels))
    assert numbers.shape == (HEIGHT, WIDTH) and numbers.dtype == np.uint8
    assert_array_equal(numbers, predictor(volume).labels.data[..., 0].T)
    # A reference may be of another format and of more bits.
    reference = numbers.copy()
    reference[:3] = 1 - reference[:3]
    both = 2 * np.sum(reference & numbers) / (reference.sum() + numbers.sum())
    (tmp_path / "grey").mkdir()
    by_pillow(tmp_path / "grey" / "a.png", reference)
    tifffile.imwrite(tmp_path / "grey.tif", reference.astype(np.uint16))
    for path in (tmp_path / "grey" / "a.png", tmp_path / "grey.tif"):
        (case,) = evaluate(labels, path).to_json()["cases"]
        assert case["dice"] == pytest.approx(both), path


def test_a_stack_with_a_pixel_size_of_ome_is_predicted_slice_by_slice(tmp_path: Path) -> None:
    stack = RNG.integers(65535, size=(3, HEIGHT, WIDTH)).astype(np.uint16)
    path = tmp_path / "stack.ome.tif"
    told = {"axes": "ZYX", "PhysicalSizeX": 0.5, "PhysicalSizeXUnit": "µm"}
    told |= {"PhysicalSizeY": 0.5, "PhysicalSizeYUnit": "µm"}
    told |= {"PhysicalSizeZ": 2.0, "PhysicalSizeZUnit": "µm"}
    tifffile.imwrite(path, stack, metadata=told)
    made = model(1, unit="µm", spacing=(0.0005, 0.0005, 0.002), slices="axial")
    predictor = Predictor(made, device="cpu", engine="torch")
    inputs = find_inputs([path], 1, rules=picture_rules_of(made.description))
    (outcome,) = predict_files(predictor, inputs, maps=tmp_path / "maps")
    assert outcome.error is None
    labels = tmp_path / "stack_seg.ome.tif"
    found = read_labels(labels)
    assert_allclose(found.grid.spacing, (0.0005, 0.0005, 0.002))
    assert tifffile.imread(labels).shape == (3, HEIGHT, WIDTH)
    assert_array_equal(found.data, predictor(read_volume(path)).labels.data)
    # A shift by a column of the middle slice is half a micrometre.
    moved = tifffile.imread(labels)
    moved[:] = 0
    moved[1, 4:8, 4:8] = 1
    tifffile.imwrite(tmp_path / "b.ome.tif", moved, metadata=told)
    tifffile.imwrite(tmp_path / "c.ome.tif", np.roll(moved, 1, axis=2), metadata=told)
    (case,) = evaluate(tmp_path / "b.ome.tif", tmp_path / "c.ome.tif").to_json()["cases"]
    assert case["hd95_um"] == pytest.approx(0.5) and case["dice"] == pytest.approx(0.75)


@pytest.mark.parametrize("form", ["palette", "colours"])
def test_labels_in_colours_are_the_numbers_of_the_config(tmp_path: Path, form: str) -> None:
    config = dataset(
        tmp_path, pictures={"label_colours": {"background": "#102030", "cell": "#ff0000"}}
    )
    numbers = np.zeros((20, 24), np.uint8)
    numbers[4:12, 6:14] = 1
    colours = np.array([[16, 32, 48], [255, 0, 0]], np.uint8)
    if form == "colours":
        by_pillow(tmp_path / "labels" / "c0.png", colours[numbers])
    else:
        image = Image.fromarray(numbers).convert("P")
        image.putpalette(colours.tobytes())
        image.putdata(numbers.ravel().tolist())
        image.save(tmp_path / "labels" / "c0.png")
    (tmp_path / "predictions").mkdir()
    by_pillow(tmp_path / "predictions" / "c0.png", np.roll(numbers, 2, axis=1))
    scores = evaluate(tmp_path / "predictions", config, missing="skip")
    assert [row["dice"] for row in scores.to_json()["cases"]] == [pytest.approx(0.75)]


@pytest.mark.parametrize(
    "kind",
    ["PNG of 16 bits"]
    + [pytest.param(k, marks=pytest.mark.slow) for k in ("JPEG", "TIFF of colours")],
)
def test_a_picture_is_explained_in_its_pixels(tmp_path: Path, kind: str) -> None:
    name, write, values = KINDS[kind]
    write(tmp_path / name, values)
    channels = 3 if values.ndim == 3 else 1
    made = model(channels, pictures=PicturesConfig(label_colours=COLOURS))
    rules = picture_rules_of(made.description)
    predictor = Predictor(made, device="cpu", engine="torch")
    (explained,) = explain_files(
        predictor, find_inputs([tmp_path / name], channels, rules=rules), tmp_path / "out"
    )
    assert explained.error is None
    with Image.open(tmp_path / "out" / "a_seg.png") as image:
        assert image.size == (WIDTH, HEIGHT) and image.mode == "P"
        colours = np.array([[255, 255, 255], [0, 0, 255]])
        shown = np.asarray(image.convert("RGB"))
        assert_array_equal(shown, colours[np.asarray(image)])
    maps = sorted((tmp_path / "out").glob("a_map-*.tif"))
    prediction = predictor(read_volume(tmp_path / name, rules=rules), maps=True)
    assert len(maps) == len(prediction.maps) > 0
    for path in maps:
        found = tifffile.imread(path)
        assert found.shape == (HEIGHT, WIDTH) and found.dtype == np.float32
        assert np.isfinite(found).all() and 0 <= found.min() <= found.max() <= 1
    assert "index.html" in {path.name for path in explained.written}
