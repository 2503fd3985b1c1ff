from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch.callbacks import ModelCheckpoint
from numpy.testing import assert_array_equal
from torch import Tensor

from segkit.data.datamodule import ConsecutiveSampler, SegmentationData, WholeCases
from segkit.data.patches import ForegroundSampler, PatchDataset
from segkit.data.prepared_cache import StoredCase, write_arrays

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]
SPACE = (10, 8, 6)
SAMPLER = ForegroundSampler((4, 4, 4), 0.5)


def stored_case(folder: Path, name: str, seed: int) -> StoredCase:
    """A case as it lies on disk."""
    random = np.random.default_rng(seed)
    image = random.normal(size=(1, *SPACE)).astype(np.float32)
    write_arrays(folder / name, image, random.integers(0, 3, SPACE).astype(np.uint8))
    return StoredCase(name, folder / name)


@pytest.fixture
def cases(tmp_path: Path) -> list[StoredCase]:
    return [stored_case(tmp_path, f"case{seed}", seed) for seed in range(3)]


class Numbers(PatchDataset):
    """Patches that are but their numbers."""

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"image": torch.tensor(index)}


def data_of(
    patches: PatchDataset,
    held_out: list[StoredCase],
    *,
    workers: int = 0,
    rank: int = 0,
    num_processes: int = 1,
) -> SegmentationData:
    data = SegmentationData(patches, held_out, batch_size=2, steps_per_epoch=3, workers=workers)
    trainer: Any = SimpleNamespace(
        world_size=num_processes,
        global_rank=rank,
        global_step=0,
        strategy=SimpleNamespace(root_device=torch.device("cpu")),
    )
    data.trainer = trainer
    return data


def patches_of(cases: list[StoredCase]) -> PatchDataset:
    return PatchDataset(cases, patch_size=(4, 4, 4), sampler=SAMPLER, seed=3)


def numbers_of(cases: list[StoredCase]) -> Numbers:
    return Numbers(cases, patch_size=(4, 4, 4), sampler=SAMPLER, seed=3)


@given(
    per_process=st.integers(0, 40),
    num_processes=st.integers(1, 7),
    epochs=st.integers(1, 4),
    stop=st.integers(0, 160),
)
def test_each_epoch_starts_after_the_last_and_processes_share_all_items(
    per_process: int, num_processes: int, epochs: int, stop: int
) -> None:
    """Also where all were stopped in the midst of an epoch, after `stop` items each."""
    seen: list[int] = []
    per_epoch = per_process * num_processes
    samplers = [
        ConsecutiveSampler(
            per_epoch, rank=rank, num_processes=num_processes, done=lambda: len(seen)
        )
        for rank in range(num_processes)
    ]
    while len(seen) < epochs * per_epoch:
        shares = [list(sampler) for sampler in samplers]
        assert [list(sampler) for sampler in samplers] == shares
        if len(seen) % per_epoch == 0:
            assert [len(share) for share in shares] == [len(sampler) for sampler in samplers]
        before = stop - len(seen) // num_processes
        kept = before if 0 < before < len(shares[0]) else len(shares[0])
        seen += [number for share in shares for number in share[:kept]]
    assert sorted(seen) == list(range(epochs * per_epoch))


def test_processes_take_turns_within_each_step(cases: list[StoredCase]) -> None:
    """One step of all processes together covers the numbers that follow the step before."""
    loaders = [
        data_of(numbers_of(cases), [], rank=rank, num_processes=2).train_dataloader()
        for rank in range(2)
    ]
    steps = zip(*loaders, strict=True)
    numbers = [sorted(torch.cat([b["image"] for b in step]).tolist()) for step in steps]
    assert numbers == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_batches_are_the_numbered_patches(cases: list[StoredCase]) -> None:
    patches = patches_of(cases)
    batches = list(data_of(patches, []).train_dataloader())
    assert len(batches) == 3
    for number in range(6):
        batch = batches[number // 2]
        for key in ("image", "label"):
            assert torch.equal(batch[key][number % 2], patches[number][key])


@pytest.mark.slow  # each worker is a fresh process that imports everything
def test_workers_change_no_batch(cases: list[StoredCase]) -> None:
    alone = list(data_of(patches_of(cases), []).train_dataloader())
    shared = list(data_of(patches_of(cases), [], workers=2).train_dataloader())
    assert len(alone) == len(shared) == 3
    for one, other in zip(alone, shared, strict=True):
        assert torch.equal(one["image"], other["image"])
        assert torch.equal(one["label"], other["label"])


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_held_out_cases_are_shared_out_whole(cases: list[StoredCase], num_processes: int) -> None:
    seen = []
    for rank in range(num_processes):
        data = data_of(patches_of(cases), cases, rank=rank, num_processes=num_processes)
        loader = data.val_dataloader()
        for _ in range(2):
            looked = [case["image"].numpy().tobytes() for case in loader]
        seen += looked
    assert sorted(seen) == sorted(case.image.tobytes() for case in cases)


def test_a_held_out_case_is_the_stored_one_and_writable(cases: list[StoredCase]) -> None:
    whole = WholeCases(cases)
    assert len(whole) == 3
    case = whole[1]
    assert cases[1].image.dtype == np.float16 and case["image"].dtype == torch.float16
    assert_array_equal(case["image"].numpy(), cases[1].image)
    assert_array_equal(case["label"].numpy(), cases[1].label)
    case["image"].zero_()
    assert cases[1].image.any()


class Recorder(L.LightningModule):
    """Learns nothing; remembers the numbers it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.numbers: list[int] = []
        self.validated: list[float] = []

    def training_step(self, batch: Mapping[str, Tensor], batch_index: int) -> Tensor:
        self.numbers += batch["image"].tolist()
        return self.weight * 0

    def validation_step(self, case: Mapping[str, Tensor], batch_index: int) -> None:
        self.validated.append(float(case["image"].sum()))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Halt(L.Callback):
    """Ends a run in the middle of it, as a crash would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            raise RuntimeError("halted")


def fit(
    recorder: Recorder,
    cases: list[StoredCase],
    *,
    callbacks: list[L.Callback],
    resume: Path | None = None,
) -> None:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=9,
        max_epochs=-1,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=callbacks,
    )
    data = SegmentationData(numbers_of(cases), cases, batch_size=2, steps_per_epoch=3, workers=0)
    trainer.fit(recorder, datamodule=data, ckpt_path=resume, weights_only=False)


def test_a_run_sees_consecutive_patches_over_its_epochs_and_after_it_is_resumed(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1)
    unbroken = Recorder()
    fit(unbroken, cases, callbacks=[checkpoints])
    assert unbroken.numbers == list(range(18))
    sums = [float(torch.from_numpy(np.array(case.image)).sum()) for case in cases]
    assert unbroken.validated == pytest.approx(sums * 3)

    resumed = Recorder()
    fit(resumed, cases, callbacks=[], resume=tmp_path / "kept" / "step=3.ckpt")
    assert resumed.numbers == list(range(6, 18))


def test_a_run_that_died_goes_on_from_its_last_checkpoint(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    checkpoints = ModelCheckpoint(dirpath=tmp_path / "kept", filename="{step}", save_top_k=-1)
    died = Recorder()
    with pytest.raises(RuntimeError, match="halted"):
        fit(died, cases, callbacks=[checkpoints, Halt(8)])
    assert died.numbers == list(range(16))

    resumed = Recorder()
    fit(resumed, cases, callbacks=[], resume=tmp_path / "kept" / "step=6.ckpt")
    assert resumed.numbers == list(range(12, 18))
