"""The record of a run in its checkpoints, and changed settings in a resumed run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from segkit.config.training import Config
from segkit.training.changed_files import states_of
from segkit.training.changed_settings import Change
from segkit.training.kept_split import SplitNames, names_of
from segkit.training.lightning_private import begin_epoch_at
from segkit.training.parts import TrainingParts
from segkit.training.run_folder import RECORD_KEY


def record_of(
    parts: TrainingParts,
    config: Config,
    before: Mapping[str, Any] = MappingProxyType({}),
    found: Sequence[Change] = (),
    step: int = 0,
    names: SplitNames | None = None,
) -> dict[str, Any]:
    """The record of a run for its checkpoints: settings, split, and settings that were changed.

    Args:
        parts: the parts of the training.
        config: the resolved config.
        before: the record so far; empty for a new run.
        found: the settings that change now.
        step: the step from which on they apply.
        names: the split that the run keeps; by default that of the parts.
    """
    changed = [
        {"step": step, "setting": key, "before": old, "after": new} for key, old, new in found
    ]
    split = names or names_of(parts)
    begun_from = parts.taken_over.as_json() if parts.taken_over else before.get("start_from")
    return {
        "config": config.model_dump(mode="json"),
        "split": {part: list(split[part]) for part in ("train", "held_out")},
        "changes": [*before.get("changes", []), *changed],
        "files": states_of((*parts.split.train, *parts.split.held_out)),
        **({"start_from": begun_from} if begun_from else {}),
    }


def record_in(trainer: L.Trainer) -> Mapping[str, Any]:
    """The record that checkpoints of a training contain."""
    noted = next(each for each in trainer.callbacks if isinstance(each, ResumeState))  # type: ignore[attr-defined]
    return noted.record


class ResumeState(Callback):
    """A callback that writes settings and split into checkpoints, and adapts a loaded checkpoint.

    After loading, optimiser and schedule have the new settings: at step s, the learning rate is
    that of a run that had these settings from its beginning. Moments, counts and the best score are
    kept.

    Args:
        record: plain data that each checkpoint holds under `segkit`: `config`, `split`, `changes`.
        every: number of steps between two validations.
        anew: whether optimiser and schedule are made again from the settings.
        patience: patience of early stopping, if any.
        finished: whether the run had ended before; if so, early stopping counts from 0 again.
    """

    def __init__(
        self,
        record: Mapping[str, Any],
        *,
        every: int,
        anew: bool = False,
        patience: int | None = None,
        finished: bool = False,
    ) -> None:
        self.record = dict(record)
        self.every = every
        self.anew = anew
        self.patience = patience
        self.finished = finished

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Write the record of the run into the checkpoint."""
        checkpoint[RECORD_KEY] = self.record

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Change a loaded checkpoint to the current settings and the current folder."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint.get("callbacks", {}).get(callback.state_key)
            if state and isinstance(callback, ModelCheckpoint) and callback.dirpath:
                _move(state, str(callback.dirpath))
            if state and isinstance(callback, EarlyStopping) and self.patience is not None:
                state["patience"] = self.patience
                if self.finished:
                    state["wait_count"] = 0
        begin_epoch_at(checkpoint, self.every, trainer.accumulate_grad_batches)
        # Lightning moves the weights later, but settings of the computation depend on the device.
        pl_module.to(trainer.strategy.root_device)
        made: Any = pl_module.configure_optimizers()
        _remake(checkpoint, made[0][0], made[1][0]["scheduler"], anew=self.anew)


def _move(state: dict[str, Any], folder: str) -> None:
    """Change the paths in the state of a ModelCheckpoint to this folder, if the run was moved."""
    before = state.get("dirpath")
    if not before or before == folder:
        return
    for key in ("best_model_path", "kth_best_model_path", "last_model_path"):
        if state.get(key):
            state[key] = str(Path(folder) / Path(state[key]).name)
    state["best_k_models"] = {
        str(Path(folder) / Path(path).name): score
        for path, score in state.get("best_k_models", {}).items()
    }
    state["dirpath"] = folder


def _remake(
    checkpoint: dict[str, Any], optimiser: Optimizer, schedule: LRScheduler, *, anew: bool
) -> None:
    """Give a checkpoint the optimiser's current settings, and a schedule at the same step.

    Settings for the computation of a step (one kernel or many) always come from this device.
    """
    if anew:
        optimiser.step()  # changes nothing without gradients, but a schedule expects it first
        for _ in range(int(checkpoint["lr_schedulers"][0].get("last_epoch", 0))):
            schedule.step()
        checkpoint["lr_schedulers"] = [schedule.state_dict()]
    device_keys = ("fused", "foreach", "capturable")
    for group, own in zip(
        checkpoint["optimizer_states"][0]["param_groups"], optimiser.param_groups, strict=True
    ):
        keys = set(own) - {"params"} if anew else set(device_keys) & set(own)
        group.update({key: own[key] for key in keys})
