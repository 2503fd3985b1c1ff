"""Which files are one volume, where its result goes, and that what lies there is kept."""

from pathlib import Path

import numpy as np
import pytest

from segkit.errors import VolumeError
from segkit.geometry import Grid
from segkit.prediction import Input, find_inputs, output_path, read_input
from segkit.volume import Volume, write_volume


def volume_at(path: Path, value: float, shift: float = 0.0) -> Path:
    affine = np.eye(4)
    affine[0, 3] = shift
    write_volume(path, Volume(np.full((2, 3, 4), value, np.float32), Grid((2, 3, 4), affine)))
    return path


def test_each_file_of_a_folder_is_a_volume_of_a_one_channel_model(tmp_path: Path) -> None:
    for name in ("b.nii.gz", "a_0000.nrrd"):
        volume_at(tmp_path / name, 1)
    (tmp_path / "notes.txt").write_text("not a volume")
    found = find_inputs([tmp_path], 1)
    assert [source.name for source in found] == ["a_0000", "b"]


def test_numbered_files_are_the_channels_of_one_volume(tmp_path: Path) -> None:
    for case in ("x", "y"):
        for channel in (0, 1):
            volume_at(tmp_path / f"{case}_{channel:04d}.nii.gz", 10 * (case == "y") + channel)
    found = find_inputs([tmp_path], 2)
    assert [source.name for source in found] == ["x", "y"]
    # One of its files names the whole volume.
    (alone,) = find_inputs([tmp_path / "y_0001.nii.gz"], 2)
    assert alone == found[1]
    assert read_input(alone).data[0, 0, 0].tolist() == [10.0, 11.0]


def test_channels_on_two_grids_are_refused(tmp_path: Path) -> None:
    files = (volume_at(tmp_path / "x_0000.nii", 1), volume_at(tmp_path / "x_0001.nii", 1, shift=2))
    with pytest.raises(VolumeError, match=r"x_0001\.nii: lies on another grid than x_0000\.nii"):
        read_input(Input("x", files))


def test_an_empty_folder_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="expected volumes"):
        find_inputs([tmp_path], 1)
    with pytest.raises(VolumeError, match="convert it first"):
        find_inputs([tmp_path / "scan.png"], 1)


def test_a_result_lies_beside_its_input_or_where_it_was_asked_for() -> None:
    source = Input("scan", (Path("in/scan.nii.gz"),))
    assert output_path(source, out=None, alone=True) == Path("in/scan_seg.nii.gz")
    assert output_path(source, out=Path("out"), alone=True) == Path("out/scan.nii.gz")
    assert output_path(source, out=Path("x.nii"), alone=True) == Path("x.nii")
    with pytest.raises(VolumeError, match="one file cannot hold several predictions"):
        output_path(source, out=Path("x.nii"), alone=False)


def test_a_result_keeps_its_inputs_format() -> None:
    source = Input("scan", (Path("scan.NRRD"),))
    assert output_path(source, out=Path("out"), alone=True) == Path("out/scan.NRRD")
