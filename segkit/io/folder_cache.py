"""A cache of folders whose files take long to make; a folder is complete or absent.

A folder's manifest holds its name and a checksum of each file. If a folder is damaged or has
another name, it is made again.
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from segkit.io.atomic import PARTIAL, remove_leftovers, write_json
from segkit.io.checksums import checksum
from segkit.io.safe_text import read_json_object

MANIFEST = "manifest.json"

logger = logging.getLogger(__name__)


def cached_folder(
    name: str, folders: Sequence[Path], make: Callable[[Path], None], *, anew: bool = False
) -> Path:
    """The undamaged folder of a name; if there is none, it is made.

    Args:
        name: name of the folder.
        folders: folders in which to look for it, in order.
        make: writes the files, into the first of `folders` that can be written.
        anew: whether it is made again even if it is undamaged.

    Raises:
        OSError: none of `folders` can be written.
    """
    found = None if anew else find_cached(name, folders)
    if found is not None:
        return found
    for folder, another in zip(folders, [*folders[1:], None], strict=True):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return _made(folder / name, make, anew)
        except OSError as error:
            if another is None:
                raise
            logger.info("%s cannot be written (%s); %s is kept in %s", folder, error, name, another)
    raise AssertionError("there must be at least one folder")


def find_cached(name: str, folders: Sequence[Path]) -> Path | None:
    """The undamaged folder of a name in the first of `folders` that has it; None if none has."""
    for folder in folders:
        if (folder / name).is_dir():
            if _intact(folder / name):
                return folder / name
            logger.warning("%s is damaged and is made again", folder / name)
    return None


def user_cache() -> Path:
    """The folder of segkit in the user's cache, $XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("XDG_CACHE_HOME")
    return (Path(named) if named else Path.home() / ".cache") / "segkit"


def _made(target: Path, make: Callable[[Path], None], anew: bool) -> Path:
    remove_leftovers(target.parent)
    partial = Path(tempfile.mkdtemp(prefix=PARTIAL, dir=target.parent))
    partial.chmod(0o755)  # as mkdir does, so that other users can read it
    try:
        make(partial)
        write_json(partial / MANIFEST, {"name": target.name, "files": _sums_in(partial)})
        if target.is_dir() and (anew or not _intact(target)):
            shutil.rmtree(target)
        try:
            partial.rename(target)
        except OSError:  # another process was faster
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _intact(folder: Path) -> bool:
    try:
        manifest = read_json_object(folder / MANIFEST)
        found = _sums_in(folder)
    except (OSError, ValueError):
        return False
    return bool(found) and manifest == {"name": folder.name, "files": found}


def _sums_in(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file in a folder and its subfolders, by path, but for its manifest."""
    return {
        file.relative_to(folder).as_posix(): checksum(file)
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
