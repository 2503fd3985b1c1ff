"""The napari plugin with the real napari, without a screen; skipped where it is not installed.

napari has a plugin for pytest, whose import warns: `pytest -W ignore tests/integrations`.
"""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

import segkit
from segkit import Volume, read_volume, write_volume
from tests.conftest import ROOT
from tests.helpers import affine_of

os.environ.setdefault("QT_QPA_PLATFORM", "offscreen")
napari = pytest.importorskip("napari", reason="napari is not installed")
npe2 = pytest.importorskip("npe2", reason="npe2 is not installed")
pytest.importorskip("qtpy", reason="qtpy is not installed")

from napari.components import ViewerModel  # noqa: E402
from napari.layers import Image, Labels, Layer  # noqa: E402
from qtpy.QtWidgets import QApplication  # noqa: E402

from segkit_napari import widget as widgets  # noqa: E402
from segkit_napari.layers import map_layers  # noqa: E402
from segkit_napari.reader import read  # noqa: E402
from segkit_napari.widget import GatesWidget, PredictWidget  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def application() -> Any:
    return QApplication.instance() or QApplication([])


@pytest.fixture
def viewer(application: Any, oblique_scan: Path) -> Any:
    """A viewer without a window, with the oblique scan."""
    model = ViewerModel()
    for layer in read(str(oblique_scan)):
        model.add_layer(Layer.create(*layer))
    return model


def finished(widget: PredictWidget) -> None:
    until = time.monotonic() + 300
    while not widget.poll():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_npe2_accepts_the_manifest() -> None:
    path = ROOT / "integrations" / "napari" / "src" / "segkit_napari" / "napari.yaml"
    manifest = npe2.PluginManifest.from_file(path)
    manifest.validate_imports()
    assert [each.display_name for each in manifest.contributions.widgets] == [
        "Segment with segkit",
        "Attention maps",
    ]


def test_a_point_of_a_layer_lies_where_nibabel_says_by_naparis_own_transforms(
    viewer: Any, oblique_scan: Path
) -> None:
    scan = read_volume(oblique_scan)
    (layer,) = viewer.layers
    for index in np.random.default_rng(0).integers(0, scan.grid.shape, (20, 3)):
        world = np.array(layer.data_to_world(index[::-1]))[::-1]
        assert_allclose(world, scan.grid.world(index), atol=1e-4)
        assert layer.data[tuple(index[::-1])] == scan.data[tuple(index)]


def test_a_layer_is_segmented_and_its_maps_lie_over_it(
    viewer: Any, untrained_model: Path, oblique_scan: Path
) -> None:
    widget = PredictWidget(viewer)
    widget.model.value = untrained_model
    assert [box.label for box in widget.channels] == ["CT"]
    widget.device.value = "cpu"
    widget.start()
    assert not widget.segment.enabled and widget.cancel.enabled
    finished(widget)
    assert widget.status.value == "2 new layers" and widget.segment.enabled
    _, gate, labels = viewer.layers
    assert isinstance(gate, Image) and isinstance(labels, Labels)
    expected = segkit.Predictor.load(untrained_model, device="cpu")(
        read_volume(oblique_scan), maps=True
    )
    volume = expected.maps["skip.1/gate"].volume
    assert volume is not None
    for index in np.random.default_rng(0).integers(0, volume.grid.shape, (20, 3)):
        world = np.array(gate.data_to_world(index[::-1]))[::-1]
        assert_allclose(world, volume.grid.world(index), atol=1e-4)
    assert_array_equal(labels.data, expected.labels.data.T)
    assert labels.features["name"].tolist() == ["background", "liver", "lesion"]
    for number, name in ((3, "liver"), (7, "lesion")):
        hexadecimal = segkit.label_colour(number)
        rgb = [int(hexadecimal[start : start + 2], 16) / 255 for start in (1, 3, 5)]
        assert_allclose(labels.get_color(number)[:3], rgb, atol=1e-3, err_msg=name)
    assert labels.get_color(0) is None or labels.get_color(0)[3] == 0
    # Maps are not offered as scans to segment.
    widget.list_layers()
    assert [layer.name for layer in widget.channels[0].choices] == ["scan"]


def test_values_that_were_not_computed_are_transparent(viewer: Any) -> None:
    values = np.array([[[np.nan, 0.5]]], np.float32)
    ((data, keywords, kind),) = map_layers(Volume(values, segkit.Grid((1, 1, 2), np.eye(4))), "m")
    layer = Layer.create(data, keywords, kind)
    colours = layer.colormap.map(np.array([np.nan, 0.5]))
    assert colours[0, 3] == 0 and colours[1, 3] == 1


def test_a_prediction_can_be_stopped_and_mistakes_are_sentences(
    viewer: Any, untrained_model: Path, tmp_path: Path
) -> None:
    widget = PredictWidget(viewer)
    widget.model.value = tmp_path
    assert "expected a run or a model folder" in widget.status.value
    widget.model.line_edit.value = "hf:owner/name"
    assert widget.address == "hf:owner/name"
    assert [box.label for box in widget.channels] == ["layer"]
    widget.model.value = untrained_model
    widget.start()
    widget.stop()
    finished(widget)
    assert widget.status.value == "stopped, because you pressed Cancel"
    assert len(viewer.layers) == 1
    viewer.layers.clear()
    widget.start()
    assert widget.status.value.startswith("expected an image layer for each channel, found none")


def test_every_transform_and_unit_of_a_layer_counts() -> None:
    data = np.zeros((4, 5, 6), np.float32)
    affine = affine_of("LPS")[np.ix_([2, 1, 0, 3], [2, 1, 0, 3])]
    layer = Image(data, affine=affine, scale=(3, 2, 1), translate=(1, 2, 3), units=("um",) * 3)
    expected = affine @ np.array([[3, 0, 0, 1], [0, 2, 0, 2], [0, 0, 1, 3], [0, 0, 0, 1]])
    expected[:3] /= 1000
    assert_allclose(widgets.affine_of(layer), expected, atol=1e-9)
    flat = Image(data[0], scale=(2, 3))
    assert_allclose(widgets.affine_of(flat).diagonal(), [1, 2, 3, 1])


def test_one_map_is_shown_at_a_time_and_slices_can_be_turned_upright(
    viewer: Any, tmp_path: Path
) -> None:
    widget = GatesWidget(viewer)
    assert widget.told.value == "no attention maps yet"
    grid = segkit.Grid((2, 2, 2), np.eye(4))
    for number, key in enumerate(("skip.1/gate", "skip.2/gate")):
        values = np.full((2, 2, 2), 0.25 + number / 2, np.float32)
        values[0, 0, 0] = np.nan
        for layer in map_layers(Volume(values, grid), key, (0, 1)):
            viewer.add_layer(Layer.create(*layer))
    one, two = widget.maps()
    assert (one.visible, two.visible) == (True, False)
    widget.map.value = two
    widget.opacity.value = 0.3
    assert (one.visible, two.visible, two.opacity) == (False, True, 0.3)
    assert widget.told.value == "min 0.75, mean 0.75, max 0.75; 12% of the cells were not computed"
    widget.turn_upright()
    assert [each.value for each in viewer.scene.camera.orientation2d] == ["up", "left"]


def test_napari_opens_files_with_the_plugin(
    viewer: Any, tmp_path: Path, oblique_scan: Path
) -> None:
    """Through the plugin manager, as a drop onto the window does."""
    path = ROOT / "integrations" / "napari" / "src" / "segkit_napari" / "napari.yaml"
    scan = tmp_path / "opened.nii.gz"
    write_volume(scan, read_volume(oblique_scan))
    npe2.PluginManager.instance().register(npe2.PluginManifest.from_file(path))
    (layer,) = viewer.open(str(scan), plugin="segkit-napari")
    assert layer.name == "opened"
    assert_allclose(widgets.affine_of(layer), widgets.affine_of(viewer.layers[0]), atol=1e-4)
