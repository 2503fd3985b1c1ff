"""A cached folder is whole, and has the files of its manifest."""

from pathlib import Path

import pytest

from segkit.io.atomic import write_text
from segkit.io.folder_cache import cached_folder, find_cached


def test_a_cached_folder_holds_the_files_of_its_manifest_and_no_others(tmp_path: Path) -> None:
    folder = cached_folder("name", [tmp_path], lambda made: write_text(made / "a", "a"))
    assert find_cached("name", [tmp_path]) == folder
    write_text(folder / "b", "an extension")
    assert find_cached("name", [tmp_path]) is None
    (folder / "b").unlink()
    (folder / "a").unlink()
    assert find_cached("name", [tmp_path]) is None


def test_a_cached_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        cached_folder("name", [tmp_path], fail)
    assert not list(tmp_path.iterdir())


def test_files_in_subfolders_belong_to_a_cached_folder(tmp_path: Path) -> None:
    folder = cached_folder("name", [tmp_path], lambda made: write_text(made / "b" / "a", "a"))
    assert find_cached("name", [tmp_path]) == folder
    write_text(folder / "b" / "a", "b")
    assert find_cached("name", [tmp_path]) is None


def test_a_cached_folder_is_made_anew_if_that_is_asked_for_and_works(tmp_path: Path) -> None:
    def make(text: str) -> Path:
        return cached_folder("n", [tmp_path], lambda made: write_text(made / "a", text), anew=True)

    def fail(_: Path) -> None:
        raise RuntimeError("planted")

    make("before")
    assert (make("after") / "a").read_text() == "after"
    with pytest.raises(RuntimeError, match="planted"):
        cached_folder("n", [tmp_path], fail, anew=True)
    assert (tmp_path / "n" / "a").read_text() == "after"
