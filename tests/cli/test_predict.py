"""`segkit predict`: labels and maps beside the input, cohorts, shards and ensembles."""

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segkit.config.network import NetworkConfig
from segkit.io.checksums import checksum
from segkit.io.volume import read_labels, write_volume
from segkit.model.folder import save_model
from tests.cli.command import run
from tests.helpers import affine_of
from tests.models import noise_volume, random_model


def test_predicting_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("predict", "x.nii.gz", capsys=capsys)
    assert code == 2 and "expected a finished run under runs/" in err


def test_a_prediction_keeps_the_files_affine_codes_and_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    scan = tmp_path / "scan.nii.gz"
    affine = affine_of("LPS", spacing=(1.1, 0.9, 2.0))
    image = nib.Nifti1Image(np.random.default_rng(0).random((17, 12, 9), np.float32), affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 3)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, scan)
    code, out, _ = run(
        "predict",
        scan,
        "--model",
        finished,
        "--maps",
        tmp_path / "maps",
        "--probabilities",
        capsys=capsys,
    )
    assert code == 0 and "wrote" in out and str(finished) in out.replace("\n", "")
    written = nib.load(tmp_path / "scan_seg.nii.gz")
    source = nib.load(scan)
    assert_array_equal(written.affine, source.affine)
    for field in ("qform_code", "sform_code", "xyzt_units", "quatern_b", "qoffset_x", "srow_x"):
        assert_array_equal(written.header[field], source.header[field])
    assert written.get_data_dtype() == np.uint8 and written.shape == (17, 12, 9)
    shares = nib.load(tmp_path / "scan_prob.nii.gz").get_fdata()
    assert_allclose(shares.sum(-1), 1, atol=2e-3)
    on_input = nib.load(tmp_path / "maps" / "scan_map-skip.1-gate.nii.gz")
    assert on_input.shape == (17, 12, 9)
    assert_array_equal(on_input.affine, source.affine)
    described = json.loads((tmp_path / "maps" / "scan_maps.json").read_text())["maps"]
    (described_gate,) = [entry for entry in described if entry["key"] == "skip.1/gate"]
    native = nib.load(tmp_path / "maps" / "native" / "scan_map-skip.1-gate.nii.gz")
    assert list(native.shape) == described_gate["shape"]
    assert described_gate["stride"] == [4.0, 4.0, 4.0]
    assert 0 < described_gate["min"] <= described_gate["mean"] <= described_gate["max"] < 1


def test_nothing_is_overwritten_unasked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), scan)
    mine = tmp_path / "scan_seg.nii.gz"
    mine.write_bytes(b"mine")
    code, _, err = run("predict", scan, "--model", finished, capsys=capsys)
    assert code == 2 and "exists already" in err and mine.read_bytes() == b"mine"
    code, _, err = run("predict", scan, "--model", finished, "--out", scan, capsys=capsys)
    assert code == 2 and "would overwrite the input" in err
    code, _, _ = run("predict", scan, "--model", finished, "--overwrite", capsys=capsys)
    assert code == 0 and nib.load(mine).shape == (8, 8, 8)


def test_an_engine_is_chosen_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    scan = tmp_path / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), scan)
    out = tmp_path / "labels.nii.gz"
    words = ("predict", scan, "--model", finished, "--out", out, "--engine")
    code, _, err = run(*words, "onnx", "--device", "cuda", capsys=capsys)
    assert code == 2 and "the engine onnx runs only on the CPU, found --device cuda" in err
    code, _, err = run(*words, "onnx", capsys=capsys)
    assert code == 0 and nib.load(out).shape == (8, 8, 8), err


def test_a_bad_file_does_not_stop_a_cohort_and_is_reported_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    scans = tmp_path / "scans"
    scans.mkdir()
    for name in ("a", "c"):
        image = nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4))
        nib.save(image, scans / f"{name}.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"no volume")
    out = tmp_path / "out"
    code, _, err = run("predict", scans, "--model", finished, "--out", out, capsys=capsys)
    assert code == 2
    assert "b.nii.gz: cannot be read" in err and "1 of 3 volumes failed" in err
    names = ["a.json", "a.nii.gz", "c.json", "c.nii.gz"]
    assert sorted(path.name for path in out.iterdir()) == names


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scans")
    for seed, name in enumerate("abc"):
        values = np.random.default_rng(seed).random((16, 16, 16), np.float32)
        nib.save(nib.Nifti1Image(values, np.eye(4)), folder / f"{name}.nii.gz")
    return folder


def test_several_models_mirrored_say_how_far_they_agree(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    finished: Path,
    scans: Path,
) -> None:
    assert json.loads((finished / "model" / "model.json").read_text())["mirror"] == ["x"]
    words = ["predict", scans / "a.nii.gz", "--tta", "--uncertainty"]
    twice = ["--model", finished, "--model", finished / "model"]
    code, out, _ = run(*words, *twice, "--out", tmp_path / "option", capsys=capsys)
    assert code == 0 and out.count("model: ") == 2 and "--tta has no effect" not in out
    monkeypatch.setenv("SEGKIT_MODEL", os.pathsep.join([str(finished)] * 2))
    code, out, _ = run(*words, "--out", tmp_path / "environment", capsys=capsys)
    assert code == 0 and out.count("model: ") == 2
    for name in ("a", "a_entropy", "a_variance"):
        files = [nib.load(tmp_path / out / f"{name}.nii.gz") for out in ("option", "environment")]
        assert_array_equal(files[0].get_fdata(), files[1].get_fdata())
        assert files[0].shape == (16, 16, 16)
    entropy = nib.load(tmp_path / "option" / "a_entropy.nii.gz").get_fdata()
    assert entropy.min() >= 0 and 0 < entropy.max() <= 1


def test_a_stopped_cohort_is_finished_by_the_same_command_and_shards_share_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path, scans: Path
) -> None:
    words = ["predict", scans, "--model", finished, "--out", tmp_path]
    code, out, _ = run(*words, "--shard", "2/2", capsys=capsys)
    assert code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.json", "b.nii.gz"]
    code, out, _ = run(*words, capsys=capsys)
    assert code == 0 and "skipped 1 of 3 volumes" in out and out.count("wrote") == 2
    assert len(list(tmp_path.glob("*.nii.gz"))) == 3
    code, out, _ = run(*words, "--shard", "5/5", capsys=capsys)
    assert code == 0 and "wrote" not in out
    code, _, err = run(*words, "--shard", "3/2", capsys=capsys)
    assert code == 2
    assert err == "segkit: --shard 3/2: expected I/N with I from 1 to N, such as 2/8; correct it\n"


def test_a_scan_with_results_is_skipped_unless_the_scan_was_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path, scans: Path
) -> None:
    files = [Path(shutil.copy(scans / f"{name}.nii.gz", tmp_path)) for name in "ab"]
    words = ["predict", *files, "--model", finished, "--out", tmp_path / "out"]
    code, _, _ = run(*words, capsys=capsys)
    assert code == 0
    code, out, err = run(*words, capsys=capsys)
    assert code == 0 and "skipped 2 of 2 volumes" in out and not err and "wrote" not in out
    shutil.copy(scans / "c.nii.gz", files[1])
    before = (tmp_path / "out" / "b.nii.gz").read_bytes()
    code, out, err = run(*words, capsys=capsys)
    assert code == 2 and "skipped 1 of 2 volumes" in out
    assert "made from another version of b.nii.gz" in err and "1 of 2 volumes failed" in err
    assert (tmp_path / "out" / "b.nii.gz").read_bytes() == before
    code, _, _ = run(*words, "--overwrite", capsys=capsys)
    told = json.loads((tmp_path / "out" / "b.json").read_text())["provenance"]["inputs"]
    assert code == 0 and told[0]["sha256"] == checksum(scans / "c.nii.gz")
    # One file alone, too.
    code, out, _ = run(*words[:2], *words[3:], capsys=capsys)
    assert code == 0 and "skipped 1 of 1 volume with results" in out


def test_predict_prints_its_results_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path
) -> None:
    scans, out = tmp_path / "scans", tmp_path / "out"
    scans.mkdir()
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), scans / "a.nii.gz")
    (scans / "b.nii.gz").write_bytes(b"no volume")
    words = ("predict", scans, "--out", out, "--model", finished, "--json")
    for again in (False, True):
        code, printed, err = run(*words, capsys=capsys)
        assert code == 2 and "1 of 2 volumes failed" in err
        told = json.loads(printed)
        assert told["models"] == [str(finished / "model")]
        good, bad = told["volumes"]
        assert good["input"] == [str(scans / "a.nii.gz")] and good["error"] is None
        labels = str(out / "a.nii.gz")
        first = good["written"][:1]
        assert (first, good["kept"]) == (([], labels) if again else ([labels], None))
        assert bad["written"] == [] and "cannot be read" in bad["error"]


def test_a_program_reads_progress_from_stderr_and_the_result_from_stdout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], finished: Path, scans: Path
) -> None:
    words = ("predict", scans / "a.nii.gz", "--model", finished, "--json", "--progress")
    code, out, err = run(*words, "--out", tmp_path / "a.nrrd", capsys=capsys)
    assert code == 0
    (volume,) = json.loads(out)["volumes"]
    assert volume["written"] == [str(tmp_path / "a.nrrd"), str(tmp_path / "a.json")]
    told = json.loads((tmp_path / "a.json").read_text())
    assert told["labels"] == {"background": 0, "ball": 1}
    assert told["colours"] == {"ball": "#4c9be8"}
    shares = [json.loads(line)["progress"] for line in err.splitlines()]
    assert shares[0] == 0 and shares[-1] == 1 and shares == sorted(shares)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_cohort_that_is_asked_to_stop_ends_in_one_line_with_complete_files(
    signum: int,
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_model(tmp_path / "model", random_model(NetworkConfig(channels=[2, 4])))
    for name in "abcdef":
        write_volume(tmp_path / f"in/{name}.nii.gz", noise_volume((8, 8, 8)))
    words = ("predict", tmp_path / "in", "--out", tmp_path / "out", "--model", tmp_path / "model")
    words = (*words, "--engine", "torch", "--device", "cpu")
    before = threading.active_count()
    with monkeypatch.context() as patched:
        patched.setattr("segkit.cli.predict._tell", lambda _: signal.raise_signal(signum))
        stopped, _, err = run(*words, capsys=capsys)
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    assert stopped == code
    assert err.splitlines()[-1] == (
        f"segkit: stopped by {name}; run the same command again to go on"
    )
    assert "Traceback" not in err and threading.active_count() == before
    written = sorted((tmp_path / "out").glob("*"))
    labels = [path for path in written if path.suffix == ".gz"]
    assert 1 <= len(labels) < 6 and len(written) == 2 * len(labels)  # none partial, none marked
    assert all(read_labels(path).data.shape == (8, 8, 8) for path in labels)
    assert run(*words, capsys=capsys)[0] == 0
    assert len(list((tmp_path / "out").glob("*.nii.gz"))) == 6
