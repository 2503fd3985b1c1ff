"""Two jobs that are started at once: each has a run of its own, and one cache serves both."""

from collections.abc import Iterator
from pathlib import Path

from benchmarks.faults.jobs import Bench, Job, runs_in
from benchmarks.faults.trial import Stored, Trial, broken, lost, stored, visible
from benchmarks.faults.zygote import Zygote


def both_at_once(bench: Bench, job: Job, count: int) -> Iterator[Trial]:
    """So many trials of two trainings in one folder, from an empty cache, at one moment."""
    whole = bench.fresh(f"{job.name}-one")
    ended = bench.zygote.run(job.words, whole)
    assert ended.code == 0, f"{job.name} fails where nothing strikes: {ended.err}"
    (run,) = runs_in(whole)
    cache = whole / "runs" / ".cache"
    expected = {**_of_run(run), **stored(visible(cache), cache)}
    with Zygote() as second:
        for number in range(count):
            folder = bench.fresh(f"{job.name}-both-{number}")
            children = [zygote.start(job.words, folder) for zygote in (bench.zygote, second)]
            both = [child.wait() for child in children]
            problems = [one.err.strip()[-300:] for one in both if one.code != 0]
            runs = runs_in(folder)
            if len(runs) != 2:
                problems.append(f"{len(runs)} runs")
            cache = folder / "runs" / ".cache"
            kept = stored(visible(cache), cache)
            missing = sum(lost(expected, {**_of_run(run), **kept}) for run in runs)
            halves = sum(path.stat().st_size for path in broken(visible(folder)))
            bad = missing + halves
            yield Trial(
                job.name,
                "started twice at once",
                not problems and not bad,
                bad,
                "; ".join(problems),
            )


def _of_run(run: Path) -> dict[str, Stored]:
    return stored([run / "model" / "weights.safetensors", run / "metrics.csv"], run)
