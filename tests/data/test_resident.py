from pathlib import Path

import numpy as np
import pytest
import torch

from segkit.data.datamodule import ConsecutiveSampler
from segkit.data.patches import ForegroundSampler, PatchDataset
from segkit.data.prepared_cache import StoredCase, write_arrays
from segkit.data.resident import ResidentCases, ResidentLoader, ResidentPatches, bytes_of, fits

CPU = torch.device("cpu")
SPACES = ((10, 8, 6), (5, 9, 12), (7, 7, 7))


def stored(
    folder: Path, *, channels: int = 2, dtype: type = np.float32, labels: type = np.uint8
) -> list[StoredCase]:
    """Cases of several shapes, the last of them kept in another precision if `dtype` says so."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    cases = []
    for number, space in enumerate(SPACES):
        image = random.normal(size=(channels, *space)).astype(np.float32)
        if dtype is np.float32 and number == len(SPACES) - 1:
            image[0, 0, 0, 0] = 1e6  # which half precision cannot hold
        label = random.integers(0, 3, space).astype(labels)
        write_arrays(folder / f"case{number}", image, label)
        cases.append(StoredCase(f"case{number}", folder / f"case{number}"))
    return cases


def patches_of(
    cases: list[StoredCase], size: tuple[int, int, int], margin: tuple[int, int, int]
) -> PatchDataset:
    sampler = ForegroundSampler(size, 0.5)
    return PatchDataset(cases, patch_size=size, margin=margin, sampler=sampler, seed=4)


@pytest.mark.parametrize("size", [(4, 4, 4), (8, 12, 4), (16, 16, 1)])
@pytest.mark.parametrize("margin", [(0, 0, 0), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32])
@pytest.mark.parametrize("labels", [np.uint8, np.uint16])
def test_patches_cut_on_a_device_are_those_cut_on_the_host(
    size: tuple[int, int, int],
    margin: tuple[int, int, int],
    dtype: type,
    labels: type,
    tmp_path: Path,
) -> None:
    patches = patches_of(stored(tmp_path, dtype=dtype, labels=labels), size, margin)
    batch = ResidentPatches(patches, CPU).batch(range(30))
    for number in range(30):
        expected = patches[number]
        assert batch["name"][number] == expected["name"]
        assert batch["image"].dtype == expected["image"].dtype
        assert batch["label"].dtype == expected["label"].dtype
        assert (batch["image"][number] == expected["image"]).all()
        assert (batch["label"][number] == expected["label"]).all()


def test_a_loader_gives_the_sampler_s_numbers_in_batches(tmp_path: Path) -> None:
    patches = patches_of(stored(tmp_path), (4, 4, 4), (0, 0, 0))
    sampler = ConsecutiveSampler(7, rank=0, num_processes=1)
    loader = ResidentLoader(ResidentPatches(patches, CPU), sampler, batch_size=3)
    batches = list(loader)
    assert len(loader) == len(batches) == 3
    assert [len(batch["image"]) for batch in batches] == [3, 3, 1]
    found = torch.cat([batch["image"] for batch in batches])
    for number in range(7):
        assert (found[number] == patches[number]["image"]).all()


def test_held_out_cases_come_back_whole_and_in_order(tmp_path: Path) -> None:
    cases = stored(tmp_path)
    sampler = ConsecutiveSampler(3, rank=0, num_processes=1)
    loader = ResidentCases(cases, sampler, CPU)
    assert len(loader) == 3
    for case, held in zip(cases, loader, strict=True):
        assert (held["image"].numpy() == case.image).all()
        assert (held["label"].numpy() == case.label).all()


def test_the_memory_of_cases_is_that_of_their_arrays_on_the_device(tmp_path: Path) -> None:
    voxels = sum(int(np.prod(space)) for space in SPACES)
    assert bytes_of(stored(tmp_path / "half", dtype=np.float16)) == voxels * (2 * 2 + 1)
    # The last case is stored in single precision, so all are on the device.
    assert bytes_of(stored(tmp_path / "single", dtype=np.float32)) == voxels * (2 * 4 + 1)
    many = stored(tmp_path / "many", dtype=np.float16, labels=np.uint16)
    assert bytes_of(many) == voxels * (2 * 2 + 4)
    for cases in (stored(tmp_path / "a", dtype=np.float32), many):
        held = ResidentPatches(patches_of(cases, (4, 4, 4), (0, 0, 0)), CPU)
        assert held.images.nbytes + held.labels.nbytes == bytes_of(cases)


def test_cases_never_lie_on_a_cpu_whole(tmp_path: Path) -> None:
    assert not fits(stored(tmp_path), CPU)


@pytest.mark.parametrize(("free", "expected"), [(10_000, False), (100_000, True)])
def test_cases_lie_on_a_gpu_only_if_they_take_a_small_share_of_it(
    free: int, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**9))
    cases = stored(tmp_path, dtype=np.float16)
    assert 4_000 < bytes_of(cases) < 40_000
    assert fits(cases, torch.device("cuda")) is expected
