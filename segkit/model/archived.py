"""Models in an archive, on this machine or on a web server."""

import hashlib
import math
import shutil
import tarfile
import zipfile
from functools import partial as bound
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from segkit.errors import DatasetError, ModelError
from segkit.io.archives import unpack
from segkit.io.atomic import whole, write_text
from segkit.io.checksums import checksum
from segkit.io.folder_cache import cached_folder
from segkit.io.safe_text import read_text
from segkit.model.addresses import ArchiveAddress
from segkit.model.file_names import DESCRIPTION, FOLD
from segkit.system.progress import Track, untracked

SECONDS_OF_SILENCE = 60.0
"""The download ends if the server sends nothing for so many seconds."""
CHUNK = 2**20
ARCHIVES = "archives"
UNPACKED = "unpacked"
ARCHIVE_SUM = "sha256"
"""The file in the cache with the SHA-256 of the archive."""


def fetch_archive(
    address: ArchiveAddress, places: Path, *, refresh: bool = False, track: Track = untracked
) -> tuple[Path, str]:
    """The folder of the model in an archive on a web server, and the archive's SHA-256.

    It is downloaded and unpacked into the cache the first time, and later only if `refresh` is
    true.

    Args:
        address: the address of the archive, with its SHA-256 if that is known.
        places: the folder of the cache for models.
        refresh: whether it is downloaded again.
        track: shows the progress over MiB.

    Raises:
        ModelError: the archive cannot be fetched or unpacked, has another SHA-256, or contains no
            model.
    """
    place = places / ARCHIVES
    name = address.sha256 or f"url-{hashlib.sha256(address.url.encode()).hexdigest()}"

    def make(folder: Path) -> None:
        archive = folder / "archive"
        _download(address, archive, track)
        found = checksum(archive)
        if address.sha256 not in (None, found):
            raise ModelError(
                f"{address}: expected the SHA-256 {address.sha256}, found {found}; try again, or "
                "ask the author for the right one"
            )
        _unpack(archive, folder / UNPACKED, str(address))
        archive.unlink()
        write_text(folder / ARCHIVE_SUM, f"{found}\n")

    anew = refresh and address.sha256 is None
    folder = cached_folder(name, [place], make, anew=anew)
    return model_in(folder / UNPACKED, str(address)), read_text(folder / ARCHIVE_SUM).strip()


def unpack_archive(archive: Path, places: Path) -> Path:
    """The folder of the model in an archive on this machine, unpacked into the cache.

    Raises:
        ModelError: the archive cannot be unpacked, or contains no model.
    """
    folder = cached_folder(
        checksum(archive),
        [places / ARCHIVES],
        lambda folder: _unpack(archive, folder / UNPACKED, str(archive)),
    )
    return model_in(folder / UNPACKED, str(archive))


def model_in(folder: Path, source: str) -> Path:
    """The folder of a model or run in an unpacked archive: its root, or its only folder with one.

    Raises:
        ModelError: it contains no model, or more than one.
    """
    if _holds_model(folder):
        return folder
    found = [inside for inside in sorted(folder.iterdir()) if _holds_model(inside)]
    if len(found) != 1:
        raise ModelError(
            f"{source}: expected one run or model folder with {DESCRIPTION} in it, found "
            f"{len(found) or 'none'}; pack exactly one model"
        )
    return found[0]


def _holds_model(folder: Path) -> bool:
    places = (folder / DESCRIPTION, folder / "model" / DESCRIPTION)
    return any(place.is_file() for place in places) or any(
        folder.glob(f"{FOLD}*/model/{DESCRIPTION}")
    )


def _unpack(archive: Path, folder: Path, source: str) -> None:
    if not (zipfile.is_zipfile(archive) or tarfile.is_tarfile(archive)):
        with archive.open("rb") as file:
            page = file.read(1024).lstrip().startswith(b"<")
        raise ModelError(
            f"{source}: expected a zip with a model, found "
            f"{'a web page' if page else 'no archive'}; use the address of the file itself"
        )
    try:
        unpack(archive, folder)
    except DatasetError as error:
        raise ModelError(str(error).replace(str(archive), source)) from None
    model_in(folder, source)


class _NoLessSafe(HTTPRedirectHandler):
    """Follows a server to another address, but never from https to anything else."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> Request | None:
        before, after = urlsplit(req.full_url).scheme, urlsplit(newurl).scheme
        if after != "https" and (before, after) != ("http", "http"):
            fp.close()
            raise URLError(f"it leads on to {newurl}, which is not encrypted")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _download(address: ArchiveAddress, path: Path, track: Track) -> None:
    request = Request(address.url, headers={"User-Agent": "segkit"})
    try:
        with (
            build_opener(_NoLessSafe).open(request, timeout=SECONDS_OF_SILENCE) as answer,
            whole(path) as partial,
            partial.open("wb") as file,
        ):
            length = int(answer.headers.get("Content-Length") or 0)
            most = shutil.disk_usage(path.parent).free
            chunks = iter(bound(answer.read, CHUNK), b"")
            for chunk in track(chunks, "fetching (MiB)", math.ceil(length / CHUNK) or 1):
                file.write(chunk)
                if file.tell() > most:
                    raise ValueError(f"it is larger than the {most / 1e9:.1f} GB that are free")
            if length and file.tell() != length:
                raise ValueError(f"expected {length:,} bytes, found {file.tell():,}")
    except (OSError, HTTPException, ValueError) as error:
        reason = " ".join(str(getattr(error, "reason", None) or error).split())
        code = ""
        if isinstance(error, HTTPError):
            error.close()
            code = f"the server answered {error.code}, "
        raise ModelError(
            f"{address}: cannot be fetched: {code}{reason or type(error).__name__}; check the "
            f"address and the network, then try again"
        ) from None
