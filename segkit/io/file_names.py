"""File names that every system can write, made from names of cases, maps and inputs."""

import hashlib
import logging
from collections.abc import Iterable

from segkit.errors import first_few

logger = logging.getLogger(__name__)

FORBIDDEN_IN_NAMES = frozenset('/\\<>:"|?*')
"""Characters that a file name cannot contain on Windows."""
DEVICES = frozenset(
    ["con", "prn", "aux", "nul"]
    + [f"{port}{number}" for port in ("com", "lpt") for number in "0123456789¹²³"]
)
"""Names of devices on Windows. No file can have one of them, whatever its suffix."""
LONGEST_FILE_NAME = 180
"""Length of a name in UTF-8; systems allow 255, and results add a prefix and an ending."""
BYTES_KEPT = 140
"""Length of the beginning that is kept of a longer name; then results of the name stay shorter."""
UNNAMED = "unnamed"
"""The file name of a case without a name."""
CHANGES_SHOWN = 3


def is_file_name(name: str) -> bool:
    """Whether a name can be a file name, also on Windows: printable, and not a path.

    Example:
        >>> [is_file_name(name) for name in ("case 1", "..", "a/b", "", "12:30", "a.", "nul.x")]
        [True, False, False, False, False, False, False]
    """
    return name == safe_name(name)


def safe_name(name: str) -> str:
    """The name, changed only if it cannot be a file name on every system.

    Each character that cannot be in a file name becomes `-`: those that Windows does not allow,
    those that are not printable, and dots and blanks at the end. The name of a device gets a `-`,
    and a name that is too long is cut and gets a digest.

    Example:
        >>> [safe_name(name) for name in ("case 1", "12:30", "a/b.", "nul.x", "")]
        ['case 1', '12-30', 'a-b-', 'nul-.x', 'unnamed']
    """
    allowed = (c if c.isprintable() and c not in FORBIDDEN_IN_NAMES else "-" for c in name)
    safe = "".join(allowed)
    bare = safe.rstrip(". ")
    safe = bare + "-" * (len(safe) - len(bare))
    start, dot, rest = safe.partition(".")
    if start.rstrip(" ").lower() in DEVICES:
        safe = f"{start.rstrip(' ')}-{dot}{rest}"
    if len(safe.encode()) > LONGEST_FILE_NAME:
        digest = hashlib.sha256(name.encode(errors="surrogateescape")).hexdigest()[:8]
        kept = safe.encode()[:BYTES_KEPT].decode(errors="ignore")
        safe = f"{kept}-{digest}"
    return safe or UNNAMED


def tell_changed_names(names: Iterable[str]) -> None:
    """Warn, in one sentence, of names whose results get another file name."""
    changed = {name: safe for name in names if (safe := safe_name(name)) != name}
    if changed:
        logger.warning(
            "some names cannot be file names on every system, so files of results are called "
            "differently: %s",
            first_few(
                [f"{name!r} becomes {safe!r}" for name, safe in changed.items()], CHANGES_SHOWN
            ),
        )
