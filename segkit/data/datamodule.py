"""Batches for Lightning: numbered patches for training, whole prepared cases for validation."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from segkit.data.drawn_ahead import DrawnAhead
from segkit.data.patches import Patch, PatchDataset, indexable
from segkit.data.prepared_cache import StoredCase
from segkit.data.resident import ResidentCases, ResidentLoader, ResidentPatches, fits
from segkit.errors import counted
from segkit.system.resources import num_cores
from segkit.system.workers import end_with_parent

logger = logging.getLogger(__name__)

MOST_WORKERS = 12


class WholeCases(TorchDataset[Patch]):
    """Whole held-out cases: `image` (channel, x, y, z) in its stored type, `label` (x, y, z)."""

    def __init__(self, cases: Sequence[StoredCase]) -> None:
        self.cases = cases

    def __len__(self) -> int:
        """Number of cases."""
        return len(self.cases)

    def __getitem__(self, index: int) -> Patch:
        """Case number `index`, read from disk."""
        case = self.cases[index]
        return {
            "image": torch.from_numpy(np.array(case.image)),
            "label": torch.from_numpy(indexable(np.array(case.label))),
        }


class ConsecutiveSampler(Sampler[int]):
    """The numbers of the items of one epoch, in order. Of n processes, each takes every n-th item.

    Args:
        per_epoch: number of items in an epoch.
        rank: number of this process.
        num_processes: number of all processes.
        done: returns the number of items that all processes have used so far; the iterator gives
            the remaining items of the epoch.
    """

    def __init__(
        self,
        per_epoch: int,
        *,
        rank: int,
        num_processes: int,
        done: Callable[[], int] = lambda: 0,
    ) -> None:
        self.per_epoch = per_epoch
        self.rank = rank
        self.num_processes = num_processes
        self.done = done

    def __len__(self) -> int:
        """Number of items of this process in a whole epoch."""
        return len(range(self.rank, self.per_epoch, self.num_processes))

    def __iter__(self) -> Iterator[int]:
        """The numbers, in order."""
        done = self.done()
        end = (done // self.per_epoch + 1) * self.per_epoch if self.per_epoch else 0
        return iter(range(done + self.rank, end, self.num_processes))


class SegmentationData(L.LightningDataModule):
    """Patches of the training cases, and whole held-out cases.

    If a GPU has memory for all cases, they are loaded to the GPU, which cuts the patches. If not,
    processes on the CPU cut them. The same seed gives the same patches in both ways.

    Args:
        patches: patches of the training cases.
        held_out: cases for validation.
        batch_size: number of patches in a batch, for each process.
        steps_per_epoch: number of steps between two validations.
        batches_per_step: number of batches whose gradients make one step.
        workers: number of processes that cut patches for each training process. `auto` is 0 if the
            CPU trains, and otherwise the number of the other cores, up to 12. With 0, a CPU cuts
            them in a thread, one batch ahead.
    """

    def __init__(
        self,
        patches: PatchDataset,
        held_out: Sequence[StoredCase],
        *,
        batch_size: int,
        steps_per_epoch: int,
        workers: int | Literal["auto"],
        batches_per_step: int = 1,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.held_out = held_out
        self.batch_size = batch_size
        self.steps_per_epoch = steps_per_epoch
        self.workers = workers
        self.batches_per_step = batches_per_step
        self.resident = False
        self.stands_for = 1.0
        """Each case stands for so many cases, if only a few of a large dataset are tried."""

    def train_dataloader(self) -> Iterable[Patch]:
        """Batches of `batch_size` patches for each process."""
        trainer = self.trainer
        assert trainer is not None
        device = trainer.strategy.root_device
        per_step = self.batch_size * self.batches_per_step * trainer.world_size
        sampler = ConsecutiveSampler(
            per_step * self.steps_per_epoch,
            rank=trainer.global_rank,
            num_processes=trainer.world_size,
            # The number of steps gives the place in an epoch, also in a resumed run.
            done=lambda: trainer.global_step * per_step,
        )
        self.resident = fits([*self.patches.cases, *self.held_out], device, self.stands_for)
        if self.resident:
            logger.info("all cases lie in the memory of %s, which cuts patches", device)
            patches = ResidentPatches(self.patches, device)
            return ResidentLoader(patches, sampler, self.batch_size)
        workers = workers_for(device) if self.workers == "auto" else self.workers
        if workers == 0 and device.type == "cpu":
            return DrawnAhead(self.patches, sampler, self.batch_size)
        if device.type == "cuda":
            logger.info(
                "cases do not fit into the memory of %s, so %s cut patches from disk",
                device,
                counted(workers, "worker"),
            )
        return DataLoader(
            self.patches,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context="spawn" if workers else None,
            worker_init_fn=end_with_parent if workers else None,
            pin_memory=device.type == "cuda",
        )

    def val_dataloader(self) -> Iterable[Patch]:
        """One held-out case at a time, distributed over the processes."""
        trainer = self.trainer
        assert trainer is not None
        sampler = ConsecutiveSampler(
            len(self.held_out), rank=trainer.global_rank, num_processes=trainer.world_size
        )
        if self.resident:
            return ResidentCases(self.held_out, sampler, trainer.strategy.root_device)
        return DataLoader(WholeCases(self.held_out), batch_size=None, sampler=sampler)


def workers_for(device: torch.device) -> int:
    """Number of processes that cut patches by default; 0 unless the device is a CUDA GPU."""
    return 0 if device.type != "cuda" else min(num_cores() - 1, MOST_WORKERS)
