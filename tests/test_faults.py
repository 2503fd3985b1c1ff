"""Jobs that are killed, asked to stop or refused what they need lose nothing, and can be finished.

The trials are those of `benchmarks/reliability.py`, fewer of them; Linux alone.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults import jobs
from benchmarks.faults.asked import ask_and_finish
from benchmarks.faults.jobs import Bench
from benchmarks.faults.killed import kill_and_finish
from benchmarks.faults.load import measure
from benchmarks.faults.refused import dead_worker, full_disk, read_only, vanished_input
from benchmarks.faults.trial import Trial, is_table, is_whole
from benchmarks.faults.twice import both_at_once
from benchmarks.faults.zygote import Zygote, survivors_of
from benchmarks.reliability import PAGE, Sizes, inputs_section, merged, page, replaced

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="faults are Linux's")
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with Zygote() as zygote:
        yield jobs.bench_in(tmp_path_factory.mktemp("bench"), zygote)


def all_survive(trials: Iterator[Trial], count: int | None = None) -> list[Trial]:
    found = list(trials)
    assert [trial for trial in found if not trial.survived] == []
    assert count is None or len(found) == count
    return found


@pytest.mark.parametrize(
    ("job", "count"), [("training", 2), ("predicting", 2), ("preprocessing", 1), ("explaining", 1)]
)
def test_killed_anywhere_a_job_is_finished_by_the_next_run(
    job: str, count: int, bench: Bench
) -> None:
    all_survive(kill_and_finish(bench, getattr(jobs, job)(bench), count, seed=1), count)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("job", "count"),
    [
        ("training", 24),
        ("predicting", 12),
        ("preprocessing", 9),
        ("explaining", 9),
        ("planning", 6),
    ],
)
def test_killed_at_many_points_a_job_is_finished_by_the_next_run(
    job: str, count: int, bench: Bench
) -> None:
    all_survive(kill_and_finish(bench, getattr(jobs, job)(bench), count, seed=2), count)


def test_asked_to_stop_a_training_says_so_in_one_sentence_and_loses_no_step(bench: Bench) -> None:
    (trial,) = all_survive(ask_and_finish(bench, jobs.training(bench), 1, seed=1), 1)
    assert trial.told == (
        "segkit: stopped by Ctrl-C; segkit train --resume runs/small continues from there"
    )


@pytest.mark.slow
def test_asked_to_stop_at_many_moments_a_training_loses_no_step(bench: Bench) -> None:
    all_survive(ask_and_finish(bench, jobs.training(bench), 8, seed=2), 8)


def test_a_full_disk_is_reported_in_one_sentence(bench: Bench) -> None:
    for trial in all_survive(full_disk(bench, jobs.predicting(bench))):
        assert "; free some space there" in trial.told or "file too large; " in trial.told


@pytest.mark.slow
@pytest.mark.parametrize("job", ["training", "explaining"])
def test_a_full_disk_leaves_earlier_results_unchanged(job: str, bench: Bench) -> None:
    all_survive(full_disk(bench, getattr(jobs, job)(bench)))


@pytest.mark.parametrize("job", ["predicting"])
def test_a_folder_that_cannot_be_written_is_told_in_one_sentence(job: str, bench: Bench) -> None:
    trials = all_survive(read_only(bench, getattr(jobs, job)(bench)))
    if not trials:
        pytest.skip("root heeds no permissions and may not mount here")


def test_an_input_that_vanishes_is_told_in_one_sentence(bench: Bench) -> None:
    scans, data = bench.scans, bench.folder / "data"
    all_survive(
        vanished_input(bench, jobs.predicting(bench), scans / "a.nii.gz", scans / "c.nii.gz")
    )
    (trial,) = vanished_input(
        bench,
        jobs.training(bench),
        data / "labelsTr" / "case_1.nii.gz",
        data / "imagesTr" / "case_2.nii.gz",
    )
    assert trial.survived and "case_2.nii.gz: no such file" in trial.told


@pytest.mark.slow
def test_a_data_worker_that_dies_is_told_in_one_sentence(bench: Bench) -> None:
    (trial,) = all_survive(dead_worker(bench, jobs.training(bench)), 1)
    assert trial.told.startswith("segkit: the process that loads patches was killed")


def test_two_trainings_at_once_have_runs_of_their_own_and_share_a_cache(bench: Bench) -> None:
    all_survive(both_at_once(bench, jobs.training(bench), 1), 1)


@pytest.mark.slow
def test_processes_end_with_the_one_that_began_them_even_where_it_is_killed() -> None:
    code = (
        "import os, time\n"
        "from segkit.system.workers import in_processes\n"
        "if __name__ == '__main__':\n"
        "    os.setsid()\n"
        "    for _ in in_processes(time.sleep, [0, 0, 600, 600], 2):\n"
        "        print('begun', flush=True)\n"
    )
    begun = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert begun.stdout is not None
    assert begun.stdout.readline() == begun.stdout.readline() == b"begun\n"
    time.sleep(0.2)
    os.kill(begun.pid, signal.SIGKILL)
    begun.wait()
    begun.stdout.close()
    assert survivors_of(begun.pid) == ()


@pytest.mark.slow
def test_many_scans_leave_nothing_behind(bench: Bench) -> None:
    load = measure("predict", bench.model, 120)
    assert load.slope < 20  # MB: so few tell only a large leak; the allocator alone gave 5.3 once
    assert [load.growth(what) for what in ("files", "threads", "processes", "shared")] == [0] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("predict", 300), ("preprocess", 200)])
def test_very_many_volumes_leave_nothing_behind(name: str, count: int, bench: Bench) -> None:
    load = measure(name, bench.model, count)
    assert load.slope < 1
    assert [load.growth(what) for what in ("files", "threads", "processes", "shared")] == [0] * 4


def test_half_a_file_is_known_as_such(tmp_path: Path, bench: Bench) -> None:
    """The trials above would say nothing if this were not so."""
    run = next((bench.folder / "runs").glob("ready*"))
    looked = 0
    for path in (*run.rglob("*"), *bench.scans.iterdir(), *(run.parent / ".cache").rglob("*.npy")):
        if path.is_file() and path.stat().st_size > 100 and "tensorboard" not in path.parts:
            half = tmp_path / path.name
            content = path.read_bytes()[: path.stat().st_size * 2 // 3]
            half.write_bytes(content.removesuffix(b"\n"))
            assert is_whole(path) and not (is_whole(half) and half.suffix != ".yaml"), path
            looked += 1
    assert looked > 10
    assert is_table("a,b\n1,2\n") and not is_table("a,b\n1,") and not is_table("a,b\n1\n")


def test_the_page_counts_the_attempts_and_lists_the_failures() -> None:
    trials = [
        Trial("train", "kill -9", "after 1 s", 0),
        Trial("train", "kill -9", "after 2 s", 30, ("exit code 1: oh",)),
        Trial("predict", "full disk", "", 0, told="segkit: full"),
    ]
    text = page(trials, [], {"accepted": 2, "refused": 3}, Sizes(2, 1, 10, 5, 5, 0))
    for line in (
        "| kill -9 | train | 2 | 1 | 30 |",
        "| **all** | | **3** | **2** | **30** |",
        "- kill -9, train after 2 s: 30 bytes lost; exit code 1: oh",
        "| full disk | predict | `segkit: full` |",
        "| refused | 3 |",
        "| **all** | **5** |",
        "python -m benchmarks.reliability --kills 2 --asks 1 --scans 10 --cases 5 --inputs 5 "
        "--seed 0",
    ):
        assert line in text, line


def test_a_page_that_is_made_again_keeps_the_sections_that_were_written_by_hand() -> None:
    old = "# Page\n\n## Faults\n\nold\n\n## By hand\n\n| a |\n\n## Many\n\nold\n"
    new = "# Page\n\n## Faults\n\nnew\n\n## Many\n\nnew\n"
    assert merged(old, new) == (
        "# Page\n\n## Faults\n\nnew\n\n## By hand\n\n| a |\n\n## Many\n\nnew\n"
    )
    assert merged("", new) == new
    assert replaced(old, "## Many\n\nnew") == old.replace("## Many\n\nold", "## Many\n\nnew")


def test_renewing_the_table_of_inputs_changes_nothing_else_of_the_documented_page() -> None:
    before = PAGE.read_text(encoding="utf-8")
    after = replaced(before, inputs_section({"accepted": 1}, 0))
    parts = [text.split("## Inputs")[0] for text in (before, after)]
    assert parts[0] == parts[1] and "## Situations" in after
    assert before.split("## Situations")[1] == after.split("## Situations")[1]
