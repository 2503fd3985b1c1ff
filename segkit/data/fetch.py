"""`segkit fetch`: public datasets by name, downloaded by MONAI and held against its checksums.

They are those of the Medical Segmentation Decathlon (Antonelli et al. 2022), from the copies that
MONAI keeps. What comes is unpacked by `segkit.io.archives`, whole or not at all.
"""

import logging
import socket
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib.util import find_spec
from pathlib import Path

from segkit.errors import DatasetError, SegkitError
from segkit.io.archives import unpack

SECONDS = 60.0
"""After which a server that says nothing is given up."""


@dataclass(frozen=True)
class Source:
    """Where an archive lies, and the MD5 that it has."""

    url: str
    md5: str


def decathlon() -> dict[str, Source]:
    """The tasks of the Decathlon by name. Raises SegkitError where MONAI is not installed."""
    try:
        from monai.apps.datasets import DecathlonDataset
    except ImportError:
        raise SegkitError("fetch needs MONAI; run pip install 'segkit[fetch]'") from None
    return {
        name: Source(url, DecathlonDataset.md5[name])
        for name, url in DecathlonDataset.resource.items()
    }


def named(name: str, sources: Mapping[str, Source]) -> str:
    """The whole name: of `Task04_Hippocampus`, `task04` and `hippocampus` say enough."""
    for known in sources:
        if name.lower() in (known.lower(), *known.lower().split("_")):
            return known
    raise DatasetError(f"{name}: is no dataset to fetch; name one of {', '.join(sources)}")


def fetch_dataset(name: str, source: Source, folder: Path) -> Path:
    """Download a dataset into `folder/NAME`, which appears whole or not at all, and return that.

    Raises DatasetError where it is there already, cannot be had, is not what was published, or
    holds no dataset of that name.
    """
    target = folder / name
    if target.exists():
        raise DatasetError(f"{target}: exists already; use it, or name another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
        archive = Path(beside) / source.url.rpartition("/")[2]
        _download(source, archive)
        inside = Path(beside) / "unpacked"
        unpack(archive, inside)
        if not (inside / name / "dataset.json").is_file():
            raise DatasetError(f"{source.url}: expected {name}/dataset.json in it, found none")
        (inside / name).replace(target)
    return target


def _download(source: Source, archive: Path) -> None:
    from monai.apps.utils import HashCheckError, download_url

    logging.getLogger("monai.apps").setLevel(logging.CRITICAL)
    reason = "the file cannot be written"
    try:
        with _impatient():
            download_url(
                source.url,
                archive,
                hash_val=source.md5,
                hash_type="md5",
                progress=sys.stderr.isatty() and find_spec("tqdm") is not None,
            )
    except HashCheckError:
        reason = f"what came is not what was published, whose MD5 is {source.md5}"
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if not archive.is_file():  # MONAI passes over files that it may not write
        raise DatasetError(
            f"{source.url}: cannot be fetched: {reason}; check the network and the disk, try again"
        )


@contextmanager
def _impatient() -> Iterator[None]:
    """No connection made within waits for ever."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
