import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segkit.data import drawn_ahead
from segkit.data.datamodule import ConsecutiveSampler
from segkit.data.drawn_ahead import DrawnAhead
from segkit.data.patches import ForegroundSampler, Patch, PatchDataset
from segkit.data.prepared_cache import StoredCase, write_arrays
from segkit.errors import DatasetError

SIZE = (6, 5, 4)


@pytest.fixture
def patches(tmp_path: Path) -> PatchDataset:
    random = np.random.default_rng(0)
    for number in range(3):
        image = random.normal(size=(2, 9, 8, 7)).astype(np.float32)
        write_arrays(tmp_path / f"case_{number}", image, (image[0] > 0.5).astype(np.uint8))
    cases = [StoredCase(f"case_{number}", tmp_path / f"case_{number}") for number in range(3)]
    return PatchDataset(cases, patch_size=SIZE, sampler=ForegroundSampler(SIZE, 0.5), seed=3)


def sampler(done: int = 0) -> ConsecutiveSampler:
    return ConsecutiveSampler(7, rank=0, num_processes=1, done=lambda: done)


def watched(patches: PatchDataset, see: Callable[[int], None]) -> PatchDataset:
    """The same patches; `see` gets the number of each one, in the thread that draws it."""
    cut = PatchDataset.__getitem__

    class Watched(PatchDataset):
        def __getitem__(self, index: int) -> Patch:
            patch = cut(self, index)
            see(index)
            return patch

    return Watched(patches.cases, patch_size=SIZE, sampler=patches.sampler, seed=3)


def wait(monkeypatch: pytest.MonkeyPatch, disk: bool) -> None:
    """Let every batch wait for the disk, or none."""
    monkeypatch.setattr(drawn_ahead, "LONG_WAIT", -1.0 if disk else 1e9)


@pytest.mark.parametrize("disk", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 9])
@pytest.mark.parametrize("done", [0, 3])
def test_batches_are_those_of_pytorchs_loader_bit_for_bit(
    batch_size: int,
    done: int,
    disk: bool,
    patches: PatchDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait(monkeypatch, disk)
    expected = list(DataLoader(patches, batch_size=batch_size, sampler=sampler(done)))
    loader = DrawnAhead(patches, sampler(done), batch_size)
    found = list(loader)
    assert len(loader) == -(-7 // batch_size) and len(found) == len(expected) > 0
    for one, two in zip(found, expected, strict=True):
        assert one["name"] == two["name"]
        assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])
        assert one["image"].dtype == two["image"].dtype


def test_a_batch_is_drawn_while_the_one_before_it_is_used_if_the_disk_is_read(
    patches: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(monkeypatch, True)
    drawn = threading.Event()
    numbers = []

    def note(index: int) -> None:
        numbers.append(index)
        if index == 3:
            drawn.set()

    batches = iter(DrawnAhead(watched(patches, note), sampler(), 2))
    next(batches)
    assert drawn.wait(20)  # the second batch, though nobody has asked for it
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert numbers[:4] == [0, 1, 2, 3] and max(numbers) <= 5
    assert not [thread for thread in threading.enumerate() if "segkit-patches" in thread.name]


def test_cases_in_memory_are_drawn_without_a_thread(
    patches: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(monkeypatch, False)
    drawn: list[int] = []

    def note(index: int) -> None:
        assert threading.current_thread() is threading.main_thread()
        drawn.append(index)

    batches = iter(DrawnAhead(watched(patches, note), sampler(), 2))
    for count in (2, 4, 6, 7):
        next(batches)
        assert drawn == list(range(count))


@pytest.mark.parametrize(("waits", "computes", "ahead"), [(0.03, 0.0, True), (0.0, 0.03, False)])
def test_only_a_batch_that_waits_has_others_drawn_ahead(
    waits: float,
    computes: float,
    ahead: bool,
    patches: PatchDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passed = computed = 0.0

    def pass_time(index: int) -> None:
        nonlocal passed, computed
        passed += waits + computes
        computed += computes

    clocks = SimpleNamespace(perf_counter=lambda: passed, thread_time=lambda: computed)
    monkeypatch.setattr(drawn_ahead, "time", clocks)
    loader = DrawnAhead(watched(patches, pass_time), sampler(), 1)
    batches = iter(loader)
    next(batches)
    assert (loader.still_ahead > 0) == ahead


def test_after_some_batches_one_is_drawn_when_it_is_needed(
    patches: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(monkeypatch, True)
    monkeypatch.setattr(drawn_ahead, "DRAWN_AHEAD", 2)
    by_thread: list[bool] = []

    def note(index: int) -> None:
        by_thread.append(threading.current_thread() is not threading.main_thread())

    assert len(list(DrawnAhead(watched(patches, note), sampler(), 1))) == 7
    assert by_thread == [False, True, True, False, True, True, False]


@pytest.mark.parametrize("disk", [False, True])
def test_an_error_is_raised_where_the_batch_is_used(
    disk: bool, patches: PatchDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(monkeypatch, disk)
    damaged = sorted({patches[number]["name"] for number in range(7)})[0]
    whole = [number for number in range(7) if patches[number]["name"] != damaged]
    (patches.cases[0].folder.parent / damaged / "image.npy").write_bytes(b"damaged")
    batches = iter(DrawnAhead(patches, sampler(), 1))
    found = []
    with pytest.raises(DatasetError, match="damaged"):
        for batch in batches:
            found.append(batch["name"])
    assert len(found) == next(number for number in range(7) if number not in whole)


def test_an_epoch_without_patches_is_empty(patches: PatchDataset) -> None:
    assert list(DrawnAhead(patches, ConsecutiveSampler(0, rank=0, num_processes=1), 2)) == []
