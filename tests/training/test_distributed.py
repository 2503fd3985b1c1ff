"""Two processes are one: the losses, weights and scores of one process with the joint batch."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segkit.config.load import dump_yaml
from tests.small import small_config, small_dataset


def run_python(folder: Path, *words: str) -> None:
    """Run Python in a folder, with one thread in each process; it must succeed."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def run_in_processes(folder: Path, count: int, batch_size: int) -> Path:
    """Train on that many processes through the command line; the run's folder."""
    config = small_config(
        folder / "data",
        data={"batch_size": batch_size, "augment": False, "validation": 0.5},
        train={"steps": 4, "validate_every": 2, "optimiser": "sgd"},
        trainer={"devices": count, "strategy": "ddp" if count > 1 else "auto"},
    )
    path = folder / f"{count}.yaml"
    path.write_text(dump_yaml(config.model_copy(update={"name": f"by_{count}"})))
    run_python(folder, "-m", "segkit", "train", str(path))
    return folder / "runs" / f"by_{count}"


needs_processes = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this build of torch has no torch.distributed"
)
SCRIPT = """
import json, os
from pathlib import Path
import segkit

run = segkit.fit(segkit.prepare(segkit.load_config("two.yaml")))
weight = next(run.model.network.parameters()).sum().item()
told = {"folder": str(run.folder.resolve()), "told": sorted(run.summary), "weight": weight}
Path(f"process_{os.environ.get('LOCAL_RANK', '0')}.json").write_text(json.dumps(told))
"""


@pytest.mark.slow
@needs_processes
def test_each_process_gets_the_run_and_only_the_first_its_summary(tmp_path: Path) -> None:
    config = small_config(
        small_dataset(tmp_path / "data"),
        data={"validation": 0.5},
        train={"steps": 1},
        trainer={"devices": 2, "strategy": "ddp"},
    )
    (tmp_path / "two.yaml").write_text(dump_yaml(config))
    (tmp_path / "script.py").write_text(SCRIPT)
    # Another run of that name: the other process has to be told which folder is the run's.
    (tmp_path / "runs" / "small").mkdir(parents=True)
    run_python(tmp_path, "script.py")
    first, other = (
        json.loads((tmp_path / f"process_{number}.json").read_text()) for number in range(2)
    )
    assert first["folder"] == other["folder"] == str((tmp_path / "runs" / "small-2").resolve())
    assert first["weight"] == other["weight"]
    assert "validation" in first["told"] and other["told"] == []


@needs_processes
@pytest.mark.slow
def test_two_processes_train_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    small_dataset(tmp_path / "data", num_cases=6)
    one = run_in_processes(tmp_path, 1, batch_size=4)
    two = run_in_processes(tmp_path, 2, batch_size=2)
    # One of the processes wrote, once.
    assert sorted(path.name for path in (tmp_path / "runs").iterdir() if path.name[0] != ".") == [
        "by_1",
        "by_2",
    ]
    tables = [
        list(csv.DictReader((run / "metrics.csv").read_text().splitlines())) for run in (one, two)
    ]
    assert len(tables[0]) == len(tables[1]) == 4
    for alone, together in zip(*tables, strict=True):
        for name in alone:
            if alone[name]:
                assert float(together[name]) == pytest.approx(float(alone[name]), abs=1e-4), name
    weights = [load_file(run / "model" / "weights.safetensors") for run in (one, two)]
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=1e-5, rtol=1e-4)


TIMED = """
import json, os, time
from pathlib import Path
import segkit
from lightning.pytorch.callbacks import Callback

class Rates(Callback):
    def __init__(self):
        self.rates, self.shares = [], []
    def on_train_batch_end(self, trainer, module, *_):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])
        self.shares.append(module.share_done)
        if trainer.global_rank:
            time.sleep(0.01)  # so that the clocks of the two differ at the end of a step

rates = Rates()
segkit.fit(segkit.prepare(segkit.load_config("timed.yaml")), callbacks=[rates])
rank = os.environ.get("LOCAL_RANK", "0")
Path(f"process_{rank}.json").write_text(json.dumps([rates.rates, rates.shares]))
"""


@needs_processes
@pytest.mark.slow
def test_processes_that_train_for_some_minutes_have_the_same_learning_rate(tmp_path: Path) -> None:
    """Each has its own clock, and they share gradients but not weights."""
    config = small_config(
        small_dataset(tmp_path / "data"),
        data={"validation": 0.5},
        train={"steps": 60, "minutes": 0.3, "validate_every": 20},
        trainer={"devices": 2, "strategy": "ddp"},
    )
    (tmp_path / "timed.yaml").write_text(dump_yaml(config))
    (tmp_path / "script.py").write_text(TIMED)
    run_python(tmp_path, "script.py")
    (rates, shares), other = (
        json.loads((tmp_path / f"process_{number}.json").read_text()) for number in range(2)
    )
    assert len(rates) > 20 and len(set(rates)) > 10
    assert [rates, shares] == other
