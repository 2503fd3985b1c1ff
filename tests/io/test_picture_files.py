"""Pictures keep their pixels and pixel size; bad pictures are refused in one sentence."""

import struct
import zlib
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image

from segkit.config.pictures import PicturesConfig
from segkit.errors import VolumeError
from segkit.geometry.grid import Grid
from segkit.io import picture_files
from segkit.io.bitmap import exif_of
from segkit.io.picture_rules import PictureFacts, PictureRules, length_mm, pixel_length_mm
from segkit.io.volume import (
    Volume,
    read_grid,
    read_labels,
    read_num_channels,
    read_volume,
    write_volume,
)
from segkit.io.volume_names import check_writable, numbers_suffix, result_suffix

RED, GREEN, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 0)
MICROSCOPIC = PictureRules(pixel_mm=(0.0005, 0.00025))
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6)
"""4 rows of 6 pixels."""


def save(path: Path, values: np.ndarray, mode: str | None = None, **options: object) -> Path:
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


def picture(path: Path, values: np.ndarray, rules: PictureRules) -> Volume:
    """A volume like a picture that was read by some rules."""
    height, width = values.shape[:2]
    save(path, np.zeros((height, width), np.uint8))
    return read_volume(path, rules=rules).like(values)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".tiff", ".ome.tif"])
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    kind=st.sampled_from(["uint8", "uint16"]),
    seed=st.integers(0, 99),
    step=st.sampled_from([None, 4e-6, 0.0005, 0.25]),
)
@settings(max_examples=12, deadline=None)
def test_labels_come_back_bit_for_bit_with_their_pixel_size(
    tmp_path_factory: pytest.TempPathFactory,
    suffix: str,
    shape: tuple[int, int],
    kind: str,
    seed: int,
    step: float | None,
) -> None:
    folder = tmp_path_factory.mktemp("labels")
    high = 256 if kind == "uint8" else 65536
    values = np.random.default_rng(seed).integers(high, size=shape[::-1]).astype(kind)
    rules = PictureRules(pixel_mm=None if step is None else (step, 2 * step))
    scan = read_volume(save(folder / "scan.png", values.astype(np.uint8)), rules=rules)
    path = folder / f"labels{suffix}"
    write_volume(path, scan.like(values.T[..., None]))
    back = read_labels(path)
    assert back.data.shape == (*shape, 1)
    assert_array_equal(back.data[..., 0].T, values)
    assert back.unit == scan.unit
    assert_allclose(back.grid.affine, scan.grid.affine, rtol=1e-6)


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("shape", [(5, 4, 1), (5, 4, 3), (5, 4, 3, 2), (5, 4, 1, 3), (1, 1, 4)])
@pytest.mark.parametrize("suffix", [".tif", ".ome.tif"])
def test_stacks_come_back_with_their_channels_and_the_distance_of_their_slices(
    tmp_path: Path, kind: str, shape: tuple[int, ...], suffix: str
) -> None:
    values = np.arange(np.prod(shape)).reshape(shape).astype(kind)
    if kind == "float32":
        values.flat[0] = np.nan
    grid = Grid(shape[:3], np.diag([-0.0005, -0.00025, 0.002, 1.0]))
    path = tmp_path / f"stack{suffix}"
    write_volume(path, Volume(values, grid, picture=PictureFacts("µm", "a test")))
    back = read_volume(path)
    assert back.data.dtype == kind
    assert_array_equal(back.data, values)
    spacing = (0.0005, 0.00025, 0.002 if shape[2] > 1 else 1.0)
    assert_allclose(back.grid.spacing, spacing, rtol=1e-6)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ome.tif"])
def test_the_same_picture_is_written_as_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    written = [tmp_path / f"{number}{suffix}" for number in range(3)]
    for path, value in zip(written, (1, 1, 2), strict=True):
        data = np.full((5, 4, 1), value, np.uint8)
        write_volume(path, Volume(data, Grid((5, 4, 1), np.diag([0.002, 0.002, 1.0, 1.0]))))
    first, second, other = (path.read_bytes() for path in written)
    assert first == second != other


def test_columns_run_along_minus_x_and_rows_along_minus_y(tmp_path: Path) -> None:
    grid = read_grid(save(tmp_path / "a.png", GREY), rules=MICROSCOPIC)
    assert grid.shape == (6, 4, 1)
    # The pixel in column 2 and row 3.
    assert_allclose(grid.world(np.array([2.0, 3.0, 0.0])), (-0.001, -0.00075, 0))


def test_pictures_lie_where_itk_places_them(tmp_path: Path) -> None:
    sitk = pytest.importorskip("SimpleITK")
    path = save(tmp_path / "a.png", GREY)
    image = sitk.ReadImage(str(path))
    at = image.TransformIndexToPhysicalPoint((2, 3))
    assert_allclose(read_grid(path).world(np.array([2.0, 3.0, 0.0]))[:2], [-at[0], -at[1]])
    assert image.GetPixel(2, 3) == read_volume(path).data[2, 3, 0] == GREY[3, 2]


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg"])
def test_grey_and_colour_are_read_from_each_format(tmp_path: Path, suffix: str) -> None:
    colour = np.repeat(np.repeat(np.array([[RED, GREEN]], np.uint8), 8, 0), 8, 1)
    for values, channels in ((GREY, 1), (colour, 3)):
        exact = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
        path = save(tmp_path / f"{channels}{suffix}", values, **exact)
        assert read_num_channels(path) == channels
        found = read_volume(path).data
        expected = np.moveaxis(values, 0, 1)[:, :, None].astype(int)
        assert_allclose(found, expected.reshape(found.shape), atol=9 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_opacity_is_left_out_and_a_note_says_so(tmp_path: Path, suffix: str) -> None:
    with_alpha = np.dstack([GREY, GREY[::-1]])
    volume = read_volume(save(tmp_path / f"a{suffix}", with_alpha))
    assert_array_equal(volume.data[..., 0], GREY.T)
    assert "its opacity (alpha) is left out" in volume.picture.notes
    rgba = np.dstack([GREY, GREY, 2 * GREY, GREY])
    volume = read_volume(save(tmp_path / f"b{suffix}", rgba))
    assert_array_equal(volume.data[:, :, 0], np.moveaxis(rgba[..., :3], 0, 1))
    assert volume.picture.notes == ("its opacity (alpha) is left out",)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_palette_is_colours_in_an_image_and_numbers_in_labels(
    tmp_path: Path, suffix: str
) -> None:
    indices = (GREY % 3).astype(np.uint8)
    image = Image.fromarray(indices)
    image.putpalette([*BLACK, *RED, *GREEN])
    path = tmp_path / f"a{suffix}"
    image.save(path)
    assert_array_equal(read_labels(path).data[..., 0], indices.T)
    volume = read_volume(path)
    assert_array_equal(volume.data[:, :, 0], np.array([BLACK, RED, GREEN])[indices.T])
    assert volume.picture.notes == ("its palette is read as red, green and blue",)
    rules = PictureRules(colours={GREEN: 1, RED: 2, BLACK: 0})
    assert_array_equal(read_labels(path, rules=rules).data[..., 0], np.array([0, 2, 1])[indices.T])


def test_a_palette_of_a_tiff_may_have_8_bits(tmp_path: Path) -> None:
    indices = (GREY % 3).astype(np.uint8)
    for bits in (1, 257):  # 255 * 257 = 65535
        table = np.zeros((3, 256), np.uint16)
        table[:, :3] = np.array([BLACK, RED, GREEN]).T * bits
        path = tmp_path / "a.tif"
        tifffile.imwrite(path, indices, photometric="palette", colormap=table)
        found = read_volume(path).data[:, :, 0]
        assert_array_equal(found, np.array([BLACK, RED, GREEN])[indices.T])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_labels_of_few_bits_are_the_numbers_of_the_file(tmp_path: Path, bits: int) -> None:
    rows = (GREY % 2**bits).astype(np.uint8)
    lines = [
        b"\0" + np.packbits(np.unpackbits(row[:, None], axis=1)[:, -bits:]).tobytes()
        for row in rows
    ]
    path = tmp_path / "few.png"
    head = struct.pack(">IIBBBBB", 6, 4, bits, 0, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    ]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    assert_array_equal(read_labels(path).data[..., 0], rows.T)


def test_a_tiff_of_one_bit_holds_0_and_1(tmp_path: Path) -> None:
    mask = GREY % 2 == 1
    path = tmp_path / "mask.tif"
    tifffile.imwrite(path, mask, photometric="minisblack")
    assert_array_equal(read_labels(path).data[..., 0], mask.T)


def test_if_0_is_white_images_are_inverted_and_labels_are_not(tmp_path: Path) -> None:
    path = tmp_path / "white.tif"
    tifffile.imwrite(path, GREY, photometric="miniswhite")
    assert_array_equal(read_volume(path).data[..., 0], 255 - GREY.T)
    assert_array_equal(read_labels(path).data[..., 0], GREY.T)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_label_colours_are_looked_up_and_written(tmp_path: Path, suffix: str) -> None:
    numbers = (GREY % 3).astype(np.uint8)
    table = np.array([BLACK, RED, GREEN], np.uint8)
    rules = PictureRules(colours={BLACK: 0, RED: 1, GREEN: 2, (254, 0, 0): 1})
    path = save(tmp_path / f"rgb{suffix}", table[numbers])
    labels = read_labels(path, rules=rules)
    assert_array_equal(labels.data[..., 0], numbers.T)
    out = tmp_path / f"out{suffix}"
    write_volume(out, labels.like(labels.data.astype(np.uint8)))
    # Whoever reads indices finds the numbers, and whoever reads colours the table's.
    assert_array_equal(read_labels(out).data[..., 0], numbers.T)
    assert_array_equal(read_labels(out, rules=rules).data[..., 0], numbers.T)
    with Image.open(out) as image:
        assert_array_equal(np.asarray(image.convert("RGB")), table[numbers])


@pytest.mark.parametrize("size", ["10 pm", "2 Å", "5 angstrom", "0.5 nm"])
@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.ome.tif", "palette.tif", "a.nii.gz"])
def test_pixels_smaller_than_a_nanometre_keep_their_size(
    tmp_path: Path, size: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    pixel_mm = pixel_length_mm(size)
    rules = PictureRules(pixel_mm=(pixel_mm, pixel_mm))
    scan = read_labels(save(tmp_path / "in.png", (GREY > 9).astype(np.uint8)), rules=rules)
    assert scan.grid.spacing[:2] == (pixel_mm, pixel_mm)
    assert scan.picture is not None
    picture = replace(scan.picture, colours={1: RED} if name == "palette.tif" else {})
    out = tmp_path / name
    write_volume(out, Volume(scan.data.astype(np.uint8), scan.grid, picture=picture))
    found = read_labels(out)
    if name == "a.png" and pixel_mm < 4.6e-7:
        assert found.picture is not None and not found.picture.sized
        assert "a.png: PNG cannot store pixels of" in caplog.text
        return
    assert_allclose(found.grid.spacing[:2], (pixel_mm, pixel_mm), rtol=1e-3)
    assert_array_equal(found.data, scan.data)


@pytest.mark.parametrize("quote", ['"', "'"])
@pytest.mark.parametrize(("value", "unit"), [("250", "pm"), ("0.25", "nm"), ("2.5", "Å")])
def test_ome_sizes_are_read_in_small_units_and_with_both_quotes(
    tmp_path: Path, value: str, unit: str, quote: str
) -> None:
    sizes = " ".join(
        f'PhysicalSize{axis}="{value}" PhysicalSize{axis}Unit="{unit}"' for axis in "XY"
    )
    shape = f'SizeX="{GREY.shape[1]}" SizeY="{GREY.shape[0]}" SizeC="1" SizeZ="1" SizeT="1"'
    told = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'
        f'<Pixels ID="P:0" DimensionOrder="XYCZT" Type="uint8" {shape} {sizes}><TiffData/>'
        "</Pixels></Image></OME>"
    ).replace('"', quote)
    path = tmp_path / "a.ome.tif"
    tifffile.imwrite(path, GREY, description=told.encode(), metadata=None)
    found = read_volume(path)
    assert_allclose(found.grid.spacing[:2], (2.5e-7, 2.5e-7))
    assert found.picture is not None and found.picture.source == "its OME metadata"


@pytest.mark.parametrize("size", ["0 nm", "1e400 mm", "1 pm", "1001 m", "1e-320 nm"])
def test_pixel_sizes_out_of_range_are_refused_by_the_setting(size: str) -> None:
    with pytest.raises(ValueError, match=rf"from 0.01 nm to 1000 m, found '{size}'; correct the"):
        PicturesConfig(pixel_size=[size])


@pytest.mark.parametrize("size", ["1.2.3 µm", ". µm", "-1 nm", "nan mm", "0.5"])
def test_texts_that_are_no_length_are_refused_in_a_sentence(size: str) -> None:
    with pytest.raises(ValueError, match=r"expected a length such as '0.5 µm', .*; give a number"):
        PicturesConfig(pixel_size=[size])


def test_grey_pictures_may_have_label_colours_too(tmp_path: Path) -> None:
    path = save(tmp_path / "mask.png", np.where(GREY > 9, 255, 0).astype(np.uint8))
    rules = PictureRules(colours={(255, 255, 255): 1, BLACK: 0})
    assert_array_equal(read_labels(path, rules=rules).data[..., 0], GREY.T > 9)


def test_labels_in_three_equal_channels_are_grey(tmp_path: Path) -> None:
    path = save(tmp_path / "rgb.png", np.dstack([GREY] * 3))
    assert_array_equal(read_labels(path).data[..., 0], GREY.T)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_an_exif_orientation_turns_the_grid_as_viewers_turn_the_picture(
    tmp_path: Path, orientation: int, suffix: str
) -> None:
    from PIL import ImageOps

    path = tmp_path / f"turned{suffix}"
    save(path, GREY, exif=exif_of(orientation), **({"quality": 100} if suffix == ".jpg" else {}))
    volume = read_volume(path)
    # Pillow turns some TIFFs itself, so that a PNG tells how viewers show it.
    with Image.open(save(tmp_path / "as.png", GREY, exif=exif_of(orientation))) as image:
        shown = np.asarray(ImageOps.exif_transpose(image))
    upright = read_volume(save(tmp_path / "upright.png", shown))
    turned = volume.onto(upright.grid, what="a", whose="b")
    assert_allclose(turned.data, upright.data, atol=2 if suffix == ".jpg" else 0)
    assert any("EXIF" in note for note in volume.picture.notes) == (orientation != 1)
    for out in (tmp_path / "back.png", tmp_path / "back.tif", tmp_path / "back.ome.tif"):
        write_volume(out, volume)
        back = read_volume(out)
        assert_array_equal(back.data, volume.data)
        assert_allclose(back.grid.affine, volume.grid.affine)


def test_resolutions_are_pixel_sizes_unless_they_are_a_screens_default(tmp_path: Path) -> None:
    scanned = save(tmp_path / "a.png", GREY, dpi=(254, 508))
    assert_allclose(read_grid(scanned).spacing[:2], (0.1, 0.05))
    screen = read_volume(save(tmp_path / "b.png", GREY, dpi=(72, 72)))
    assert screen.unit == "pixel" and screen.grid.spacing == (1, 1, 1)
    assert screen.picture.source == "its 72 dpi are a screen's and not a pixel size"
    path = tmp_path / "c.tif"
    tifffile.imwrite(path, GREY, resolution=(20_000, 10_000), resolutionunit=3)
    assert_allclose(read_grid(path).spacing[:2], (0.0005, 0.001))
    tifffile.imwrite(path, GREY, resolution=(96, 96), resolutionunit=2)
    assert read_volume(path).unit == "pixel"
    tifffile.imwrite(path, GREY)
    assert read_volume(path).unit == "pixel"


def test_pixel_sizes_of_ome_and_imagej_have_their_own_units(tmp_path: Path) -> None:
    stack = np.zeros((2, 4, 6), np.uint16)
    path = tmp_path / "a.ome.tif"
    sizes = {"PhysicalSizeX": 500, "PhysicalSizeXUnit": "nm", "PhysicalSizeY": 0.25}
    metadata = {"axes": "ZYX", "PhysicalSizeZ": 2.0, **sizes}
    tifffile.imwrite(path, stack, ome=True, photometric="minisblack", metadata=metadata)
    assert_allclose(read_grid(path).spacing, (0.0005, 0.00025, 0.002))
    path = tmp_path / "b.tif"
    metadata = {"axes": "ZYX", "spacing": 3, "unit": "\\u00B5m"}
    tifffile.imwrite(path, stack, imagej=True, resolution=(4, 2), metadata=metadata)
    assert_allclose(read_grid(path).spacing, (0.00025, 0.0005, 0.003))


def test_the_settings_make_pages_slices_or_channels(tmp_path: Path) -> None:
    pages = np.arange(48, dtype=np.uint8).reshape(2, 4, 6)
    path = tmp_path / "pages.tif"
    tifffile.imwrite(path, pages, photometric="minisblack")
    assert_array_equal(read_volume(path).data, pages.transpose(2, 1, 0))
    channels = read_volume(path, rules=PictureRules(pages="channels"))
    assert_array_equal(channels.data[:, :, 0], pages.transpose(2, 1, 0))
    assert read_num_channels(path, rules=PictureRules(pages="channels")) == 2


def test_pillow_decompresses_if_tifffile_cannot(tmp_path: Path) -> None:
    for number, values in enumerate([GREY, GREY.astype(np.uint16) * 999, np.dstack([GREY] * 3)]):
        path = save(tmp_path / f"{number}.tif", values, compression="tiff_lzw")
        found = read_volume(path).data
        assert_array_equal(found, np.moveaxis(values, 0, 1)[:, :, None].reshape(found.shape))


def test_settings_replace_the_pixel_size_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", GREY, dpi=(254, 254))
    assert read_volume(path).picture.source == "its pHYs chunk"
    assert read_grid(path, rules=MICROSCOPIC).spacing == (0.0005, 0.00025, 1)
    assert read_volume(path, rules=PictureRules(in_pixels=True)).unit == "pixel"


def test_a_label_without_a_pixel_size_takes_that_of_its_image(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "a.png", GREY), rules=MICROSCOPIC)
    label = read_labels(save(tmp_path / "b.png", GREY)).sized_as(image)
    assert_allclose(label.grid.affine, image.grid.affine)
    assert label.unit == "µm"


def test_a_pixel_size_that_only_the_label_has_does_not_count(tmp_path: Path) -> None:
    image = read_volume(save(tmp_path / "a.png", GREY))
    label = read_labels(save(tmp_path / "b.png", GREY, dpi=(300, 300)))
    assert label.unit == "µm" and label.measured_as(image).unit == "pixel"
    assert_allclose(label.measured_as(image).grid.affine, image.grid.affine, atol=1e-12)
    assert label.sized_as(image) is label  # in scores, the known size counts
    assert_allclose(image.sized_as(label).grid.affine, label.grid.affine)


def test_lengths_in_settings_name_their_unit() -> None:
    lengths = ("4 nm", "0.5 µm", "0.5um", "1e-3 mm", "2 cm")
    assert [length_mm(text) for text in lengths] == pytest.approx([4e-6, 5e-4, 5e-4, 1e-3, 20])
    for wrong in ("0.5", "µm", "0.5 furlongs", "-1 mm"):
        with pytest.raises(ValueError, match="expected a length such as"):
            length_mm(wrong)


def test_results_are_in_the_inputs_format_or_in_one_that_holds_them() -> None:
    kept = {".png": ".png", ".tif": ".tif", ".ome.tif": ".ome.tif", ".jpg": ".png", ".bmp": ".png"}
    for suffix, labels in kept.items():
        assert result_suffix(Path(f"scan{suffix}")) == labels
    assert numbers_suffix(".png") == ".tif" and numbers_suffix(".nii.gz") == ".nii.gz"
    with pytest.raises(VolumeError, match="change its suffix"):
        check_writable(Path("scan.jpg"))


def test_a_volume_written_as_a_picture_is_shown_upright(tmp_path: Path) -> None:
    values = np.arange(24, dtype=np.uint8).reshape(6, 4, 1)
    write_volume(tmp_path / "a.png", Volume(values, Grid((6, 4, 1), np.diag([0.5, 0.5, 2, 1]))))
    back = read_volume(tmp_path / "a.png")
    assert_array_equal(back.data, values[::-1, ::-1])
    assert_allclose(back.grid.spacing[:2], 0.5)


def cut_png(path: Path) -> Path:
    noise = np.random.default_rng(0).integers(256, size=(64, 64)).astype(np.uint8)
    whole = save(path, noise).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    return path


def cut_tiff(path: Path) -> Path:
    tifffile.imwrite(path, np.ones((64, 64), np.uint8))
    path.write_bytes(path.read_bytes()[:-1000])
    return path


def bomb(path: Path) -> Path:
    """A PNG that claims 60,000 x 60,000 pixels in 100 bytes."""
    save(path, GREY)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 60_000, 60_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return path


def times(path: Path) -> Path:
    metadata = {"axes": "TYX"}
    tifffile.imwrite(path, np.zeros((3, 4, 6), np.uint8), imagej=True, metadata=metadata)
    return path


def two_sizes(path: Path) -> Path:
    with tifffile.TiffWriter(path) as writer:
        writer.write(GREY, metadata=None)
        writer.write(GREY[:2], metadata=None)
    return path


CMYK = np.zeros((4, 6, 4), np.uint8)
REFUSED = {
    "cut.png": (cut_png, "cannot be read as .png: image file is truncated"),
    "cut.tif": (cut_tiff, "it is incomplete: its pixels lack 1000 bytes"),
    "bomb.png": (bomb, "its header claims 60000 x 60000 pixels.*its file can only hold"),
    "times.tif": (times, "found time points; set data.pictures.pages"),
    "sizes.tif": (two_sizes, r"expected one picture, found 2 \(2x6, 4x6\)"),
    "cmyk.jpg": (lambda path: save(path, CMYK, "CMYK"), "found the printing colours CMYK"),
    "cmyk.tif": (lambda path: save(path, CMYK, "CMYK"), "found the colours SEPARATED"),
    "text.png": (lambda path: path.write_text("no picture") and path, "cannot be read as .png"),
    "text.tif": (lambda path: path.write_text("no picture") and path, "cannot be read as .tif"),
    "empty.jpg": (lambda path: path.write_text("") or path, "cannot be read as .jpg"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_pictures_that_cannot_be_read_are_refused_in_a_sentence(tmp_path: Path, name: str) -> None:
    build, reason = REFUSED[name]
    path = build(tmp_path / name)
    with pytest.raises(VolumeError, match=reason) as refusal:
        read_volume(path)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_pictures_beyond_free_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    path = save(tmp_path / f"a{suffix}", GREY)
    monkeypatch.setattr(picture_files, "free_memory", lambda: 47)
    with pytest.raises(VolumeError, match="of memory are free; cut it into tiles"):
        read_volume(path)
    monkeypatch.setattr(picture_files, "free_memory", lambda: 48)
    assert read_volume(path).data.size == 24


def test_pictures_that_cannot_be_labels_are_refused_in_one_sentence(tmp_path: Path) -> None:
    coloured = np.array([[RED, (1, 2, 3)]], np.uint8)
    refused = {
        "a.jpg": (GREY, {}, "JPEG compression changes label numbers; save labels as PNG or TIFF"),
        "b.png": (coloured, {}, "expected labels as numbers, found colours; list the colour"),
        "c.png": (coloured, {RED: 1}, "label_colours, found also #010203; add"),
        "d.png": (np.dstack([GREY, GREY]), {}, "without transparent pixels"),
    }
    for name, (values, colours, reason) in refused.items():
        path = save(tmp_path / name, values)
        with pytest.raises(VolumeError, match=reason):
            read_labels(path, rules=PictureRules(colours=colours))


def test_png_refuses_values_that_it_cannot_hold(tmp_path: Path) -> None:
    grid = Grid((2, 2, 1), np.diag([-1.0, -1, 1, 1]))
    facts = PictureFacts("mm", "a test")
    refused = {
        "PNG file can only hold whole numbers": np.full((2, 2, 1), 0.5),
        "from 70000": np.full((2, 2, 1), 70_000),
        "PNG file can only hold one slice": np.zeros((2, 2, 2), np.uint8),
    }
    for reason, values in refused.items():
        shape = values.shape
        with pytest.raises(VolumeError, match=reason):
            write_volume(tmp_path / "a.png", Volume(values, Grid(shape, grid.affine), None, facts))
        assert not (tmp_path / "a.png").exists()


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """A file with some bytes of its first 400 changed, or cut short."""
    broken = bytearray(content)
    for place in rng.integers(min(400, len(content)), size=rng.integers(1, 4)):
        broken[place] = rng.integers(256)
    return bytes(broken[: rng.integers(len(broken))] if rng.random() < 0.2 else broken)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg", ".bmp", ".ome.tif"])
def test_damaged_pictures_are_read_or_refused_in_a_sentence(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(3)
    path = tmp_path / f"whole{suffix}"
    if suffix == ".ome.tif":
        write_volume(path, read_volume(save(tmp_path / "a.png", GREY)))
    else:
        save(path, np.dstack([GREY, GREY + 1, GREY]))
    content, refused = path.read_bytes(), 0
    for number in range(60):
        broken = tmp_path / f"broken{suffix}"
        broken.write_bytes(damaged(content, rng))
        for read in (read_volume, read_grid):
            try:
                read(broken)
            except VolumeError as refusal:
                refused += 1
                assert str(refusal).startswith(f"{broken}: ") and "\n" not in str(refusal), number
    assert refused > 10
