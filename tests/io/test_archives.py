"""Archives are unpacked only into their folder; one with a member outside it is not unpacked."""

import io
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from segkit.errors import DatasetError
from segkit.io import archives
from segkit.io.archives import unpack

FILES = {"Task/dataset.json": b"{}", "Task/imagesTr/a.nii.gz": os.urandom(3000), "Task/e": b""}


def as_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def as_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def as_tar_gz(path: Path, files: dict[str, bytes]) -> Path:
    return as_tar(path, files, "w:gz")


def below(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(archive: Path, tmp_path: Path, match: str) -> None:
    """It is refused, and there is not a file more than before."""
    before = below(tmp_path)
    with pytest.raises(DatasetError, match=match):
        unpack(archive, tmp_path / "in" / "out")
    assert below(tmp_path) == before
    assert not (tmp_path / "in" / "out").exists()


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz])
def test_unpacking_returns_the_packed_files(
    tmp_path: Path, pack: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    unpack(pack(tmp_path / "archive", FILES), tmp_path / "deep" / "out")
    assert below(tmp_path / "deep" / "out") == FILES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz])
@pytest.mark.parametrize(
    "name",
    ["../canary", "a/../../canary", "/canary", "//host/canary", "..\\canary", "C:canary", "a/.."],
)
def test_no_member_may_lie_outside_the_folder(
    tmp_path: Path, pack: Callable[[Path, dict[str, bytes]], Path], name: str
) -> None:
    archive = pack(tmp_path / "archive", {**FILES, name: b"out"})
    refused(archive, tmp_path, "would lie outside the folder; nothing was unpacked")


@pytest.mark.parametrize(
    "kind",
    [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE],
)
def test_links_and_devices_of_a_tar_are_refused(tmp_path: Path, kind: bytes) -> None:
    archive = as_tar(tmp_path / "archive.tar", FILES)
    with tarfile.open(archive, "a") as more:
        info = tarfile.TarInfo("Task/link")
        info.type, info.linkname = kind, "/etc/passwd"
        more.addfile(info)
    refused(archive, tmp_path, "is a link or a device")


def test_links_of_a_zip_are_refused(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "archive.zip", FILES)
    with zipfile.ZipFile(archive, "a") as more:
        info = zipfile.ZipInfo("Task/link")
        info.create_system, info.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
        more.writestr(info, "/etc")
    refused(archive, tmp_path, "is a link or a device")


@pytest.mark.parametrize("pack", [as_zip, as_tar])
@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b", "a"), ("a", "./a")])
def test_no_member_may_replace_another(
    tmp_path: Path, pack: Callable[[Path, dict[str, bytes]], Path], names: tuple[str, str]
) -> None:
    archive = pack(tmp_path / "archive", dict.fromkeys(names, b"content"))
    refused(archive, tmp_path, "has the same path as another")


def test_a_folder_may_be_named_before_after_and_twice(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        for name in (".", "a", "a/b", "a"):
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("a/b/empty"))
    unpack(tmp_path / "archive.tar", tmp_path / "out")
    assert below(tmp_path / "out") == {"a/b/empty": b""}


def test_absurd_claimed_sizes_are_refused(tmp_path: Path) -> None:
    archive = tmp_path / "archive.tar"
    info = tarfile.TarInfo("huge")
    info.size = 2**50
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    refused(archive, tmp_path, "too much for this disk or for such an archive")


@pytest.mark.parametrize("pack", [as_zip, as_tar_gz])
def test_a_bomb_is_refused(
    tmp_path: Path,
    pack: Callable[[Path, dict[str, bytes]], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives, "ALWAYS_ALLOWED", 2**16)
    archive = pack(tmp_path / "archive", {f"{number}": bytes(2**20) for number in range(4)})
    refused(archive, tmp_path, "too much for this disk")


def test_too_many_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MOST_MEMBERS", 2)
    refused(as_zip(tmp_path / "archive", FILES), tmp_path, "or 2 files, which is too much")


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz])
def test_a_damaged_archive_leaves_nothing(
    tmp_path: Path, pack: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    archive = pack(tmp_path / "archive", FILES)
    whole = archive.read_bytes()
    # (A plain tar that ends where a file does is whole to its readers.)
    for size in (0, 1, 100, 600, len(whole) // 3, 1700):
        archive.write_bytes(whole[:size])
        refused(archive, tmp_path, "cannot be unpacked")
    if pack is as_zip:
        archive.write_bytes(whole.replace(FILES["Task/imagesTr/a.nii.gz"][100:130], bytes(30)))
        refused(archive, tmp_path, "cannot be unpacked: Bad CRC-32")


@pytest.mark.parametrize("pack", [as_zip, as_tar, as_tar_gz])
def test_any_damage_is_refused_in_one_sentence_or_is_harmless(
    tmp_path: Path, pack: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    whole = pack(tmp_path / "archive", {**FILES, "b": b"text"}).read_bytes()
    random = np.random.default_rng(0)
    # Where names, sizes and kinds stand, not in the noise of the large file.
    telling = [place for place in range(len(whole)) if not 1600 <= place < 4000]
    (tmp_path / "in").mkdir()
    for trial in range(300):
        damaged = bytearray(whole)
        for place in random.choice(telling, 3).tolist():
            damaged[place] = int(random.integers(256))
        (tmp_path / "archive").write_bytes(damaged)
        out = tmp_path / "in" / f"{trial}"
        with suppress(DatasetError):
            unpack(tmp_path / "archive", out)
        assert {path.name for path in tmp_path.iterdir()} == {"archive", "in"}
        assert {path.name for path in out.parent.iterdir()} <= {out.name}
        shutil.rmtree(out, ignore_errors=True)


def test_a_folder_with_files_is_not_changed(tmp_path: Path) -> None:
    archive = as_zip(tmp_path / "archive.zip", FILES)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(DatasetError, match="exists already"):
        unpack(archive, tmp_path / "out")
    assert below(tmp_path / "out") == {"mine": b"mine"}


def test_a_missing_archive_is_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be unpacked"):
        unpack(tmp_path / "missing.zip", tmp_path / "out")


def test_no_unpacked_file_is_executable(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "archive.tar", "w") as archive:
        info = tarfile.TarInfo("run.sh")
        info.mode = 0o6777
        archive.addfile(info)
    unpack(tmp_path / "archive.tar", tmp_path / "out")
    assert not (tmp_path / "out" / "run.sh").stat().st_mode & (0o111 | stat.S_ISUID | stat.S_ISGID)


@pytest.mark.parametrize("name", [".", "./", "a/"])
def test_a_file_never_replaces_a_folder(tmp_path: Path, name: str) -> None:
    archive = as_tar(tmp_path / "archive.tar", {"a/b": b"content", name: b"content"})
    refused(archive, tmp_path, "has the same path as another")
