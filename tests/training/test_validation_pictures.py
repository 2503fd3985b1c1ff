"""Pictures of held-out cases: the right way up, as round as in the patient, of one pass."""

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from segkit.training import parts as training
from segkit.training import validation_pictures as samples
from segkit.training.fit import train
from segkit.training.validation_pictures import COLOURS, OPACITY, draw, outline, overlaid, planes_of
from tests.small import small_config, small_dataset

Image = pytest.importorskip("PIL.Image")


def ball(shape: tuple[int, int, int], spacing: tuple[float, float, float], mm: float) -> ndarray:
    """A ball in the middle of a grid."""
    axes = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)]
    squares = [axis**2 for axis in np.meshgrid(*axes, indexing="ij")]
    return (sum(squares) < mm**2).astype(np.uint8)


def extent(found: ndarray) -> list[int]:
    return [int(index.max() - index.min() + 1) for index in np.nonzero(found)]


def test_right_is_left_and_front_and_head_are_up() -> None:
    label = np.zeros((4, 6, 8), np.uint8)
    label[3, 5, 7] = 1  # the rightmost, foremost, topmost voxel
    planes = planes_of(
        np.zeros(label.shape, np.float32), label, label, spacing=(1, 1, 1), caption="case"
    )
    sagittal, coronal, axial = planes.references
    # Heads and fronts at row 0; right, and front where the plane is sagittal, at column 0.
    for plane, shape in ((sagittal, (8, 6)), (coronal, (8, 4)), (axial, (6, 4))):
        assert plane.shape == shape
        assert np.argwhere(plane).tolist() == [[0, 0]]


def test_planes_pass_through_the_middle_of_the_reference_or_else_of_the_image() -> None:
    image = np.arange(4 * 6 * 8, dtype=np.float32).reshape(4, 6, 8)
    label = np.zeros(image.shape, np.uint8)
    empty = planes_of(image, label, label, spacing=(1, 1, 1), caption="")
    assert empty.images[0].max() == image[2].max() and empty.images[2].max() == image[..., 4].max()
    label[1, 2:5, 1] = 1
    planes = planes_of(image, label, label, spacing=(1, 1, 1), caption="")
    for axis, at in enumerate((1, 3, 1)):
        expected = np.take(image, at, axis=axis)
        assert planes.images[axis].min() == expected.min()
        assert planes.images[axis].max() == expected.max()


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 0.5, 4.0), (3.0, 1.0, 1.0)])
def test_a_ball_is_drawn_round_whatever_the_spacing(spacing: tuple[float, float, float]) -> None:
    shape = tuple(round(48 / step) for step in spacing)
    label = ball(shape, spacing, 16.0)
    planes = planes_of(
        np.zeros(shape, np.float32), np.zeros_like(label), label, spacing=spacing, caption=""
    )
    strip = samples._strip(planes)
    # The scan is black, so that each panel's tint is all there is: three discs beside one another.
    tinted = np.flatnonzero(strip.any(axis=(0, 2)))
    discs = np.split(tinted, np.flatnonzero(np.diff(tinted) > 1) + 1)
    assert len(discs) == 3
    thickest = max(spacing) / 48 * samples.PANEL
    for disc in discs:
        height, width = extent(strip[:, disc[0] : disc[-1] + 1].any(axis=2))
        for size in (height, width):
            assert abs(size - 2 * 16 / 48 * samples.PANEL) <= thickest + 2


def test_an_outline_is_the_rim_of_each_class() -> None:
    labels = np.zeros((6, 7), np.uint8)
    labels[1:5, 1:4] = 1
    labels[1:5, 4:6] = 2
    expected = labels > 0
    expected[2:4, 2] = False  # of class 1, what touches class 1 alone
    assert np.array_equal(outline(labels), expected)


def test_what_is_predicted_is_tinted_and_the_reference_has_its_colour() -> None:
    bare = np.full((20, 20, 3), 100, np.uint8)
    predicted, reference = np.zeros((10, 10), np.uint8), np.zeros((10, 10), np.uint8)
    predicted[:, :2] = 3
    reference[4:8, 4:8] = 2
    panel = overlaid(bare, reference, predicted)
    tint = np.round(100 * (1 - OPACITY) + OPACITY * COLOURS[2])
    assert np.array_equal(panel[5, 1], tint)
    assert np.array_equal(panel[8, 8], COLOURS[1]) and np.array_equal(panel[9, 9], COLOURS[1])
    assert np.array_equal(panel[11, 11], [100, 100, 100])  # inside the outline, two pixels wide
    assert np.array_equal(panel[0, 19], [100, 100, 100])


def test_more_classes_than_fit_make_the_picture_wider() -> None:
    label = ball((8, 8, 8), (1, 1, 1), 3.0)
    row = planes_of(label.astype(np.float32), label, label, spacing=(1, 1, 1), caption="case")
    few = draw([row], title="step 1", classes=["background", "ball"])
    many = draw([row, row], title="step 1", classes=["background", *["a long name"] * 30])
    assert many.shape[1] > few.shape[1] and many.shape[0] > few.shape[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


def test_each_validation_leaves_a_picture_of_what_it_predicted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    passes, rows = [], []
    segment, draw_rows = training.segment_prepared, samples.draw

    def counted(*inputs: object, **settings: object) -> object:
        passes.append(segment(*inputs, **settings))  # type: ignore[arg-type]
        return passes[-1]

    def kept(given: list[samples.CasePicture], **words: object) -> ndarray:
        rows.append(list(given))
        return draw_rows(given, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "segment_prepared", counted)
    monkeypatch.setattr(samples, "draw", kept)
    config = small_config(dataset, data={"validation": 0.5}, train={"pictures": 1})
    run = train(config, runs=tmp_path)
    assert len(passes) == 2 * 2  # two validations of two cases
    pictures = sorted((run.folder / "samples").iterdir())
    assert [path.name for path in pictures] == ["step_000002.png", "step_000004.png"]
    assert [len(given) for given in rows] == [1, 1]
    (shown,) = rows[0]
    (first, *_) = run.summary["validation"]["dice_of_cases"]
    assert shown.caption.startswith(first)
    assert any(
        np.array_equal(shown.predictions[2], passes[0].numpy()[:, :, at].T[::-1, ::-1])
        for at in range(16)
    )
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    logged = events.Images("samples")
    assert [image.step for image in logged] == [2, 4]
    with Image.open(pictures[0]) as picture:
        assert (logged[0].width, logged[0].height) == picture.size


@pytest.mark.parametrize("missing", [False, True])
def test_no_picture_where_none_is_wanted_or_pillow_is_missing(
    missing: bool,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if missing:
        monkeypatch.setattr(samples, "find_spec", lambda name: None)
    count = 2 if missing else 0
    with caplog.at_level(logging.INFO, "segkit"):
        run = train(small_config(dataset, train={"steps": 1, "pictures": count}), runs=tmp_path)
    assert not (run.folder / "samples").exists()
    told = [line for line in caplog.messages if "pictures of held-out cases" in line]
    assert len(told) == missing
