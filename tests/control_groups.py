"""A Linux with control groups, as files in a folder."""

from collections.abc import Mapping
from pathlib import Path

OTHERS = "23 1 8:1 / / rw - ext4 /dev/sda rw\n30 31 0:29 / {top}/pids rw - cgroup cgroup rw,pids\n"
VERSION_2 = "41 31 0:38 {root} {top} rw,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate"


def lies_in(linux: Path, groups: str, mounted: str, root: str = "/") -> Path:
    """Write which groups the process lies in, and where they are mounted; the latter's folder.

    Args:
        linux: stands for `/proc/self`.
        groups: its file `cgroup`.
        mounted: lines of its file `mountinfo`, after those of other mounts.
        root: the group that lies at the mount point.
    """
    top = linux / "sys fs cgroup"
    escaped = str(top).replace(" ", "\\040")
    (linux / "cgroup").write_text(groups)
    (linux / "mountinfo").write_text(f"{OTHERS}{mounted}\n".format(top=escaped, root=root))
    return top


def write_group(folder: Path, **files: str | int | Mapping[str, int]) -> None:
    """Files of a group: `memory_max` is `memory.max`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        lines = content.items() if isinstance(content, Mapping) else None
        text = "".join(f"{key} {value}\n" for key, value in lines) if lines else f"{content}\n"
        (folder / name.replace("_", ".", 1)).write_text(text)
