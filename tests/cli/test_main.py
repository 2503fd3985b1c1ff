"""What a user sees: files, one sentence, exit codes."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segkit.cli.main import main
from segkit.config.load import dump_yaml
from segkit.planning import make_plan as planning
from tests.helpers import affine_of
from tests.small import magnified, small_config, small_dataset, trained_run

COMMANDS = ("demo", "train", "predict", "evaluate", "check")


def run(*words: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a `segkit` command."""
    before, sys.argv = sys.argv, ["segkit", *map(str, words)]
    try:
        with pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    code = stop.value.code
    assert code is None or isinstance(code, int)
    return code or 0, out, err


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on small made-up volumes."""
    return trained_run(tmp_path_factory.mktemp("finished"))


def test_help_loads_neither_torch_nor_lightning_nor_monai() -> None:
    code = (
        "import sys; sys.argv = ['segkit', '--help']\n"
        "from segkit.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'monai', 'lightning', 'nibabel', 'scipy'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip().endswith("[]"), result.stdout + result.stderr
    assert all(command in result.stdout for command in COMMANDS)


def test_module_and_command_are_one() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "segkit", "--version"], capture_output=True, text=True
    )
    assert result.returncode == 0 and result.stdout.startswith("segkit 0.")


def test_a_wrong_setting_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{folder: {tmp_path}, patch_size: [8, 8, 8]}}\n")
    code, out, err = run("train", config, "train.stepps=3", capsys=capsys)
    assert code == 2 and out == ""
    assert err == f"segkit: {config}: train.stepps is not a setting (did you mean steps?)\n"


@pytest.mark.parametrize("words", [("check", "nowhere.nii.gz"), ("predict", "x.nii.gz")])
def test_a_missing_file_is_one_line_and_exit_code_2(
    words: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    finished: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEGKIT_MODEL", str(finished))
    code, _, err = run(*words, capsys=capsys)
    assert code == 2
    assert err.startswith(f"segkit: {words[1]}: no such file") and err.count("\n") == 1


def test_predicting_without_a_model_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, _, err = run("predict", "x.nii.gz", capsys=capsys)
    assert code == 2 and "no finished run under runs/" in err


def test_folds_are_trained_by_one_command_and_gone_on_with_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = small_dataset(tmp_path / "data", num_cases=5)
    config = small_config(data, train={"steps": 1})
    (tmp_path / "small.yaml").write_text(dump_yaml(config))
    monkeypatch.chdir(tmp_path)
    code, out, err = run("train", "small.yaml", "--folds", "0,3", capsys=capsys)
    assert (code, err) == (0, "")
    for line in ("fold 0, 1 of 2", "fold 3, 2 of 2", "2 steps in", "mean Dice of 2 held-out cases"):
        assert line in out, line
    assert "post-processing: " in out and "wrote runs/small\n" in out
    code, out, err = run("train", "--resume", "runs/small", capsys=capsys)
    assert code == 2 and "runs/small: is finished already" in err
    (tmp_path / "runs/small/fold_3/summary.json").unlink()
    code, out, _ = run("train", "--resume", "runs/small", capsys=capsys)
    assert code == 0 and "fold 3, 2 of 2" in out and "fold 0" not in out
    # All folds predict together.
    scan = data / "imagesTr" / "case_0.nii.gz"
    code, out, _ = run("predict", scan, "--out", tmp_path / "seg.nii.gz", capsys=capsys)
    assert code == 0 and out.startswith(
        "model: runs/small/fold_0/model\nmodel: runs/small/fold_3/model\nwrote "
    )


@pytest.mark.parametrize("folds", ["5", "0,x", "", "every"])
def test_folds_that_are_none_are_refused(
    folds: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", tmp_path / "c.yaml", "--folds", folds, capsys=capsys)
    assert code == 2
    assert err == (
        f"segkit: --folds is {folds!r}; expected all, or numbers from 0 to 4 such as 0,2\n"
    )


def test_a_run_has_no_folds_to_go_on_with(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run("train", "--resume", finished, "--folds", "all", capsys=capsys)
    assert code == 2
    assert err == f"segkit: {finished}: is one run, not a cross-validation; leave --folds out\n"


def test_our_own_bugs_keep_their_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("segkit.checking.check", broken)
    monkeypatch.setattr(sys, "argv", ["segkit", "check", str(tmp_path)])
    with pytest.raises(ZeroDivisionError, match="ours"):
        main()


def test_what_the_system_refuses_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "out.json")

    monkeypatch.setattr("segkit.checking.check", full)
    code, _, err = run("check", tmp_path, capsys=capsys)
    assert code == 2
    assert err == (
        "segkit: out.json: no space left on device; free some space there and run the same "
        "command again\n"
    )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("predict scan --maps --tta", "--maps needs a value, found --tta"),
        (
            "predict scan --tta --out --maps x",
            "--out needs a value, found --maps",
        ),
        ("explain scan --out -q", "--out needs a value, found -q"),
    ],
)
def test_an_option_is_never_taken_as_the_value_of_another(
    words: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(*words.split(), capsys=capsys)
    assert (code, out, err) == (2, "", f"segkit: {sentence}; give it one or leave it out\n")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_command_that_is_asked_to_stop_says_so_in_one_line(
    signum: int,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr("segkit.checking.check", lambda *_, **__: signal.raise_signal(signum))
    name = "Ctrl-C" if signum == signal.SIGINT else "SIGTERM"
    sentence = f"segkit: stopped by {name}; run the same command again to go on\n"
    assert run("check", tmp_path, capsys=capsys) == (code, "", sentence)


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
    assert code == 2 and "is the input itself" in err
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
    assert code == 2 and "the engine onnx runs on the CPU, found --device cuda" in err
    code, _, err = run(*words, "onnx", capsys=capsys)
    assert code == 0 and nib.load(out).shape == (8, 8, 8), err


def test_a_cohort_goes_on_past_a_bad_file_and_says_so_at_the_end(
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


def test_evaluating_a_folder_against_itself_scores_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=3)
    labels, scores = folder / "labelsTr", tmp_path / "scores.json"
    code, out, _ = run("evaluate", labels, labels, "--out", scores, capsys=capsys)
    assert code == 0 and "ball" in out
    content = json.loads(scores.read_text())
    assert content["overall"]["dice"]["mean"] == 1.0
    assert content["overall"]["hd95_mm"]["mean"] == 0.0
    assert len(content["cases"]) == 3


def test_evaluating_refuses_what_does_not_pair(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    empty = tmp_path / "empty"
    empty.mkdir()
    code, _, err = run("evaluate", empty, folder / "labelsTr", capsys=capsys)
    assert code == 2 and "holds no volume named as one in" in err
    one = nib.load(folder / "labelsTr" / "case_0.nii.gz")
    moved = one.affine.copy()
    moved[0, 3] += 5
    nib.save(nib.Nifti1Image(np.asarray(one.dataobj), moved), empty / "case_0.nii.gz")
    nib.save(one, empty / "case_1.nii.gz")
    code, _, err = run("evaluate", empty, folder / "labelsTr", capsys=capsys)
    assert code == 2 and "lies on another grid" in err


def test_check_tells_what_it_understood(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=4)
    code, out, _ = run("check", folder, capsys=capsys)
    assert code == 0 and "4 cases, all readable" in out and "label 1 ball: in 4 cases" in out
    code, out, _ = run("check", folder / "imagesTr" / "case_0.nii.gz", capsys=capsys)
    assert code == 0 and "16 x 16 x 16 voxels of 1 x 1 x 1 mm" in out and "RAS" in out
    config = tmp_path / "c.yaml"
    config.write_text(
        f"data: {{folder: {folder}, patch_size: [16, 16, 16]}}\n"
        "network: {channels: [4, 8, 8], attention: {skip: additive_grid}}\n"
    )
    code, out, _ = run("check", config, "data.validation=0.5", capsys=capsys)
    assert code == 0
    assert "# 2 cases to train on, 2 held out" in out and "attention maps: skip.1/gate" in out


def test_check_names_the_case_whose_label_lies_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=2)
    path = folder / "labelsTr" / "case_1.nii.gz"
    label = nib.load(path)
    values = np.asarray(label.dataobj).copy()
    nib.save(nib.Nifti1Image(values, np.diag([2.0, 1, 1, 1])), path)
    code, _, err = run("check", folder, capsys=capsys)
    assert code == 2 and "case_1.nii.gz: its grid" in err


def test_a_large_dataset_is_planned_and_trained_in_two_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(planning, "multiply_adds_per_second", lambda: 3e8)
    magnified(small_dataset(tmp_path / "balls", num_cases=2), 2)
    code, out, err = run("plan", "balls", "--device", "cpu", "--minutes", "10", capsys=capsys)
    assert code == 0, err
    assert out.endswith("next: segkit train balls_low.yaml, and then segkit train balls.yaml\n")
    code, _, err = run("check", "balls.yaml", capsys=capsys)
    assert code == 2 and err.startswith("segkit: runs/balls_low: expected a run or a model folder")
    (tmp_path / "balls.yaml").unlink()
    code, _, err = run("plan", "balls", "--device", "cpu", "--minutes", "10", capsys=capsys)
    assert code == 2 and "balls_low.yaml: exists already" in err
    assert not (tmp_path / "balls.yaml").exists()

    words = ["train", "balls", "trainer.accelerator=cpu", "train.steps=2", "name=two"]
    code, out, err = run(*words, capsys=capsys)
    assert code == 0, err
    low, full = Path("runs/two_low"), Path("runs/two")
    assert out.index(f"wrote {low}\n") < out.index(f"wrote {full}\n")
    assert (full / "model" / "first" / "0" / "weights.safetensors").read_bytes() == (
        low / "model" / "weights.safetensors"
    ).read_bytes()
    code, _, err = run(*words, "data.spacing=[1,1,1]", capsys=capsys)
    assert code == 2 and "two stages cannot share data.spacing" in err
    code, out, err = run(*words, "data.first_stage=null", "name=one", capsys=capsys)
    assert code == 0 and not Path("runs/one_low").exists(), err
    assert not (Path("runs/one/model/first")).exists()


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
    assert code == 0 and out.count("model: ") == 2 and "changes nothing" not in out
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
    assert code == 0 and "left 1 of 3 volumes alone" in out and out.count("wrote") == 2
    assert len(list(tmp_path.glob("*.nii.gz"))) == 3
    code, out, _ = run(*words, "--shard", "5/5", capsys=capsys)
    assert code == 0 and "wrote" not in out
    code, _, err = run(*words, "--shard", "3/2", capsys=capsys)
    assert code == 2
    assert err == "segkit: --shard 3/2: expected I/N with I from 1 to N, such as 2/8\n"
