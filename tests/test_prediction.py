"""Which files are one volume, where its result goes, and that what lies there is kept."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.build import build_network
from segkit.config import ModelDescription, NetworkConfig, ZScore
from segkit.config_attention import AttentionConfig, MeanPooling
from segkit.errors import VolumeError
from segkit.geometry import Grid
from segkit.inference.predictor import Predictor
from segkit.model import Model
from segkit.prediction import Input, find_inputs, output_path, predict_files, read_input
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


def predictor_of(head: MeanPooling | None) -> Predictor:
    torch.manual_seed(0)
    description = ModelDescription(
        segkit="test",
        run="test",
        channels=["MRI"],
        labels={"background": 0, "head": 1, "tail": 2},
        network=NetworkConfig(channels=[2, 4], attention=AttentionConfig(head=head)),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[ZScore()],
        slices="axial",
        patch_size=[8, 8, 8],
    )
    return Predictor(Model(description, build_network(description)), device="cpu")


def noise_at(path: Path, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).normal(size=(8, 8, 8)).astype(np.float32)
    write_volume(path, Volume(values, Grid((8, 8, 8), np.eye(4))))
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_presence_is_written_beside_the_labels_of_a_model_with_a_head(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "in" / f"{name}.nii.gz") for name in "ab"], 1)
    predictor = predictor_of(MeanPooling())
    for outcome in predict_files(predictor, inputs, out=tmp_path / "out"):
        assert outcome.error is None
        told = tmp_path / "out" / f"{outcome.input.name}_presence.json"
        assert outcome.written == (tmp_path / "out" / f"{outcome.input.name}.nii.gz", told)
        expected = predictor(read_input(outcome.input)).presence
        assert expected is not None and expected.keys() == {"head", "tail"}
        assert json.loads(told.read_text()) == {"presence": expected}
        assert outcome.presence == expected
    names = ["a.nii.gz", "a_presence.json", "b.nii.gz", "b_presence.json"]
    assert names_in(tmp_path / "out") == names


def test_presence_beside_an_input_is_named_after_it(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    (outcome,) = predict_files(predictor_of(MeanPooling()), inputs)
    assert outcome.error is None
    names = ["scan.nii.gz", "scan_presence.json", "scan_seg.nii.gz"]
    assert names_in(tmp_path) == names


def test_presence_that_lies_there_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    told = tmp_path / "scan_presence.json"
    told.write_text("kept")
    predictor = predictor_of(MeanPooling())
    (refused,) = predict_files(predictor, inputs)
    reason = f"{told}: exists already; pass --overwrite or name another --out"
    assert refused.error is not None and refused.error.endswith(reason)
    assert refused.written == () and refused.presence is None
    assert told.read_text() == "kept"
    assert names_in(tmp_path) == ["scan.nii.gz", "scan_presence.json"]
    (written,) = predict_files(predictor, inputs, overwrite=True)
    assert json.loads(told.read_text()) == {"presence": written.presence}


def test_a_model_without_a_head_neither_writes_nor_minds_presence(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz"), noise_at(tmp_path / "b.nii.gz")], 1)
    told = tmp_path / "scan_presence.json"
    told.write_text("kept")
    for outcome in predict_files(predictor_of(None), inputs, overwrite=True):
        assert outcome.error is None and outcome.presence is None
    assert told.read_text() == "kept"
    assert not (tmp_path / "b_presence.json").exists()


def test_inputs_named_alike_but_for_seg_keep_their_own_presence(tmp_path: Path) -> None:
    names = ["scan", "scan_seg"]
    paths = [noise_at(tmp_path / f"{name}.nii.gz", seed) for seed, name in enumerate(names)]
    predictor = predictor_of(MeanPooling())
    outcomes = list(predict_files(predictor, find_inputs(paths, 1), out=tmp_path / "out"))
    assert [outcome.error for outcome in outcomes] == [None, None]
    told = [json.loads((tmp_path / "out" / f"{name}_presence.json").read_text()) for name in names]
    assert told[0] != told[1]


def test_maps_that_are_there_already_are_kept_unless_they_may_be_overwritten(
    tmp_path: Path,
) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    predictor = predictor_of(MeanPooling())
    told = tmp_path / "maps" / "scan_maps.json"
    told.parent.mkdir()
    told.write_text("precious")
    (outcome,) = predict_files(predictor, inputs, maps=told.parent)
    assert outcome.error is not None and outcome.error.endswith(
        "scan_maps.json: exists already; pass --overwrite or name another --out"
    )
    assert told.read_text() == "precious"
    (outcome,) = predict_files(predictor, inputs, maps=told.parent, overwrite=True)
    assert outcome.error is None and told.read_text() != "precious"


def test_hidden_files_of_a_folder_are_no_volumes(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "._a.nii.gz"):
        noise_at(tmp_path / name)
    assert [found.name for found in find_inputs([tmp_path], 1)] == ["a"]
