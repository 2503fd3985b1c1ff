"""Voxels in a data file beside their header keep their positions; other folders are refused."""

import gzip
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from numpy.testing import assert_allclose, assert_array_equal

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.inference.result_files import output_path
from segkit.io.inputs import find_inputs
from segkit.io.volume import Volume, files_of, read_grid, read_volume, write_volume
from segkit.io.volume_names import check_writable, result_suffix
from tests.helpers import affine_of

# 2 x 3 x 4 voxels, the first axis fastest, so that voxel (x, y, z) holds x + 2 y + 6 z.
VALUES = np.arange(24, dtype=">i2")
BYTES = VALUES.tobytes()
NHDR = (
    "NRRD0004\ntype: short\ndimension: 3\nspace: left-posterior-superior\nsizes: 2 3 4\n"
    "space directions: (0,2,0) (3,0,0) (0,0,4)\nendian: big\nspace origin: (10,20,30)\n"
)
MHD = (
    "ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\n"
    "ElementSpacing = 2 3 4\nTransformMatrix = 0 1 0 1 0 0 0 0 1\nOffset = 10 20 30\n"
    "BinaryDataByteOrderMSB = True\n"
)
# Of both: in LPS, x runs along the second axis by 2 mm, y along the first by 3 mm, z by 4 mm.
PLACES = {(0, 0, 0): (-10, -20, 30), (1, 0, 0): (-10, -22, 30), (0, 2, 3): (-16, -20, 42)}


def nhdr(folder: Path, *lines: str, data: bytes | None = BYTES) -> Path:
    """An NRRD header of these more lines, and its data file `scan.raw`."""
    (folder / "scan.nhdr").write_text(NHDR + "".join(f"{line}\n" for line in lines))
    if data is not None:
        (folder / "scan.raw").write_bytes(data)
    return folder / "scan.nhdr"


def mhd(folder: Path, *lines: str, data: bytes | None = BYTES) -> Path:
    """A MetaImage header of these more lines, and its data file `scan.raw`."""
    (folder / "scan.mhd").write_text(MHD + "".join(f"{line}\n" for line in lines))
    if data is not None:
        (folder / "scan.raw").write_bytes(data)
    return folder / "scan.mhd"


RAW, GZIP = "encoding: raw", "encoding: gzip"
HERE = "data file: scan.raw"
HERE_MHD = "ElementDataFile = scan.raw"
BUILDS: dict[str, Callable[[Path], Path]] = {
    "nrrd": lambda folder: nhdr(folder, RAW, HERE),
    "nrrd of another spelling": lambda folder: nhdr(folder, RAW, "datafile: ./scan.raw"),
    "nrrd with its voxels inside": lambda folder: inside(nhdr(folder, RAW, data=None), b"\n"),
    "nrrd of bytes to skip": lambda folder: nhdr(
        folder, RAW, "byte skip: 5", HERE, data=b"abc\nd" + BYTES + b"more"
    ),
    "nrrd of lines to skip": lambda folder: nhdr(
        folder, RAW, "line skip: 2", HERE, data=b"one\r\n\n" + BYTES
    ),
    "nrrd of lines and bytes": lambda folder: nhdr(
        folder, RAW, "lineskip: 1", "byteskip: 3", HERE, data=b"one\nabc" + BYTES
    ),
    "nrrd at the end": lambda folder: nhdr(
        folder, RAW, "byte skip: -1", HERE, data=b"anything" + BYTES
    ),
    "gzipped nrrd": lambda folder: nhdr(folder, GZIP, HERE, data=gzip.compress(BYTES)),
    "gzipped nrrd of lines and bytes": lambda folder: nhdr(
        folder,
        GZIP,
        "line skip: 1",
        "byte skip: 2",
        HERE,
        data=b"one\n" + gzip.compress(b"ab" + BYTES),
    ),
    "mha": lambda folder: mhd(folder, HERE_MHD),
    "mha with its voxels inside": lambda folder: inside(
        mhd(folder, "ElementDataFile = LOCAL", data=None), b""
    ),
    "mha of a header to skip": lambda folder: mhd(
        folder, "HeaderSize = 5", HERE_MHD, data=b"abcde" + BYTES
    ),
    "mha at the end": lambda folder: mhd(
        folder, "HeaderSize = -1", HERE_MHD, data=b"abcdefg" + BYTES
    ),
    "compressed mha": lambda folder: mhd(
        folder,
        "CompressedData = True",
        f"CompressedDataSize = {len(zlib.compress(BYTES))}",
        HERE_MHD,
        data=zlib.compress(BYTES),
    ),
}


def inside(path: Path, between: bytes) -> Path:
    path.write_bytes(path.read_bytes() + between + BYTES)
    return path


@pytest.mark.parametrize("name", BUILDS)
def test_voxels_of_a_data_file_lie_where_the_header_places_them(tmp_path: Path, name: str) -> None:
    path = BUILDS[name](tmp_path)
    volume = read_volume(path)
    assert_array_equal(volume.data, np.arange(24).reshape(2, 3, 4, order="F"))
    assert volume.data.dtype == np.int16 and volume.data.dtype.isnative
    for index, place in PLACES.items():
        assert_allclose(volume.grid.world(np.array(index, dtype=float)), place, atol=1e-12)
    assert read_grid(path).agrees_with(volume.grid, tolerance=0)


@pytest.mark.parity
@pytest.mark.parametrize("name", BUILDS)
def test_a_data_file_is_read_as_simpleitk_reads_it(tmp_path: Path, name: str) -> None:
    image = sitk.ReadImage(str(BUILDS[name](tmp_path)))
    assert_array_equal(sitk.GetArrayFromImage(image).ravel(), np.arange(24))
    for index, (x, y, z) in PLACES.items():
        assert_allclose(image.TransformIndexToPhysicalPoint(index), (-x, -y, z), atol=1e-12)


@pytest.mark.parity
@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
@pytest.mark.parametrize("channels", [1, 3])
def test_pairs_by_simpleitk_are_read_at_their_position(
    tmp_path: Path, suffix: str, channels: int, compressed: bool
) -> None:
    values = np.arange(60 * channels, dtype=np.float32).reshape(5, 4, 3, channels)
    grid = Grid((3, 4, 5), affine_of("PIR"))
    image = sitk.GetImageFromArray(values.squeeze(), isVector=channels > 1)
    affine = np.diag([-1, -1, 1, 1]) @ grid.affine
    image.SetSpacing(grid.spacing)
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / grid.spacing).ravel().tolist())
    sitk.WriteImage(image, str(tmp_path / f"scan{suffix}"), useCompression=compressed)
    assert len(list(tmp_path.iterdir())) == 2
    volume = read_volume(tmp_path / f"scan{suffix}")
    assert_array_equal(volume.data, values.transpose(2, 1, 0, 3).squeeze())
    assert_allclose(volume.grid.affine, grid.affine, atol=1e-9)
    assert files_of(tmp_path / f"scan{suffix}") == tuple(
        sorted(tmp_path.iterdir(), key=lambda path: path.suffix != suffix)
    )


# What a header must not reach

ELSEWHERE = "expected its voxels in a file in the same folder, found"
NO_FILE = "in the same folder, found no such file; copy it there, or convert the volume to one file"


@pytest.mark.parametrize("header", ["nhdr", "mhd"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("{outside}/secret.raw", ELSEWHERE),
        ("../outside/secret.raw", ELSEWHERE),
        ("sub/../../outside/secret.raw", ELSEWHERE),
        ("sub/../scan.raw", ELSEWHERE),
        ("link.raw", ELSEWHERE),
        ("linked/secret.raw", ELSEWHERE),
        ("C:\\secret.raw", ELSEWHERE),
        ("\\\\host\\secret.raw", ELSEWHERE),
        ("..\\outside\\secret.raw", ELSEWHERE),
        ("missing.raw", NO_FILE),
        ("loop.raw", NO_FILE),
        ("sub", NO_FILE),
        (".", NO_FILE),
        ("pipe.raw", NO_FILE),
        ("LIST", NO_FILE),
        ("LIST 3", NO_FILE),
        ("scan%03d.raw 1 3 1", NO_FILE),
        ("%n%n%n%s.raw 1 3 1", NO_FILE),
        ("x" * 5000, "File name too long|found no such file"),
        ("a\0b", "null byte"),
        ("", "found no such file|expected KEY = VALUE|expected a known field"),
    ],
)
def test_a_data_file_outside_the_headers_folder_is_refused(
    tmp_path: Path, header: str, name: str, why: str
) -> None:
    folder, outside = tmp_path / "in", tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret.raw").write_bytes(BYTES)
    (folder / "link.raw").symlink_to(outside / "secret.raw")
    (folder / "linked").symlink_to(outside)
    (folder / "loop.raw").symlink_to("loop.raw")
    os.mkfifo(folder / "pipe.raw")
    name = name.format(outside=outside)
    if header == "nhdr":
        path = nhdr(folder, RAW, f"data file: {name}")
    else:
        path = mhd(folder, f"ElementDataFile = {name}")
    with pytest.raises(VolumeError, match=why) as refusal:
        read_volume(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)
    with pytest.raises(VolumeError, match=why):
        read_grid(path)


def test_a_data_file_may_lie_in_a_subfolder_or_behind_a_link_in_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in" / "sub").mkdir(parents=True)
    (tmp_path / "in" / "sub" / "größe 1.raw").write_bytes(BYTES)
    (tmp_path / "in" / "again.raw").symlink_to(Path("sub") / "größe 1.raw")
    (tmp_path / "link").symlink_to("in")
    for name in ("sub/größe 1.raw", "again.raw"):
        nhdr(tmp_path / "in", RAW, f"data file: {name}", data=None)
        mhd(tmp_path / "in", f"ElementDataFile = {name}", data=None)
        for header in ("in/scan.nhdr", "in/scan.mhd", "link/scan.nhdr", "link/scan.mhd"):
            assert read_volume(tmp_path / header).data[1, 2, 3] == 23


@pytest.mark.parametrize(
    ("build", "why"),
    [
        (
            lambda f: nhdr(f, RAW, HERE, data=BYTES[:-1]),
            "48 bytes of voxels, but the file can only",
        ),
        (
            lambda f: mhd(f, HERE_MHD, data=BYTES[:-1]),
            "48 bytes of voxels, but the file can only",
        ),
        (lambda f: nhdr(f, RAW, "byte skip: 1", HERE), "the file can only hold 47"),
        (lambda f: nhdr(f, RAW, "byte skip: 99999999999", HERE), "the file can only hold 0"),
        (lambda f: nhdr(f, RAW, "byte skip: -1", HERE, data=b"few"), "the file can only hold 3"),
        (lambda f: nhdr(f, RAW, "byte skip: -2", HERE), "expected a byte skip of 0 or more"),
        (lambda f: nhdr(f, GZIP, "byte skip: -1", HERE), "expected a byte skip of 0 or more"),
        (lambda f: nhdr(f, RAW, "byte skip: x", HERE), "cannot be read as .nhdr: invalid literal"),
        (
            lambda f: nhdr(f, RAW, "line skip: 99999999999", HERE),
            "fewer than the 99999999999 l",
        ),
        (lambda f: nhdr(f, RAW, "line skip: -1", HERE), "has fewer than the -1 lines to skip"),
        (lambda f: nhdr(f, RAW, HERE, "datafile: scan.raw"), "gives data file twice"),
        (lambda f: nhdr(f, GZIP, HERE), "its compressed data are damaged"),
        (
            lambda f: nhdr(f, GZIP, HERE, data=gzip.compress(BYTES)[:-1]),
            "its compressed data are incomplete",
        ),
        (
            lambda f: nhdr(f, GZIP, "byte skip: 1", HERE, data=gzip.compress(BYTES)),
            "claims 48 bytes of voxels, but the file holds only 47",
        ),
        (lambda f: mhd(f, "HeaderSize = 1", HERE_MHD), "the file can only hold 47"),
        (lambda f: mhd(f, "HeaderSize = -2", HERE_MHD), "expected a HeaderSize of 0 or more, or"),
        (
            lambda f: mhd(f, "CompressedData = True", "HeaderSize = -1", HERE_MHD),
            "expected a HeaderSize of 0 or more, or -1 for raw data",
        ),
        (
            lambda f: mhd(f, "HeaderSize = 1", "ElementDataFile = LOCAL"),
            "expected HeaderSize to be 0, found 1",
        ),
        (
            lambda f: nhdr(f, RAW, HERE).rename(f / "scan.nrrd"),
            "field in its header, found 'data file: scan.raw'",
        ),
        (lambda f: mhd(f, HERE_MHD).rename(f / "scan.mha"), "expected ElementDataFile to be LOCAL"),
        (lambda f: nhdr(f, RAW), "its header has no end; it is incomplete"),
    ],
)
def test_a_data_file_that_cannot_hold_the_voxels_is_refused(
    tmp_path: Path, build: Callable[[Path], Path], why: str
) -> None:
    path = build(tmp_path)
    with pytest.raises(VolumeError, match=why) as refusal:
        read_volume(path)
    assert str(refusal.value).startswith(f"{path}: ") and "\n" not in str(refusal.value)


# What becomes of such an input


@pytest.mark.parametrize(("build", "result"), [(nhdr, ".nrrd"), (mhd, ".mha")])
def test_results_for_a_header_with_a_data_file_are_one_file_of_its_format(
    tmp_path: Path, build: Callable[..., Path], result: str
) -> None:
    path = build(tmp_path, *([RAW, HERE] if build is nhdr else [HERE_MHD]))
    (found,) = find_inputs([tmp_path], 1)
    assert found.files == (path,) and found.suffix == result == result_suffix(path)
    assert output_path(found, out=None, single=True) == tmp_path / f"scan_seg{result}"
    assert output_path(found, out=tmp_path / "out", single=True).name == f"scan{result}"
    volume = read_volume(path)
    write_volume(tmp_path / f"scan_seg{result}", volume)
    again = read_volume(tmp_path / f"scan_seg{result}")
    assert_array_equal(again.data, volume.data)
    assert again.grid.agrees_with(volume.grid, tolerance=1e-9)
    assert find_inputs([tmp_path], 1) == [found]


@pytest.mark.parametrize("suffix", [".nhdr", ".mhd"])
def test_a_header_with_a_data_file_is_never_written(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "new" / f"scan{suffix}"
    volume = Volume(np.zeros((2, 2, 2)), Grid((2, 2, 2), np.eye(4)))
    with pytest.raises(VolumeError, match=r"expected a name in \*\.nii, .*; change its suffix"):
        write_volume(path, volume)
    with pytest.raises(VolumeError, match="change its suffix"):
        check_writable(path)
    nhdr(tmp_path, RAW, HERE)
    (source,) = find_inputs([tmp_path / "scan.nhdr"], 1)
    with pytest.raises(VolumeError, match="change its suffix"):
        output_path(source, out=path, single=True)
    assert not path.parent.exists()


def test_a_path_may_be_a_string(tmp_path: Path) -> None:
    path = nhdr(tmp_path, RAW, HERE)
    assert_array_equal(read_volume(str(path)).data, read_volume(path).data)
    write_volume(f"{tmp_path}/again.mha", read_volume(str(path)))
    assert read_grid(f"{tmp_path}/again.mha").agrees_with(read_grid(path), tolerance=1e-9)
