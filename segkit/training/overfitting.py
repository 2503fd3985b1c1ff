"""A warning if the held-out cases were segmented better before the end of training.

Then the network has begun to learn its training cases by heart. The final weights stay the last
ones, because weights that were chosen by their score on the held-out cases would make this score
too high.
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
    highest = best.best_model_score
    if last is None or highest is None or not float(highest - last) >= LARGEST_FALL:
        return None
    step = int(read_checkpoint(Path(best.best_model_path))["global_step"])
    return (
        f"the score of the validations was best at step {step} ({float(highest):.3f}) and fell to "
        f"{float(last):.3f}: the network learns its training cases by heart; `--checkpoint best` "
        f"uses the weights of step {step}, and train.patience ends a training there"
    )
