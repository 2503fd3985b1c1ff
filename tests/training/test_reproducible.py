"""Commands reach for no network, and leave the same bytes when they are run again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.small import small_dataset

ROOT = Path(__file__).parents[2]
SCRIPT = """
import sys
from pathlib import Path

reached = Path("reached")

def offline(event, details):
    # A socket between processes of one machine has a path for its address.
    beyond = event == "socket.connect" and not isinstance(details[1], (str, bytes))
    if beyond or event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        reached.write_text(f"{event} {details}")
        raise OSError("there is no network here")

sys.addaudithook(offline)
from segkit.cli.main import main
from segkit.system import core_share

# Speeds that are measured while other programs run are not kept, so the next plan measures again.
# Without this count no machine is busy, and both plans use one measurement.
core_share.TASKS = Path("uncounted")

for words in Path("commands").read_text().splitlines():
    sys.argv = ["segkit", *words.split()]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            sys.exit(f"{words}: ended with {ended.code}")
"""
TRAINING = """\
check DATA
plan DATA --out plan.yaml --device cpu --minutes 1 --runs ../cache
check plan.yaml
train plan.yaml train.steps=2
check DATA/imagesTr/case_0.nii.gz
predict DATA/imagesTr --model MODEL --out predicted --maps maps --probabilities --uncertainty
explain DATA/imagesTr --model MODEL --reference DATA/labelsTr --out explained
evaluate predicted DATA/labelsTr --out scores.json
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two folders in which the same commands were run, in processes with other orders of sets."""
    base = tmp_path_factory.mktemp("twice")
    data = small_dataset(base / "data", num_cases=2)
    folders = [base / "one", base / "two"]
    for number, folder in enumerate(folders):
        folder.mkdir()
        commands = TRAINING.replace("DATA", str(data)).replace("MODEL", "runs/data")
        (folder / "commands").write_text(commands)
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONHASHSEED": str(number),
            "XDG_CACHE_HOME": str(base / "converted"),
        }
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-500:] + done.stderr[-3000:]
    return folders


def files_of(folder: Path, *parts: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for part in parts:
        place = folder / part
        paths = sorted(place.rglob("*")) if place.is_dir() else [place]
        found |= {
            str(path.relative_to(folder)): path.read_bytes() for path in paths if path.is_file()
        }
    return found


def test_no_command_reaches_for_a_network(twice: list[Path]) -> None:
    assert not any((folder / "reached").exists() for folder in twice)


@pytest.mark.parametrize(
    ("part", "least"),
    [
        ("plan.yaml", 1),
        ("runs/data/model", 2),
        ("runs/data/config.yaml", 1),
        ("predicted", 2 * 4 * 2),
        ("maps", 2 * 3),
        ("explained", 2 * 8 + 3),
        ("scores.json", 1),
    ],
)
def test_the_same_command_leaves_the_same_bytes(twice: list[Path], part: str, least: int) -> None:
    one, two = (files_of(folder, part) for folder in twice)
    assert len(one) >= least and one.keys() == two.keys()
    different = [name for name in one if one[name] != two[name]]
    if part.startswith("runs"):
        assert all(b"/two/" in two[name] for name in different if name.endswith(".yaml"))
        different = [name for name in different if not name.endswith(".yaml")]
    assert different == []


def test_no_result_names_a_machine_or_a_place(twice: list[Path]) -> None:
    (one, _), parts = twice, ("predicted", "maps", "explained", "scores.json")
    machine = os.uname().nodename
    for name, content in files_of(one, *parts).items():
        assert str(one.parent).encode() not in content, name
        if len(machine) > 5 and Path(name).suffix in (".json", ".csv"):
            assert machine.encode() not in content, name


def test_saved_scores_name_their_cases_labels_and_tolerance(twice: list[Path]) -> None:
    told = json.loads((twice[0] / "scores.json").read_text())["provenance"]
    assert [entry["case"] for entry in told["inputs"]] == ["case_0", "case_1"]
    assert told["tolerance_mm"] == 1.0 and len(told["labels"]) == 1
    assert all(len(entry["prediction"]) == 64 for entry in told["inputs"])
