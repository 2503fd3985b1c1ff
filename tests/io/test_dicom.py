"""DICOM series: positions and values of their voxels, and series that are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from pydicom import Dataset
from pydicom.uid import BasicTextSRStorage, generate_uid

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io import voxel_bytes
from segkit.io.dicom import read_series
from segkit.io.dicom_listing import choose_series, holds_series, list_series
from segkit.io.volume import Volume
from tests.dicom import Change, decimal, write_series
from tests.helpers import affine_of

SHAPE = (5, 6, 7)


def stored_of(shape: tuple[int, int, int] = SHAPE, seed: int = 0) -> ndarray:
    return np.random.default_rng(seed).integers(0, 3000, shape).astype(np.uint16)


def grid_of(code: str = "LPS", shape: tuple[int, int, int] = SHAPE, **where: Any) -> Grid:
    return Grid(shape, affine_of(code, **where))


def read(folder: Path) -> Volume:
    return read_series(choose_series(folder))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "series"


# What is read. A series whose slices run against the normal of its rows and columns is turned.


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    code=st.sampled_from(["LPS", "LAS", "RPI", "PSR", "SLA", "AIL"]),
    spacing=st.tuples(*[st.floats(0.4, 5)] * 3),
    origin=st.tuples(*[st.floats(-300, 300)] * 3),
    rotation=st.tuples(*[st.floats(-0.4, 0.4)] * 3),
)
def test_every_voxel_keeps_its_value_and_its_place_in_the_world(
    tmp_path_factory: pytest.TempPathFactory,
    code: str,
    spacing: tuple[float, float, float],
    origin: tuple[float, float, float],
    rotation: tuple[float, float, float],
) -> None:
    folder = tmp_path_factory.mktemp("series")
    grid = grid_of(code, spacing=spacing, origin=origin, rotation=rotation)
    write_series(folder, stored_of(), grid)
    volume = read(folder)
    expected, world = stored_of().astype(int) - 1024, grid.centres()
    if np.linalg.det(grid.affine[:3, :3]) < 0:  # in LPS as in RAS
        expected, world = expected[:, :, ::-1], world[:, :, ::-1]
    assert_array_equal(volume.data, expected)
    assert volume.data.dtype.kind == "i"
    assert_allclose(volume.grid.centres(), world, atol=1e-4)


def test_an_upright_series_lies_where_simpleitk_places_it(folder: Path) -> None:
    paths = write_series(folder, stored_of(), grid_of("LPS"))
    names = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))
    image = sitk.ReadImage(names)
    volume = read(folder)
    assert len(names) == len(paths)
    assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), volume.data)
    for index in ((0, 0, 0), (4, 5, 6), (1, 3, 2)):
        lps = np.array(image.TransformIndexToPhysicalPoint(index))
        assert_allclose(volume.grid.world(np.array(index, float)), lps * (-1, -1, 1), atol=1e-5)


def test_a_tilted_gantry_shears_the_grid(folder: Path) -> None:
    affine = affine_of("LPS")
    affine[:3, 2] += affine[:3, 1] * 0.4
    write_series(folder, stored_of(), Grid(SHAPE, affine))
    assert_allclose(read(folder).grid.centres(), Grid(SHAPE, affine).centres(), atol=1e-4)


def test_slices_with_different_scales_become_float32(folder: Path) -> None:
    def scaled(number: int, one: Dataset) -> None:
        one.RescaleSlope, one.RescaleIntercept = decimal(0.5 + number), "2"

    write_series(folder, stored_of(), grid_of(), change=scaled)
    volume = read(folder)
    assert volume.data.dtype == np.float32
    assert_allclose(volume.data, stored_of() * (0.5 + np.arange(7)) + 2, rtol=1e-6)


def test_signed_numbers_without_rescaling_keep_their_type(folder: Path) -> None:
    stored = stored_of().astype(np.int16) - 1500

    def bare(number: int, one: Dataset) -> None:
        del one.RescaleSlope, one.RescaleIntercept

    write_series(folder, stored, grid_of(), change=bare)
    assert_array_equal(read(folder).data, stored)


def test_a_single_slice_has_the_thickness_of_its_header(folder: Path) -> None:
    grid = grid_of(shape=(5, 6, 1))
    write_series(folder, stored_of((5, 6, 1)), grid)
    assert_allclose(read(folder).grid.affine, grid.affine, atol=1e-5)


def test_rounded_positions_count_as_even(folder: Path) -> None:
    def rounded(number: int, one: Dataset) -> None:
        one.ImagePositionPatient = [f"{value:.2f}" for value in one.ImagePositionPatient]

    grid = grid_of(spacing=(0.7, 0.7, 0.625))
    write_series(folder, stored_of(), grid, change=rounded)
    assert_allclose(read(folder).grid.centres(), grid.centres(), atol=0.01)


# Several series


def test_one_of_several_series_is_chosen_by_its_uid(folder: Path) -> None:
    write_series(folder, stored_of(), grid_of())
    second = stored_of((5, 6, 2), seed=1)
    for number, path in enumerate(
        write_series(folder / "more", second, grid_of(shape=(5, 6, 2)), description="scout")
    ):
        path.rename(folder / f"scout{number}.dcm")
    (folder / "more").rmdir()
    found = list_series(folder)
    described = {series.description: series for series in found}
    assert {name: len(series.slices) for name, series in described.items()} == {
        "thorax": 7,
        "scout": 2,
    }
    with pytest.raises(VolumeError) as refusal:
        choose_series(folder)
    for series in found:
        assert f"{series.uid} ({series.description}, CT, " in str(refusal.value)
    assert "holds 2 series; pass the UID of one as --series" in str(refusal.value)
    with pytest.raises(VolumeError, match=r"expected the series 1\.2\.3, found only "):
        choose_series(folder, "1.2.3")
    chosen = choose_series(folder, described["scout"].uid)
    assert_array_equal(read_series(chosen).data, second.astype(int) - 1024)


def test_files_that_are_not_images_are_skipped(folder: Path) -> None:
    def report(number: int, one: Dataset) -> None:
        one.file_meta.MediaStorageSOPClassUID = one.SOPClassUID = BasicTextSRStorage
        one.SeriesInstanceUID = "1.2"
        del one.PixelData, one.Rows

    write_series(folder, stored_of(), grid_of())
    write_series(folder / "reports", stored_of(), grid_of(), change=report)[0].rename(folder / "SR")
    (folder / "README.txt").write_text("not DICOM")
    (folder / ".hidden.dcm").write_text("not DICOM")
    assert read(folder).grid.shape == SHAPE


def test_copies_of_a_slice_count_once_and_another_image_of_its_uid_is_refused(folder: Path) -> None:
    paths = write_series(folder, stored_of(), grid_of())
    expected = read(folder).data
    for number, path in enumerate(paths[:3]):
        (folder / f"copy {number}.dcm").write_bytes(path.read_bytes())
    assert len(choose_series(folder).slices) == SHAPE[2]
    assert_array_equal(read(folder).data, expected)
    changed = bytearray(paths[0].read_bytes())
    changed[-1] ^= 1  # a pixel
    (folder / "copy 0.dcm").write_bytes(changed)
    with pytest.raises(
        VolumeError, match=r"has the same SOP Instance UID as .* but a different image"
    ):
        read(folder)


def test_a_series_beyond_free_memory_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_series(folder, stored_of(), grid_of())
    monkeypatch.setattr(voxel_bytes, "free_memory", lambda: 800)
    with pytest.raises(VolumeError, match=r"5 x 6 x 7 voxels, .* but only 0.0008 MB are free"):
        read(folder)


def test_unreadable_files_are_refused_and_not_skipped(folder: Path) -> None:
    write_series(folder, stored_of(), grid_of())
    (folder / "broken.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nothing")
    with pytest.raises(
        VolumeError, match=r"cannot be read as DICOM: .*; export the file again, or move"
    ):
        read(folder)


def test_other_files_do_not_hide_a_series(folder: Path) -> None:
    folder.mkdir()
    assert not holds_series(folder)
    with pytest.raises(VolumeError, match="expected the DICOM files of a series, found none"):
        list_series(folder)
    write_series(folder, stored_of(), grid_of())
    assert holds_series(folder)
    (folder / "x.nii.gz").touch()
    assert holds_series(folder)


# What makes no volume


def moved(number: int, one: Dataset) -> None:
    if number == 6:
        x, y, z = one.ImagePositionPatient
        one.ImagePositionPatient = [x, y, decimal(float(z) + 1)]


def stacked(number: int, one: Dataset) -> None:
    one.ImagePositionPatient = ["0", "0", str(number // 2)]


def turned(number: int, one: Dataset) -> None:
    if number == 3:
        one.ImageOrientationPatient = ["0", "1", "0", "0", "0", "-1"]


def framed(number: int, one: Dataset) -> None:
    if number == 0:
        one.NumberOfFrames = 2
        one.PixelData = one.PixelData * 2


def coloured(number: int, one: Dataset) -> None:
    one.SamplesPerPixel, one.PhotometricInterpretation, one.PlanarConfiguration = 3, "RGB", 0
    one.BitsAllocated = one.BitsStored = 8
    one.HighBit = 7
    one.PixelData = bytes(5 * 6 * 3)


def nowhere(number: int, one: Dataset) -> None:
    del one.ImagePositionPatient


def skewed(number: int, one: Dataset) -> None:
    one.ImageOrientationPatient = ["1", "0", "0", "0.5", "0.866", "0"]


def wider(number: int, one: Dataset) -> None:
    if number == 2:
        one.PixelSpacing = ["0.9", "0.9"]


def cropped(number: int, one: Dataset) -> None:
    if number == 2:
        one.Rows = 5
        one.PixelData = one.PixelData[: 5 * 5 * 2]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (moved, "is 5 mm away, but others are 4 mm apart; complete the series"),
        (stacked, "lies at the same position as .*; split the series"),
        (turned, "expected the orientation .* in the same series, found .*; split the series"),
        (framed, "expected one slice in a file, found 2 frames without .*; convert it"),
        (coloured, "expected one grey value per pixel, found 3 values"),
        (nowhere, "its place in the volume is unknown"),
        (skewed, "expected rows and columns at right angles"),
        (wider, r"expected the spacing .* in the same series, found"),
        (cropped, r"expected the size .* in the same series, found"),
    ],
)
def test_slices_that_do_not_form_a_block_are_refused(
    change: Change, words: str, folder: Path
) -> None:
    write_series(folder, stored_of(), grid_of(rotation=(0, 0, 0)), change=change)
    with pytest.raises(VolumeError, match=words) as refusal:
        read(folder)
    assert str(refusal.value).startswith(str(folder)) and "\n" not in str(refusal.value)


def test_a_missing_slice_is_refused(folder: Path) -> None:
    paths = write_series(folder, stored_of(), grid_of())
    paths[3].unlink()
    with pytest.raises(VolumeError) as refusal:
        read(folder)
    assert str(refusal.value) == (
        f"{paths[2]}: the next slice, {paths[4].name}, is 8 mm away, but others are 4 mm apart; "
        f"complete the series or resample it first"
    )


def test_a_truncated_slice_is_refused(folder: Path) -> None:
    paths = write_series(folder, stored_of((64, 64, 3)), grid_of(shape=(64, 64, 3)))
    paths[1].write_bytes(paths[1].read_bytes()[:-4000])
    with pytest.raises(VolumeError, match="cannot be read as DICOM") as refusal:
        read(folder)
    assert str(refusal.value).startswith(str(paths[1]))


def test_series_differ_by_uid_and_nothing_else(folder: Path) -> None:
    def another(number: int, one: Dataset) -> None:
        if number == 0:
            one.SeriesInstanceUID = generate_uid()

    write_series(folder, stored_of(), grid_of(), change=another)
    assert sorted(len(series.slices) for series in list_series(folder)) == [1, 6]
