"""A run's folder belongs to one process at a time."""

import subprocess
import sys
from pathlib import Path

import pytest

from segkit.errors import ConfigError
from segkit.training.run_folder import locked_folder, new_run_folder

HOLD = """
import sys
from pathlib import Path
from segkit.training.run_folder import locked_folder
with locked_folder(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="nothing is locked there")
def test_a_folder_is_free_again_once_its_process_is_killed(tmp_path: Path) -> None:
    words = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(ConfigError, match="another process is training this run"),
            locked_folder(tmp_path),
        ):
            pass
        holder.kill()
    with locked_folder(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_each_new_folder_is_another(tmp_path: Path) -> None:
    names = [new_run_folder(tmp_path, "run").name for _ in range(3)]
    assert names == ["run", "run-2", "run-3"]
