"""How many bytes of pixels a DICOM file holds, against the number that its header says.

A reader fills a short image with whatever lies in memory, so the length is compared first.
"""

from pathlib import Path

from segkit.errors import VolumeError

SYNTAX = b"\x02\0\x10\0UI"
"""Bytes before the length and the text of a file's transfer syntax."""
BEGINNING = 1024
"""The transfer syntax stands in so many first bytes."""
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
"""The uncompressed transfer syntaxes in use, both little-endian."""
PIXELS = b"\xe0\x7f\x10\0"
"""The tag of pixel data."""
PIXEL_TYPES = (b"OW\0\0", b"OB\0\0")
"""The types of pixel data, with two bytes that are not used."""
PADDING = b"\xfc\xff\xfc\xff"
"""The tag of meaningless bytes after the last element."""


def surplus_of_pixels(path: Path, expected: int) -> int:
    """Number of bytes of pixels beyond the expected ones; 0 if compressed or not found.

    The byte that makes an odd length even does not count.

    Args:
        path: a DICOM file.
        expected: bytes of all pixels by the header: rows x columns x frames x bytes of a pixel.

    Raises:
        VolumeError: the file holds fewer bytes of pixels.
    """
    content = path.read_bytes()
    _, _, rest = content[:BEGINNING].partition(SYNTAX)
    length = int.from_bytes(rest[:2], "little")
    syntax = rest[2 : 2 + length].decode("ascii", "replace").strip("\0 ")
    if syntax not in (IMPLICIT, EXPLICIT):
        return 0
    found = _length_at_end(content, explicit=syntax == EXPLICIT)
    if found is None:
        return 0
    if found < expected:
        raise VolumeError(
            f"{path}: its header says {expected:,} bytes of pixels, but the file holds {found:,}; "
            f"get a new copy of it"
        )
    surplus = found - expected
    return 0 if surplus == expected % 2 else surplus


def _length_at_end(content: bytes, *, explicit: bool) -> int | None:
    """Length of the pixel data that reaches to the end of the file; None if there is none.

    An icon may have pixels as well, and pixels may look like a tag, so the end has to fit.
    """
    place = content.find(PIXELS)
    while place >= 0:
        start = place + len(PIXELS)
        if not explicit or content[start : start + 4] in PIXEL_TYPES:
            start += 4 * explicit
            length = int.from_bytes(content[start : start + 4], "little")
            end = start + 4 + length
            if end == len(content) or content[end : end + 4] == PADDING:
                return length
        place = content.find(PIXELS, place + 1)
    return None
