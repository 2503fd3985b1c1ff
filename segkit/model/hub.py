"""Models on a model hub: reading a repository, and the errors of a hub as sentences.

The library huggingface_hub speaks with the server; `HF_ENDPOINT` names another server. Only the
files of a model are downloaded. Each is compared with the checksum that the server lists.
"""

import hashlib
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote, urlsplit

from segkit.errors import ModelError, first_few
from segkit.io.atomic import write_json
from segkit.io.checksums import checksum
from segkit.io.folder_cache import cached_folder, find_cached
from segkit.io.safe_text import read_json_object
from segkit.model.addresses import MAIN, HubAddress, hub_server
from segkit.model.file_names import DESCRIPTION, FOLD, SUMS, WEIGHTS

MODEL_FILES = (DESCRIPTION, WEIGHTS, SUMS)
MOST_FILES = 1000
SECONDS_TO_DESCRIBE = 30.0
"""The longest time that the server may take to describe a repository."""
COMMIT = re.compile(r"[0-9a-f]{40}")
PIN = "commit"


@dataclass(frozen=True)
class HubFile:
    """A file of a repository. `blob` is its SHA-1 in git; `sha256` is that of a large file."""

    path: str
    size: int
    blob: str | None
    sha256: str | None


def fetch_from_hub(address: HubAddress, places: Path, *, refresh: bool = False) -> tuple[Path, str]:
    """The folder with the files of a model on a hub, and its commit.

    The first time, the files are downloaded into the cache, and the newest commit of the branch is
    stored. Later the hub is not asked, unless `refresh` is true.

    Args:
        address: the repository and its revision.
        places: the folder of the cache for models.
        refresh: whether the hub is asked for the newest commit of the branch.

    Raises:
        ModelError: there is no such repository, revision or model, the hub cannot be reached, or a
            file differs from its checksum.
    """
    revision = address.revision or MAIN
    server = urlsplit(hub_server()).netloc or "hub"
    place = places / quote(server, safe="") / f"{address.owner}--{address.name}"
    pin = place / f"{quote(revision, safe='')}.json"
    bound = revision if COMMIT.fullmatch(revision) else None if refresh else _bound(pin)
    if bound is not None and (found := find_cached(bound, [place])) is not None:
        return found, bound
    commit, files = _listed(address, bound or revision)
    folder = cached_folder(
        commit, [place], lambda partial: _download(address, commit, files, partial)
    )
    if not COMMIT.fullmatch(revision):
        write_json(pin, {PIN: commit})
    return folder, commit


def _bound(pin: Path) -> str | None:
    """The commit that was stored for a branch; None if there is none."""
    try:
        commit = read_json_object(pin).get(PIN)
    except (OSError, ValueError):
        return None
    return commit if isinstance(commit, str) and COMMIT.fullmatch(commit) else None


def _listed(address: HubAddress, revision: str) -> tuple[str, list[HubFile]]:
    """The commit of a revision, and the files of the model in it."""
    with hub_errors(address):
        from huggingface_hub import HfApi

        info = HfApi(endpoint=hub_server()).model_info(
            address.repository, revision=revision, files_metadata=True, timeout=SECONDS_TO_DESCRIBE
        )
    listed = list(info.siblings or ())
    files = [_hub_file(each) for each in listed if _is_of_model(each.rfilename)]
    if not any(PurePosixPath(file.path).name == DESCRIPTION for file in files):
        found = first_few(sorted(each.rfilename for each in listed), 4) or "no file"
        raise ModelError(
            f"{address}: expected a segkit model with {DESCRIPTION}, found {found}; choose a "
            "repository that segkit push has written"
        )
    if info.sha is None or not COMMIT.fullmatch(info.sha) or len(files) > MOST_FILES:
        raise ModelError(
            f"{address}: expected a commit and at most {MOST_FILES} files of a model, found "
            f"{info.sha} and {len(files)}; choose another repository"
        )
    return info.sha, files


def _hub_file(listed: Any) -> HubFile:
    large = listed.lfs
    return HubFile(
        listed.rfilename, listed.size or 0, listed.blob_id, large.sha256 if large else None
    )


def _is_of_model(path: str) -> bool:
    """Whether a path in a repository is that of a model's file, in its usual place."""
    *above, name = path.split("/")
    known = re.compile(rf"model|first|\d+|{FOLD}\d+")
    return name in MODEL_FILES and all(known.fullmatch(part) for part in above)


def _download(address: HubAddress, commit: str, files: Sequence[HubFile], folder: Path) -> None:
    """Download files of a repository into a folder, and check each of them. Raises ModelError."""
    free = shutil.disk_usage(folder).free
    if sum(file.size for file in files) > free:
        raise ModelError(
            f"{address}: needs {sum(file.size for file in files) / 1e9:.1f} GB, found "
            f"{free / 1e9:.1f} GB free in {folder.parent}; free some space there"
        )
    with hub_errors(address):
        from huggingface_hub import hf_hub_download

        for file in files:
            hf_hub_download(
                address.repository,
                file.path,
                revision=commit,
                endpoint=hub_server(),
                local_dir=folder,
            )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # notes of the library
    for file in files:
        _check(address, file, folder / file.path)


def _check(address: HubAddress, file: HubFile, path: Path) -> None:
    """Raise ModelError unless a file has the checksum that the server lists."""
    if file.sha256 is not None:
        wanted, found = file.sha256, checksum(path)
    else:
        wanted, found = file.blob or "a checksum", _blob(path)
    if found != wanted:
        raise ModelError(
            f"{address}: {file.path} differs from the published file: expected {wanted}, found "
            f"{found}; try again, and tell its author if it happens again"
        )


def _blob(path: Path) -> str:
    """The SHA-1 by which git names the content of a file."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


@contextmanager
def hub_errors(address: HubAddress) -> Iterator[None]:
    """Raise each error of huggingface_hub and of the network as a ModelError of one sentence.

    Progress bars of the library are shown only on a terminal.
    """
    try:
        from huggingface_hub import errors
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    except ImportError:
        raise ModelError(
            f"{address}: needs the library huggingface_hub; run pip install 'segkit[hub]'"
        ) from None
    if not sys.stderr.isatty() and not are_progress_bars_disabled():
        disable_progress_bars()
    server = hub_server()
    # The base classes hold the errors of the library that sends requests, which differs between
    # versions of huggingface_hub.
    network = (OSError, ValueError, RuntimeError, *errors.HfHubHTTPError.__bases__)
    try:
        yield
    except errors.GatedRepoError:
        raise ModelError(
            f"{address}: requires you to accept its terms; accept them at "
            f"{server}/{address.repository}, then log in with: hf auth login"
        ) from None
    except errors.RepositoryNotFoundError:
        raise ModelError(
            f"{address}: {server} has no such repository, or it is private; check the name, or log "
            f"in with: hf auth login"
        ) from None
    except errors.RevisionNotFoundError:
        raise ModelError(
            f"{address}: the repository has no revision {address.revision or MAIN}; name a branch, "
            f"a tag or a whole commit of it"
        ) from None
    except errors.OfflineModeIsEnabled:
        raise ModelError(
            f"{address}: is not in the cache, and HF_HUB_OFFLINE forbids to download it; unset it, "
            f"or fetch the model once with a network"
        ) from None
    except network as error:
        raise ModelError(_failure(address, error)) from None


def _failure(address: HubAddress, error: Exception) -> str:
    """The sentence of an error that has no class of its own."""
    if type(error) is RuntimeError and isinstance(error.__cause__, Exception):
        error = error.__cause__  # of a large file that could not be sent
    code = getattr(getattr(error, "response", None), "status_code", None)
    said = " ".join((getattr(error, "server_message", None) or str(error)).split())[:300]
    if code == 401:
        return (
            f"{address}: {hub_server()} refused the token; log in again with: hf auth login, or "
            f"correct HF_TOKEN"
        )
    if code == 403:
        return (
            f"{address}: the token does not allow it: {said}; use a token that may write to "
            f"{address.owner}"
        )
    if code is not None:
        return f"{address}: {hub_server()} answered {code}: {said}; try again later"
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return (
            f"{address}: huggingface_hub refuses it: {said}; check the two names, or update "
            f"huggingface_hub"
        )
    return (
        f"{address}: {hub_server()} cannot be reached: {said or type(error).__name__}; check the "
        f"network, or name the folder of a model"
    )
