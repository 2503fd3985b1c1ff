import gzip
import zlib
from pathlib import Path

import pytest

from segkit.io import deflate
from segkit.io.deflate import STREAM_ERRORS, gzip_file, inflater

CONTENT = bytes(range(256)) * 999


def inflated(stream: bytes) -> bytes:
    engine, found = inflater(), b""
    while not engine.eof:
        piece = engine.decompress(stream, 1000)
        stream = engine.unconsumed_tail
        if not piece and not stream:
            break
        found += piece
    return found


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_stream_of_either_kind_is_read_whole(pack: object) -> None:
    assert inflated(pack(CONTENT)) == CONTENT  # type: ignore[operator]


def test_a_written_file_is_read_by_python_and_is_the_same_each_time(tmp_path: Path) -> None:
    for name in ("one.gz", "two.gz"):
        with gzip_file(tmp_path / name) as file:
            file.write(CONTENT[:7])
            file.write(memoryview(CONTENT)[7:])
    assert gzip.decompress((tmp_path / "one.gz").read_bytes()) == CONTENT
    assert (tmp_path / "one.gz").read_bytes() == (tmp_path / "two.gz").read_bytes()


@pytest.mark.parametrize("pack", [gzip.compress, zlib.compress])
def test_a_wrong_checksum_is_an_error(pack: object) -> None:
    stream = bytearray(pack(CONTENT))  # type: ignore[operator]
    stream[-5 if pack is gzip.compress else -1] ^= 1
    with pytest.raises(STREAM_ERRORS):
        inflated(bytes(stream))


def test_without_isal_files_are_read_and_written_by_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deflate, "fast_zlib", zlib)
    monkeypatch.setattr(deflate, "fast_gzip", gzip)
    with gzip_file(tmp_path / "one.gz") as file:
        file.write(CONTENT)
    assert inflated((tmp_path / "one.gz").read_bytes()) == CONTENT
