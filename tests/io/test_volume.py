import gzip
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from nibabel.nifti1 import Nifti1Header, Nifti1Image
from nibabel.nifti2 import Nifti2Image
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, read_grid, read_labels, read_volume, write_volume
from segkit.io.volume_names import WRITTEN_SUFFIXES, stem_of, suffix_of
from tests.helpers import ORIENTATIONS, affine_of, affines

KINDS = ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64")
SHAPE = (3, 4, 5)
# Where a NIfTI-1 header keeps them, in bytes from its start.
SLOPE_INTER, UNITS, SROW_X, SROW_Y, SROW_Z = 112, 123, 280, 296, 312
PLACING = (
    *("qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z"),
    *("sform_code", "srow_x", "srow_y", "srow_z", "xyzt_units", "pixdim", "dim_info"),
)
LPS_TO_RAS = np.array([-1, -1, 1])


def values_of(kind: str, shape: tuple[int, ...] = SHAPE) -> ndarray:
    """Every value another, and the extremes of the type among them."""
    limits = np.finfo(kind) if np.dtype(kind).kind == "f" else np.iinfo(kind)
    values = np.arange(np.prod(shape)).astype(kind)
    values[-2:] = [limits.min, limits.max][-len(values) :]
    return values.reshape(shape)


def nifti(
    path: Path,
    values: ndarray | None = None,
    affine: ndarray | None = None,
    *,
    image_class: type[Nifti1Image] = Nifti1Image,
    endianness: str = "<",
    codes: tuple[int, int] = (1, 3),
    units: tuple[str, str] = ("mm", "sec"),
) -> Path:
    """Write a NIfTI file with nibabel alone, quaternion and matrix both set."""
    values = values_of("int16") if values is None else values
    affine = affine_of("LPS") if affine is None else affine
    header = image_class.header_class(endianness=endianness)
    header.set_data_dtype(values.dtype)
    image = image_class(values, affine, header)
    image.header.set_qform(affine, codes[0])
    image.header.set_sform(affine, codes[1])
    image.header.set_xyzt_units(*units)
    image.header.set_dim_info(0, 1, 2)
    nib.save(image, path)
    return path


def edited(path: Path, offset: int, form: str, *content: Any) -> Path:
    """A file with some of its bytes written over."""
    raw = bytearray(path.read_bytes())
    struct.pack_into(form, raw, offset, *content)
    path.write_bytes(raw)
    return path


def assert_places_the_same(first: Any, second: Any) -> None:
    for field in PLACING:
        assert_array_equal(first[field], second[field], err_msg=field)


# Reading and writing back


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize(
    ("image_class", "endianness"), [(Nifti1Image, "<"), (Nifti1Image, ">"), (Nifti2Image, "<")]
)
@pytest.mark.parametrize("kind", KINDS)
def test_volumes_are_read_and_written_as_nibabel_reads_them(
    tmp_path: Path, kind: str, image_class: type[Nifti1Image], endianness: str, suffix: str
) -> None:
    values = values_of(kind)
    source = nifti(tmp_path / f"in{suffix}", values, image_class=image_class, endianness=endianness)
    volume = read_volume(source)
    assert volume.data.dtype == np.dtype(kind)
    assert volume.data.dtype.isnative
    assert_array_equal(volume.data, values)
    assert_array_equal(volume.grid.affine, nib.load(source).affine)
    write_volume(tmp_path / f"out{suffix}", volume)
    before, after = nib.load(source), nib.load(tmp_path / f"out{suffix}")
    assert type(after) is image_class
    assert after.get_data_dtype() == before.get_data_dtype()
    assert_array_equal(np.asanyarray(after.dataobj), values)
    assert_array_equal(after.affine, before.affine)
    assert_places_the_same(after.header, before.header)


@pytest.mark.parity
@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
@pytest.mark.parametrize("kind", KINDS)
def test_simpleitk_reads_written_volumes_unchanged(tmp_path: Path, kind: str, suffix: str) -> None:
    values, grid = values_of(kind), Grid(SHAPE, affine_of("PIR"))
    path = tmp_path / f"out{suffix}"
    write_volume(path, Volume(values, grid))
    image = sitk.ReadImage(str(path))
    assert_array_equal(sitk.GetArrayFromImage(image).transpose(2, 1, 0), values)
    for index in ((0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, 4)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * LPS_TO_RAS
        assert_allclose(world, grid.world(np.array(index, dtype=float)), atol=1e-6)
    again = read_volume(path)
    assert again.data.dtype == np.dtype(kind)
    assert_array_equal(again.data, values)
    assert_allclose(again.grid.affine, grid.affine, atol=1e-9)


@given(affines())
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_format_keeps_the_position_of_every_voxel(tmp_path: Path, affine: ndarray) -> None:
    values, grid = values_of("float32"), Grid(SHAPE, affine)
    for suffix in WRITTEN_SUFFIXES:
        path = tmp_path / f"scan{suffix}"
        write_volume(path, Volume(values, grid))
        again = read_volume(path)
        assert_array_equal(again.data, values)
        # NIfTI keeps float32 numbers, of 500 mm to 3e-5.
        assert again.grid.agrees_with(grid, tolerance=2e-4)
        assert read_grid(path).agrees_with(again.grid, tolerance=0)


@pytest.mark.parity
@pytest.mark.parametrize("code", ORIENTATIONS)
def test_a_nifti_lies_where_simpleitk_places_it(tmp_path: Path, code: str) -> None:
    path = nifti(tmp_path / "scan.nii", affine=affine_of(code))
    grid = read_grid(path)
    image = sitk.ReadImage(str(path))
    for index in ((0, 0, 0), (2, 3, 4)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * LPS_TO_RAS
        assert_allclose(grid.world(np.array(index, dtype=float)), world, atol=1e-3)


@pytest.mark.parametrize("space", ["right-anterior-superior", "left-posterior-superior"])
def test_the_space_of_an_nrrd_gives_the_directions_of_its_axes(tmp_path: Path, space: str) -> None:
    path = tmp_path / "scan.nrrd"
    head = (
        "NRRD0004\ntype: uint8\ndimension: 3\n"
        f"space: {space}\nsizes: 1 2 3\n"
        "space directions: (2,0,0) (0,3,0) (0,0,4)\nkinds: domain domain domain\n"
        "encoding: raw\nspace origin: (10,20,30)\n\n"
    )
    path.write_bytes(head.encode() + bytes(range(6)))
    volume = read_volume(path)
    sign = 1 if space.startswith("right") else -1
    assert_allclose(volume.grid.affine[:3, 3], [sign * 10, sign * 20, 30])
    assert_allclose(np.diag(volume.grid.affine)[:3], [sign * 2, sign * 3, 4])
    assert_array_equal(volume.data[0], [[0, 2, 4], [1, 3, 5]])


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
@pytest.mark.parametrize(
    "shape", [(1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 1), (3, 4, 5, 2), (3, 4, 1, 3)]
)
def test_thin_volumes_and_channels_keep_every_value(
    tmp_path: Path, shape: tuple[int, ...], suffix: str
) -> None:
    x, y, z = shape[:3]
    grid = Grid((x, y, z), affine_of("ASL"))
    write_volume(tmp_path / f"scan{suffix}", Volume(values_of("float32", shape), grid))
    again = read_volume(tmp_path / f"scan{suffix}")
    assert_array_equal(again.data, values_of("float32", shape))
    assert again.grid.agrees_with(grid, tolerance=1e-3)


@pytest.mark.parametrize(
    ("in_file", "in_memory", "written"),
    [
        ((3, 4), (3, 4, 1), (3, 4)),
        ((3, 4, 5, 2), (3, 4, 5, 2), (3, 4, 5, 2)),
        ((3, 4, 5, 1, 2), (3, 4, 5, 2), (3, 4, 5, 2)),
        ((3, 4, 1, 1, 2), (3, 4, 1, 2), (3, 4, 1, 2)),
        ((3, 4, 5, 2, 1), (3, 4, 5, 2), (3, 4, 5, 2)),
        ((3, 4, 5, 1, 1, 2, 1), (3, 4, 5, 2), (3, 4, 5, 2)),
        ((3, 4, 5, 1), (3, 4, 5), (3, 4, 5)),
        ((3, 4, 5, 1, 1, 1, 1), (3, 4, 5), (3, 4, 5)),
        ((3, 4, 1, 1), (3, 4, 1), (3, 4, 1)),
        ((1, 4, 5, 1), (1, 4, 5), (1, 4, 5)),
        ((1, 1, 1, 1), (1, 1, 1), (1, 1, 1)),
    ],
)
def test_axes_of_a_nifti_are_space_and_then_channels(
    tmp_path: Path,
    in_file: tuple[int, ...],
    in_memory: tuple[int, ...],
    written: tuple[int, ...],
) -> None:
    values = values_of("float32", in_file)
    source = nifti(tmp_path / "in.nii.gz", values)
    volume = read_volume(source)
    assert volume.data.shape == in_memory
    assert_array_equal(volume.data.squeeze(), values.squeeze())
    write_volume(tmp_path / "out.nii.gz", volume)
    after = nib.load(tmp_path / "out.nii.gz")
    assert after.shape == written
    assert_array_equal(after.get_fdata().squeeze(), values.squeeze())
    assert_places_the_same(after.header, nib.load(source).header)


def with_ones(path: Path, values: ndarray, num_axes: int) -> Path:
    """A file of SimpleITK's or nibabel's with axes of size 1 behind the three of space."""
    values = values.reshape(*values.shape, *[1] * (num_axes - 3))
    if path.name.endswith((".nii", ".nii.gz")):
        return nifti(path, values)
    image = sitk.GetImageFromArray(values.T, isVector=False)
    image.SetSpacing((0.5, 0.6, 0.7, 2.0, 3.0)[:num_axes])
    image.SetOrigin((1.0, 2.0, 3.0, 9.0, 8.0)[:num_axes])
    sitk.WriteImage(image, str(path), useCompression=True)
    return path


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
@pytest.mark.parametrize("num_axes", [4, 5])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 4, 1), (1, 4, 5), (3, 1, 5)])
def test_axes_of_size_1_beyond_the_third_are_dropped_in_every_format(
    tmp_path: Path, shape: tuple[int, ...], num_axes: int, suffix: str
) -> None:
    values = values_of("uint8", shape)
    plain = with_ones(tmp_path / f"plain{suffix}", values, 3)
    path = with_ones(tmp_path / f"scan{suffix}", values, num_axes)
    for read in (read_volume, read_labels):
        assert read(path).data.shape == shape
        assert_array_equal(read(path).data, values)
    assert read_grid(path).agrees_with(read_grid(plain), tolerance=0)
    write_volume(tmp_path / f"out{suffix}", read_volume(path))
    assert_array_equal(read_volume(tmp_path / f"out{suffix}").data, values)
    assert read_grid(tmp_path / f"out{suffix}").agrees_with(read_grid(plain))


@pytest.mark.parametrize("kinds", ["domain domain domain list", "vector domain domain domain"])
def test_an_nrrd_with_one_channel_has_no_channel_axis(tmp_path: Path, kinds: str) -> None:
    sizes = "1 2 3 4" if kinds.startswith("vector") else "2 3 4 1"
    text = f"NRRD0004\ntype: uint8\ndimension: 4\nsizes: {sizes}\nkinds: {kinds}\nencoding: raw"
    (tmp_path / "scan.nrrd").write_bytes(f"{text}\n\n".encode() + bytes(range(24)))
    expected = np.arange(24).reshape((2, 3, 4), order="F")
    assert_array_equal(read_labels(tmp_path / "scan.nrrd").data, expected)


def test_a_2d_metaimage_is_one_slice(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.arange(6, dtype=np.uint8).reshape(2, 3))
    image.SetSpacing((2.0, 3.0))
    image.SetOrigin((10.0, 20.0))
    sitk.WriteImage(image, str(tmp_path / "slice.mha"))
    volume = read_volume(tmp_path / "slice.mha")
    assert_array_equal(volume.data[:, :, 0], [[0, 3], [1, 4], [2, 5]])
    assert_allclose(np.diag(volume.grid.affine), [-2, -3, 1, 1])
    assert_allclose(volume.grid.affine[:3, 3], [-10, -20, 0])


def test_a_label_on_a_scans_grid_has_the_scans_affine_and_its_own_type(tmp_path: Path) -> None:
    source = nifti(tmp_path / "scan.nii.gz", values_of("float32"), codes=(1, 4))
    label = (values_of("float32") > 0).astype(np.uint8)
    write_volume(tmp_path / "label.nii.gz", read_volume(source).like(label))
    after = nib.load(tmp_path / "label.nii.gz")
    assert after.get_data_dtype() == np.uint8
    assert_array_equal(np.asanyarray(after.dataobj), label)
    assert_places_the_same(after.header, nib.load(source).header)


def test_data_must_fill_its_grid() -> None:
    with pytest.raises(ValueError, match=r"the grid's shape \(3, 4, 5\), found \(2, 2, 2\)"):
        Volume(np.zeros((2, 2, 2)), Grid(SHAPE, np.eye(4)))


# What the header says


@pytest.mark.parametrize("kind", ["uint8", "int16", "float32"])
def test_a_files_slope_and_intercept_give_float32(tmp_path: Path, kind: str) -> None:
    stored = np.arange(60).reshape(SHAPE).astype(kind)
    path = edited(nifti(tmp_path / "scan.nii", stored), SLOPE_INTER, "<ff", 0.5, -1024.0)
    volume = read_volume(path)
    assert volume.data.dtype == np.float32
    assert_array_equal(volume.data, stored * 0.5 - 1024.0)
    write_volume(tmp_path / "out.nii", volume)
    assert_array_equal(nib.load(tmp_path / "out.nii").get_fdata(), stored * 0.5 - 1024.0)


@pytest.mark.parametrize("slope", [0.0, 1.0, float("nan")])
def test_a_slope_of_1_or_none_keeps_the_type(tmp_path: Path, slope: float) -> None:
    path = edited(nifti(tmp_path / "scan.nii"), SLOPE_INTER, "<ff", slope, 0.0)
    assert read_volume(path).data.dtype == np.int16


@pytest.mark.parametrize(("unit", "millimetres"), [("meter", 1000), ("mm", 1), ("micron", 1e-3)])
def test_a_grid_is_in_mm_and_the_file_keeps_its_unit(
    tmp_path: Path, unit: str, millimetres: float
) -> None:
    source = nifti(tmp_path / "in.nii.gz", units=(unit, "sec"))
    volume = read_volume(source)
    in_file = nib.load(source).affine
    assert_allclose(volume.grid.affine[:3], in_file[:3] * millimetres, rtol=1e-12)
    write_volume(tmp_path / "out.nii.gz", volume)
    assert_places_the_same(nib.load(tmp_path / "out.nii.gz").header, nib.load(source).header)
    coarse = volume.grid.placed((2, 2, 2), (2, 2, 2), (0.5, 0.5, 0.5))
    write_volume(tmp_path / "coarse.nii.gz", volume.on(coarse, np.zeros((2, 2, 2), np.uint8)))
    header = nib.load(tmp_path / "coarse.nii.gz").header
    assert header.get_xyzt_units()[0] == "mm"
    assert_allclose(header.get_sform(), coarse.affine, rtol=1e-6)


@pytest.mark.parametrize("unit", range(8))
def test_an_undefined_unit_counts_as_mm(tmp_path: Path, unit: int) -> None:
    path = edited(nifti(tmp_path / "scan.nii"), UNITS, "B", unit)
    expected = affine_of("LPS")[:3] * {1: 1000, 3: 0.001}.get(unit, 1)
    assert_allclose(read_grid(path).affine[:3], expected, rtol=1e-5)


def test_the_sform_precedes_the_qform_and_both_precede_voxel_sizes(tmp_path: Path) -> None:
    qform, sform = affine_of("RAS"), affine_of("LPI", spacing=(1, 2, 3))
    image = Nifti1Image(values_of("int16"), None)
    for codes, expected in (((1, 2), sform), ((1, 0), qform), ((0, 2), sform)):
        image.header.set_qform(qform, codes[0])
        image.header.set_sform(sform, codes[1])
        nib.save(image, tmp_path / "scan.nii")
        assert_allclose(read_grid(tmp_path / "scan.nii").affine, expected, atol=1e-4)


@pytest.mark.parametrize(
    ("codes", "expected"), [((1, 0), 1), ((0, 2), 2), ((1, 3), 3), ((0, 0), 2)]
)
def test_another_grid_sets_both_forms_and_keeps_the_larger_code(
    tmp_path: Path, codes: tuple[int, int], expected: int
) -> None:
    volume = read_volume(nifti(tmp_path / "in.nii.gz", codes=codes))
    coarse = volume.grid.with_spacing((2.0, 2.0, 5.0))
    write_volume(tmp_path / "out.nii.gz", volume.on(coarse, np.zeros(coarse.shape, np.uint8)))
    header = nib.load(tmp_path / "out.nii.gz").header
    assert int(header["qform_code"]) == int(header["sform_code"]) == expected
    assert_allclose(header.get_sform(), coarse.affine, atol=1e-4)
    assert_allclose(header.get_qform(), coarse.affine, atol=1e-4)
    assert_allclose(header.get_zooms(), (2.0, 2.0, 5.0), rtol=1e-6)


@pytest.mark.parametrize("codes", [(0, 0), (1, 0), (0, 2)])
def test_a_crop_from_the_far_end_keeps_its_position(tmp_path: Path, codes: tuple[int, int]) -> None:
    # The affine is the source's own, and without codes a header's affine follows its shape.
    volume = read_volume(nifti(tmp_path / "in.nii", codes=codes))
    crop = Grid((2, 3, 4), volume.grid.affine)
    write_volume(tmp_path / "out.nii", volume.on(crop, volume.data[:2, :3, :4]))
    assert read_grid(tmp_path / "out.nii").agrees_with(crop, tolerance=1e-3)


def test_a_sheared_sform_and_its_qform_are_kept(tmp_path: Path) -> None:
    sheared = affine_of("RAS", rotation=(0, 0, 0))
    sheared[0, 1] = 0.5  # a gantry tilt
    image = Nifti1Image(values_of("int16"), None)
    image.header.set_qform(affine_of("RAS"), 1)
    image.header.set_sform(sheared, 2)
    nib.save(image, tmp_path / "in.nii.gz")
    volume = read_volume(tmp_path / "in.nii.gz")
    assert_allclose(volume.grid.affine, sheared, atol=1e-5)
    write_volume(tmp_path / "like.nii.gz", volume)
    assert_places_the_same(
        nib.load(tmp_path / "like.nii.gz").header, nib.load(tmp_path / "in.nii.gz").header
    )
    half = volume.grid.placed((1, 2, 2), (2, 2, 2), (0.5, 0.5, 0.5))
    for suffix in WRITTEN_SUFFIXES:
        write_volume(tmp_path / f"half{suffix}", volume.on(half, np.zeros((1, 2, 2), np.uint8)))
        assert read_grid(tmp_path / f"half{suffix}").agrees_with(half, tolerance=1e-3)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("tilt", [(0.0, 0.4663, 0.0), (0.3, 0.0, 0.0), (-0.2, 0.1, 0.0)])
def test_the_qform_of_sheared_axes_has_code_0(
    tmp_path: Path, tilt: tuple[float, float, float], suffix: str
) -> None:
    affine = affine_of("LPS")
    affine[:3, 2] += affine[:3, :3] @ np.array(tilt)
    grid, path = Grid((32, 32, 20), affine), tmp_path / f"labels{suffix}"
    write_volume(path, Volume(np.zeros(grid.shape, np.uint8), grid))
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (0, 2)
    assert read_grid(path).agrees_with(grid)
    try:
        image = sitk.ReadImage(str(path))
    except RuntimeError as error:  # ITK holds no sheared axes of a NIfTI: it says so
        assert "orthonormal" in str(error)
        return
    for index in ((0, 0, 0), (31, 31, 19)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * LPS_TO_RAS
        assert_allclose(world, grid.world(np.array(index, dtype=float)), atol=0.01)


@pytest.mark.parametrize("code", ORIENTATIONS)
def test_simpleitk_places_written_labels_on_their_scan(tmp_path: Path, code: str) -> None:
    grid, path = Grid((32, 3, 20), affine_of(code)), tmp_path / "labels.nii"
    write_volume(path, Volume(np.zeros(grid.shape, np.uint8), grid))
    header = nib.load(path).header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 2)
    image = sitk.ReadImage(str(path))
    for index in ((0, 0, 0), (31, 2, 19)):
        world = np.array(image.TransformIndexToPhysicalPoint(index)) * LPS_TO_RAS
        assert_allclose(world, grid.world(np.array(index, dtype=float)), atol=0.01)


@pytest.mark.parity
@pytest.mark.parametrize("image_class", [Nifti1Image, Nifti2Image])
@pytest.mark.parametrize("excess", [1e-8, 4.7e-7, 1e-5, 1e-4])
def test_a_quaternion_too_long_by_rounding_counts_as_one_of_length_1(
    tmp_path: Path, excess: float, image_class: type[Nifti1Image]
) -> None:
    path = nifti(tmp_path / "scan.nii", codes=(1, 0), image_class=image_class)
    # b, c and d, behind the code of the qform.
    place, form = (256, "<3f") if image_class is Nifti1Image else (352, "<3d")
    length = np.sqrt(1 + excess)
    edited(path, place, form, 0.6 * length, 0.8 * length, 0)
    volume = read_volume(path)
    # A half turn about (0.6, 0.8, 0): 2 v v' - 1.
    turn = 2 * np.outer((0.6, 0.8, 0), (0.6, 0.8, 0)) - np.eye(3)
    assert_allclose(volume.grid.directions.T * volume.grid.spacing, turn * (0.7, 1.3, 4), atol=1e-5)
    if image_class is Nifti1Image:
        image = sitk.ReadImage(str(path))
        world = np.array(image.TransformIndexToPhysicalPoint((2, 3, 4))) * LPS_TO_RAS
        assert_allclose(volume.grid.world(np.array((2.0, 3.0, 4.0))), world, atol=1e-4)
    write_volume(tmp_path / "out.nii", volume.like((volume.data > 0).astype(np.uint8)))
    assert_allclose(nib.load(tmp_path / "out.nii").affine, volume.grid.affine, atol=1e-5)


def test_a_quaternion_much_too_long_is_refused_only_if_it_is_used(tmp_path: Path) -> None:
    path = edited(nifti(tmp_path / "scan.nii", codes=(1, 0)), 256, "<3f", 0.6, 0.9, 0)
    with pytest.raises(VolumeError, match=r"with a quaternion of length 1, found 1\.08167; re"):
        read_volume(path)
    placed = edited(nifti(tmp_path / "placed.nii", codes=(1, 1)), 256, "<3f", 0.6, 0.9, 0)
    assert_allclose(read_grid(placed).affine, affine_of("LPS"), atol=1e-4)


def test_a_nifti_written_from_an_nrrd_has_its_affine_in_mm(tmp_path: Path) -> None:
    grid = Grid(SHAPE, affine_of("SRP"))
    write_volume(tmp_path / "scan.nrrd", Volume(values_of("int16"), grid))
    write_volume(tmp_path / "scan.nii.gz", read_volume(tmp_path / "scan.nrrd"))
    header = nib.load(tmp_path / "scan.nii.gz").header
    assert (int(header["qform_code"]), int(header["sform_code"])) == (2, 2)
    assert header.get_xyzt_units()[0] == "mm"
    assert_allclose(header.get_qform(), grid.affine, atol=1e-4)


# Names


@pytest.mark.parametrize(
    ("name", "stem", "suffix"),
    [
        ("scan.nii.gz", "scan", ".nii.gz"),
        ("scan.nii", "scan", ".nii"),
        ("sub-01.v2.nrrd", "sub-01.v2", ".nrrd"),
        ("SCAN.NII.GZ", "SCAN", ".NII.GZ"),
        (".nii.mha", ".nii", ".mha"),
    ],
)
def test_a_name_is_its_stem_and_its_suffix(name: str, stem: str, suffix: str) -> None:
    assert (stem_of(Path("a.b") / name), suffix_of(Path("a.b") / name)) == (stem, suffix)


def test_a_suffix_in_capitals_is_read(tmp_path: Path) -> None:
    nifti(tmp_path / "scan.nii.gz").rename(tmp_path / "SCAN.NII.GZ")
    assert_array_equal(read_volume(tmp_path / "SCAN.NII.GZ").data, values_of("int16"))


# Refusals


def missing(folder: Path) -> Path:
    return folder / "scan.nii.gz"


def a_folder(folder: Path) -> Path:
    (folder / "scan.nii").mkdir()
    return folder / "scan.nii"


def wrong_suffix(folder: Path) -> Path:
    return nifti(folder / "scan.nii").rename(folder / "scan.img")


def empty(folder: Path) -> Path:
    (folder / "scan.nii").touch()
    return folder / "scan.nii"


def text_as(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        (folder / name).write_text("not a scan\n" * 100)
        return folder / name

    return build


def gzipped_text(folder: Path) -> Path:
    (folder / "scan.nii.gz").write_bytes(gzip.compress(b"not a scan\n" * 100))
    return folder / "scan.nii.gz"


def truncated(name: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        random = np.random.default_rng(0).normal(size=(20, 20, 20))
        volume = Volume(random, Grid((20, 20, 20), affine_of("RAS")))
        write_volume(folder / name, volume)
        os.truncate(folder / name, (folder / name).stat().st_size // 2)
        return folder / name

    return build


def edit(offset: int, form: str, *content: Any) -> Callable[[Path], Path]:
    return lambda folder: edited(nifti(folder / "scan.nii"), offset, form, *content)


def holding(values: ndarray) -> Callable[[Path], Path]:
    return lambda folder: nifti(folder / "scan.nii", values)


def another_format(folder: Path) -> Path:
    image = nib.MGHImage(np.zeros(SHAPE, np.float32), np.eye(4))
    nib.save(image, folder / "scan.mgz")
    return (folder / "scan.mgz").rename(folder / "scan.nii.gz")


def itk_of_four_axes(folder: Path) -> Path:
    sitk.WriteImage(sitk.Image([2, 3, 4, 5], sitk.sitkUInt8), str(folder / "scan.nrrd"))
    return folder / "scan.nrrd"


def complex_itk(folder: Path) -> Path:
    sitk.WriteImage(sitk.Image([2, 3, 4], sitk.sitkComplexFloat32), str(folder / "scan.nrrd"))
    return folder / "scan.nrrd"


RGB = np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")])
ONE_REAL = "expected one real number per voxel, found"
AXES = "expected two or three spatial axes and at most one of channels, found shape"
REFUSALS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (missing, "no such file; check the path"),
    "folder": (a_folder, "expected a file, found a folder"),
    "suffix": (wrong_suffix, r"expected a volume named \*\.nii, .*; convert it first"),
    "empty": (empty, r"cannot be read as \.nii: "),
    "text as nii": (text_as("scan.nii"), r"cannot be read as \.nii: "),
    "text as nii.gz": (text_as("scan.nii.gz"), r"cannot be read as \.nii\.gz: "),
    "text as nrrd": (text_as("scan.nrrd"), r"cannot be read as \.nrrd: "),
    "text as mha": (text_as("scan.mha"), r"cannot be read as \.mha: "),
    "gzipped text": (gzipped_text, r"cannot be read as \.nii\.gz: "),
    "truncated nii": (
        truncated("scan.nii"),
        "claims 64000 bytes of voxels, but the file can only hold 31",
    ),
    "truncated nii.gz": (truncated("scan.nii.gz"), r"cannot be read as \.nii\.gz: "),
    "truncated nrrd": (truncated("scan.nrrd"), r"cannot be read as \.nrrd: "),
    "truncated mha": (truncated("scan.mha"), r"cannot be read as \.mha: "),
    "another format": (another_format, r"cannot be read as \.nii\.gz: "),
    # A whole column of zeros: voxels of no width along the first axis.
    "zero spacing": (
        lambda folder: edited(
            edited(edit(SROW_X, "<f", 0)(folder), SROW_Y, "<f", 0), SROW_Z, "<f", 0
        ),
        r"expected voxel sizes above zero, found \[0\.0, ",
    ),
    "NaN": (edit(SROW_X, "<f", float("nan")), "its affine holds NaN or infinite values"),
    "NaN origin": (
        edit(SROW_X + 12, "<f", float("nan")),
        "its affine holds NaN or infinite values",
    ),
    "infinite": (edit(SROW_X, "<f", float("inf")), "its affine holds NaN or infinite values"),
    "singular": (
        edit(SROW_X, "<12f", 1, 1, 0, 0, 2, 2, 0, 0, 0, 0, 3, 0),
        "its affine is singular: its axes lie in one plane",
    ),
    "RGB": (holding(RGB), ONE_REAL),
    "complex": (holding(np.zeros(SHAPE, np.complex64)), f"{ONE_REAL} complex64"),
    "complex nrrd": (complex_itk, f"{ONE_REAL} complex"),
    "one axis": (holding(np.zeros(7, np.uint8)), rf"{AXES} \(7,\)"),
    "time and channels": (holding(np.zeros((2, 3, 4, 5, 6), np.uint8)), rf"{AXES} \(2, 3, 4, 5, 6"),
    "no voxels": (holding(np.zeros((2, 0, 4), np.uint8)), rf"{AXES} \(2, 0, 4\)"),
    "nrrd of four axes": (itk_of_four_axes, "expected two or three axes, found 4"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_files_that_are_not_volumes_are_refused_in_one_sentence(tmp_path: Path, name: str) -> None:
    build, reason = REFUSALS[name]
    path = build(tmp_path)
    with pytest.raises(VolumeError, match=reason) as refusal:
        read_volume(path)
    assert str(refusal.value).startswith(f"{path}: ")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["missing", "folder", "suffix", "gzipped text", "NaN", "one axis"])
def test_a_grid_is_refused_as_its_volume_is(tmp_path: Path, name: str) -> None:
    build, reason = REFUSALS[name]
    with pytest.raises(VolumeError, match=reason):
        read_grid(build(tmp_path))


def test_a_grid_is_read_from_the_header_only(tmp_path: Path) -> None:
    path = truncated("scan.nii")(tmp_path)
    assert read_grid(path).agrees_with(Grid((20, 20, 20), affine_of("RAS")))


# Whole or not at all


@pytest.mark.parametrize("failure", [OSError("no space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, failure: BaseException
) -> None:
    volume = Volume(values_of("int16"), Grid(SHAPE, affine_of("RAS")))

    def write_half(*arguments: Any, **options: Any) -> None:
        (path,) = (Path(a) for a in arguments if isinstance(a, str) and a != "wb")
        path.write_bytes(b"half a volume")
        raise failure

    kept = tmp_path / f"kept{suffix}"
    write_volume(kept, volume)
    content = kept.read_bytes()

    def write_half_of_nifti(header: Nifti1Header, file: BinaryIO) -> None:
        file.write(b"half a volume")
        raise failure

    monkeypatch.setattr(Nifti1Header, "write_to", write_half_of_nifti)
    monkeypatch.setattr(sitk, "WriteImage", write_half)
    for path in (kept, tmp_path / f"new{suffix}"):
        with pytest.raises(type(failure)):
            write_volume(path, volume)
    assert list(tmp_path.iterdir()) == [kept]
    assert kept.read_bytes() == content


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_a_write_replaces_the_volume_it_was_read_from(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"scan{suffix}"
    write_volume(path, Volume(values_of("float32"), Grid(SHAPE, affine_of("RAS"))))
    volume = read_volume(path)  # mapped from the file, where it is not compressed
    write_volume(path, volume.like(volume.data[::-1]))
    assert_array_equal(read_volume(path).data, values_of("float32")[::-1])
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("suffix", WRITTEN_SUFFIXES)
def test_the_same_volume_gives_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    volume = Volume(values_of("int16"), Grid(SHAPE, affine_of("RAS")))
    first, second = tmp_path / f"first{suffix}", tmp_path / "elsewhere" / f"second{suffix}"
    write_volume(first, volume)
    monkeypatch.setattr("time.time", lambda: 4e9)  # gzip would keep the time, and the name
    write_volume(second, volume)
    assert first.read_bytes() == second.read_bytes()


def test_an_unsupported_suffix_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    volume = Volume(values_of("int16"), Grid(SHAPE, affine_of("RAS")))
    with pytest.raises(VolumeError, match=r"expected a name in \*\.nii"):
        write_volume(tmp_path / "new" / "scan.jpg", volume)
    assert not (tmp_path / "new").exists()


# Real scans


@pytest.mark.data
@pytest.mark.parametrize("folder", ["images", "labels"])
def test_real_scans_come_back_as_they_were(data_folder: Path, tmp_path: Path, folder: str) -> None:
    paths = sorted((data_folder / "spinal_cord" / folder).glob("*.nii.gz"))
    assert paths
    for path in paths:
        volume = read_volume(path)
        before = nib.load(path)
        assert_allclose(volume.data, before.get_fdata(dtype=np.float32))
        write_volume(tmp_path / "again.nii.gz", volume)
        after = nib.load(tmp_path / "again.nii.gz")
        assert_array_equal(after.affine, before.affine)
        assert_places_the_same(after.header, before.header)
        assert_array_equal(np.asanyarray(after.dataobj), volume.data.reshape(after.shape))


@pytest.mark.parametrize("kind", [Nifti1Image, Nifti2Image])
@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_text_of_a_header_is_not_written(
    tmp_path: Path, kind: type[Nifti1Image], suffix: str
) -> None:
    image = kind(np.zeros((3, 4, 5), np.uint8), np.eye(4))
    known = image.header.structarr.dtype.names
    text = ("db_name", "data_type", "aux_file", "intent_name", "descrip")
    for field in text:
        if field in known:
            image.header[field] = b"Doe^Jane"
    nib.save(image, tmp_path / "scan.nii")
    assert b"Doe^Jane" in (tmp_path / "scan.nii").read_bytes()
    result = tmp_path / f"labels{suffix}"
    write_volume(result, read_volume(tmp_path / "scan.nii"))
    header = nib.load(result).header
    assert {field: header[field].item() for field in text if field in known} == {
        field: b"segkit" if field == "descrip" else b"" for field in text if field in known
    }


@pytest.mark.parametrize("suffix", [".nrrd", ".mha"])
def test_text_of_other_formats_is_not_written(tmp_path: Path, suffix: str) -> None:
    image = sitk.GetImageFromArray(np.zeros((5, 4, 3), np.uint8))
    image.SetMetaData("PatientName", "Doe^Jane")
    path = tmp_path / f"scan{suffix}"
    sitk.WriteImage(image, str(path))
    assert b"Doe^Jane" in path.read_bytes()
    for result in (tmp_path / f"labels{suffix}", tmp_path / "labels.nii"):
        write_volume(result, read_volume(path))
        assert b"Doe^Jane" not in result.read_bytes()
