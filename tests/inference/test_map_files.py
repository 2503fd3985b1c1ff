"""Names of map files are possible on every system, and differ."""

import json
from pathlib import Path

import numpy as np

from segkit.geometry.grid import Grid
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.map_files import names_of_maps, write_maps
from segkit.io.volume import Volume, read_volume
from segkit.nn.map_tap import MapInfo, Placement

GRID = Grid((3, 3, 3), np.eye(4))


def test_maps_of_structures_with_any_name_have_different_files() -> None:
    keys = ["ig/left kidney", "ig/a/b", "ig/a-b", "ig/A:B", "ig/who?"]
    names = ["ig-left kidney", "ig-a-b", "ig-a-b-2", "ig-A-B-3", "ig-who-"]
    assert list(names_of_maps(keys).items()) == list(zip(keys, names, strict=True))


def test_the_json_file_names_the_files_of_each_map(tmp_path: Path) -> None:
    source = Volume(np.zeros((3, 3, 3), np.float32), GRID)
    maps = {
        key: AttentionMap(
            MapInfo(key, "attribution", 0, Placement.identity(3), -np.inf, np.inf),
            Volume(np.full((3, 3, 3), value, np.float32), GRID),
            source.grid,
        )
        for value, key in enumerate(["ig/cyst: small", "ig/cyst? small"])
    }
    write_maps(tmp_path, "scan", maps, source)
    told = json.loads((tmp_path / "scan_maps.json").read_text())["maps"]
    names = ["scan_map-ig-cyst- small", "scan_map-ig-cyst- small-2"]
    assert [(one["key"], one["file"]) for one in told] == list(zip(maps, names, strict=True))
    for value, one in enumerate(told):
        for folder in (tmp_path, tmp_path / "native"):
            assert read_volume(folder / f"{one['file']}.nii.gz").data.mean() == value
