"""Batches of patches that a thread draws while the batch before them is trained on.

A CPU that trains need not wait for the disk then, even if the prepared cases do not fit into
memory.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from torch.utils.data import BatchSampler, Sampler, default_collate

from segkit.data.patches import Patch, PatchDataset


class DrawnAhead:
    """A loader that gives the batches of PyTorch's loader, and draws one batch ahead in a thread.

    Args:
        patches: the patches, each drawn only by its number.
        sampler: the numbers.
        batch_size: number of patches in a batch; the last may have fewer.
    """

    def __init__(self, patches: PatchDataset, sampler: Sampler[int], batch_size: int) -> None:
        self.dataset = patches
        # With the names `sampler` or `batch_sampler`, Lightning would expect a DataLoader.
        self.batches = BatchSampler(sampler, batch_size, drop_last=False)

    def __len__(self) -> int:
        """Number of batches in a whole epoch."""
        return len(self.batches)

    def __iter__(self) -> Iterator[Patch]:
        """The batches, in order.

        An error in the thread is raised when its batch is asked for.
        """
        batches = list(self.batches)
        with ThreadPoolExecutor(1, "segkit-patches") as pool:
            ahead = [pool.submit(self._batch, batch) for batch in batches[:1]]
            for batch in [*batches[1:], None]:
                if not ahead:
                    return
                ready = ahead.pop().result()
                if batch is not None:
                    ahead.append(pool.submit(self._batch, batch))
                yield ready

    def _batch(self, numbers: list[int]) -> Patch:
        batch: Patch = default_collate([self.dataset[number] for number in numbers])
        return batch
