"""The extension of 3D Slicer, without Slicer: its commands run, are stopped, fail and are read."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_allclose

from segkit.io.pictures import label_rgb
from segkit.io.volume import read_labels, read_volume
from SegkitPredictLib import job as jobs
from SegkitPredictLib.environment import (
    INSTALLED,
    clean_environment,
    find_python,
    find_segkit,
    forget_environment,
    install_steps,
    program_in,
)
from SegkitPredictLib.errors import ExtensionError
from SegkitPredictLib.job import Job, sentence_of
from SegkitPredictLib.results import (
    channels_of,
    input_names,
    maps_of,
    predict_words,
    remove,
    result_of,
)
from tests.conftest import ROOT
from tests.integrations.conftest import OBLIQUE

MODULE = ROOT / "integrations" / "slicer" / "SegkitPredict"
LIBRARY = MODULE / "SegkitPredictLib"
VARIABLES = clean_environment(os.environ)


@pytest.fixture(scope="session")
def segkit_command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The segkit command of this checkout, as a file that can be run."""
    path = tmp_path_factory.mktemp("command") / "segkit"
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m segkit "$@"\n')
    path.chmod(0o755)
    return path


def started(folder: Path, scan: Path, command: Path, model: object, **options: object) -> Job:
    """The job that Slicer would start for a scan."""
    folder.mkdir()
    (name,) = input_names(1)
    shutil.copy(scan, folder / name)
    words = predict_words(command, folder, [str(model)], device="cpu", **options)  # type: ignore[arg-type]
    return Job([words], folder, VARIABLES)


@pytest.mark.slow
def test_a_scan_is_segmented_by_another_process_which_tells_its_progress(
    tmp_path: Path, segkit_command: Path, untrained_model: Path, oblique_scan: Path
) -> None:
    folder = tmp_path / "job"
    job = started(folder, oblique_scan, segkit_command, untrained_model)
    job.wait()
    assert job.problem() is None, job.log
    assert job.progress == 1 and job.seconds_left == 0
    check_result(folder, job.printed)
    remove(folder)
    assert not folder.exists()


def test_results_have_names_colours_concepts_and_maps_on_their_own_grids(
    predicted: tuple[Path, str],
) -> None:
    check_result(*predicted)


def check_result(folder: Path, printed: str) -> None:
    """The files are those of the oblique scan and of the model that has learned nothing."""
    result = result_of(folder, printed)
    labels = read_labels(result.labels)
    assert_allclose(labels.grid.affine, OBLIQUE.affine, atol=1e-5)
    assert {*np.unique(labels.data)} <= {0, 3, 7} and result.background == 0
    liver, lesion = result.classes
    assert (liver.number, liver.name, lesion.number, lesion.name) == (3, "liver", 7, "lesion")
    assert_allclose(liver.colour, np.array(label_rgb(3)) / 255)
    assert_allclose(lesion.colour, np.array(label_rgb(7)) / 255)
    assert liver.terminology is not None and lesion.terminology is None
    _, category, concept, *rest = liver.terminology.split("~")
    assert category == "SCT^123037004^Anatomical Structure" and concept == "SCT^10200004^Liver"
    assert rest == ["^^", "", "^^", "^^"]
    (gate,) = result.maps
    assert (gate.key, gate.low, gate.high) == ("skip.1/gate", 0, 1)
    native = nib.load(gate.path)
    (told,) = json.loads((folder / "maps" / "scan_maps.json").read_text())["maps"]
    assert told["stride"] == [4, 4, 4] and list(native.shape) == told["shape"]
    # The network saw the scan in RAS+ order, so cells may run the other way along an axis.
    steps = np.linalg.norm(native.affine[:3, :3], axis=0)
    assert_allclose(steps, [4 * step for step in OBLIQUE.spacing], rtol=1e-5)


@pytest.mark.slow
def test_errors_are_the_sentences_of_segkit(
    tmp_path: Path, segkit_command: Path, untrained_model: Path, oblique_scan: Path
) -> None:
    damaged = tmp_path / "damaged.nrrd"
    damaged.write_bytes(oblique_scan.read_bytes()[:400])
    job = started(tmp_path / "a", damaged, segkit_command, untrained_model)
    job.wait()
    problem = job.problem()
    assert problem is not None and "scan.nrrd: cannot be read" in problem and "\n" not in problem
    job = started(tmp_path / "b", oblique_scan, segkit_command, tmp_path / "nothing")
    job.wait()
    assert "expected a run or a model folder with model.json" in str(job.problem())


@pytest.mark.slow
@pytest.mark.parametrize("reports", [0, 1])
def test_a_cancelled_prediction_ends_and_leaves_no_results(
    tmp_path: Path, segkit_command: Path, untrained_model: Path, oblique_scan: Path, reports: int
) -> None:
    """It is cancelled while torch is imported, or when the network is at work."""
    job = started(tmp_path / "job", oblique_scan, segkit_command, untrained_model)
    while reports and job.progress is None and not job.poll():
        pass
    job.stop()
    job.wait()
    assert job.problem() == "stopped, because you pressed Cancel"
    left = {path.name for path in (tmp_path / "job").iterdir()}
    assert left <= {"scan.nrrd", "step-0.out", "step-0.err", "maps"}


PRINTS = "import sys; print('out'); print('err', file=sys.stderr)"


def test_steps_run_one_after_the_other_until_one_fails(tmp_path: Path) -> None:
    fails = [sys.executable, "-c", "raise SystemExit('no room')"]
    prints = [sys.executable, "-c", PRINTS]
    job = Job([prints, fails, prints], tmp_path, VARIABLES, together=True)
    job.wait()
    assert job.number == 1 and {*job.log} == {"out", "err", "no room"}
    assert job.problem() == ("the command ended with exit code 1: no room; the log below says more")


def test_a_command_that_does_not_stop_is_killed_with_all_that_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "SECONDS_TO_STOP", 0.2)
    text = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, file=sys.stderr, flush=True)\n"
        "time.sleep(60)\n"
    )
    job = Job([[sys.executable, "-c", text]], tmp_path, VARIABLES)
    while not job.log:
        job.poll()
    job.stop()
    job.wait()
    assert job.code == -signal.SIGKILL and job.problem() == "stopped, because you pressed Cancel"
    state = Path(f"/proc/{job.log[0]}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_a_command_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ExtensionError, match="nothing cannot be started: No such file"):
        Job([[str(tmp_path / "nothing")]], tmp_path, VARIABLES)


@pytest.mark.parametrize(
    ("code", "printed", "log", "sentence"),
    [
        (-9, "", [], "the system ended segkit, as it does if memory is full; "),
        (2, "", ["╭─ Error ─╮", "│ No such option: --progress │"], "this segkit is too old"),
        (2, '{"error": "x.nii: is cut short", "problems": []}', ["segkit: y"], "x.nii: is cut"),
        (2, '{"volumes": [{"error": "a: bad"}, {"error": null}]}', [], "a: bad"),
        (2, "", ["segkit: a: bad", "segkit: b: worse"], "b: worse"),
        (1, "no JSON", ["Traceback", "KeyError: 1"], "the command ended with exit code 1: KeyE"),
        (1, "[]", [], "the command ended with exit code 1: it printed nothing; "),
    ],
)
def test_every_failure_becomes_one_sentence(
    code: int, printed: str, log: list[str], sentence: str
) -> None:
    told = sentence_of(code, printed, log)
    assert told.startswith(sentence) and "\n" not in told


def test_half_a_line_is_read_when_its_end_has_come(tmp_path: Path) -> None:
    text = (
        "import sys, time\n"
        "sys.stderr.write('{\"progress\": 0.5, '); sys.stderr.flush(); time.sleep(0.3)\n"
        "sys.stderr.write('\"seconds_left\": null}\\nsegkit: \\u00e9'); sys.stderr.flush()\n"
    )
    job = Job([[sys.executable, "-c", text]], tmp_path, VARIABLES)
    job.wait()
    assert job.progress == 0.5 and job.seconds_left is None and job.log == ["segkit: é"]


def test_the_command_is_the_typed_one_or_that_of_the_own_environment_or_on_the_path(
    tmp_path: Path, segkit_command: Path
) -> None:
    own, on_path = tmp_path / "own", {"PATH": str(segkit_command.parent)}
    assert find_segkit(str(segkit_command), own, {"PATH": ""}) == segkit_command
    assert find_segkit(" ", own, on_path) == segkit_command
    program_in(own, "segkit").parent.mkdir(parents=True)
    shutil.copy(segkit_command, program_in(own, "segkit"))
    assert find_segkit("", own, on_path) == segkit_command, "an unfinished one is not used"
    (own / INSTALLED).touch()
    assert find_segkit("", own, on_path) == program_in(own, "segkit")
    assert find_segkit(str(own), tmp_path, on_path) == program_in(own, "segkit")
    with pytest.raises(ExtensionError, match="segkit was not found; press Install"):
        find_segkit("", tmp_path, {"PATH": str(tmp_path)})
    for wrong in (tmp_path / "missing", tmp_path):
        with pytest.raises(ExtensionError, match="expected the segkit command or the folder"):
            find_segkit(str(wrong), own, on_path)


def test_slicers_own_libraries_are_kept_from_the_command() -> None:
    told = clean_environment({"PYTHONHOME": "/slicer", "PYTHONPATH": "/slicer", "HOME": "/home"})
    assert told["HOME"] == "/home" and not {"PYTHONHOME", "PYTHONPATH"} & {*told}


def test_a_python_must_be_new_enough(tmp_path: Path) -> None:
    assert find_python(sys.executable, VARIABLES) == sys.executable
    old = tmp_path / "python3"
    old.write_text("#!/bin/sh\necho 3 9\n")
    old.chmod(0o755)
    with pytest.raises(ExtensionError, match=r"expected Python 3.11 or newer, found python3 3\.9"):
        find_python("", {"PATH": str(tmp_path)})
    with pytest.raises(ExtensionError, match="found none; install it"):
        find_python(str(tmp_path / "missing"), VARIABLES)


def test_an_installation_runs_its_steps_in_order(tmp_path: Path) -> None:
    venv, torch, package, mark = install_steps("py", tmp_path, "segkit[openvino]", cpu_only=True)
    assert venv == ["py", "-m", "venv", "--clear", str(tmp_path)]
    assert torch[-3:] == ["torch", "--index-url", "https://download.pytorch.org/whl/cpu"]
    assert package[-1] == "segkit[openvino]" and INSTALLED in mark[-1]
    assert len(install_steps("py", tmp_path)) == 3


@pytest.mark.slow
def test_an_environment_is_made_and_a_failed_one_is_removed(tmp_path: Path) -> None:
    """With a wheel that holds only a command, so that no index is needed."""
    wheel = tmp_path / "segkit-9.0-py3-none-any.whl"
    about = "Metadata-Version: 2.1\nName: segkit\nVersion: 9.0\n"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_segkit.py", "def main(): print('toy')\n")
        archive.writestr("segkit-9.0.dist-info/METADATA", about)
        archive.writestr(
            "segkit-9.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        scripts = "[console_scripts]\nsegkit = toy_segkit:main\n"
        archive.writestr("segkit-9.0.dist-info/entry_points.txt", scripts)
        archive.writestr("segkit-9.0.dist-info/RECORD", "")
    python = find_python(sys.executable, VARIABLES)
    for number, requirement in enumerate((tmp_path / "missing.whl", wheel)):
        environment, folder = tmp_path / "environment", tmp_path / f"job-{number}"
        folder.mkdir()
        steps = install_steps(python, environment, str(requirement))
        job = Job(steps, folder, VARIABLES, together=True)
        job.wait()
        forget_environment(environment)
        assert (job.problem() is None) == environment.exists() == (requirement == wheel), job.log
    command = find_segkit("", environment, VARIABLES)
    assert subprocess.run([command], capture_output=True, text=True).stdout == "toy\n"


def test_a_model_tells_its_channels_and_each_becomes_a_file(
    tmp_path: Path, untrained_model: Path
) -> None:
    assert channels_of(str(untrained_model)) == ["CT"] and input_names(1) == ["scan.nrrd"]
    for place in ("run/model", "folds/fold_0/model"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "model.json").write_text('{"channels": ["T1", "T2"]}')
        assert channels_of(str(tmp_path / place.split("/")[0])) == ["T1", "T2"]
    assert input_names(2) == ["scan_0000.nrrd", "scan_0001.nrrd"]
    words = predict_words(Path("segkit"), Path("job"), ["m"], num_channels=2, mirrors=True)
    assert words[:3] == ["segkit", "predict", str(Path("job/scan_0000.nrrd"))]
    assert words[-1] == "--tta" and words[3:5] == ["--model", "m"]
    assert channels_of("hf:owner/name") == [""]
    with pytest.raises(ExtensionError, match=r"found no model\.json in it"):
        channels_of(str(tmp_path))
    with pytest.raises(ExtensionError, match="expected the folder of a model"):
        channels_of(str(tmp_path / "missing"))
    with pytest.raises(ExtensionError, match="expected a model, found none"):
        predict_words(Path("segkit"), Path("job"), [" "])


def test_maps_that_cannot_lie_over_the_scan_are_left_out_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "native").mkdir()

    def entry(key: str, level: int, **more: object) -> dict[str, object]:
        (tmp_path / "native" / f"s_map-{key.replace('/', '-')}.nii.gz").touch()
        known = {"min": 0.5, "max": 2.5, "range": [0, None], "stride": [2, 2, 2]}
        return {"key": key, "level": level, "shape": [3, 3, 3], **known, **more}

    described = tmp_path / "s_maps.json"
    maps = [
        entry("skip.2/gate", 2, range=[0, 1]),
        entry("skip.1/gate", 1),
        entry("block.0/channel", 0, stride=None),
        entry("deep/received", 2, shape=[3, 3, 3, 4]),
        entry("skip.3/gate", 3, range=[None, None], min=None, max=None),
    ]
    described.write_text(json.dumps({"maps": maps}))
    overlays, notes = maps_of(described)
    assert [(each.key, each.low, each.high) for each in overlays] == [
        ("skip.1/gate", 0, 2.5),
        ("skip.2/gate", 0, 1),
    ]
    assert [note.partition("because ")[2] for note in notes] == [
        "they have no place in the scan: block.0/channel",
        "they have several values in each cell: deep/received",
        "they have no value: skip.3/gate",
    ]


def test_other_output_than_segkits_is_a_sentence(tmp_path: Path) -> None:
    for printed in (
        "",
        "{}",
        '{"volumes": [{"written": []}]}',
        '{"volumes": [{"written": ["x"]}]}',
    ):
        with pytest.raises(ExtensionError, match="expected the results of segkit in"):
            result_of(tmp_path, printed)


def test_an_older_segkit_tells_names_without_colours(tmp_path: Path) -> None:
    (tmp_path / "labels.json").write_text('{"labels": {"background": 2, "a": 0, "b": 1}}')
    printed = json.dumps({"volumes": [{"written": [str(tmp_path / "labels.nrrd")]}]})
    result = result_of(tmp_path, printed)
    assert result.background == 2 and result.maps == ()
    assert [(each.number, each.name, each.colour) for each in result.classes] == [
        (0, "a", None),
        (1, "b", None),
    ]
    assert result.notes == (
        "the label with number 0 is not shown, because Slicer takes 0 for background",
    )


@pytest.mark.parametrize("path", sorted(MODULE.rglob("*.py")), ids=lambda path: path.name)
def test_the_code_is_that_of_slicers_python_and_the_library_needs_nothing_else(path: Path) -> None:
    tree = ast.parse(path.read_text("utf-8"), feature_version=(3, 9))
    if path.parent != LIBRARY:
        return
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [str(node.module)]
        assert {name.split(".")[0] for name in names} <= sys.stdlib_module_names


def test_the_build_installs_every_file() -> None:
    told = (MODULE / "CMakeLists.txt").read_text().replace("${MODULE_NAME}", "SegkitPredict")
    named = set(re.findall(r"\S+\.(?:py|png)\b", told))
    there = [*MODULE.rglob("*.py"), *MODULE.rglob("*.png")]
    assert named == {path.relative_to(MODULE).as_posix() for path in there}


def test_the_scan_of_these_tests_is_oblique(oblique_scan: Path) -> None:
    affine = read_volume(oblique_scan).grid.affine
    assert_allclose(affine, OBLIQUE.affine, atol=1e-6)
    assert (np.abs(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)) < 0.999).all()
