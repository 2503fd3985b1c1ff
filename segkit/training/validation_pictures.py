"""Pictures of held-out cases during training: the scan, its reference and the prediction.

Each validation writes one PNG, such as `samples/step_000200.png`, with a row for each case. A row
shows three planes through the middle of the reference. Each plane is shown twice: the scan itself,
then the scan with the prediction filled and the reference outlined. The predictions are those of
the validation, on the network's grid.
"""

import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch import Tensor

from segkit.io.pictures import CasePicture, draw_cases, planes_of, save_picture
from segkit.training.module import SegmentationModule

logger = logging.getLogger(__name__)

PICTURES_FOLDER = "samples"


class SamplePictures(Callback):
    """A callback that draws the first held-out cases at each validation, in the first process.

    Args:
        folder: the run's folder.
        names: names of the held-out cases, in order.
        classes: names of the labels, the background first.
        spacing: spacing of the network's grid, in mm.
        count: number of cases to draw.
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
            logger.info(
                "held-out cases are not drawn, because Pillow is not installed; run "
                "pip install 'segkit[report]'"
            )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Store the planes of one case."""
        if not trainer.is_global_zero or batch_idx >= self.count:
            return
        assert isinstance(pl_module, SegmentationModule)
        label, partly = batch["label"], pl_module.partly
        if partly is not None:
            label = label.remainder(partly.num_labels)
        name = self.names[batch_idx * trainer.world_size]
        scores, measure = pl_module.scores_of_cases[-1], pl_module.validation.measure.capitalize()
        mean = f"{measure} {float(scores.nanmean()):.3f}"
        shown = "no class in it" if scores.isnan().all() else mean
        self.rows.append(
            planes_of(
                batch["image"][0].float().cpu().numpy(),
                label.cpu().numpy(),
                outputs.cpu().numpy(),
                spacing=self.spacing,
                caption=f"{name}   {shown}",
            )
        )

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the picture, write it and log it."""
        if not self.rows:
            return
        step = trainer.global_step
        picture = draw_cases(self.rows, title=f"step {step}", classes=self.classes)
        self.rows = []
        path = self.folder / f"step_{step:06d}.png"
        save_picture(path, picture)
        for tracker in trainer.loggers:
            match tracker:
                case TensorBoardLogger():
                    tracker.experiment.add_image(PICTURES_FOLDER, picture, step, dataformats="HWC")
                case WandbLogger():
                    tracker.log_image(PICTURES_FOLDER, [str(path)], step)
                case MLFlowLogger():
                    tracker.experiment.log_artifact(tracker.run_id, str(path), PICTURES_FOLDER)
