"""The benchmark of a GPU runs on a CPU too, and its table shows what was measured."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_shows_each_figure_in_its_row_and_what_was_not_measured() -> None:
    lines = [
        json.dumps({"device": "NVIDIA H200"}),
        json.dumps({"step": "small", "ms": 7.1, "seconds in total": 9}),
        json.dumps({"hippocampus fold 0": 0.877, "steps": 7423}),
        "│ segkit │ 0.24 │",
        json.dumps({"case": "brain", "seconds": {"segkit": 0.24, "monai, best": 0.64}}),
        "== 36 passed, 9198 deselected in 40.12s ==",
    ]
    rows = {line[:26].strip(): line[26:].split() for line in benchmark().table(lines).splitlines()}
    assert rows["small step, ms"][-3:] == ["7.1", "nnU-Net", "19.1"]
    assert rows["large step, ms"][-2:] == ["not", "measured"]
    assert rows["hippocampus fold 0"][3] == "0.877"
    assert rows["1 mm brain, s"][-4:] == ["0.24", "monai,", "best", "0.64"]
    assert rows["60 classes, 512x512x300, s"][-2:] == ["not", "measured"]
    assert "36 passed" in " ".join(rows["pytest -m gpu"])


def test_a_part_that_takes_too_long_is_stopped_with_what_it_started() -> None:
    script = "import subprocess, sys; print(7, flush=True); subprocess.run(['sleep', '60'])"
    status, output, _ = benchmark()._run([sys.executable, "-c", script], 3.0)
    assert status is None and output == "7\n"
    assert benchmark()._run([sys.executable, "-c", "print(8)"], 60.0)[:2] == (0, "8\n")


@pytest.mark.slow
def test_training_steps_are_rehearsed_on_a_cpu() -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--only", "step", "--rehearse"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"step')]
    assert [each["step"] for each in told] == ["small", "large step"]
    assert all(each["ms"] > 0 for each in told)
