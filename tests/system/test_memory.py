"""Free memory respects the limits of the system and of each control group around this process."""

import os
from pathlib import Path

import pytest

from segkit.system import control_groups, memory
from segkit.system.memory import free_memory, in_words
from tests.control_groups import VERSION_2, lies_in, write_group

AVAILABLE = 300 * 1024
UNLIMITED_V1 = "9223372036854771712"
VERSION_1 = "32 31 0:32 {root} {top}/memory rw,relatime - cgroup cgroup rw,memory"
VERSION_1_WITH_CPU = "32 31 0:32 {root} {top}/memory rw - cgroup cgroup rw,cpuacct,memory"


@pytest.fixture
def linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Linux with 300 KB free and no control groups yet, in a folder whose name has a space."""
    state = tmp_path / "meminfo"
    state.write_text(f"MemTotal: 900 kB\nMemFree: 100 kB\nMemAvailable: {AVAILABLE // 1024} kB\n")
    monkeypatch.setattr(memory, "MEMORY_STATE", state)
    monkeypatch.setattr(control_groups, "PROCESS", tmp_path)
    (tmp_path / "sys fs cgroup").mkdir()
    return tmp_path


def test_free_memory_is_what_linux_leaves_without_control_groups(
    linux: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert free_memory() == AVAILABLE
    monkeypatch.setattr(memory, "MEMORY_STATE", linux / "none")
    assert free_memory() == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    monkeypatch.delattr(os, "sysconf")
    assert free_memory() == 4 * 1024**3


def test_a_container_of_version_2_leaves_its_limit_minus_memory_that_cannot_be_freed(
    linux: Path,
) -> None:
    top = lies_in(linux, "0::/\n", VERSION_2)
    write_group(top, memory_max="max", memory_stat={"anon": 1000, "file": 5000})
    assert free_memory() == AVAILABLE
    write_group(top, memory_max=3000)
    assert free_memory() == 2000
    write_group(
        top, memory_stat={"anon": 1000, "file": 5000, "shmem": 300, "slab_unreclaimable": 50}
    )
    assert free_memory() == 1650
    write_group(top, memory_high=2000)  # above it, processes are slowed down until they stand still
    assert free_memory() == 650
    write_group(top, memory_max=500)
    assert free_memory() == 0


@pytest.mark.parametrize("tightest", ["slurm", "slurm/job_7", "slurm/job_7/step_0", "."])
def test_the_tightest_limit_along_the_path_counts_in_version_2(linux: Path, tightest: str) -> None:
    top = lies_in(linux, "0::/slurm/job_7/step_0\n", VERSION_2)
    for group in (".", "slurm", "slurm/job_7", "slurm/job_7/step_0"):
        limit = 9000 if group == tightest else 90_000
        write_group(top / group, memory_max=limit, memory_stat={"anon": 2000})
    write_group(top / "slurm/job_8", memory_max=10, memory_stat={"anon": 0})  # another job's
    assert free_memory() == 7000


def test_a_large_limit_shared_with_others_may_leave_less_than_a_small_one(linux: Path) -> None:
    """A group of 10,000 bytes of which a neighbour holds 9,500 leaves less than one of 5,000."""
    top = lies_in(linux, "0::/user/session\n", VERSION_2)
    write_group(top / "user", memory_max=10_000, memory_stat={"anon": 9_500})
    write_group(top / "user/session", memory_max=5000, memory_stat={"anon": 100})
    assert free_memory() == 500


@pytest.mark.parametrize("mounted", [VERSION_1, VERSION_1_WITH_CPU])
@pytest.mark.parametrize("tightest", ["batch", "batch/job_7", "."])
def test_the_tightest_limit_along_the_path_counts_in_version_1(
    linux: Path, tightest: str, mounted: str
) -> None:
    groups = "5:devices:/\n4:cpuacct,memory:/batch/job_7\n1:name=systemd:/\n0::/\n"
    top = lies_in(linux, groups, mounted) / "memory"
    for group in (".", "batch", "batch/job_7"):
        limit = "9000" if group == tightest else UNLIMITED_V1
        write_group(
            top / group,
            memory_limit_in_bytes=limit,
            memory_stat={"rss": 10, "total_rss": 2000, "total_shmem": 500, "total_cache": 4000},
        )
    assert free_memory() == 6500


def test_version_1_without_limits_leaves_what_linux_leaves(linux: Path) -> None:
    top = lies_in(linux, "4:memory:/batch\n", VERSION_1) / "memory"
    write_group(top / "batch", memory_limit_in_bytes=UNLIMITED_V1, memory_stat={"total_rss": 2000})
    assert free_memory() == AVAILABLE


def test_both_versions_together_leave_the_least_of_both(linux: Path) -> None:
    """systemd's hybrid: version 2 is mounted beside version 1, which holds the memory."""
    both = f"{VERSION_1}\n{VERSION_2.replace('{top}', '{top}/unified')}"
    top = lies_in(linux, "4:memory:/job\n0::/job\n", both)
    write_group(top / "memory/job", memory_limit_in_bytes=9000, memory_stat={"total_rss": 1000})
    write_group(top / "unified/job", cgroup_procs="1")
    assert free_memory() == 8000
    write_group(top / "unified/job", memory_max=5000, memory_stat={"anon": 1000})
    assert free_memory() == 4000


@pytest.mark.parametrize("root", ["/docker/abc", "/../../docker/abc", "/.."])
def test_a_container_that_sees_paths_of_its_host_finds_its_limit(linux: Path, root: str) -> None:
    """Its own group lies at the mount point, and the groups above it cannot be seen."""
    for groups, mounted, files in (
        ("4:memory:/docker/abc\n", VERSION_1, ("memory_limit_in_bytes", "total_rss", "memory")),
        ("0::/docker/abc\n", VERSION_2, ("memory_max", "anon", ".")),
    ):
        limit, held, folder = files
        top = lies_in(linux, groups, mounted, root) / folder
        write_group(top, **{limit: 9000}, memory_stat={held: 2000})
        assert free_memory() == 7000


def test_a_process_that_was_moved_out_of_its_namespace_finds_the_limit_it_sees(
    linux: Path,
) -> None:
    top = lies_in(linux, "0::/../other\n", VERSION_2)
    write_group(top, memory_max=9000, memory_stat={"anon": 2000})
    assert free_memory() == 7000


def test_a_group_without_statistics_counts_all_that_it_uses(linux: Path) -> None:
    top = lies_in(linux, "0::/job\n", VERSION_2)
    write_group(top / "job", memory_max=9000, memory_current=3000)
    assert free_memory() == 6000


@pytest.mark.parametrize(
    ("count", "words"), [(1.234e9, "1.23 GB"), (56_789_000, "56.8 MB"), (1e9, "1.00 GB")]
)
def test_a_number_of_bytes_is_written_with_a_fitting_unit(count: float, words: str) -> None:
    assert in_words(count) == words
