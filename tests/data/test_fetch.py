"""Datasets fetched from a server of our own: what comes, and what is said of what does not."""

import hashlib
import sys
import tarfile
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from segkit.checking.check import check
from segkit.data import fetch as fetching
from segkit.data.fetch import Source, decathlon, fetch_dataset, named
from segkit.errors import DatasetError, SegkitError
from tests.cli.command import run
from tests.small import small_dataset

NAME = "Task99_Ball"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *words: object) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small dataset in a tar, as the Decathlon's are."""
    folder = tmp_path_factory.mktemp("packed")
    small_dataset(folder / NAME)
    with tarfile.open(folder / f"{NAME}.tar", "w") as archive:
        archive.add(folder / NAME, NAME)
    return folder / f"{NAME}.tar"


@pytest.fixture(scope="module")
def served(packed: Path) -> Iterator[str]:
    """The address of a server of the archive's folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(packed.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def source_of(address: str, packed: Path) -> Source:
    return Source(f"{address}/{packed.name}", hashlib.md5(packed.read_bytes()).hexdigest())


def test_a_dataset_comes_whole_and_leaves_nothing_beside_it(
    served: str, packed: Path, tmp_path: Path
) -> None:
    for address, out in ((served, tmp_path / "a"), (packed.parent.as_uri(), tmp_path / "b")):
        folder = fetch_dataset(NAME, source_of(address, packed), out)
        assert folder == out / NAME and [path.name for path in out.iterdir()] == [NAME]
        for path in folder.rglob("*"):
            if path.is_file():
                inside = packed.parent / NAME / path.relative_to(folder)
                assert path.read_bytes() == inside.read_bytes()
        assert "4 cases, all readable" in str(check(folder))
        with pytest.raises(DatasetError, match="exists already; use it, or choose another --out"):
            fetch_dataset(NAME, source_of(address, packed), out)


def test_a_download_with_a_wrong_checksum_is_refused(
    served: str, packed: Path, tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="the file differs from the published one"):
        fetch_dataset(NAME, Source(f"{served}/{packed.name}", "0" * 32), tmp_path)
    with pytest.raises(DatasetError, match=r"expected Task98_Cube/dataset\.json in it"):
        fetch_dataset("Task98_Cube", source_of(served, packed), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("address", "words"),
    [
        ("{served}/nothing.tar", "404"),
        ("http://127.0.0.1:9/x.tar", "refused"),
        ("http://no-such-host.invalid/x.tar", "urlopen error"),
        ("file:///nowhere/x.tar", "No such file"),
        ("gopher://x/x.tar", "unknown url type"),
    ],
)
def test_a_download_that_fails_is_one_sentence(
    address: str, words: str, served: str, tmp_path: Path
) -> None:
    url = address.format(served=served)
    with pytest.raises(DatasetError, match=words) as refusal:
        fetch_dataset(NAME, Source(url, "0" * 32), tmp_path)
    assert str(refusal.value).startswith(f"{url}: cannot be fetched: ")
    assert "\n" not in str(refusal.value) and not list(tmp_path.iterdir())


def test_an_archive_that_reaches_elsewhere_is_refused(
    served: str, packed: Path, tmp_path: Path
) -> None:
    evil = packed.with_name("evil.tar")
    with tarfile.open(evil, "w") as archive:
        archive.add(packed, f"{NAME}/../../../outside")
    with pytest.raises(DatasetError, match="would lie outside the folder"):
        fetch_dataset(NAME, source_of(served, evil), tmp_path / "in" / "side")
    assert not (tmp_path / "outside").exists()


def test_the_ten_tasks_are_known_by_whole_names_and_halves() -> None:
    tasks = decathlon()
    assert len(tasks) == 10
    for word in ("Task04_Hippocampus", "task04", "hippocampus", "Hippocampus"):
        assert named(word, tasks) == "Task04_Hippocampus"
    assert all(len(source.md5) == 32 and source.url.endswith(".tar") for source in tasks.values())
    with pytest.raises(
        DatasetError,
        match="nose: segkit cannot fetch a dataset with this name; choose one of Task01_Brain",
    ):
        named("nose", tasks)


def test_without_monai_the_error_names_the_package_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "monai.apps.datasets", None)
    with pytest.raises(SegkitError, match=r"pip install 'segkit\[fetch\]'"):
        decathlon()


def test_the_command_prints_the_folder_and_the_next_command(
    served: str,
    packed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(fetching, "decathlon", lambda: {NAME: source_of(served, packed)})
    code, out, _ = run("fetch", "ball", "--out", tmp_path, capsys=capsys)
    assert code == 0
    assert f"wrote {tmp_path / NAME}" in out and f"next: segkit check {tmp_path / NAME}" in out
    code, _, err = run("fetch", "cube", "--out", tmp_path, capsys=capsys)
    assert (
        code == 2
        and err
        == f"segkit: cube: segkit cannot fetch a dataset with this name; choose one of {NAME}\n"
    )
