"""`segkit fetch`: download of public datasets by name.

They are the datasets of the Medical Segmentation Decathlon (Antonelli et al. 2022). MONAI downloads
them and compares their checksums. `segkit.io.archives` unpacks each completely or not at all.
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
"""The download ends if a server sends nothing for so many seconds."""


@dataclass(frozen=True)
class Source:
    """The address of an archive, and its MD5 checksum."""

    url: str
    md5: str


def decathlon() -> dict[str, Source]:
    """The tasks of the Decathlon, by name. Raises SegkitError if MONAI is not installed."""
    try:
        from monai.apps.datasets import DecathlonDataset
    except ImportError:
        raise SegkitError("fetch needs MONAI; run pip install 'segkit[fetch]'") from None
    return {
        name: Source(url, DecathlonDataset.md5[name])
        for name, url in DecathlonDataset.resource.items()
    }


def named(name: str, sources: Mapping[str, Source]) -> str:
    """The full name of a dataset; `task04` or `hippocampus` stand for `Task04_Hippocampus`.

    Raises:
        DatasetError: there is no such dataset.
    """
    for known in sources:
        if name.lower() in (known.lower(), *known.lower().split("_")):
            return known
    raise DatasetError(
        f"{name}: segkit cannot fetch a dataset with this name; choose one of {', '.join(sources)}"
    )


def fetch_dataset(name: str, source: Source, folder: Path) -> Path:
    """Download a dataset to `folder/NAME`, completely or not at all.

    Args:
        name: full name of the dataset.
        source: address and checksum of its archive.
        folder: the folder in which the dataset's folder is made.

    Returns:
        The folder of the dataset.

    Raises:
        DatasetError: the folder exists already, the download fails, the checksum is wrong, or the
            archive does not contain this dataset.
    """
    target = folder / name
    if target.exists():
        raise DatasetError(f"{target}: exists already; use it, or choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as beside:
        archive = Path(beside) / source.url.rpartition("/")[2]
        _download(source, archive)
        inside = Path(beside) / "unpacked"
        unpack(archive, inside)
        if not (inside / name / "dataset.json").is_file():
            raise DatasetError(
                f"{source.url}: expected {name}/dataset.json in it, found none; fetch another"
            )
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
        reason = f"the file differs from the published one, whose MD5 is {source.md5}"
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
    if not archive.is_file():  # MONAI ignores files that it cannot write
        raise DatasetError(
            f"{source.url}: cannot be fetched: {reason}; check the network and the disk, then try "
            f"again"
        )


@contextmanager
def _impatient() -> Iterator[None]:
    """Limit the time that connections made inside this block wait for a server."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(SECONDS)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
