"""Pictures of held-out cases as training sees them: the scan, its reference, what is predicted.

One PNG a validation, `samples/step_000200.png`, a row for each case: its three planes through the
middle of the reference, each bare and then with the prediction as colour and the reference as
outline. They are drawn from what the validation predicted anyway, on the network's grid, as a
light box shows them: the patient's right on the left, a millimetre as long along every axis.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from jaxtyping import Float, Integer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from numpy import ndarray
from torch import Tensor

from segkit.io.atomic import whole
from segkit.io.colours import LABEL_COLOURS
from segkit.io.montage import on_light_box
from segkit.training.module import SegmentationModule

logger = logging.getLogger(__name__)

PICTURES_FOLDER = "samples"
PANEL = 240
"""Pixels of a row's longest side."""
GAP = 4
"""Pixels between a plane and itself overlaid; three times as many between planes."""
CAPTION = 24
_LEGEND = "filled: predicted   outlined: reference"
OPACITY = 0.4
PALE = (190, 190, 190)
COLOURS = np.array([[int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in LABEL_COLOURS], np.float32)


@dataclass(frozen=True)
class CasePicture:
    """Three planes of a case, as pictures, one per world axis, and what is written above them."""

    caption: str
    images: tuple[Float[ndarray, "height width"], ...]
    references: tuple[Integer[ndarray, "height width"], ...]
    predictions: tuple[Integer[ndarray, "height width"], ...]
    sizes: tuple[tuple[float, float], ...]
    """Height and width in mm."""


class SamplePictures(Callback):
    """Draws the first of the held-out cases at each validation; the first process alone does.

    Args:
        folder: of the run.
        names: of the held-out cases, in order.
        classes: names of the labels, the background first.
        spacing: of the network's grid, mm.
        count: how many cases are drawn.
    """

    def __init__(
        self,
        folder: Path,
        *,
        names: Sequence[str],
        classes: Sequence[str],
        spacing: tuple[float, float, float],
        count: int,
    ) -> None:
        self.folder = folder / PICTURES_FOLDER
        self.names = tuple(names)
        self.classes = tuple(classes)
        self.spacing = spacing
        self.count = count if find_spec("PIL") else 0
        self.rows: list[CasePicture] = []
        if self.count < count and names:
            logger.info("no pictures of held-out cases: run pip install 'segkit[report]'")

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the planes of one case."""
        if not trainer.is_global_zero or batch_idx >= self.count:
            return
        assert isinstance(pl_module, SegmentationModule)
        name = self.names[batch_idx * trainer.world_size]
        scores, measure = pl_module.scores_of_cases[-1], pl_module.validation.measure.capitalize()
        mean = f"{measure} {float(scores.nanmean()):.3f}"
        shown = "no class in it" if scores.isnan().all() else mean
        self.rows.append(
            planes_of(
                batch["image"][0].float().cpu().numpy(),
                batch["label"].cpu().numpy(),
                outputs.cpu().numpy(),
                spacing=self.spacing,
                caption=f"{name}   {shown}",
            )
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw, write and log the picture."""
        if not self.rows:
            return
        from PIL import Image

        step = trainer.global_step
        picture = draw(self.rows, title=f"step {step}", classes=self.classes)
        self.rows = []
        path = self.folder / f"step_{step:06d}.png"
        with whole(path) as partial:
            Image.fromarray(picture).save(partial, compress_level=3)
        for tracker in trainer.loggers:
            match tracker:
                case TensorBoardLogger():
                    tracker.experiment.add_image(PICTURES_FOLDER, picture, step, dataformats="HWC")
                case WandbLogger():
                    tracker.log_image(PICTURES_FOLDER, [str(path)], step)
                case MLFlowLogger():
                    tracker.experiment.log_artifact(tracker.run_id, str(path), PICTURES_FOLDER)


def planes_of(
    image: Float[ndarray, "x y z"],
    label: Integer[ndarray, "x y z"],
    prediction: Integer[ndarray, "x y z"],
    *,
    spacing: Sequence[float],
    caption: str,
) -> CasePicture:
    """The sagittal, coronal and axial plane through the middle of the reference.

    Where the reference is empty, through the middle of the image.
    """
    foreground = np.argwhere(label)
    at = (
        np.median(foreground, axis=0).astype(int) if len(foreground) else np.array(label.shape) // 2
    )
    sizes = []
    for axis in range(3):
        across, up = [other for other in range(3) if other != axis]
        sizes.append((label.shape[up] * spacing[up], label.shape[across] * spacing[across]))

    def cut(values: ndarray) -> tuple[ndarray, ...]:
        return tuple(on_light_box(np.take(values, at[axis], axis=axis)) for axis in range(3))

    return CasePicture(caption, cut(image), cut(label), cut(prediction), tuple(sizes))


def draw(
    rows: Sequence[CasePicture], *, title: str, classes: Sequence[str]
) -> Integer[ndarray, "height width 3"]:
    """The rows below one another, uint8, under a title and the classes in their colours."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(14)
    title += " " * 6
    words = [(f"{name}   ", _colour(number)) for number, name in enumerate(classes) if number]
    words = [(title, (255, 255, 255)), *words, (_LEGEND, PALE)]
    strips = [_strip(row) for row in rows]
    written = math.ceil(sum(font.getlength(text) for text, _ in words))
    width = 2 * GAP + max(written, *(strip.shape[1] for strip in strips))
    height = CAPTION + sum(CAPTION + strip.shape[0] + GAP for strip in strips)
    picture = Image.new("RGB", (width, height))
    pen = ImageDraw.Draw(picture)
    left, top = float(GAP), CAPTION
    for text, colour in words:
        pen.text((left, 5), text, fill=colour, font=font)
        left += font.getlength(text)
    for row, strip in zip(rows, strips, strict=True):
        pen.text((GAP, top + 5), row.caption, fill=PALE, font=font)
        picture.paste(Image.fromarray(strip), (GAP, top + CAPTION))
        top += CAPTION + strip.shape[0] + GAP
    return np.asarray(picture)


def _colour(number: int) -> tuple[int, int, int]:
    """Of a label from 1 on, red, green and blue."""
    red, green, blue = COLOURS[(number - 1) % len(COLOURS)].astype(int).tolist()
    return red, green, blue


def _strip(row: CasePicture) -> Integer[ndarray, "height width 3"]:
    """Six panels of one scale beside one another, each in the middle of its height."""
    scale = PANEL / max(max(size) for size in row.sizes)
    shapes = [(max(round(h * scale), 1), max(round(w * scale), 1)) for h, w in row.sizes]
    values = np.concatenate([image.ravel() for image in row.images])
    low, high = np.percentile(values, [0.5, 99.5])
    width = sum(2 * w + 4 * GAP for _, w in shapes) - 3 * GAP
    strip = np.zeros((max(h for h, _ in shapes), width, 3), np.uint8)
    left = 0
    for image, reference, prediction, shape in zip(
        row.images, row.references, row.predictions, shapes, strict=True
    ):
        grey = np.clip((image - low) / max(high - low, 1e-8), 0, 1) * 255
        bare = _resized(grey.astype(np.uint8), shape, smooth=True)[..., None].repeat(3, axis=2)
        top = (strip.shape[0] - shape[0]) // 2
        for panel in (bare, overlaid(bare, reference, prediction)):
            strip[top : top + shape[0], left : left + shape[1]] = panel
            left += shape[1] + GAP
        left += 2 * GAP
    return strip


def overlaid(
    bare: Integer[ndarray, "height width 3"],
    reference: Integer[ndarray, "rows columns"],
    prediction: Integer[ndarray, "rows columns"],
) -> Integer[ndarray, "height width 3"]:
    """A picture tinted where a class is predicted, and outlined where it is in the reference."""
    shape = bare.shape[:2]
    predicted, true = (_resized(labels, shape, smooth=False) for labels in (prediction, reference))
    tint = OPACITY * (predicted > 0)[..., None]
    panel = bare * (1 - tint) + tint * COLOURS[(predicted.astype(int) - 1) % len(COLOURS)]
    edge = outline(true)
    edge |= outline(np.where(edge, 0, true))
    panel[edge] = COLOURS[(true[edge].astype(int) - 1) % len(COLOURS)]
    return panel.round().astype(np.uint8)


def outline(labels: Integer[ndarray, "height width"]) -> ndarray:
    """Which pixels of a class touch another class, or the background."""
    edge = np.zeros(labels.shape, bool)
    for axis in range(2):
        changes = np.diff(labels, axis=axis) != 0
        before = [(1, 0) if other == axis else (0, 0) for other in range(2)]
        after = [(0, 1) if other == axis else (0, 0) for other in range(2)]
        edge |= np.pad(changes, before) | np.pad(changes, after)
    return edge & (labels > 0)


def _resized(values: ndarray, shape: tuple[int, ...], *, smooth: bool) -> ndarray:
    """A plane brought to a picture's size, by cubic interpolation or by the nearest pixel."""
    from PIL import Image

    way = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    source = values if smooth else values.astype(np.int32)
    height, width = shape
    return np.asarray(Image.fromarray(np.ascontiguousarray(source)).resize((width, height), way))
