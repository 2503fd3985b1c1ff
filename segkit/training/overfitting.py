"""A warning if the held-out cases were segmented better before the end of training.

Then the network may have begun to learn its training cases by heart. The final weights stay the
last ones, because weights that were chosen by their score on the held-out cases would make this
score too high.
"""

from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import ModelCheckpoint

from segkit.model.checkpoint import read_checkpoint

LARGEST_FALL = 0.005
"""A fall of the score by less is not told."""


def fall_of_score(trainer: L.Trainer, best: ModelCheckpoint) -> str | None:
    """The fall of the score from the best validation to the last, in words; None if it is small.

    Args:
        trainer: a trainer that has ended.
        best: its callback that keeps the checkpoint with the best score.
    """
    last = trainer.callback_metrics.get(best.monitor or "")
    highest, path = best.best_model_score, Path(best.best_model_path)
    if last is None or highest is None or not float(highest - last) >= LARGEST_FALL:
        return None
    if not path.is_file():  # somebody has removed it
        return None
    step = int(read_checkpoint(path)["global_step"])
    return (
        f"the score of the validations was best at step {step} ({float(highest):.3f}) and is "
        f"{float(last):.3f} at the end: this may be chance, or the network may learn its training "
        f"cases by heart; `--checkpoint best` uses the weights of step {step}, and train.patience "
        f"ends a training there"
    )
