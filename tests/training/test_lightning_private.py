"""What segkit touches of Lightning unpromised is there, or these tests say what is gone."""

import copy
import inspect
from functools import reduce
from importlib.metadata import version
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.loggers import WandbLogger

from segkit.training import lightning_private as private


class OneWeight(L.LightningModule):
    """The least that can be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def training_step(self, batch: torch.Tensor, batch_index: int) -> torch.Tensor:
        return self.weight * batch.sum()

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**changes: object) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **changes,  # type: ignore[arg-type]
    )


TOUCHED = [
    (trainer, "fit_loop._combined_loader"),
    (trainer, "fit_loop.epoch_loop.val_loop._combined_loader"),
    (trainer, "fit_loop.epoch_loop._batches_that_stepped"),
    (trainer, "fit_loop.epoch_loop._skip_next_val"),
    (trainer, "fit_loop.epoch_loop.max_steps"),
    (trainer, "fit_loop.epoch_loop.val_loop.batch_progress.reset"),
    (lambda: rank_zero_only, "rank"),
    (WeightAveraging, "_device"),
    (WeightAveraging, "_average_model"),
    (WeightAveraging, "_latest_update_step"),
    (WeightAveraging, "_swap_models"),
    (WeightAveraging, "_copy_average_to_current"),
]


@pytest.mark.parametrize(("make", "path"), TOUCHED, ids=[path for _, path in TOUCHED])
def test_an_attribute_that_is_touched_is_there(make: object, path: str) -> None:
    assert callable(make)
    there = make()
    try:
        reduce(getattr, path.split("."), there)
    except AttributeError:
        pytest.fail(
            f"lightning {version('lightning')}: {type(there).__name__} has no {path}; "
            f"see segkit/training/lightning_private.py, and the cap of lightning in pyproject.toml"
        )


def test_a_tracker_keeps_its_record_where_it_is_looked_for() -> None:
    assert "self._experiment" in inspect.getsource(WandbLogger), (
        f"lightning {version('lightning')}: WandbLogger keeps no _experiment; see "
        f"segkit/training/lightning_private.py"
    )


class Saved(OneWeight):
    """Keeps a checkpoint as it is between two steps, and one as it is while a case is looked at."""

    def on_train_batch_start(self, batch: torch.Tensor, batch_idx: int) -> None:
        if self.global_step == 1:
            self.stepping = self._checkpoint()

    def validation_step(self, batch: torch.Tensor, batch_index: int) -> None:
        self.looking = self._checkpoint()

    def _checkpoint(self) -> dict[str, Any]:
        found: dict[str, Any] = self.trainer._checkpoint_connector.dump_checkpoint()
        return copy.deepcopy(found)


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_checkpoint_counts_as_it_is_put_right() -> None:
    """If these keys or numbers change, `settle` has to be thought over."""
    saved = Saved()
    batches = torch.utils.data.DataLoader(torch.ones(2, 1))  # type: ignore[arg-type]
    trainer().fit(saved, batches, batches)
    between, within = saved.stepping, saved.looking
    steps = between["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert (steps["ready"], steps["started"], steps["completed"]) == (2, 1, 1)
    assert not private.validation_is_interrupted(between)
    assert private.validation_is_interrupted(within)
    private.correct_counts(between, validating=False)
    assert [steps[key] for key in ("ready", "started", "processed", "completed")] == [1, 1, 1, 1]
    looked = within["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]["current"]
    private.correct_counts(within, validating=True)
    assert [looked[key] for key in ("ready", "started", "processed", "completed")] == [1, 1, 0, 0]


def test_without_a_launcher_this_is_the_first_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert private.is_first_process()
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert not private.is_first_process()
