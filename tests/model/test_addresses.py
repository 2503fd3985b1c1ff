"""Addresses of models: what is one, what it means, and several in one variable."""

from pathlib import Path

import pytest

from segkit.errors import ModelError
from segkit.model.addresses import (
    ArchiveAddress,
    HubAddress,
    is_address,
    parse_address,
    split_paths,
)

SUM = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf:clinic/brains", HubAddress("clinic", "brains")),
        ("hf://clinic/brains", HubAddress("clinic", "brains")),
        ("hf:clinic/brains@refs/pr/1", HubAddress("clinic", "brains", "refs/pr/1")),
        (Path("hf:clinic/brains@v1.0"), HubAddress("clinic", "brains", "v1.0")),
        ("https://a.org/m.zip", ArchiveAddress("https://a.org/m.zip")),
        (Path("https://a.org/m.zip"), ArchiveAddress("https://a.org/m.zip")),
        ("http://a.org/m?download=1", ArchiveAddress("http://a.org/m?download=1")),
        (f"https://a.org/m.zip#sha256={SUM}", ArchiveAddress("https://a.org/m.zip", SUM)),
        (f"https://a.org/m.zip#SHA256={SUM.upper()}", ArchiveAddress("https://a.org/m.zip", SUM)),
        ("https://huggingface.co/c/b/resolve/main/m.zip",
         ArchiveAddress("https://huggingface.co/c/b/resolve/main/m.zip")),
        ("runs/mine", None),
        ("./hf:clinic/brains", None),
        ("file:///etc/passwd", None),
        ("ftp://a.org/m.zip", None),
    ],
)  # fmt: skip
def test_an_address_means(text: str | Path, meant: HubAddress | ArchiveAddress | None) -> None:
    assert parse_address(text) == meant
    assert is_address(text) == (meant is not None)
    if isinstance(meant, HubAddress):
        assert parse_address(str(meant)) == meant


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hf:", "expected hf:OWNER/NAME"),
        ("hf:brains", "expected hf:OWNER/NAME"),
        ("hf:a/b/c", "expected hf:OWNER/NAME"),
        ("hf:a/b@", "expected hf:OWNER/NAME"),
        ("hf:a/b@x/../y", "expected hf:OWNER/NAME"),
        ("hf:a--x/b", "expected hf:OWNER/NAME"),
        ("hf:a/b c", "expected hf:OWNER/NAME"),
        ("https://huggingface.co/a/b", "write hf:a/b"),
        ("https://huggingface.co/a/b/tree/main", "write hf:a/b"),
        ("https://huggingface.co/", "write hf:OWNER/NAME"),
        ("https://a.org/m.zip#sha256=12", "expected #sha256= and 64 hexadecimal digits"),
        ("https://a.org/m.zip#md5=12", "expected #sha256= and 64 hexadecimal digits"),
    ],
)
def test_a_malformed_address_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        parse_address(text)


def test_a_variable_holds_several_paths_and_addresses_as_path_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert split_paths("") == []
    assert split_paths("runs/a b") == ["runs/a b"]
    text = "runs/a:hf:clinic/brains@v1:http://127.0.0.1:80/m.zip:https://a.org/m.zip:/b"
    assert split_paths(text) == [
        "runs/a",
        "hf:clinic/brains@v1",
        "http://127.0.0.1:80/m.zip",
        "https://a.org/m.zip",
        "/b",
    ]
