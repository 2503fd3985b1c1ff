"""Batches of patches that are drawn in a thread while the batch before them is trained on.

A CPU that trains need not wait for the disk then, if the prepared cases do not fit into memory. If
they do, each batch is drawn when it is needed: a thread that draws takes a core from PyTorch's
threads, which all wait for the slowest of them.
"""

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch.utils.data import BatchSampler, Sampler, default_collate

from segkit.data.patches import Patch, PatchDataset

LONG_WAIT = 0.01
"""A batch that has waited so many seconds, without computing, has waited for the disk."""
DRAWN_AHEAD = 20
"""Number of batches that are drawn ahead after a wait. Then one is drawn when it is needed, to see
whether it still waits."""


class DrawnAhead:
    """A loader that gives the batches of PyTorch's loader, and draws ahead if the disk is slow.

    Args:
        patches: the patches, each drawn only by its number.
        sampler: the numbers.
        batch_size: number of patches in a batch; the last may have fewer.
    """

    def __init__(self, patches: PatchDataset, sampler: Sampler[int], batch_size: int) -> None:
        self.dataset = patches
        # With the names `sampler` or `batch_sampler`, Lightning would expect a DataLoader.
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)
        self.still_ahead = 0

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Patch]:
        """The batches, in order.

        An error in the thread is raised when its batch is asked for.
        """
        ahead: Future[Patch] | None = None
        batches = list(self.batches)
        with ThreadPoolExecutor(1, "segkit-patches") as pool:
            for batch, following in itertools.zip_longest(batches, batches[1:]):
                ready = self._drawn_now(batch) if ahead is None else ahead.result()
                ahead = None
                if self.still_ahead and following is not None:
                    self.still_ahead -= 1
                    ahead = pool.submit(self._batch, following)
                yield ready

    def _drawn_now(self, numbers: list[int]) -> Patch:
        """A batch that nobody has drawn yet; if it waits long, others are drawn ahead."""
        started, computed = time.perf_counter(), time.thread_time()
        batch = self._batch(numbers)
        waited = time.perf_counter() - started - (time.thread_time() - computed)
        self.still_ahead = DRAWN_AHEAD if waited >= LONG_WAIT else 0
        return batch

    def _batch(self, numbers: list[int]) -> Patch:
        batch: Patch = default_collate([self.dataset[number] for number in numbers])
        return batch
