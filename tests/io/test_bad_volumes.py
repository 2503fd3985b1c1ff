"""Each kind of unusual or damaged file gives its values, or an error of one sentence."""

import gzip
import re
import struct
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from nibabel.nifti1 import Nifti1Image
from nibabel.nifti2 import Nifti2Image
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

from segkit.checking.describe_volume import describe_volume
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io import voxel_bytes
from segkit.io.volume import (
    BYTES_OF_LABEL,
    Volume,
    read_grid,
    read_labels,
    read_volume,
    write_volume,
)
from segkit.io.volume_names import WRITTEN_SUFFIXES
from segkit.io.whole_numbers import whole_numbers
from segkit.system.memory import in_words
from tests.helpers import affine_of

SHAPE = (3, 4, 5)
VALUES = np.arange(60, dtype=np.int16).reshape(SHAPE)
# Where a NIfTI-1 header keeps them, in bytes from its start.
DIM, DATATYPE, PIXDIM, VOX_OFFSET, SLOPE, QFORM_CODE, SFORM_CODE = 40, 70, 76, 108, 112, 252, 254
SROW_X, MAGIC = 280, 344
FLOAT128 = 1536
ZERO_TO = "expected voxel sizes above zero, found"
NOT_NUMBERS = "its affine holds NaN or infinite values; repair its header"

Build = Callable[[Path], Path]


def nifti(path: Path, values: ndarray = VALUES, codes: tuple[int, int] = (1, 1)) -> Path:
    """A NIfTI file of nibabel's."""
    image = Nifti1Image(values, affine_of("LPS") if any(codes) else None)
    image.header.set_qform(affine_of("LPS"), codes[0])
    image.header.set_sform(affine_of("LPS"), codes[1])
    image.header.set_xyzt_units("mm")
    nib.save(image, path)
    return path


def edit(offset: int, form: str, *content: Any, codes: tuple[int, int] = (1, 1)) -> Build:
    """Builds a NIfTI file with some bytes of its header written over."""

    def build(folder: Path) -> Path:
        path = nifti(folder / "scan.nii", codes=codes)
        raw = bytearray(path.read_bytes())
        struct.pack_into(f"<{form}", raw, offset, *content)
        path.write_bytes(raw)
        return path

    return build


def packed(build: Build) -> Build:
    """Builds the same file, compressed."""

    def build_packed(folder: Path) -> Path:
        path = folder / "scan.nii.gz"
        path.write_bytes(gzip.compress(build(folder).read_bytes()))
        return path

    return build_packed


def bytes_of(name: str, content: bytes) -> Build:
    """Builds a file of this content."""

    def build(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return build


def changed(name: str, change: Callable[[bytes], bytes], values: ndarray = VALUES) -> Build:
    """Builds a file of any format, and changes its bytes."""

    def build(folder: Path) -> Path:
        path = folder / name
        write_volume(path, Volume(values, Grid(SHAPE, affine_of("LPS"))))
        path.write_bytes(change(path.read_bytes()))
        return path

    return build


def with_line(start: str, line: str) -> Callable[[bytes], bytes]:
    """Puts a line of a header in the place of the one that starts so."""
    pattern = re.compile(rb"^" + start.encode() + rb".*$", re.MULTILINE)
    return lambda content: pattern.sub(line.encode(), content, count=1)


def nrrd(*lines: str, body: bytes = bytes(24), encoding: str = "raw") -> Build:
    """Builds an NRRD file of 2 x 3 x 4 bytes and these lines of its header."""
    head = ["NRRD0004", "type: uint8", "dimension: 3", "sizes: 2 3 4", f"encoding: {encoding}"]
    return bytes_of("scan.nrrd", "\n".join([*head, *lines, "", ""]).encode() + body)


def mha(*lines: str, body: bytes = bytes(24), size: str = "2 3 4") -> Build:
    """Builds a MetaImage file of 2 x 3 x 4 bytes and these lines of its header."""
    head = ["ObjectType = Image", "NDims = 3", f"DimSize = {size}", "ElementType = MET_UCHAR"]
    if not any(line.startswith("ElementSpacing") for line in lines):
        head.append("ElementSpacing = 1 2 3")
    text = "\n".join([*head, *lines, "ElementDataFile = LOCAL", ""])
    return bytes_of("scan.mha", text.encode() + body)


def flipped(place: int) -> Callable[[bytes], bytes]:
    """Turns over a bit of one byte."""

    def flip(content: bytes) -> bytes:
        raw = bytearray(content)
        raw[place] ^= 1
        return bytes(raw)

    return flip


NOISE = np.random.default_rng(0).normal(size=SHAPE)
DIRECTIONS = "space directions: (1,0,0) (0,1,0) (0,0,1)"
LPS = "space: left-posterior-superior"
CUT_SHORT = "its compressed data are incomplete"
REFUSED: dict[str, tuple[Build, str]] = {
    # Damage
    "gzip cut short": (changed("scan.nii.gz", lambda raw: raw[: len(raw) // 2], NOISE), CUT_SHORT),
    "gzip without its checksum": (changed("scan.nii.gz", lambda raw: raw[:-8]), CUT_SHORT),
    "gzip with a wrong checksum": (
        changed("scan.nii.gz", flipped(-8)),
        r"its compressed data are damaged \(.*(incorrect data check|Incorrect checksum)",
    ),
    "gzip with a wrong length": (
        changed("scan.nii.gz", flipped(-4)),
        r"its compressed data are damaged \(.*(incorrect length check|Incorrect checksum)",
    ),
    "rubbish after gzip": (
        changed("scan.nii.gz", lambda raw: raw + b"rubbish"),
        "unknown data follow its compressed data",
    ),
    "gzipped nrrd cut short": (changed("scan.nrrd", lambda raw: raw[:-9], NOISE), CUT_SHORT),
    "gzipped nrrd with a wrong checksum": (
        changed("scan.nrrd", flipped(-8)),
        "its compressed data are damaged",
    ),
    "compressed mha cut short": (changed("scan.mha", lambda raw: raw[:-9], NOISE), CUT_SHORT),
    "compressed mha with a wrong checksum": (
        changed("scan.mha", flipped(-1)),
        "its compressed data are damaged",
    ),
    "nii cut short": (
        changed("scan.nii", lambda raw: raw[:-1]),
        "its header claims 120 bytes of voxels, but the file can only hold 119; it is incomplete",
    ),
    "nrrd cut short": (
        nrrd(body=bytes(23)),
        "24 bytes of voxels, but the file can only hold 23",
    ),
    "mha cut short": (
        mha(body=bytes(23)),
        "24 bytes of voxels, but the file can only hold 23",
    ),
    "nii of a header alone": (
        changed("scan.nii", lambda raw: raw[:352]),
        "the file can only hold 0",
    ),
    "nii.gz of a header alone": (
        changed("scan.nii.gz", lambda raw: gzip.compress(gzip.decompress(raw)[:352])),
        "its header claims 120 bytes of voxels, but the file holds only 0",
    ),
    "nii of half a header": (
        changed("scan.nii", lambda raw: raw[:200]),
        "expected b'n.1.x00' in its header, found b''|its header has only 200 of 348 bytes",
    ),
    "nrrd of a header alone": (
        nrrd(body=b""),
        "24 bytes of voxels, but the file can only hold 0",
    ),
    "nrrd of half a header": (bytes_of("scan.nrrd", b"NRRD0004\ntype: uint8\n"), "has no end"),
    "mha of half a header": (bytes_of("scan.mha", b"NDims = 3\n"), "has no end"),
    # What it is not
    "magic of nothing": (edit(MAGIC, "4s", b"abc\0"), r"expected b'n\+1\\x00' in its header"),
    "magic of a pair": (
        edit(MAGIC, "4s", b"ni1\0"),
        "its voxels are in another file; convert both",
    ),
    "no nii.gz but a nii": (
        lambda folder: nifti(folder / "scan.nii").rename(folder / "scan.nii.gz"),
        "it is not compressed by gzip; rename it to .nii",
    ),
    "no nii but a nii.gz": (
        lambda folder: nifti(folder / "scan.nii.gz").rename(folder / "scan.nii"),
        "it is compressed by gzip; rename it to .nii.gz",
    ),
    "no mha but an nrrd": (
        lambda folder: nrrd()(folder).rename(folder / "scan.mha"),
        "expected KEY = VALUE in its header, found 'NRRD0004'",
    ),
    "no nrrd but an mha": (
        lambda folder: mha()(folder).rename(folder / "scan.nrrd"),
        "it does not begin with an NRRD header",
    ),
    "nrrd whose voxels are elsewhere": (
        nrrd("data file: /etc/passwd"),
        "expected a known field in its header, found 'data file: /etc/passwd'",
    ),
    "mha whose voxels are elsewhere": (
        bytes_of(
            "scan.mha",
            b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"
            b"ElementDataFile = /etc/passwd\n",
        ),
        "expected ElementDataFile to be LOCAL, found /etc/passwd",
    ),
    "nrrd with a field misspelt": (nrrd("spase: LPS"), "field in its header, found 'spase: LPS'"),
    "nrrd in plain text": (nrrd(encoding="text"), "expected the encoding raw or gzip, found text"),
    "mha that says it twice": (mha("Offset = 1 2 3", "Origin = 3 2 1"), "gives Offset twice"),
    # Sizes that no file holds
    "nii of 32000^3": (edit(DIM, "4h", 3, 32000, 32000, 32000), "claims 65536000000000 bytes"),
    "nii.gz of 32000^3": (
        packed(edit(DIM, "4h", 3, 32000, 32000, 32000)),
        "claims 65536000000000 bytes of voxels, but the file can only hold",
    ),
    "nii.gz of a little too much": (
        packed(edit(DIM, "4h", 3, 3, 4, 6)),
        "its header claims 144 bytes of voxels, but the file holds only 120",
    ),
    "nrrd that says it twice": (nrrd("sizes: 1"), "gives sizes twice"),
    "nrrd of 32000^3": (
        bytes_of(
            "scan.nrrd",
            b"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 32000 32000 32000\nencoding: raw\n\n",
        ),
        "claims 32768000000000 bytes of voxels, but the file can only hold 0",
    ),
    "gzipped nrrd of 32000^3": (
        changed("scan.nrrd", with_line("sizes", "sizes: 32000 32000 32000")),
        "claims 65536000000000 bytes of voxels",
    ),
    "mha of 32000^3": (mha(size="32000 32000 32000"), "claims 32768000000000 bytes of voxels"),
    "compressed mha of 32000^3": (
        changed("scan.mha", with_line("DimSize", "DimSize = 32000 32000 32000")),
        "claims 65536000000000 bytes of voxels",
    ),
    "size below zero": (edit(DIM, "4h", 3, 3, -4, 5), "found shape \\(3, -4, 5\\)"),
    "more axes than there are": (edit(DIM, "h", 9), "expected 1 to 7 axes, found 9"),
    "voxels within the header": (edit(VOX_OFFSET, "f", 100.0), "vox offset 100 too low"),
    "voxels past the end": (edit(VOX_OFFSET, "f", 1e9), "but the file can only hold 0"),
    "voxels nowhere": (edit(VOX_OFFSET, "f", float("nan")), "cannot be read as .nii: "),
    "mha of no size": (mha(size="2 0 4"), "expected 3 sizes and channels above zero"),
    # Voxel sizes and affines
    "no size by the qform": (
        edit(PIXDIM, "4f", 1, 1, 0, 1, codes=(1, 0)),
        rf"{ZERO_TO} \[1.0, 0.0, 1.0\] mm; repair its header",
    ),
    "size below zero by the qform": (
        edit(PIXDIM, "4f", 1, 1, -2, 1, codes=(1, 0)),
        rf"{ZERO_TO} \[1.0, -2.0, 1.0\]",
    ),
    "size that is no number": (
        edit(PIXDIM, "4f", 1, 1, float("nan"), 1, codes=(0, 0)),
        rf"{ZERO_TO} \[1.0, nan, 1.0\]",
    ),
    "no size in an nrrd": (nrrd("spacings: 1 0 1"), rf"{ZERO_TO} \[1.0, 0.0, 1.0\] mm"),
    "NaN in an nrrd": (nrrd(LPS, "space directions: (1,0,0) (0,nan,0) (0,0,1)"), NOT_NUMBERS),
    "no size in an mha": (mha("ElementSpacing = 1 0 1"), rf"{ZERO_TO} \[1.0, 0.0, 1.0\] mm"),
    "size below zero in an mha": (mha("ElementSpacing = 1 -1 1"), rf"{ZERO_TO} \[1.0, -1.0, 1.0"),
    "NaN in an mha": (mha("ElementSpacing = 1 nan 1"), rf"{ZERO_TO} \[1.0, nan, 1.0\] mm"),
    "NaN origin in an mha": (mha("Offset = 0 nan 0"), NOT_NUMBERS),
    "singular nrrd": (nrrd(LPS, "space directions: (1,0,0) (1,0,0) (0,0,1)"), "is singular"),
    "singular mha": (mha("TransformMatrix = 1 0 0 1 0 0 0 0 1"), "is singular: its axes lie in"),
    "nrrd of a space without directions": (nrrd(LPS), "expected space directions"),
    "nrrd in no patient's space": (
        nrrd("space: 3D-left-handed", DIRECTIONS),
        "expected a space such as left-posterior-superior",
    ),
    "mha without a spacing": (
        changed("scan.mha", with_line("ElementSpacing", "Spacing = 1 1 1")),
        r"expected an ElementSpacing of 3 numbers, found \[\]",
    ),
    "nrrd in micrometres": (
        nrrd(LPS, DIRECTIONS, 'space units: "um" "um" "um"'),
        "expected space units of mm, found um",
    ),
    "mha in micrometres": (mha("DistanceUnits = um"), "expected DistanceUnits to be mm, found um"),
    "voxels of a thousand kilometres": (
        edit(SROW_X, "12f", 1e9, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0),
        r"expected voxel sizes from 1e-08 to 1e\+06 mm, found \[1000000000.0, 1.0, 1.0\]",
    ),
    "voxels smaller than atoms": (
        edit(SROW_X, "12f", 1, 0, 0, 0, 0, 1e-9, 0, 0, 0, 0, 1, 0),
        r"expected voxel sizes from 1e-08 to 1e\+06 mm",
    ),
    "first voxel beyond the moon": (
        edit(SROW_X + 12, "f", 4e11),
        r"expected its first voxel within 1e\+06 mm of the origin, found it at",
    ),
    "code that no standard has": (edit(SFORM_CODE, "h", 300), "expected a sform_code from 0 to 5"),
    "code below zero": (edit(QFORM_CODE, "h", -1), "expected a qform_code from 0 to 5, found -1"),
    # What a voxel holds
    "bits": (edit(DATATYPE, "h", 1), "data code 1 not supported"),
    "128 bits": (edit(DATATYPE, "h", FLOAT128), "data code 1536 not supported|found float128"),
    "infinite slope": (edit(SLOPE, "f", float("inf")), "expected a finite scl_slope, found an inf"),
    "type that is none": (edit(DATATYPE, "h", 77), "data code 77 not recognized"),
    "nrrd of blocks": (
        changed("scan.nrrd", with_line("type", "type: block")),
        "expected one real number per voxel, found block",
    ),
    "mha of text": (
        changed("scan.mha", with_line("ElementType", "ElementType = MET_STRING")),
        "expected one real number per voxel, found MET_STRING",
    ),
    "nrrd without a byte order": (
        changed("scan.nrrd", with_line("endian", "# endian")),
        "expected the endian little or big, found none",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_invalid_headers_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    build, reason = REFUSED[name]
    path = build(tmp_path)
    with pytest.raises(VolumeError, match=reason) as refusal:
        read_volume(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", [name for name in REFUSED if "32000" in name])
def test_nothing_is_allocated_that_the_file_cannot_hold(tmp_path: Path, name: str) -> None:
    path = REFUSED[name][0](tmp_path)
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError):
            read_volume(path)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_takes_no_more_memory_than_its_header_claims(tmp_path: Path) -> None:
    path = nifti(tmp_path / "scan.nii")
    bomb = tmp_path / "scan.nii.gz"
    bomb.write_bytes(gzip.compress(path.read_bytes() + bytes(64 * 2**20)))
    tracemalloc.start()
    try:
        with pytest.raises(VolumeError, match="claims 120 bytes of voxels, but the file holds"):
            read_volume(bomb)
        assert tracemalloc.get_traced_memory()[1] < 8 * 2**20
    finally:
        tracemalloc.stop()


TWELVE = np.arange(12**3, dtype=np.uint8).reshape(12, 12, 12)
"""Of which the headers below claim less."""


@pytest.mark.parametrize(
    "size", [(1, 1, 1), (10, 10, 10), (11, 12, 12), (12, 11, 12), (12, 12, 11)]
)
@pytest.mark.parametrize("suffix", [*WRITTEN_SUFFIXES, ".nhdr", ".mhd"])
def test_a_header_that_claims_less_than_the_file_holds_is_refused(
    tmp_path: Path, suffix: str, size: tuple[int, int, int]
) -> None:
    path = tmp_path / f"scan{suffix}"
    sizes = " ".join(map(str, size))
    if suffix in WRITTEN_SUFFIXES:
        write_volume(path, Volume(TWELVE, Grid((12, 12, 12), np.eye(4))))
    else:
        sitk.WriteImage(sitk.GetImageFromArray(TWELVE), str(path))
    content = path.read_bytes()
    if suffix.startswith(".nii"):
        raw = bytearray(gzip.decompress(content) if suffix.endswith(".gz") else content)
        struct.pack_into("<4h", raw, DIM, 3, *size)
        content = gzip.compress(raw) if suffix.endswith(".gz") else bytes(raw)
    elif suffix in (".nrrd", ".nhdr"):
        content = with_line("sizes", f"sizes: {sizes}")(content)
    else:
        content = with_line("DimSize", f"DimSize = {sizes}")(content)
    path.write_bytes(content)
    claimed = size[0] * size[1] * size[2]
    expected = f"{claimed} bytes? of voxels, but the file holds 1728( or more)?, so"
    for read in (read_volume, read_labels):
        with pytest.raises(VolumeError, match=expected):
            read(path)


def test_a_detached_header_may_describe_a_part_of_its_data_file(tmp_path: Path) -> None:
    (tmp_path / "many.raw").write_bytes(bytes(16) + TWELVE.tobytes(order="F"))
    (tmp_path / "part.nhdr").write_text(
        "NRRD0004\ntype: uint8\ndimension: 3\nsizes: 12 12 2\nencoding: raw\nbyte skip: 16\n"
        "data file: many.raw\n\n"
    )
    (tmp_path / "part.mhd").write_text(
        "NDims = 3\nDimSize = 12 12 2\nElementType = MET_UCHAR\nElementSpacing = 1 1 1\n"
        "HeaderSize = 16\nElementDataFile = many.raw\n"
    )
    for name in ("part.nhdr", "part.mhd"):
        assert_array_equal(read_volume(tmp_path / name).data, TWELVE[..., :2])


@pytest.mark.parametrize(
    ("image", "place", "form"),
    [(Nifti1Image, VOX_OFFSET, "f"), (Nifti2Image, 168, "q")],
)
def test_a_vox_offset_of_0_means_right_after_the_header(
    tmp_path: Path, image: type[Nifti1Image], place: int, form: str
) -> None:
    path = tmp_path / "scan.nii"
    nib.save(image(VALUES, affine_of("LPS")), path)
    raw = bytearray(path.read_bytes())
    struct.pack_into(f"<{form}", raw, place, 0)
    path.write_bytes(raw)
    (tmp_path / "packed.nii.gz").write_bytes(gzip.compress(raw))
    assert_array_equal(read_volume(path).data, VALUES)
    assert_array_equal(read_volume(tmp_path / "packed.nii.gz").data, VALUES)
    length = image.header_class.sizeof_hdr
    raw[length] = 1  # an extension follows, whose end only vox_offset could tell
    path.write_bytes(raw)
    with pytest.raises(VolumeError, match="vox_offset is 0 although extensions follow its header"):
        read_volume(path)
    path.write_bytes(raw[:length] + raw[length + 4 :])  # voxels at once, where none may be
    with pytest.raises(VolumeError, match=r"vox_offset is 0|claims 120 bytes of voxels"):
        read_volume(path)


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_volumes_beyond_free_memory_are_refused_before_they_are_allocated(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"scan{suffix}"
    side = 128
    write_volume(path, Volume(np.zeros((side,) * 3, np.uint8), Grid((side,) * 3, np.eye(4))))
    voxels = side**3
    monkeypatch.setattr(voxel_bytes, "free_memory", lambda: 8 * voxels)
    compressed = suffix != ".nii"
    held = voxels * compressed
    assert read_volume(path, working=8 - compressed).data.shape == (side,) * 3
    tracemalloc.start()
    try:
        needed = in_words(held + 12 * voxels)
        said = f"{needed} of memory, but only 16.8 MB are free; free some memory, crop it"
        with pytest.raises(VolumeError, match=f"claims 128 x 128 x 128 voxels, which need {said}"):
            read_volume(path, working=12)
        with pytest.raises(VolumeError, match=r"need .* but only 16.8 MB are free"):
            read_labels(path, working=1)
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_labels_take_no_more_memory_than_documented(tmp_path: Path) -> None:
    path = tmp_path / "labels.nii.gz"
    side = 128
    values = np.zeros((side,) * 3, np.uint8)
    write_volume(path, Volume(values, Grid(values.shape, np.eye(4))))
    tracemalloc.start()
    try:
        read_labels(path)
        assert tracemalloc.get_traced_memory()[1] < (1 + BYTES_OF_LABEL) * values.size + 4 * 2**20
    finally:
        tracemalloc.stop()


# What is read all the same


def test_several_gzip_streams_followed_by_zeros_are_one_file(tmp_path: Path) -> None:
    raw = nifti(tmp_path / "scan.nii").read_bytes()
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(gzip.compress(raw[:400]) + gzip.compress(raw[400:]) + bytes(700))
    assert_array_equal(read_volume(path).data, VALUES)


def test_a_few_bytes_after_the_voxels_of_a_raw_file_are_ignored(tmp_path: Path) -> None:
    path = changed("scan.nii", lambda raw: raw + b"more")(tmp_path)
    assert_array_equal(read_volume(path).data, VALUES)


def test_extensions_are_skipped_and_not_written(tmp_path: Path) -> None:
    image = Nifti1Image(VALUES, affine_of("LPS"))
    # The code of DICOM, the content of none.
    image.header.extensions.append(nib.nifti1.Nifti1Extension(6, b"Jane Doe, born in 1950"))
    nib.save(image, tmp_path / "scan.nii")
    raw = (tmp_path / "scan.nii").read_bytes()
    (tmp_path / "scan.nii").write_bytes(raw[:356] + struct.pack("<i", 2) + raw[360:])
    volume = read_volume(tmp_path / "scan.nii")
    assert_array_equal(volume.data, VALUES)
    write_volume(tmp_path / "again.nii", volume)
    assert b"Jane Doe" not in (tmp_path / "again.nii").read_bytes()
    assert_array_equal(read_volume(tmp_path / "again.nii").data, VALUES)


def test_voxel_sizes_do_not_matter_if_the_sform_places_the_voxels(tmp_path: Path) -> None:
    path = edit(PIXDIM, "4f", 1, 0, -1, float("nan"))(tmp_path)
    assert_allclose(read_grid(path).affine, affine_of("LPS"), rtol=1e-6, atol=1e-5)


def test_without_codes_voxel_sizes_place_the_voxels_around_the_centre(tmp_path: Path) -> None:
    path = edit(PIXDIM, "4f", 1, 2, 3, 4, codes=(0, 0))(tmp_path)
    expected = [[-2, 0, 0, 2], [0, 3, 0, -4.5], [0, 0, 4, -8], [0, 0, 0, 1]]
    assert_array_equal(read_grid(path).affine, expected)
    assert "placed by its voxel sizes only" in str(describe_volume(path, read_volume(path)))


def test_if_sform_and_qform_disagree_the_sform_is_used_and_reported(tmp_path: Path) -> None:
    image = Nifti1Image(VALUES, None)
    moved = affine_of("LPS")
    moved[0, 3] += 7
    image.header.set_qform(affine_of("LPS"), 1)
    image.header.set_sform(moved, 2)
    nib.save(image, tmp_path / "scan.nii")
    volume = read_volume(tmp_path / "scan.nii")
    assert_allclose(volume.grid.affine, moved, atol=1e-4)
    said = str(describe_volume(tmp_path / "scan.nii", volume))
    assert (
        "placed by its sform (sform code 2, qform code 1); its qform differs by up to 7 mm" in said
    )
    image.header.set_qform(moved, 1)
    nib.save(image, tmp_path / "scan.nii")
    said = str(describe_volume(tmp_path / "scan.nii", read_volume(tmp_path / "scan.nii")))
    assert "placed by its sform (sform code 2, qform code 1)\n" in said


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_half_precision_is_written_as_single(tmp_path: Path, suffix: str) -> None:
    values = np.array([0.1, -65504, 65504, 6e-8], np.float16).reshape(1, 2, 2)
    write_volume(tmp_path / f"scan{suffix}", Volume(values, Grid((1, 2, 2), np.eye(4))))
    again = read_volume(tmp_path / f"scan{suffix}").data
    assert again.dtype == np.float32
    assert_array_equal(again, values.astype(np.float32))


def test_nan_values_are_read_unchanged(tmp_path: Path) -> None:
    values = np.full(SHAPE, np.nan, np.float32)
    values[0] = np.inf
    assert_array_equal(read_volume(nifti(tmp_path / "scan.nii.gz", values)).data, values)


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
@pytest.mark.parametrize("value", [0, -3])
def test_constant_images_are_images(tmp_path: Path, suffix: str, value: int) -> None:
    values = np.full(SHAPE, value, np.int16)
    write_volume(tmp_path / f"scan{suffix}", Volume(values, Grid(SHAPE, affine_of("LPS"))))
    assert_array_equal(read_volume(tmp_path / f"scan{suffix}").data, values)


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_colours_of_nrrd_and_metaimage_are_channels(tmp_path: Path, suffix: str) -> None:
    values = np.arange(180, dtype=np.uint8).reshape(5, 4, 3, 3)
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(sitk.GetImageFromArray(values, isVector=True), str(path))
    assert_array_equal(read_volume(path).data, values.transpose(2, 1, 0, 3))


@pytest.mark.parity
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("kind", ["int8", "uint16", "int32", "int64", "float32", "float64"])
def test_files_by_simpleitk_are_read_at_their_position(
    tmp_path: Path, kind: str, suffix: str, compressed: bool
) -> None:
    values = (np.arange(60) * 3 - 60).astype(kind).reshape(5, 4, 3)
    image = sitk.GetImageFromArray(values)
    affine = np.diag([-1, -1, 1, 1]) @ affine_of("PIR")
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / spacing).ravel().tolist())
    image.SetMetaData("0010|0010", "Doe = Jane: 1")
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"), useCompression=compressed)
    volume = read_volume(tmp_path / f"scan{suffix}")
    assert volume.data.dtype == np.dtype(kind) and volume.data.dtype.isnative
    assert_array_equal(volume.data, values.transpose(2, 1, 0))
    assert_allclose(volume.grid.affine, affine_of("PIR"), atol=1e-9)


BIG = np.arange(24, dtype=">i2").tobytes()


@pytest.mark.parity
@pytest.mark.parametrize(
    "build",
    [
        bytes_of(
            "scan.nrrd",
            b"NRRD0005\n# made by hand\ntype: short\ndimension: 3\nspace: RAS\nsizes: 2 3 4\n"
            b"space directions: (2,0,0) (0.5,3,0) (0,0,4)\nkinds: domain domain domain\n"
            b"endian: big\nencoding: raw\nspace origin: (10,20,30)\nmade by:=us: ourselves\n\n"
            + BIG,
        ),
        bytes_of(
            "scan.nrrd",
            b"NRRD0001\ntype: short\ndimension: 3\nsizes: 2 3 4\nspacings: 2 3 4\n"
            b"encoding: gzip\nendian: big\n\n" + gzip.compress(BIG),
        ),
        bytes_of(
            "scan.mha",
            b"NDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementSpacing = 2 3 4\n"
            b"TransformMatrix = 0 1 0 0 0 1 1 0 0\nOffset = 10 20 30\nOperator = Jane\n"
            b"BinaryDataByteOrderMSB = True\nElementDataFile = LOCAL\n" + BIG,
        ),
        bytes_of(
            "scan.mha",
            b"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\n"
            b"ElementSize = 2 3 4\nPosition = 1 2 3\nElementByteOrderMSB = True\n"
            b"CompressedData = True\nCompressedDataSize = %d\nElementDataFile = LOCAL\n%b"
            % (len(zlib.compress(BIG)), zlib.compress(BIG)),
        ),
    ],
    ids=["nrrd of a space", "nrrd of spacings", "mha", "mha of sizes"],
)
def test_big_endian_files_are_read_as_simpleitk_reads_them(tmp_path: Path, build: Build) -> None:
    path = build(tmp_path)
    image, volume = sitk.ReadImage(str(path)), read_volume(path)
    assert_array_equal(volume.data, sitk.GetArrayFromImage(image).transpose(2, 1, 0))
    assert_array_equal(volume.data.ravel(order="F"), np.arange(24))
    for index in ((0, 0, 0), (1, 0, 0), (0, 2, 0), (0, 0, 3)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * (-1, -1, 1)
        assert_allclose(volume.grid.world(np.array(index, dtype=float)), world, atol=1e-9)


def test_a_nifti_2_header_is_recognised_by_its_length(tmp_path: Path) -> None:
    nib.save(Nifti2Image(VALUES, affine_of("LPS")), tmp_path / "scan.nii.gz")
    volume = read_volume(tmp_path / "scan.nii.gz")
    assert_array_equal(volume.data, VALUES)
    assert_allclose(volume.grid.affine, affine_of("LPS"))


@pytest.mark.parametrize("strange", [0.5, float("nan"), float("inf"), 1e300])
def test_labels_are_whole_numbers(tmp_path: Path, strange: float) -> None:
    values = np.zeros(SHAPE)
    path = nifti(tmp_path / "label.nii", values)
    assert read_labels(path).data.dtype == np.int64
    values[1, 2, 3] = strange
    nifti(path, values)
    with pytest.raises(VolumeError, match="expected whole numbers, one per voxel"):
        read_labels(path)


@pytest.mark.parametrize(
    ("value", "told"),
    [(0.5, "0.5"), (2.998, "2.998"), (1.0015, "1.0015"), (1e6 + 0.5, "1000000.5")],
)
def test_an_error_shows_all_digits_of_a_label(tmp_path: Path, value: float, told: str) -> None:
    path = nifti(tmp_path / "label.nii", np.full(SHAPE, value))
    with pytest.raises(VolumeError, match=rf"as labels, found {re.escape(told)};"):
        read_labels(path)


@given(
    st.lists(st.integers(0, 2**19), min_size=1, max_size=24),  # so that none is 0.1 off
    st.floats(-1e-7, 1e-7),
    st.floats(-9e-4, 9e-4),
)
def test_labels_off_by_rounding_are_the_nearest_whole_numbers(
    numbers: list[int], share: float, shift: float
) -> None:
    for kind in (np.float32, np.float64):
        for values in (np.array(numbers) * (1 + share), np.array(numbers) % 1000 + shift):
            stored = values.astype(kind)
            assert_array_equal(whole_numbers(stored, "label.nii"), np.rint(values))


@pytest.mark.parametrize(("slope", "intercept"), [(1 / 3, 0.0), (0.1, 0.0), (3 / 65534, 1.5)])
def test_labels_of_a_file_that_scales_its_values_are_whole(
    tmp_path: Path, slope: float, intercept: float
) -> None:
    labels = np.arange(60).reshape(SHAPE) % 4
    stored = np.round((labels - intercept) / slope).astype(np.int16)
    image = Nifti1Image(stored, affine_of("LPS"))
    image.header.set_slope_inter(slope, intercept)
    image.header.set_data_dtype(np.int16)
    path = tmp_path / "label.nii"
    nib.save(image, path)
    content = bytearray(path.read_bytes())
    content[SLOPE : SLOPE + 8] = struct.pack("<ff", slope, intercept)
    content[352:] = stored.astype("<i2").tobytes(order="F")
    path.write_bytes(content)
    assert_array_equal(read_labels(path).data, labels)


def test_grids_of_tiny_voxels_agree_to_a_tenth_of_one() -> None:
    grid = Grid(SHAPE, np.diag([1e-4, 1e-4, 1e-4, 1.0]))
    moved = grid.affine.copy()
    moved[0, 3] = 1e-4  # one voxel, which is less than a micrometre
    assert not grid.agrees_with(Grid(SHAPE, moved))
    moved[0, 3] = 0.9e-5
    assert grid.agrees_with(Grid(SHAPE, moved))
