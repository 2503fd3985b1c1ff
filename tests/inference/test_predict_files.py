"""Which files are one volume, where its result goes, and that what lies there is kept."""

import json
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from segkit.config.attention import AttentionConfig, MeanPoolingConfig
from segkit.config.data import ZScoreConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.errors import ConfigError, SegkitError, Stopped, VolumeError
from segkit.geometry.grid import Grid
from segkit.inference import predict_files as prediction
from segkit.inference import write_results
from segkit.inference.model_walk import ModelWalk
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.inference.result_files import Outcome, output_path, sidecar_of
from segkit.io.inputs import Input, find_inputs, parse_shard, read_input
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from segkit.system.signals import handling_signals
from tests.helpers import ORIENTATIONS, STORED, affine_of, stored_otherwise


def test_prediction_loads_nothing_that_it_can_do_without() -> None:
    program = (
        "import sys, segkit.inference.predict_files, segkit.system.progress; print(*sys.modules)"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "segkit.inference.predictor" in loaded
    heavy = {"lightning", "torchmetrics", "matplotlib", "monai", "pandas", "sklearn", "sympy"}
    assert (heavy | {"torch._dynamo", "SimpleITK", "openvino"}).isdisjoint(loaded)


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


@pytest.mark.parametrize("suffix", [".nii", ".NII.GZ", ".mha"])
def test_channels_of_one_volume_may_end_in_different_suffixes(tmp_path: Path, suffix: str) -> None:
    volume_at(tmp_path / "x_0000.nii.gz", 10)
    volume_at(tmp_path / f"x_0001{suffix}", 11)
    found = find_inputs([tmp_path], 2)
    assert [source.name for source in found] == ["x"]
    assert find_inputs([tmp_path / "x_0000.nii.gz"], 2) == found
    assert find_inputs([tmp_path / f"x_0001{suffix}"], 2) == found
    assert read_input(found[0]).data[0, 0, 0].tolist() == [10.0, 11.0]
    for num_channels in (1, 2):  # in a folder that does not exist
        (absent,) = find_inputs([tmp_path / "nowhere" / "x_0000.nii"], num_channels)
        with pytest.raises(VolumeError, match="no such file"):
            read_input(absent)


@pytest.mark.parametrize("thin", [(0, 1), (0,), (1,)])
def test_a_channel_with_axes_of_size_1_is_the_channel_without_them(
    tmp_path: Path, thin: tuple[int, ...]
) -> None:
    for channel in (0, 1):
        values = np.full((2, 2, 2, *[1, 1] * (channel in thin)), channel, np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), tmp_path / f"a_000{channel}.nii.gz")
    (case,) = find_inputs([tmp_path], num_channels=2)
    volume = read_input(case)
    assert volume.data.shape == (2, 2, 2, 2)
    assert [volume.data[..., channel].max() for channel in (0, 1)] == [0, 1]


def test_a_file_of_two_channels_beside_one_of_one_makes_three(tmp_path: Path) -> None:
    for channel, shape in ((0, (2, 2, 2)), (1, (2, 2, 2, 2))):
        image = nib.Nifti1Image(np.zeros(shape, np.float32), np.eye(4))
        nib.save(image, tmp_path / f"a_000{channel}.nii.gz")
    (case,) = find_inputs([tmp_path], num_channels=2)
    assert read_input(case).data.shape == (2, 2, 2, 3)


@pytest.mark.parametrize("numbers", [(0, 1), (1, 0), (11, 12), (0, 1, 11)])
def test_files_that_each_hold_all_channels_are_cases_of_their_own(
    tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    for number in numbers:
        image = nib.Nifti1Image(np.zeros((2, 2, 2, 2), np.float32), np.eye(4))
        nib.save(image, tmp_path / f"a_{number:04d}.nii.gz")
    found = find_inputs([tmp_path], num_channels=2)
    assert [case.name for case in found] == [f"a_{number:04d}" for number in sorted(numbers)]


def test_channels_on_two_grids_are_refused(tmp_path: Path) -> None:
    files = (volume_at(tmp_path / "x_0000.nii", 1), volume_at(tmp_path / "x_0001.nii", 1, shift=2))
    with pytest.raises(VolumeError, match=r"x_0001\.nii: lies on another grid than x_0000\.nii"):
        read_input(Input("x", files))


def test_channels_may_store_their_axes_in_any_order(tmp_path: Path) -> None:
    grid = Grid((2, 3, 4), affine_of("LPS", (1.0, 2.0, 3.0)))
    values = np.arange(48, dtype=np.float32).reshape(2, 3, 4, 2)
    files = (tmp_path / "x_0000.nii", tmp_path / "x_0001.nii")
    write_volume(files[0], Volume(values[..., 0], grid))
    for order, flipped in STORED:
        write_volume(files[1], Volume(*stored_otherwise(values[..., 1], grid, order, flipped)))
        read = read_input(Input("x", files))
        assert_array_equal(read.data, values)
        assert read.grid.agrees_with(grid, tolerance=1e-6)


def test_an_empty_folder_and_a_strange_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="expected volumes"):
        find_inputs([tmp_path], 1)
    with pytest.raises(VolumeError, match="convert it first"):
        find_inputs([tmp_path / "scan.gif"], 1)


def test_a_result_lies_beside_its_input_or_at_the_requested_path() -> None:
    source = Input("scan", (Path("in/scan.nii.gz"),))
    assert output_path(source, out=None, single=True) == Path("in/scan_seg.nii.gz")
    assert output_path(source, out=Path("out"), single=True) == Path("out/scan.nii.gz")
    assert output_path(source, out=Path("x.nii"), single=True) == Path("x.nii")
    with pytest.raises(VolumeError, match="one file cannot hold several predictions"):
        output_path(source, out=Path("x.nii"), single=False)


def test_a_result_keeps_its_inputs_format() -> None:
    source = Input("scan", (Path("scan.NRRD"),))
    assert output_path(source, out=Path("out"), single=True) == Path("out/scan.NRRD")


def predictor_of(head: MeanPoolingConfig | None) -> Predictor:
    torch.manual_seed(0)
    description = ModelDescription(
        segkit="test",
        run="test",
        channels=["MRI"],
        labels={"background": 0, "head": 1, "tail": 2},
        network=NetworkConfig(channels=[2, 4], attention=AttentionConfig(head=head)),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[ZScoreConfig()],
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
    predictor = predictor_of(MeanPoolingConfig())
    for outcome in predict_files(predictor, inputs, out=tmp_path / "out"):
        assert outcome.error is None
        told = tmp_path / "out" / f"{outcome.input.name}_presence.json"
        labels = tmp_path / "out" / f"{outcome.input.name}.nii.gz"
        assert outcome.written == (labels, told, sidecar_of(labels))
        expected = predictor(read_input(outcome.input)).presence
        assert expected is not None and expected.keys() == {"head", "tail"}
        assert json.loads(told.read_text())["presence"] == expected
        assert outcome.presence == expected
    endings = (".json", ".nii.gz", "_presence.json")
    assert names_in(tmp_path / "out") == [f"{name}{ending}" for name in "ab" for ending in endings]


def test_presence_beside_an_input_is_named_after_it(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    (outcome,) = predict_files(predictor_of(MeanPoolingConfig()), inputs)
    assert outcome.error is None
    names = ["scan.nii.gz", "scan_presence.json", "scan_seg.json", "scan_seg.nii.gz"]
    assert names_in(tmp_path) == names


def test_presence_that_lies_there_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    told = tmp_path / "scan_presence.json"
    told.write_text("kept")
    predictor = predictor_of(MeanPoolingConfig())
    (refused,) = predict_files(predictor, inputs)
    reason = f"{told}: exists already; pass --overwrite or choose another --out"
    assert refused.error is not None and refused.error.endswith(reason)
    assert refused.written == () and refused.presence is None
    assert told.read_text() == "kept"
    assert names_in(tmp_path) == ["scan.nii.gz", "scan_presence.json"]
    (written,) = predict_files(predictor, inputs, overwrite=True)
    assert json.loads(told.read_text())["presence"] == written.presence


def test_a_model_without_a_head_neither_writes_nor_minds_presence(tmp_path: Path) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz"), noise_at(tmp_path / "b.nii.gz")], 1)
    told = tmp_path / "scan_presence.json"
    told.write_text("kept")
    for outcome in predict_files(predictor_of(None), inputs, overwrite=True):
        assert outcome.error is None and outcome.presence is None
    assert told.read_text() == "kept"
    assert not (tmp_path / "b_presence.json").exists()


def test_inputs_whose_names_differ_only_by_seg_keep_their_own_presence(tmp_path: Path) -> None:
    names = ["scan", "scan_seg"]
    paths = [noise_at(tmp_path / f"{name}.nii.gz", seed) for seed, name in enumerate(names)]
    predictor = predictor_of(MeanPoolingConfig())
    outcomes = list(predict_files(predictor, find_inputs(paths, 1), out=tmp_path / "out"))
    assert [outcome.error for outcome in outcomes] == [None, None]
    told = [json.loads((tmp_path / "out" / f"{name}_presence.json").read_text()) for name in names]
    assert told[0] != told[1]


def test_maps_that_are_there_already_are_kept_unless_they_may_be_overwritten(
    tmp_path: Path,
) -> None:
    inputs = find_inputs([noise_at(tmp_path / "scan.nii.gz")], 1)
    predictor = predictor_of(MeanPoolingConfig())
    told = tmp_path / "maps" / "scan_maps.json"
    told.parent.mkdir()
    told.write_text("precious")
    (outcome,) = predict_files(predictor, inputs, maps=told.parent)
    assert outcome.error is not None and outcome.error.endswith(
        "scan_maps.json: exists already; pass --overwrite or choose another --out"
    )
    assert told.read_text() == "precious"
    (outcome,) = predict_files(predictor, inputs, maps=told.parent, overwrite=True)
    assert outcome.error is None and told.read_text() != "precious"


def test_hidden_files_of_a_folder_are_ignored(tmp_path: Path) -> None:
    for name in ("a.nii.gz", "._a.nii.gz"):
        noise_at(tmp_path / name)
    assert [found.name for found in find_inputs([tmp_path], 1)] == ["a"]


# What is written is what the predictor says


@pytest.mark.parametrize("code", sorted(ORIENTATIONS)[::5])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".mha"])
def test_volumes_that_went_through_files_are_those_made_in_memory(
    code: str, suffix: str, tmp_path: Path
) -> None:
    grid = Grid((9, 11, 13), affine_of(code, spacing=(0.9, 1.1, 1.4)))
    values = np.random.default_rng(0).normal(5, 1, grid.shape).astype(np.float32)
    values[:3] = 0  # cut off as background
    write_volume(tmp_path / f"scan{suffix}", Volume(values, grid))
    predictor = predictor_of(None)
    (outcome,) = predict_files(
        predictor,
        find_inputs([tmp_path / f"scan{suffix}"], 1),
        maps=tmp_path / "maps",
        probabilities=True,
        uncertainty=True,
    )
    assert outcome.error is None
    expected = predictor(
        read_volume(tmp_path / f"scan{suffix}"), probabilities=True, uncertainty=True
    )
    names = ["scan_seg", "scan_prob", "scan_entropy", "scan_variance"]
    assert outcome.written[0].name == f"scan_seg{suffix}"
    for name, volume in zip(
        names,
        (expected.labels, expected.probabilities, expected.entropy, expected.variance),
        strict=True,
    ):
        assert volume is not None
        written = read_volume(tmp_path / f"{name}{suffix}")
        assert written.grid.agrees_with(grid, tolerance=1e-3)
        assert_array_equal(written.data, volume.data)
        if name != "scan_seg":
            assert written.data.dtype == np.float32
    results = [f"{name}{ending}" for name in names for ending in (suffix, ".json")]
    assert names_in(tmp_path) == sorted(["maps", f"scan{suffix}", *results])


# Cohorts


def scans_in(folder: Path, names: str = "abcde") -> Path:
    for seed, name in enumerate(names):
        noise_at(folder / f"{name}.nii.gz", seed)
    return folder


def test_a_folder_that_was_segmented_before_is_skipped(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "abc")], 1)
    predictor, out = predictor_of(None), tmp_path / "out"
    written = [outcome.written for outcome in predict_files(predictor, inputs, out=out)]
    expected = [(out / f"{name}.nii.gz", out / f"{name}.json") for name in "abc"]
    assert written == expected
    marks = {}
    for name in "ac":
        (out / f"{name}.nii.gz").write_bytes(b"mine")
        marks[name] = out / f"{name}.nii.gz"
    (out / "b.nii.gz").unlink()
    again = list(predict_files(predictor, inputs, out=out))
    assert [outcome.kept for outcome in again] == [marks["a"], None, marks["c"]]
    assert [outcome.written for outcome in again] == [(), expected[1], ()]
    assert [outcome.error for outcome in again] == [None] * 3
    assert marks["a"].read_bytes() == b"mine"
    for outcome in predict_files(predictor, inputs, out=out, overwrite=True):
        assert outcome.kept is None and outcome.error is None
    assert marks["a"].read_bytes() != b"mine"


def test_incomplete_results_of_a_stopped_run_are_written_again(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "a")], 1)
    out = tmp_path / "out"
    out.mkdir()
    (out / "a_prob.nii.gz").write_bytes(b"left")
    (outcome,) = predict_files(predictor_of(None), inputs, out=out, probabilities=True)
    assert outcome.error is None
    assert read_volume(out / "a_prob.nii.gz").data.shape == (8, 8, 8, 3)


def test_labels_without_all_requested_results_are_kept_and_reported(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "a")], 1)
    out, predictor = tmp_path / "out", predictor_of(None)
    list(predict_files(predictor, inputs, out=out))
    (outcome,) = predict_files(predictor, inputs, out=out, probabilities=True)
    assert outcome.error is not None and "a.nii.gz: exists already" in outcome.error
    assert names_in(out) == ["a.json", "a.nii.gz"]


@pytest.mark.parametrize("of_folder", [True, False])
def test_a_picture_that_fails_costs_no_labels_and_is_made_next_time(
    tmp_path: Path, of_folder: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out, predictor = scans_in(tmp_path / "in", "a"), tmp_path / "out", predictor_of(None)
    inputs = find_inputs([folder if of_folder else folder / "a.nii.gz"], 1)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "a_preview.png")

    with monkeypatch.context() as broken:
        broken.setattr(write_results, "write_montage", full)
        (outcome,) = predict_files(predictor, inputs, out=out, preview=True, statistics=True)
    assert outcome.error is not None
    assert "a_preview.png: no space left on device" in outcome.error
    assert f"its labels are written: {out / 'a.nii.gz'}" in outcome.error
    assert {path.name for path in outcome.written} == {
        "a.nii.gz",
        "a.json",
        "a_statistics.json",
    }
    labels = read_volume(out / "a.nii.gz").data
    (again,) = predict_files(predictor, inputs, out=out, preview=True, statistics=True)
    assert again.error is None and again.kept is None
    assert (out / "a_preview.png").exists()
    assert_array_equal(read_volume(out / "a.nii.gz").data, labels)
    assert not list(out.glob(".unfinished*"))


@pytest.mark.parametrize(
    ("name", "file"),
    [
        *[("", "unnamed"), (".", "-"), ("..", "--"), ("a/b", "a-b"), ("../a", "..-a")],
        *[("/a", "-a"), ("a\0b", "a-b"), ("a\x1b[2J", "a-[2J"), ("12:30", "12-30")],
        *[("CON", "CON-"), ("a.", "a-"), ("x" * 240, f"{'x' * 140}-718df670")],
    ],
)
def test_results_of_any_name_lie_in_their_folder(tmp_path: Path, name: str, file: str) -> None:
    source = Input(name, (noise_at(tmp_path / "scan.nii.gz"),))
    out = tmp_path / "out" / "labels"
    for kept in (False, True):
        (outcome,) = predict_files(predictor_of(None), [source], out=out, maps=out)
        assert outcome.error is None and (outcome.kept is not None) == kept
    assert names_in(tmp_path) == ["out", "scan.nii.gz"] and names_in(tmp_path / "out") == ["labels"]
    found = [each for each in names_in(out) if "_map" not in each and each != "native"]
    assert found == [f"{file}.json", f"{file}.nii.gz"]
    assert (out / f"{file}_maps.json").is_file()


def test_no_file_has_to_be_renamed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "in"
    for name in ("12:30", "12-30", "b?", "c"):
        noise_at(folder / "scan.nii.gz").rename(folder / f"{name}.nii.gz")
    outcomes = list(predict_files(predictor_of(None), find_inputs([folder], 1)))
    refused = [outcome.error for outcome in outcomes if outcome.error]
    assert refused == [
        f"{folder}/12:30.nii.gz: {folder}/12-30_seg.nii.gz: would also be the prediction of "
        f"{folder}/12-30.nii.gz; give one of them another --out"
    ]
    assert [record.message for record in caplog.records if "becomes" in record.message] == [
        "some names cannot be file names on every system, so files of results are called "
        "differently: '12:30' becomes '12-30', 'b?' becomes 'b-'"
    ]
    # Results with changed names are no inputs.
    names = [source.name for source in find_inputs([folder], 1)]
    assert sorted(names) == ["12-30", "12:30", "b?", "c"]


def test_a_file_whose_name_leads_upwards_keeps_its_result_in_the_folder(tmp_path: Path) -> None:
    noise_at(tmp_path / "in" / "scan.nii.gz").rename(tmp_path / "in" / "...nii.gz")
    inputs = find_inputs([tmp_path / "in" / "...nii.gz"], 1)
    assert [source.name for source in inputs] == [".."]
    (outcome,) = predict_files(predictor_of(None), inputs, out=tmp_path / "out")
    assert outcome.error is None and names_in(tmp_path / "out") == ["--.json", "--.nii.gz"]


def test_results_beside_the_inputs_of_a_folder_are_not_read_as_inputs(tmp_path: Path) -> None:
    folder = scans_in(tmp_path, "ab")
    list(predict_files(predictor_of(None), find_inputs([folder], 1), probabilities=True))
    found = find_inputs([folder], 1)
    assert [source.name for source in found] == ["a", "b"]
    assert all(
        outcome.kept is not None
        for outcome in predict_files(predictor_of(None), found, probabilities=True)
    )
    # Asked for by its own name, it is one.
    assert [source.name for source in find_inputs([folder / "a_seg.nii.gz"], 1)] == ["a_seg"]
    noise_at(folder / "alone_seg.nii.gz")
    assert "alone_seg" in [source.name for source in find_inputs([folder], 1)]


def test_shards_share_the_inputs_and_leave_none_out(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in")], 1)
    names = []
    for number in (1, 2, 3):
        outcomes = predict_files(
            predictor_of(None), inputs, out=tmp_path / "out", shard=(number, 3)
        )
        names.append("".join(outcome.input.name for outcome in outcomes if outcome.written))
    assert names == ["ad", "be", "c"]


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "1/0", "a/b", "-1/2"])
def test_a_malformed_shard_is_refused(text: str) -> None:
    assert parse_shard("2/8") == (2, 8)
    with pytest.raises(ConfigError, match=r"expected I/N with I from 1 to N, such as 2/8"):
        parse_shard(text)


def test_two_inputs_of_one_name_do_not_take_each_others_place(tmp_path: Path) -> None:
    folders = [scans_in(tmp_path / name, "a") for name in ("one", "two")]
    outcomes = list(
        predict_files(predictor_of(None), find_inputs(folders, 1), out=tmp_path / "out")
    )
    assert outcomes[0].written and outcomes[1].error is not None
    assert outcomes[1].error.endswith(
        f"would also be the prediction of {folders[0] / 'a.nii.gz'}; give one of them another --out"
    )


def test_no_result_takes_the_place_of_another_input(tmp_path: Path) -> None:
    paths = [noise_at(tmp_path / f"{name}.nii.gz") for name in ("scan", "scan_seg")]
    before = paths[1].read_bytes()
    first, second = predict_files(predictor_of(None), find_inputs(paths, 1), overwrite=True)
    assert (
        first.error is not None
        and "scan_seg.nii.gz: the prediction would overwrite an input" in first.error
    )
    assert second.written[0] == tmp_path / "scan_seg_seg.nii.gz"
    assert paths[1].read_bytes() == before


def test_outcomes_keep_the_order_of_inputs_and_a_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = scans_in(tmp_path / "in")
    (folder / "b.nii.gz").write_bytes(b"no volume")
    write = write_results.write_volume

    def failing(path: Path, volume: Volume) -> None:
        if path.name == "d.nii.gz":
            raise OSError("No space left on device")
        time.sleep(0.05 if path.name == "a.nii.gz" else 0)
        write(path, volume)

    monkeypatch.setattr(write_results, "write_volume", failing)
    outcomes = list(
        predict_files(predictor_of(None), find_inputs([folder], 1), out=tmp_path / "out")
    )
    assert [outcome.input.name for outcome in outcomes] == list("abcde")
    assert [bool(outcome.written) for outcome in outcomes] == [True, False, True, False, True]
    assert outcomes[1].error is not None and "b.nii.gz: cannot be read" in outcomes[1].error
    assert outcomes[3].error is not None and outcomes[3].error.endswith(
        "d.nii.gz: cannot write its result: No space left on device; check the disk and run the "
        "same command again"
    )


def test_a_bug_while_reading_or_writing_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in")], 1)

    def broken(*_: object) -> Volume:
        raise ZeroDivisionError("ours")

    for module, name in ((prediction, "read_input"), (write_results, "write_volume")):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, broken)
            with pytest.raises(ZeroDivisionError, match="ours"):
                list(predict_files(predictor_of(None), inputs, out=tmp_path / "out"))


def test_the_next_is_read_and_the_last_written_while_one_is_segmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in")], 1)
    events: list[str] = []
    threads: set[str] = set()
    alive: list[weakref.ref[Volume]] = []
    most = 0
    read, write = prediction.read_input, write_results.write_volume
    third_read = threading.Event()

    def reading(source: Input) -> Volume:
        nonlocal most
        volume = read(source)
        alive.append(weakref.ref(volume))
        most = max(most, sum(past() is not None for past in alive))
        events.append(f"read {source.name}")
        threads.add(threading.current_thread().name)
        if source.name == "c":
            third_read.set()
        return volume

    def writing(path: Path, volume: Volume) -> None:
        if path.name == "a.nii.gz":
            # The network is at b by now, and c is read meanwhile.
            assert third_read.wait(timeout=30)
        write(path, volume)
        events.append(f"write {path.name[0]}")
        threads.add(threading.current_thread().name)

    monkeypatch.setattr(prediction, "read_input", reading)
    monkeypatch.setattr(write_results, "write_volume", writing)
    outcomes = list(predict_files(predictor_of(None), inputs, out=tmp_path / "out"))
    assert all(outcome.written for outcome in outcomes)
    assert events.index("read b") < events.index("write a")
    assert most <= 3
    assert threading.current_thread().name not in threads and len(threads) == 2


def test_the_next_is_prepared_while_one_is_segmented(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "abc")], 1)
    prepare, run = Predictor.prepare_next, ModelWalk.walk
    prepared = [threading.Event() for _ in inputs]
    threads: set[str] = set()
    count = 0

    def preparing(self: Predictor, volume: Volume) -> object:
        images = prepare(self, volume)
        assert images is not None
        threads.add(threading.current_thread().name)
        next(event for event in prepared if not event.is_set()).set()
        return images

    def walking(self: ModelWalk, *given: object, **named: object) -> object:
        nonlocal count
        count += 1
        if count < len(inputs):  # the one after this is ready before this one is finished
            assert prepared[count].wait(timeout=30)
        return run(self, *given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Predictor, "prepare_next", preparing)
    monkeypatch.setattr(ModelWalk, "walk", walking)
    outcomes = list(predict_files(predictor_of(None), inputs, out=tmp_path / "out"))
    assert all(outcome.written for outcome in outcomes) and count == 3
    assert threading.current_thread().name not in threads and len(threads) == 1


def test_preparing_ahead_changes_no_bit_and_needs_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "abc")], 1)
    written = []
    for name, free in (("ahead", 10**9), ("alone", 8**3 * 4 * 2 * 2)):
        monkeypatch.setattr("segkit.inference.model_walk.free_memory_of", lambda _, free=free: free)
        ready = [predictor_of(None).prepare_next(read_input(each)) for each in inputs]
        assert all((images is not None) == (name == "ahead") for images in ready)
        list(predict_files(predictor_of(None), inputs, out=tmp_path / name, probabilities=True))
        written.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*")})
    assert written[0] == written[1] and len(written[0]) == 12


def test_a_volume_that_cannot_be_prepared_is_told_for_itself(tmp_path: Path) -> None:
    folder = scans_in(tmp_path / "in", "abc")
    values = np.full((8, 8, 8), np.nan, np.float32)
    write_volume(folder / "b.nii.gz", Volume(values, Grid((8, 8, 8), np.eye(4))))
    outcomes = list(
        predict_files(predictor_of(None), find_inputs([folder], 1), out=tmp_path / "out")
    )
    assert [bool(outcome.error) for outcome in outcomes] == [False, True, False]
    assert "b.nii.gz" in str(outcomes[1].error) and "NaN" in str(outcomes[1].error)


def test_a_consumer_that_stops_leaves_only_complete_files(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in")], 1)
    outcomes = predict_files(predictor_of(None), inputs, out=tmp_path / "out")
    first = next(outcomes)
    assert isinstance(first, Outcome)
    outcomes.close()
    for path in (tmp_path / "out").glob("*.nii.gz"):
        assert read_volume(path).data.shape == (8, 8, 8)
        assert sidecar_of(path).is_file()


def test_ctrl_c_while_a_volume_is_read_prepares_and_begins_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in")], 1)
    begun: list[str] = []
    prepared: list[Volume] = []
    second_asked, stopping = threading.Event(), threading.Event()
    read, shutdown = prediction.read_input, ThreadPoolExecutor.shutdown
    submit = ThreadPoolExecutor.submit

    def submitting(self: ThreadPoolExecutor, *given: Any) -> Any:
        future = submit(self, *given)
        if given[2].name == "b":
            second_asked.set()
        return future

    def reading(source: Input) -> Volume:
        begun.append(source.name)
        assert second_asked.wait(timeout=30)
        time.sleep(0.3)  # a signal just before the main thread waits would be seen only after it
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        assert stopping.wait(timeout=30)
        return read(source)

    def shutting(self: ThreadPoolExecutor, wait: bool = True, **more: bool) -> None:
        shutdown(self, wait=False, **more)
        stopping.set()
        shutdown(self, wait=wait, **more)

    monkeypatch.setattr(prediction, "read_input", reading)
    monkeypatch.setattr(ThreadPoolExecutor, "shutdown", shutting)
    monkeypatch.setattr(ThreadPoolExecutor, "submit", submitting)
    monkeypatch.setattr(Predictor, "prepare_next", lambda _, volume: prepared.append(volume))
    before = threading.active_count()
    with pytest.raises(Stopped, match="stopped by Ctrl-C"), handling_signals():
        list(predict_files(predictor_of(None), inputs, out=tmp_path / "out"))
    assert begun == ["a"] and prepared == []
    assert threading.active_count() == before and not list(tmp_path.glob("out/*"))


def test_a_prediction_that_fails_is_reported_in_one_sentence(tmp_path: Path) -> None:
    inputs = find_inputs([scans_in(tmp_path / "in", "ab")], 1)

    class Failing(Predictor):
        def __call__(self, *_: object, **__: object) -> None:  # type: ignore[override]
            raise SegkitError("the network is tired; let it rest")

    predictor = predictor_of(None)
    predictor.__class__ = Failing
    errors = [outcome.error for outcome in predict_files(predictor, inputs, out=tmp_path / "out")]
    assert errors == [
        f"{tmp_path / 'in' / name}.nii.gz: the network is tired; let it rest" for name in "ab"
    ]
