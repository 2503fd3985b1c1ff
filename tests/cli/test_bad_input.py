"""Awkward and damaged volumes at every command: a result on the volume's grid, or one sentence."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_array_equal

from segkit.cli.main import main
from segkit.config.load import dump_yaml
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.planning import planned_seconds, planning_task
from tests.helpers import affine_of
from tests.small import small_config, small_dataset

NOISE = np.random.default_rng(0).normal(size=(20, 18, 16)).astype(np.float32)


@pytest.fixture
def segkit(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """Runs a command; gives its exit code and all that it said on stderr."""

    def run(*words: object) -> tuple[int, str]:
        before, sys.argv = sys.argv, ["segkit", *map(str, words)]
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            sys.argv = before
        return int(stop.value.code or 0), capfd.readouterr().err

    return run


def scan(path: Path, values: ndarray, spacing: float = 1.0) -> Path:
    """A volume of that spacing."""
    x, y, z = values.shape[:3]
    write_volume(path, Volume(values, Grid((x, y, z), affine_of("LPS", (spacing,) * 3))))
    return path


def damaged(path: Path) -> Path:
    """A volume whose compressed data are cut short: the one that is there, or noise."""
    if not path.exists():
        scan(path, NOISE)
    path.write_bytes(path.read_bytes()[:-300])
    return path


# Refused


@pytest.mark.parametrize(
    "words",
    [
        ("predict", "{scan}"),
        ("explain", "{scan}", "--out", "{out}"),
        ("evaluate", "{scan}", "{scan}"),
        ("check", "{scan}"),
        ("check", "{data}"),
        ("plan", "{data}", "--out", "{out}/c.yaml", "--no-race"),
        ("train", "{config}"),
    ],
    ids=lambda words: " ".join(words[:2]),
)
def test_damage_is_one_sentence_and_exit_code_2_whatever_the_command(
    words: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    segkit: Callable[..., tuple[int, str]],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGKIT_MODEL", str(finished))
    data = small_dataset(tmp_path / "data")
    bad = damaged(data / "imagesTr" / "case_2.nii.gz")
    (tmp_path / "c.yaml").write_text(dump_yaml(small_config(data)))
    places = {"scan": bad, "data": data, "out": tmp_path / "out", "config": tmp_path / "c.yaml"}
    code, err = segkit(*[word.format(**places) for word in words])
    assert code == 2
    *_, last = err.splitlines()
    sentence = (
        f"segkit: {bad}: cannot be read as .nii.gz: its compressed data are incomplete; repair or "
        f"convert it, or get a new copy"
    )
    assert last == sentence
    assert "Traceback" not in err


NOT_FINITE = NOISE.copy()
NOT_FINITE[3, 3, 3] = np.nan
REFUSED: dict[str, tuple[ndarray, float, str]] = {
    "NaN": (NOT_FINITE, 1.0, "the volume holds 1 NaN or infinite values among"),
    "infinity": (
        np.where(np.isnan(NOT_FINITE), np.inf, NOT_FINITE),
        1.0,
        "the volume holds 1 NaN or infinite values among",
    ),
    "beyond single precision": (
        np.where(np.isnan(NOT_FINITE), 1e300, NOT_FINITE.astype(np.float64)),
        1.0,
        "the volume holds values from ",
    ),
    "huge spacing": (
        NOISE,
        1e4,
        "expected a volume that fits into memory at the network's spacing",
    ),
    "two channels": (np.stack([NOISE, NOISE], axis=3), 1.0, "the model expects 1 channel (MRI)"),
}


@pytest.mark.parametrize("command", ["predict", "explain"])
@pytest.mark.parametrize("name", REFUSED)
def test_values_that_cannot_be_computed_with_are_refused_with_their_file(
    name: str,
    command: str,
    tmp_path: Path,
    finished: Path,
    segkit: Callable[..., tuple[int, str]],
) -> None:
    values, spacing, reason = REFUSED[name]
    path = scan(tmp_path / "scan.nii", values, spacing)
    code, err = segkit(command, path, "--model", finished, "--out", tmp_path / "out")
    assert code == 2
    assert err.startswith(f"segkit: {path}: {reason}") and err.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))


def test_huge_voxels_among_the_training_cases_are_refused_by_name(
    tmp_path: Path, segkit: Callable[..., tuple[int, str]]
) -> None:
    data = small_dataset(tmp_path / "data")
    for folder in ("imagesTr", "labelsTr"):
        path = data / folder / "case_1.nii.gz"
        volume = read_volume(path)
        write_volume(path, Volume(volume.data, Grid(volume.grid.shape, np.diag([1e5] * 3 + [1]))))
    config = small_config(data, data={"spacing": [1.0, 1.0, 1.0], "validation": 0.0})
    (tmp_path / "c.yaml").write_text(dump_yaml(config))
    code, err = segkit("train", tmp_path / "c.yaml", "--runs", tmp_path / "runs")
    assert code == 2
    assert err.splitlines()[-1].startswith(
        "segkit: case case_1: expected a volume that fits into memory"
    )


def test_images_are_refused_as_labels(
    tmp_path: Path, segkit: Callable[..., tuple[int, str]]
) -> None:
    path = scan(tmp_path / "scan.nii.gz", np.arange(2000, dtype=np.int16).reshape(20, 10, 10))
    code, err = segkit("evaluate", path, path)
    assert code == 2
    assert f"{path}: expected at most 1000 labels, found 2000 different numbers" in err


def test_a_prediction_on_another_grid_than_its_reference_is_refused(
    tmp_path: Path, segkit: Callable[..., tuple[int, str]]
) -> None:
    labels = np.ones((4, 4, 4), np.uint8)
    first, second = scan(tmp_path / "a.nii", labels), scan(tmp_path / "b.nii", labels, 1.1)
    code, err = segkit("evaluate", first, second)
    assert (code, err) == (
        2,
        f"segkit: {first}: lies on another grid than {second}: its spacing is 1x1x1 mm, not "
        "1.1x1.1x1.1 mm, so that voxels lie up to 0.3 voxels apart; resample one onto the other\n",
    )


# Accepted


ACCEPTED: dict[str, tuple[ndarray, float]] = {
    "constant": (np.full((20, 18, 16), 7, np.int16), 1.0),
    "zeros": (np.zeros((20, 18, 16), np.float32), 1.0),
    "one voxel": (np.full((1, 1, 1), 3, np.uint8), 1.0),
    "one slice": (NOISE[:, :, :1], 1.0),
    "one column": (NOISE[:1, :1], 1.0),
    "thinner than a patch": (NOISE[:, :3], 1.0),
    "tiny voxels": (NOISE, 1e-4),
    "large voxels": (NOISE[:2, :3, :4], 9.0),
    "bytes with a sign": ((NOISE * 40).astype(np.int8), 1.0),
    "whole numbers of 64 bits": ((NOISE * 1e15).astype(np.int64), 1.0),
    "unsigned whole numbers of 64 bits": (np.abs(NOISE * 1e18).astype(np.uint64), 1.0),
    "double precision": (NOISE.astype(np.float64) * 1e20, 1.0),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_awkward_volume_is_segmented_on_its_own_grid(
    name: str, tmp_path: Path, finished: Path, segkit: Callable[..., tuple[int, str]]
) -> None:
    values, spacing = ACCEPTED[name]
    path = scan(tmp_path / "scan.nii.gz", values, spacing)
    maps = tmp_path / "maps"
    code, err = segkit("predict", path, "--model", finished, "--maps", maps, "--probabilities")
    assert (code, err) == (0, "")
    labels = read_volume(tmp_path / "scan_seg.nii.gz")
    assert labels.data.dtype == np.uint8 and set(np.unique(labels.data)) <= {0, 1}
    assert labels.data.shape == values.shape[:3]
    assert_array_equal(labels.grid.affine, read_volume(path).grid.affine)
    for written in [tmp_path / "scan_prob.nii.gz", *maps.rglob("*.nii.gz")]:
        # Of a scan that is 0 everywhere no map is computed.
        unknown = name == "zeros" and written.parent != tmp_path
        assert (np.isnan if unknown else np.isfinite)(read_volume(written).data).all(), written
    mean = json.loads((maps / "scan_maps.json").read_text())["maps"][0]["mean"]
    assert mean is None if name == "zeros" else np.isfinite(mean)


@pytest.mark.parametrize("name", ["constant", "zeros", "one voxel", "one slice", "tiny voxels"])
def test_an_awkward_volume_is_explained(
    name: str, tmp_path: Path, finished: Path, segkit: Callable[..., tuple[int, str]]
) -> None:
    values, spacing = ACCEPTED[name]
    path = scan(tmp_path / "scan.nii.gz", values, spacing)
    code, err = segkit("explain", path, "--model", finished, "--out", tmp_path / "out")
    assert (code, err) == (0, "")
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_dataset_of_awkward_images_is_planned_and_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, segkit: Callable[..., tuple[int, str]]
) -> None:
    monkeypatch.setattr(planning_task, "multiply_adds_per_second", lambda *_: 20e9)
    monkeypatch.setattr(planned_seconds, "step_seconds", lambda *_, **__: 0.01)
    data = small_dataset(tmp_path / "data")
    for number, values in enumerate((np.zeros((16, 16, 16)), np.full((2, 3, 4), 5), NOISE[:, :1])):
        scan(data / "imagesTr" / f"case_{number}.nii.gz", values.astype(np.float32))
        label = (values > 0.5).astype(np.uint8)
        scan(data / "labelsTr" / f"case_{number}.nii.gz", label)
    plan = tmp_path / "plan.yaml"
    code, err = segkit("plan", data, "--out", plan, "--minutes", 1, "--runs", tmp_path / "runs")
    assert (code, err) == (0, "") and plan.is_file()
    (tmp_path / "c.yaml").write_text(dump_yaml(small_config(data)))
    code, err = segkit("train", tmp_path / "c.yaml", "--runs", tmp_path / "runs")
    assert code == 0, err
    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    assert summary["steps"] == 4
