"""The pixel size of a picture from the JSON file beside it, as nnU-Net has it."""

import json
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image

from segkit.errors import VolumeError
from segkit.io.checksums import file_states
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import read_grid, read_picture_facts, read_volume


def stack(folder: Path, name: str = "cell_0000.tif") -> Path:
    """A TIFF of 2 slices, 5 rows and 7 columns, whose own resolution says 0.01 mm."""
    path = folder / name
    values = np.arange(70, dtype=np.uint16).reshape(2, 5, 7)
    tifffile.imwrite(
        path, values, resolution=(1000, 1000), resolutionunit="CENTIMETER", photometric="minisblack"
    )
    return path


def test_slices_rows_and_columns_have_the_distances_in_the_file(tmp_path: Path) -> None:
    path = stack(tmp_path)
    assert read_grid(path).spacing[:2] == pytest.approx((0.01, 0.01))
    (tmp_path / "cell.json").write_text(json.dumps({"spacing": [2.5, 0.3, 0.2]}))
    assert read_volume(path).grid.spacing == pytest.approx((0.2, 0.3, 2.5))
    facts = read_picture_facts(path)[1]
    assert (facts.unit, facts.source) == ("mm", "spacing in cell.json, in mm")


def test_settings_win_over_the_file_and_its_change_is_noticed(tmp_path: Path) -> None:
    path, beside = stack(tmp_path), tmp_path / "cell.json"
    beside.write_text(json.dumps({"spacing": [2.5, 0.3, 0.2]}))
    grid = read_grid(path, rules=PictureRules(pixel_mm=(0.5, 0.5)))
    assert grid.spacing == pytest.approx((0.5, 0.5, 2.5))
    assert [Path(name).name for name, *_ in file_states([path])] == ["cell_0000.tif", "cell.json"]


def test_two_numbers_are_rows_and_columns_of_a_picture(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((3, 4), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "a.json").write_text('{"spacing": [0.3, 0.2]}')
    assert read_grid(tmp_path / "a.png").spacing[:2] == pytest.approx((0.2, 0.3))


def test_json_of_another_kind_is_no_spacing(tmp_path: Path) -> None:
    path = stack(tmp_path)
    (tmp_path / "cell.json").write_text('{"model": "a"}')
    assert read_grid(path).spacing[:2] == pytest.approx((0.01, 0.01))


@pytest.mark.parametrize("spacing", ['[1, "2"]', "[0, 1, 1]", "[1]", "3"])
def test_a_malformed_spacing_is_refused(spacing: str, tmp_path: Path) -> None:
    path = stack(tmp_path)
    (tmp_path / "cell.json").write_text(f'{{"spacing": {spacing}}}')
    with pytest.raises(VolumeError, match=r"cell\.json: expected spacing to hold the distances"):
        read_grid(path)
