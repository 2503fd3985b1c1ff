"""The napari plugin without napari: files become layers that lie where segkit and nibabel say."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import nibabel as nib
import numpy as np
import PIL.Image
import pytest
import yaml
from hypothesis import given, settings
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

import segkit
from segkit import Grid, SegkitError, Volume, read_volume
from segkit_napari.layers import image_layers, labels_layer, layer_affine, map_layers, volume_of
from segkit_napari.predict import Cancelled, Work, channels_of, predicted_layers
from segkit_napari.reader import get_reader, read
from tests.conftest import ROOT
from tests.helpers import grids
from tests.integrations.conftest import OBLIQUE

PLUGIN = ROOT / "integrations" / "napari"


def world_of(affine: ndarray, index: ndarray) -> ndarray:
    """World (x, y, z) of an index (x, y, z), by the affine (z, y, x) of a layer."""
    z, y, x = (affine @ [*index[::-1], 1])[:3]
    return np.array([x, y, z])


@pytest.fixture
def written(predicted: tuple[Path, str]) -> Path:
    """A folder with a scan and all that predict writes of it."""
    return predicted[0]


@settings(max_examples=30)
@given(grids())
def test_a_point_of_a_layer_lies_where_the_volume_says(grid: Grid) -> None:
    values = np.arange(np.prod(grid.shape)).reshape(grid.shape)
    ((data, keywords, _),) = image_layers(Volume(values, grid), "scan")
    for index in (np.zeros(3, int), np.array(grid.shape) - 1):
        assert data[tuple(index[::-1])] == values[tuple(index)]
        assert_allclose(world_of(keywords["affine"], index), grid.world(index), atol=1e-9)
    back = volume_of([data], keywords["affine"])
    assert_array_equal(back.data, values)
    assert_array_equal(back.grid.affine, grid.affine)


def test_an_oblique_scan_its_labels_and_its_map_at_stride_4_lie_on_one_another(
    written: Path,
) -> None:
    maps = written / "maps"
    for path in (
        written / "scan.nii.gz",
        maps / "scan_map-skip.1-gate.nii.gz",
        maps / "native" / "scan_map-skip.1-gate.nii.gz",
    ):
        image = nib.load(path)
        ((data, keywords, _),) = read(str(path))
        values = np.asarray(image.dataobj)
        random = np.random.default_rng(0)
        for index in random.integers(0, values.shape, (20, 3)):
            expected = (image.affine @ [*index, 1])[:3]
            assert_allclose(world_of(keywords["affine"], index), expected, atol=1e-4)
            assert_array_equal(data[tuple(index[::-1])], values[tuple(index)])
    ((_, keywords, _),) = read(str(written / "labels.nrrd"))
    assert_allclose(keywords["affine"], layer_affine(OBLIQUE.affine), atol=1e-5)
    # The first and the last cell of the map lie on the scan, or less than a cell beyond it.
    (told,) = json.loads((maps / "scan_maps.json").read_text())["maps"]
    assert told["stride"] == [4, 4, 4]
    ((gate, keywords, _),) = read(str(maps))
    to_voxel = np.linalg.inv(layer_affine(OBLIQUE.affine)) @ keywords["affine"]
    for cell in (np.zeros(3), np.array(gate.shape) - 1):
        voxel = (to_voxel @ [*cell, 1])[:3]
        assert (voxel > -4).all() and (voxel < np.array(OBLIQUE.shape[::-1]) + 3).all()
    assert_allclose(np.abs(to_voxel[:3, :3]), np.diag([4, 4, 4]), atol=1e-4)


def test_labels_have_names_and_segkits_colours(written: Path) -> None:
    ((data, keywords, kind),) = read(str(written / "labels.nrrd"))
    assert kind == "labels" and data.dtype == np.uint8 and {*np.unique(data)} <= {0, 3, 7}
    assert keywords["features"] == {"index": [0, 3, 7], "name": ["background", "liver", "lesion"]}
    assert keywords["colormap"] == {
        None: "transparent",
        0: "transparent",
        3: segkit.label_colour(3),
        7: segkit.label_colour(7),
    }


def test_probabilities_are_a_layer_for_each_class(written: Path) -> None:
    layers = read(str(written / "labels_prob.nrrd"))
    assert [keywords["name"] for _, keywords, _ in layers] == [
        "labels_prob background",
        "labels_prob liver",
        "labels_prob lesion",
    ]
    assert [keywords["visible"] for _, keywords, _ in layers] == [True, False, False]
    assert_allclose(sum(data for data, _, _ in layers), 1, atol=1e-5)


def test_a_map_has_the_range_that_its_description_says_and_keeps_nan(written: Path) -> None:
    maps = written / "maps"
    for path in (maps, maps / "scan_maps.json", maps / "scan_map-skip.1-gate.nii.gz"):
        ((_, keywords, kind),) = read(str(path))
        assert kind == "image" and keywords["contrast_limits"] == (0, 1)
        assert keywords["metadata"] == {"segkit": {"map": "skip.1/gate"}}
        assert (keywords["colormap"], keywords["interpolation2d"]) == ("inferno", "nearest")
    values = np.full((2, 2, 2), np.nan, np.float32)
    values[0, 0, 0] = 3
    ((data, keywords, _),) = map_layers(Volume(values, Grid((2, 2, 2), np.eye(4))), "x")
    assert np.isnan(data).sum() == 7 and keywords["contrast_limits"] == (0, 3)
    nothing = Volume(np.full_like(values, np.nan), Grid((2, 2, 2), np.eye(4)))
    ((_, keywords, _),) = map_layers(nothing, "x")
    assert keywords["contrast_limits"] == (0, 1)


def test_a_map_with_several_values_in_each_cell_is_several_layers() -> None:
    grid = Grid((2, 3, 4), np.eye(4))
    values = np.random.default_rng(0).random((2, 3, 4, 2)).astype(np.float32)
    layers = map_layers(Volume(values, grid), "deep/received", (0, 1))
    assert [keywords["name"] for _, keywords, _ in layers] == ["deep/received 0", "deep/received 1"]
    assert [keywords["visible"] for _, keywords, _ in layers] == [True, False]
    assert_array_equal(layers[1][0], values[..., 1].T)


def test_a_slice_and_a_picture_of_unknown_scale_are_layers_too(tmp_path: Path) -> None:
    PIL.Image.fromarray(np.arange(12, dtype=np.uint8).reshape(3, 4)).save(tmp_path / "a.png")
    flat = read_volume(tmp_path / "a.png")
    ((data, keywords, _),) = image_layers(flat, "picture")
    assert flat.unit == "pixel" and data.shape == (1, *flat.data.shape[1::-1])
    assert "units" not in keywords
    back = volume_of([data[0]], layer_affine(flat.grid.affine))
    assert_array_equal(back.data, flat.data)


def test_labels_of_an_older_segkit_get_colours_of_napari() -> None:
    volume = Volume(np.array([[[0, 300]]]), Grid((1, 1, 2), np.eye(4)))
    data, keywords, _ = labels_layer(volume, "old", {"background": 0, "a": 300})
    assert data.dtype == np.uint16 and "colormap" not in keywords


def test_only_files_that_the_plugin_can_read_are_claimed(written: Path, tmp_path: Path) -> None:
    scan = str(written / "scan.nii.gz")
    assert get_reader(scan) is read and get_reader([scan, str(written / "maps")]) is read
    for other in (str(tmp_path), "a.png", [scan, "a.png"], []):
        assert get_reader(other) is None
    assert len(read([scan, scan])) == 2


def test_bad_files_are_sentences(tmp_path: Path, written: Path) -> None:
    described = tmp_path / "scan_maps.json"
    for text, sentence in (
        ("{", "cannot be read"),
        ("[]", "expected a JSON object"),
        ('{"maps": []}', "expected attention maps with a place, found none"),
    ):
        described.write_text(text)
        with pytest.raises(SegkitError, match=sentence):
            read(str(described))
    shutil.copy(written / "maps" / "scan_maps.json", described)
    with pytest.raises(SegkitError, match=r"skip\.1-gate\.nii\.gz: "):
        read(str(described))


@pytest.mark.slow
def test_a_layer_is_segmented_as_the_command_segments_its_file(
    written: Path, untrained_model: Path
) -> None:
    assert channels_of(untrained_model) == ["CT"]
    ((data, keywords, _),) = read(str(written / "scan.nii.gz"))
    work = Work()
    layers = predicted_layers(
        untrained_model, volume_of([data], keywords["affine"]), "scan", device="cpu", work=work
    )
    assert work.share == 1
    from_files = [*read(str(written / "maps")), *read(str(written / "labels.nrrd"))]
    for (mine, told, kind), (theirs, also_told, also) in zip(layers, from_files, strict=True):
        assert kind == also
        assert_allclose(told["affine"], also_told["affine"], atol=1e-4)
        if kind == "image":
            assert_allclose(mine, theirs, atol=1e-4)
        else:
            assert (mine == theirs).mean() > 0.999  # another engine may round otherwise
            assert told["colormap"] == also_told["colormap"]


@pytest.mark.slow
def test_a_stopped_prediction_has_no_layers(untrained_model: Path) -> None:
    volume = Volume(np.ones(OBLIQUE.shape, np.float32), OBLIQUE)
    work = Work()
    work.stopped.set()
    with pytest.raises(Cancelled):
        predicted_layers(untrained_model, volume, "scan", device="cpu", work=work)


def test_the_manifest_names_functions_that_exist() -> None:
    manifest = yaml.safe_load((PLUGIN / "src" / "segkit_napari" / "napari.yaml").read_text())
    project = tomllib.loads((PLUGIN / "pyproject.toml").read_text())["project"]
    assert manifest["name"] == project["name"]
    assert project["entry-points"]["napari.manifest"] == {
        "segkit-napari": "segkit_napari:napari.yaml"
    }
    commands = {each["id"]: each["python_name"] for each in manifest["contributions"]["commands"]}
    assert all(name.startswith("segkit-napari.") for name in commands)
    for name in commands.values():
        module, _, attribute = name.partition(":")
        path = PLUGIN / "src" / f"{module.replace('.', '/')}.py"
        assert re.search(rf"^(?:def|class) {attribute}\b", path.read_text(), re.MULTILINE)


def test_the_plugin_uses_public_names_only() -> None:
    for path in (PLUGIN / "src").rglob("*.py"):
        for names in re.findall(r"^from segkit import (.+)$", path.read_text(), re.MULTILINE):
            assert {name.strip() for name in names.split(",")} <= {*segkit.__all__}
        assert not re.search(r"^(?:from segkit\.|import segkit\.)", path.read_text(), re.MULTILINE)
