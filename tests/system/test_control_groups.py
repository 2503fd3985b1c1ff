"""The number of cores respects the CPU quota of each control group around this process."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from segkit.system import control_groups
from segkit.system.control_groups import quota_of_cores
from segkit.system.resources import limit_threads, num_cores
from tests.control_groups import VERSION_2, lies_in, write_group

VERSION_1 = "33 31 0:33 {root} {top}/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
MEMORY_V1 = "34 31 0:34 {root} {top}/memory rw - cgroup cgroup rw,memory"


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux with eight cores and no control groups yet, in a folder whose name has a space."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(control_groups, "PROCESS", tmp_path)
    (tmp_path / "sys fs cgroup").mkdir()
    return tmp_path


def test_without_control_groups_all_cores_count(linux: Path) -> None:
    assert quota_of_cores() is None and num_cores() == 8


@pytest.mark.parametrize(
    ("limit", "quota", "cores"),
    [
        ("max 100000", None, 8),
        ("200000 100000", 2.0, 2),
        ("150000 100000", 1.5, 2),
        ("50000 100000", 0.5, 1),
        ("25000 50000", 0.5, 1),
        ("1600000 100000", 16.0, 8),
    ],
)
def test_a_quota_of_version_2_is_rounded_up_to_whole_cores(
    limit: str, quota: float | None, cores: int, linux: Path
) -> None:
    top = lies_in(linux, "0::/\n", VERSION_2)
    write_group(top, cpu_max=limit)
    assert quota_of_cores() == quota and num_cores() == cores


@pytest.mark.parametrize(
    ("time", "period", "quota", "cores"),
    [(-1, 100_000, None, 8), (300_000, 100_000, 3.0, 3), (10_000, 100_000, 0.1, 1)],
)
def test_a_quota_of_version_1_is_time_over_period(
    time: int, period: int, quota: float | None, cores: int, linux: Path
) -> None:
    groups = "5:memory:/docker/abc\n4:cpu,cpuacct:/docker/abc\n0::/\n"
    top = lies_in(linux, groups, VERSION_1, "/docker/abc") / "cpu,cpuacct"
    write_group(top, cpu_cfs_quota_us=time, cpu_cfs_period_us=period)
    assert quota_of_cores() == quota and num_cores() == cores


@pytest.mark.parametrize("tightest", ["slurm", "slurm/job_7", "slurm/job_7/step_0"])
def test_the_tightest_quota_along_the_path_counts(tightest: str, linux: Path) -> None:
    top = lies_in(linux, "0::/slurm/job_7/step_0\n", VERSION_2)  # the outermost has no cpu.max
    for group in ("slurm", "slurm/job_7", "slurm/job_7/step_0"):
        write_group(top / group, cpu_max=f"{3 if group == tightest else 6}00000 100000")
    write_group(top / "slurm/job_8", cpu_max="100000 100000")  # another job's
    assert num_cores() == 3


def test_fewer_cores_than_the_quota_count(linux: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {4, 5}, raising=False)
    write_group(lies_in(linux, "0::/\n", VERSION_2), cpu_max="600000 100000")
    assert num_cores() == 2


def test_quotas_of_cores_and_limits_of_memory_can_lie_in_two_groups(linux: Path) -> None:
    """In version 1 each controller has its own tree, and in hybrids version 2 is there too."""
    groups = "5:memory:/tight\n4:cpu,cpuacct:/wide\n0::/job\n"
    unified = VERSION_2.replace("{top}", "{top}/unified")
    top = lies_in(linux, groups, f"{VERSION_1}\n{MEMORY_V1}\n{unified}")
    write_group(top / "memory/tight", cpu_cfs_quota_us=100_000, cpu_cfs_period_us=100_000)
    write_group(top / "cpu,cpuacct/wide", cpu_cfs_quota_us=500_000, cpu_cfs_period_us=100_000)
    assert num_cores() == 5
    write_group(top / "unified/job", cpu_max="400000 100000")
    assert num_cores() == 4


@pytest.mark.parametrize("content", ["", "nonsense", "100000", "0 100000", "100000 0", "1 2 3"])
def test_a_file_without_a_quota_sets_no_limit(content: str, linux: Path) -> None:
    write_group(lies_in(linux, "0::/\n", VERSION_2), cpu_max=content)
    assert quota_of_cores() is None


@pytest.fixture
def five_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(5)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("limit", "threads"),
    [("max 100000", 5), ("150000 100000", 2), ("50000 100000", 1), ("700000 100000", 5)],
)
def test_torch_uses_no_more_threads_than_the_quota_has_cores(
    limit: str,
    threads: int,
    linux: Path,
    five_threads: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    write_group(lies_in(linux, "0::/\n", VERSION_2), cpu_max=limit)
    with caplog.at_level(logging.INFO):
        limit_threads()
    assert torch.get_num_threads() == threads
    assert (f"torch uses {threads} instead of 5 threads" in caplog.text) == (threads < 5)


def test_the_quota_never_raises_the_number_of_threads(linux: Path, five_threads: None) -> None:
    write_group(lies_in(linux, "0::/\n", VERSION_2), cpu_max="800000 100000")
    limit_threads()
    assert torch.get_num_threads() == 5
