"""A file that did not change is read once."""

import os
from pathlib import Path

from segkit.io.kept import kept_while_unchanged


def test_a_file_is_read_again_only_if_it_changed(tmp_path: Path) -> None:
    reads = []

    @kept_while_unchanged(8)
    def read(path: Path) -> str:
        reads.append(path)
        return path.read_text()

    file = tmp_path / "a"
    file.write_text("one")
    assert [read(file), read(file)] == ["one", "one"] and len(reads) == 1
    file.write_text("two")
    os.utime(file, ns=(1, 1))
    assert read(file) == "two" and len(reads) == 2
