"""The pixels of a DICOM file are as many as its header says; fewer are refused, more are told."""

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pydicom import Dataset, dcmread
from pydicom.uid import ExplicitVRLittleEndian, ImplicitVRLittleEndian

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.dicom_pixels import surplus_of_pixels
from segkit.io.volume import read_volume
from tests.dicom import write_enhanced, write_series

SHAPE = (5, 3, 3)
BYTES = 2 * 5 * 3
GRID = Grid(SHAPE, np.diag([1.0, 1.0, 2.0, 1.0]))
STORED = np.arange(45, dtype=np.uint16).reshape(SHAPE)


def with_pixels(folder: Path, bytes_: int) -> Path:
    """A series whose second slice has pixels of so many bytes."""

    def change(number: int, one: Dataset) -> None:
        if number == 1:
            one.PixelData = (one.PixelData + b"\7" * 100)[:bytes_]

    write_series(folder, STORED, GRID, change=change)
    return folder


def test_a_file_with_fewer_pixels_than_its_header_says_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VolumeError, match="says 30 bytes of pixels, but the file holds 20; get a"):
        read_volume(with_pixels(tmp_path / "s", 20))


def test_pixels_beyond_the_header_are_left_out_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    volume = read_volume(with_pixels(tmp_path / "s", 40))
    assert_array_equal(volume.data[:, ::1], STORED.astype(int) - 1024)
    assert "1 of 3 files hold more pixels than their header says" in caplog.text


@pytest.mark.parametrize(("bytes_", "words"), [(80, "holds 80"), (120, "1 of 1 files hold more")])
def test_frames_of_an_enhanced_file_are_counted_too(
    bytes_: int, words: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def change(one: Dataset) -> None:
        one.PixelData = (one.PixelData + b"\7" * 100)[:bytes_]

    path = write_enhanced(tmp_path / "e.dcm", STORED, GRID, change=change)
    if bytes_ < 3 * BYTES:
        with pytest.raises(VolumeError, match=words):
            read_volume(path)
    else:
        assert_array_equal(read_volume(path).data, STORED.astype(int) - 1024)
        assert words in caplog.text


@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, ImplicitVRLittleEndian])
def test_an_icon_or_a_tag_among_the_pixels_is_not_taken_for_them(
    syntax: str, tmp_path: Path
) -> None:
    path = write_series(tmp_path / "s", STORED, GRID)[0]
    one = dcmread(path)
    icon = Dataset()
    icon.BitsAllocated, icon.PixelData = 8, b"\1" * 6
    one.IconImageSequence = [icon]
    one.PixelData = b"\xe0\x7f\x10\0OW\0\0\4\0\0\0" + b"\2" * 18
    one.file_meta.TransferSyntaxUID = syntax
    one.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    assert surplus_of_pixels(path, BYTES) == 0
    assert surplus_of_pixels(path, 29) == 0  # an odd length is filled up
    assert surplus_of_pixels(path, 20) == 10
