"""Maps of a scan are measured where they lie, beside what the scan itself says there."""

import math
from dataclasses import replace

import numpy as np
import pytest
from numpy import ndarray

from segkit.config.labels import Labelling
from segkit.errors import VolumeError
from segkit.explain.measures.measure_maps import Measure, measure_maps
from segkit.geometry.grid import Grid, Orientation, Placement
from segkit.inference.attention_maps import AttentionMap
from segkit.io.volume import Volume
from segkit.nn.map_tap import MapInfo
from tests.helpers import affine_of

SHAPE = (8, 12, 16)
TOLD_APART = Labelling({"background": 0, "left": 1, "right": 2})


def scan_of(values: ndarray, code: str = "LPS") -> Volume:
    """A volume stored in some orientation of values given in RAS+ order."""
    affine = affine_of(code, spacing=(1.0, 1.0, 1.0))
    orientation = Orientation.of(affine)
    stored = orientation.turn_back(values)
    x, y, z = stored.shape
    return Volume(stored, Grid((x, y, z), affine))


def map_of(values: ndarray, scan: Volume, stride: int, key: str = "skip.1/gate") -> AttentionMap:
    """A gate's map, given in RAS+ order, on a grid `stride` times coarser than the scan's."""
    turned = Orientation.of(scan.grid.affine).turn_grid(scan.grid)
    offset = ((stride - 1) / 2,) * 3
    grid = turned.placed(values.shape, (stride,) * 3, offset)
    placement = Placement((float(stride),) * 3, offset)
    info = MapInfo(key, "gate", 1, placement, 0.0, 1.0)
    return AttentionMap(info, Volume(values.astype(np.float32), grid), turned)


def pooled(values: ndarray, stride: int) -> ndarray:
    x, y, z = (size // stride for size in values.shape)
    mean: ndarray = values.reshape(x, stride, y, stride, z, stride).mean(axis=(1, 3, 5))
    return mean


def measured(
    attention_map: AttentionMap, scan: Volume, labels: Volume, labelling: Labelling = TOLD_APART
) -> dict[tuple[str, str, str], Measure]:
    found = measure_maps(
        {attention_map.info.key: attention_map}, scan, labels, labelling, channels=["MRI"]
    )
    return {(one.of, one.structure, one.name): one for one in found}


def test_a_map_equal_to_the_structure_is_perfect_and_the_scan_is_measured_as_a_baseline(
    labels: ndarray,
) -> None:
    random = np.random.default_rng(0)
    scan = scan_of(np.where(labels == 1, -1.0, 0.0) + random.normal(0, 0.01, SHAPE))
    inside = pooled((labels == 1).astype(float), 2) >= 0.5
    found = measured(map_of(inside, scan, 2), scan, scan.like(scan_of(labels).data))
    share = inside.mean()
    for name, value in (("energy", 1), ("auroc", 1), ("iou", 1), ("pointing", 1)):
        assert found["map", "left", name].value == value, name
    assert found["map", "left", "enrichment"].value == pytest.approx(1 / share)
    assert found["map", "left", "energy"].chance == pytest.approx(share)
    # The structure is dark: intensity tells it just as well, the other way round.
    assert found["intensity", "left", "auroc"].value == pytest.approx(0, abs=0.01)
    assert found["map", "", "spearman_intensity"].value < -0.4
    both = found["map", "foreground", "energy"]
    assert both.value == 1 and both.chance is not None and both.chance > share


def test_a_map_equal_to_the_scan_measures_as_the_scan(labels: ndarray) -> None:
    values = np.random.default_rng(1).random(SHAPE)
    scan = scan_of(values)
    found = measured(map_of(pooled(values, 2), scan, 2), scan, scan_of(labels))
    assert found["map", "", "spearman_intensity"].value == pytest.approx(1)
    for name in ("auroc", "iou", "pointing"):
        for structure in ("left", "right", "foreground"):
            expected = found["intensity", structure, name]
            assert found["map", structure, name].value == pytest.approx(expected.value), name


def test_an_attribution_is_ranked_with_its_sign_and_also_by_its_magnitude(labels: ndarray) -> None:
    scan = scan_of(np.random.default_rng(1).random(SHAPE))
    # It speaks for the left structure, and twice as much against the right one.
    values = pooled((labels == 1) - 2.0 * (labels == 2), 1)
    one = map_of(values, scan, 1)
    info = replace(one.info, kind="attribution", lowest=-np.inf, highest=np.inf)
    found = measured(replace(one, info=info), scan, scan.like(scan_of(labels).data))
    assert found["map", "left", "auroc"].value == found["map", "left", "energy"].value == 1
    assert found["map", "right", "auroc"].value == found["map", "right", "energy"].value == 0
    assert found["magnitude", "right", "auroc"].value == 1
    left, right = (labels == 1).sum(), (labels == 2).sum()
    share = 2 * right / (left + 2 * right)
    assert found["magnitude", "right", "energy"].value == pytest.approx(share)
    assert math.isnan(found["map", "", "saturated_low"].value)
    assert ("map", "", "spearman_magnitude") not in found


def test_unlabelled_voxels_do_not_count(labels: ndarray) -> None:
    labelling = replace(TOLD_APART, ignore=3)
    random = np.random.default_rng(2)
    scan, values = scan_of(random.random(SHAPE)), random.random((4, 6, 8))
    told = labels.copy()
    told[:, :, 8:] = 3
    # What the map says where nobody labelled changes nothing.
    other = values.copy()
    other[:, :, 4:] = 1 - other[:, :, 4:]
    found, changed = (
        measured(map_of(some, scan, 2), scan, scan_of(told), labelling) for some in (values, other)
    )
    assert found["map", "left", "auroc"] == changed["map", "left", "auroc"]
    assert found["map", "", "entropy"] == changed["map", "", "entropy"]
    assert found["map", "left", "energy"].chance == pytest.approx(
        (pooled((labels == 1).astype(float), 2) >= 0.5)[:, :, :4].mean()
    )


def test_cells_that_were_not_computed_do_not_count(labels: ndarray) -> None:
    """A constant map that is NaN in half of the scan says as little as one that is whole."""
    values = np.full((4, 6, 8), 0.7)
    values[:, :, 4:] = np.nan
    scan = scan_of(np.random.default_rng(2).random(SHAPE))
    found = measured(map_of(values, scan, 2), scan, scan_of(labels))
    assert found["map", "left", "auroc"].value == 0.5
    assert found["map", "", "entropy"].value == pytest.approx(1)
    assert found["map", "left", "energy"].chance == pytest.approx(
        (pooled((labels == 1).astype(float), 2) >= 0.5)[:, :, :4].mean()
    )
    nothing = measured(map_of(np.full((4, 6, 8), np.nan), scan, 2), scan, scan_of(labels))
    assert nothing == {}


def test_a_structure_that_never_fills_half_of_a_cell_has_no_measures() -> None:
    labels = np.zeros(SHAPE, np.uint8)
    labels[3, 3, 3] = 1
    scan = scan_of(np.random.default_rng(3).random(SHAPE))
    found = measured(map_of(np.ones((4, 6, 8)), scan, 2), scan, scan_of(labels))
    assert math.isnan(found["map", "left", "auroc"].value)
    assert found["map", "left", "energy"].chance == 0


def test_a_reference_on_another_grid_is_refused(labels: ndarray) -> None:
    scan = scan_of(labels.astype(np.float32))
    moved = Volume(scan.data, scan.grid.placed(scan.grid.shape, (1, 1, 1), (1, 0, 0)))
    with pytest.raises(VolumeError, match="lies on another grid than the scan"):
        measured(map_of(np.ones((4, 6, 8)), scan, 2), scan, moved)
