"""The folder of a model, wherever the model lies: here, in an archive, or on a model hub."""

import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from segkit.errors import ModelError
from segkit.io.atomic import whole_folder
from segkit.io.checksums import checksum
from segkit.io.folder_cache import MANIFEST, user_cache
from segkit.io.safe_text import read_text
from segkit.model.addresses import ArchiveAddress, HubAddress, parse_address
from segkit.model.archived import fetch_archive, unpack_archive
from segkit.model.file_names import SUMS
from segkit.model.hub import fetch_from_hub
from segkit.system.progress import Track, untracked

MODELS = "models"
"""The folder of the user's cache in which models are kept."""


@dataclass(frozen=True)
class FetchedModel:
    """A model in the cache, and its identity: a commit, or the SHA-256 of an archive."""

    folder: Path
    version: str


def fetch_model(path: str | Path, *, refresh: bool = False, track: Track = untracked) -> Path:
    """The folder of a model, which is downloaded into the cache if it is not there yet.

    `load_model` and `Predictor.load` call it, so call it yourself only to download a model before
    it is needed, or to replace it by a newer one.

    Args:
        path: an address such as `hf:OWNER/NAME`, `hf:OWNER/NAME@REVISION` or
            `https://SERVER/model.zip#sha256=…`, the path of a zip, or a folder, which is returned
            as it is.
        refresh: whether the server is asked for a newer model of this address. By default it is
            asked only if the model is not in the cache.
        track: shows the progress of a download.

    Returns:
        The folder, with the model or run in it.

    Raises:
        ModelError: there is no model at the address, the server cannot be reached, or a file
            differs from its checksum.

    Example:
        folder = segkit.fetch_model("hf:clinic/hippocampus@v1")
        model = segkit.load_model(folder)
    """
    address = parse_address(path)
    if address is not None:
        return fetched(address, refresh=refresh, track=track).folder
    path = Path(path)
    if path.is_file() and zipfile.is_zipfile(path):
        path = unpack_archive(path, user_cache() / MODELS)
    check_sums(path)
    return path


def fetched(
    address: HubAddress | ArchiveAddress, *, refresh: bool = False, track: Track = untracked
) -> FetchedModel:
    """The model at an address, in the cache, and its version. Raises as `fetch_model` does."""
    places = user_cache() / MODELS
    if isinstance(address, HubAddress):
        folder, version = fetch_from_hub(address, places, refresh=refresh)
    else:
        folder, version = fetch_archive(address, places, refresh=refresh, track=track)
    check_sums(folder)
    return FetchedModel(folder, version)


def copy_model(model: FetchedModel, folder: Path) -> None:
    """Copy a model from the cache into a new folder, for a machine without a network.

    Raises:
        ModelError: the folder exists already.
    """
    if folder.exists():
        raise ModelError(f"{folder}: exists already; use it, or choose another --out")
    with whole_folder(folder) as partial:
        left_out = shutil.ignore_patterns(MANIFEST)
        shutil.copytree(model.folder, partial, ignore=left_out, dirs_exist_ok=True)


def check_sums(folder: Path) -> None:
    """Compare the files of a model with the list of their checksums, if it has one.

    Raises:
        ModelError: a file is missing or differs, or the list cannot be read.
    """
    source = folder / SUMS
    if not source.is_file():
        return
    try:
        lines = [line.split(maxsplit=1) for line in read_text(source).splitlines() if line.strip()]
        wanted = {name.lstrip("*"): digest for digest, name in lines}
    except (OSError, ValueError) as error:
        raise ModelError(f"{source}: cannot be read: {error}; fetch the model again") from None
    for name, digest in wanted.items():
        path = folder / name
        inside = path.resolve().is_relative_to(folder.resolve())
        found = checksum(path) if inside and path.is_file() else "no such file"
        if found != digest:
            raise ModelError(
                f"{path}: expected the SHA-256 {digest} of {SUMS}, found {found}; fetch the model "
                f"again, or delete {SUMS} if you changed the model yourself"
            )
