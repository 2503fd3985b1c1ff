"""Test segkit with killed jobs, full disks and bad inputs, and write docs/reliability.md.

    python -m benchmarks.reliability            # all tests, from the root of the repository
    python -m benchmarks.reliability --kills 3 --asks 2 --scans 100 --cases 50 --inputs 300
    python -m benchmarks.reliability --only inputs      # renews only the table of inputs

Faults hit small jobs, each in its own process (`benchmarks/faults`). The loss is counted in bytes:
of files that were there before, of half-written files under final names, and of files that differ
from those of a job without a fault after the job was resumed. It runs only on Linux; as root it
mounts a full disk and a read-only folder.
"""

import argparse
import itertools
import platform
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console

from benchmarks.faults import jobs
from benchmarks.faults.asked import ask_and_finish
from benchmarks.faults.jobs import Bench
from benchmarks.faults.killed import kill_and_finish
from benchmarks.faults.load import Load, measure
from benchmarks.faults.refused import dead_worker, full_disk, read_only, vanished_input
from benchmarks.faults.trial import Trial
from benchmarks.faults.twice import both_at_once
from benchmarks.faults.zygote import Zygote
from segkit.io.atomic import write_text
from segkit.system.progress import Tracker
from segkit.system.resources import num_cores

PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"
INPUTS = "## Inputs"
MOST_MB = 1.0
"""Largest growth of memory per 100 volumes in MB; more is a leak."""


@dataclass(frozen=True)
class Sizes:
    """The number of trials of each kind, and the seed."""

    kills: int
    asks: int
    scans: int
    cases: int
    inputs: int
    seed: int


def trials_of(bench: Bench, sizes: Sizes) -> Iterator[tuple[str, int, Iterable[Trial]]]:
    """The name, number and trials of each kind of fault."""
    training, predicting = jobs.training(bench), jobs.predicting(bench)
    explaining, planning = jobs.explaining(bench), jobs.planning(bench)
    for job in (training, predicting, jobs.preprocessing(bench), explaining, planning):
        kills = kill_and_finish(bench, job, sizes.kills, seed=sizes.seed)
        yield f"kill -9, {job.name}", sizes.kills, kills
    asks = ask_and_finish(bench, training, sizes.asks, seed=sizes.seed)
    yield "Ctrl-C and SIGTERM", sizes.asks, asks
    full = (full_disk(bench, job) for job in (training, predicting, explaining))
    yield "full disk", 6, itertools.chain.from_iterable(full)
    closed = (read_only(bench, job) for job in (training, predicting, planning))
    yield "read-only folder", 3, itertools.chain.from_iterable(closed)
    data, scans = bench.folder / "data", bench.scans
    gone = itertools.chain(
        vanished_input(
            bench,
            training,
            data / "labelsTr" / "case_1.nii.gz",
            data / "imagesTr" / "case_2.nii.gz",
        ),
        vanished_input(bench, predicting, scans / "a.nii.gz", scans / "c.nii.gz"),
    )
    yield "vanished input", 2, gone
    yield "dead data worker", 1, dead_worker(bench, training)
    yield "two at once", sizes.asks, both_at_once(bench, training, sizes.asks)


def faults_table(trials: Sequence[Trial]) -> str:
    """A Markdown table with a row for each kind of fault and job."""
    lines = [
        "| fault | job | tried | survived | bytes lost |",
        "|---|---|--:|--:|--:|",
    ]
    for (fault, job), group in _grouped(trials).items():
        survived = sum(trial.survived for trial in group)
        bytes_lost = sum(trial.lost for trial in group)
        lines.append(f"| {fault} | {job} | {len(group)} | {survived} | {bytes_lost} |")
    survived, bytes_lost = sum(t.survived for t in trials), sum(t.lost for t in trials)
    lines.append(f"| **all** | | **{len(trials)}** | **{survived}** | **{bytes_lost}** |")
    return "\n".join(lines)


def sentences(trials: Sequence[Trial]) -> str:
    """A Markdown table with one message of each kind of fault and job that ended early."""
    lines = ["| fault | job | what it says |", "|---|---|---|"]
    for (fault, job), group in _grouped(trials).items():
        sentence = next((trial.told for trial in group if trial.told), None)
        if sentence is not None:
            lines.append(f"| {fault} | {job} | `{sentence}` |")
    return "\n".join(lines)


def failures(trials: Sequence[Trial]) -> str:
    """A list of the faults that were not survived; empty if there are none."""
    lines = [
        f"- {trial.fault}, {trial.job} {trial.where}: {trial.lost} bytes lost; "
        f"{'; '.join(trial.problems) or 'no message'}"
        for trial in trials
        if not trial.survived
    ]
    return "\n".join(["", "Not survived:", "", *lines]) if lines else ""


def load_table(loads: Sequence[Load]) -> str:
    """A Markdown table of memory growth, with a row for each job on many volumes."""
    lines = [
        "| job | volumes | growth of memory, MB per 100 | files left open | threads | processes "
        "| shared memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for load in loads:
        left = [load.growth(what) for what in ("files", "threads", "processes", "shared")]
        slope = f"{load.slope:+.2f}" + (" (a leak)" if load.slope >= MOST_MB else "")
        lines.append(f"| {load.name} | {load.count} | {slope} | {' | '.join(map(str, left))} |")
    return "\n".join(lines)


def inputs_section(counts: Mapping[str, int], seed: int) -> str:
    """The section on inputs that were damaged on purpose, with a table of the outcomes."""
    lines = ["| outcome | inputs |", "|---|--:|"]
    lines += [f"| {outcome} | {count} |" for outcome, count in counts.items()]
    table = "\n".join([*lines, f"| **all** | **{sum(counts.values())}** |"])
    return "\n\n".join(
        [
            INPUTS,
            "Headers and bodies of volumes and pictures were changed at random. Each file is "
            f"accepted, or refused in one sentence. (Seed {seed}.)",
            table,
        ]
    )


def merged(old: str, new: str) -> str:
    """A new page, with those sections of an old page that the new one lacks, in their old places.

    So a section that is written by hand stays if the page is made again.
    """
    found = _sections(new)
    before = None
    for heading, text in _sections(old).items():
        if text and heading not in found:
            names = list(found)
            place = names.index(before) + 1 if before in found else len(names)
            entries = list(found.items())
            found = dict([*entries[:place], (heading, text), *entries[place:]])
        before = heading
    return "\n\n".join(found.values()) + "\n"


def replaced(old: str, section: str) -> str:
    """An old page, with one section made anew."""
    ((heading, text),) = _sections(section).items()
    return "\n\n".join({**_sections(old), heading: text}.values()) + "\n"


def _sections(text: str) -> dict[str, str]:
    """The parts of a page by their headings, each without blank lines around it."""
    parts = re.split(r"\n(?=## )", text)
    return {part.partition("\n")[0]: part.strip() for part in parts}


def page(
    trials: Sequence[Trial],
    loads: Sequence[Load],
    inputs: Mapping[str, int] | None,
    sizes: Sizes,
) -> str:
    """The page, as Markdown."""
    slowest = max((trial.seconds for trial in trials), default=0.0)
    given = " ".join(f"--{name} {value}" for name, value in vars(sizes).items())
    parts = [
        "# Reliability",
        "This page shows what happens to segkit's jobs if they are killed, if the system refuses "
        "them memory or disk space, and if there are very many of them. This command made the "
        "tables:\n\n"
        "<!-- not run: takes minutes, and mounts disks -->\n"
        f"```sh\npython -m benchmarks.reliability {given}\n```",
        "## Faults",
        "Each fault hits a small job. A fault is survived if all of this is true:\n\n"
        "- right after it, every file is complete or absent, results from before are unchanged, "
        "and "
        "no process is left behind;\n"
        "- the job says one sentence, and its exit code is not zero (`kill -9` leaves no time for "
        "a "
        "sentence);\n"
        "- then the same command, or `--resume`, ends with the same files, **byte for byte**, as a "
        "job without a fault.\n\n"
        "Lost bytes are the bytes of three kinds of files: earlier files that were changed, "
        "half-written files, and files that differ from those of a job without a fault.",
        faults_table(trials) + failures(trials),
        "The time of `kill -9` is drawn at random: before a file or folder is changed, while a "
        "file is being written, or any time. Every third job is killed again when it continues. "
        "Training is compared by "
        "its weights, description, table of metrics and pictures. Ctrl-C and SIGTERM, which "
        "schedulers send before a time limit, come at any time of training or validation; the "
        f'slowest of {sum(t.seconds > 0 for t in trials)} jobs ended after {slowest:.1f} s. "Two '
        "at "
        'once" start in one folder, from an empty cache.',
        "## Messages",
        sentences(trials),
    ]
    if inputs is not None:
        parts.append(inputs_section(inputs, sizes.seed))
    parts += [
        "## Many volumes",
        "One process segments this number of scans, with probabilities, or prepares this number of "
        "cases in two processes of its own. Growth is the median slope of resident memory over all "
        "pairs of measurements (Theil and Sen) after the first 40 %. The other columns say how "
        "many "
        "more there are at the end than before the first volume.",
        load_table(loads),
        f"Linux, {num_cores()} cores, Python {platform.python_version()}, torch "
        f"{version('torch')}, segkit {version('segkit')}.",
    ]
    return "\n\n".join(parts) + "\n"


def fuzzed(count: int, seed: int) -> Mapping[str, int] | None:
    """The number of damaged inputs with each outcome; None without `benchmarks.faults.fuzz`."""
    if find_spec("benchmarks.faults.fuzz") is None:
        return None
    outcomes: Mapping[str, int] = import_module("benchmarks.faults.fuzz").fuzz(count, seed)
    return outcomes


def _grouped(trials: Iterable[Trial]) -> dict[tuple[str, str], list[Trial]]:
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in trials:
        groups.setdefault((trial.fault, trial.job), []).append(trial)
    return groups


def run(
    sizes: Sizes, console: Console, fuzz: Callable[[int, int], Mapping[str, int] | None]
) -> str:
    """Run all trials and return the page."""
    track = Tracker(console)
    trials: list[Trial] = []
    with tempfile.TemporaryDirectory(prefix="segkit-") as temporary:
        with Zygote() as zygote:
            bench = jobs.bench_in(Path(temporary), zygote)
            for what, count, group in trials_of(bench, sizes):
                found = list(track(group, what, count))
                trials += found
                console.print(
                    f"{what}: {sum(trial.survived for trial in found)} of {len(found)} survived",
                    highlight=False,
                )
        loads = []
        for name, count in (("predict", sizes.scans), ("preprocess", sizes.cases)):
            with console.status(f"{name}, {count} volumes"):
                loads.append(measure(name, bench.model, count))
            console.print(f"{name}: {loads[-1].slope:+.2f} MB per 100 volumes", highlight=False)
    with console.status(f"{sizes.inputs} damaged inputs"):
        inputs = fuzz(sizes.inputs, sizes.seed)
    return page(trials, loads, inputs, sizes)


def main() -> None:
    """Run the trials and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each of the five jobs")
    parser.add_argument(
        "--asks", type=int, default=10, help="stops of a training; also for two at once"
    )
    parser.add_argument("--scans", type=int, default=1000, help="scans for predict")
    parser.add_argument("--cases", type=int, default=500, help="cases for preprocessing")
    parser.add_argument("--inputs", type=int, default=10_000, help="inputs damaged at random")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PAGE)
    parser.add_argument("--only", choices=("inputs",), help="keep all other sections of the page")
    options = parser.parse_args()
    sizes = Sizes(**{name: getattr(options, name) for name in Sizes.__dataclass_fields__})
    console = Console()
    old = options.out.read_text(encoding="utf-8") if options.out.is_file() else ""
    if options.only:
        counts = fuzzed(sizes.inputs, sizes.seed)
        if counts is None or not old:
            parser.error("--only inputs needs benchmarks/faults/fuzz.py and a page to change")
        write_text(options.out, replaced(old, inputs_section(counts, sizes.seed)))
    else:
        write_text(options.out, merged(old, run(sizes, console, fuzzed)))
    console.print(f"wrote {options.out}", highlight=False)


if __name__ == "__main__":
    main()
