import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from numpy import ndarray
from numpy.testing import assert_array_equal

from segkit.data import case_processes
from segkit.data import prepared_cache as store
from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.data.normalise import ct_window, zscore
from segkit.data.patches import ForegroundSampler, PatchDataset
from segkit.data.prepared_cache import StoredCase, half_if_exact, store_cases, write_arrays
from segkit.data.preprocess import prepare_image, prepare_label
from segkit.errors import DatasetError, WorkerError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from tests.helpers import affine_of

SPACING = (1.0, 1.5, 3.0)


def halved(image: torch.Tensor) -> torch.Tensor:
    return image / 2


def write_case(folder: Path, name: str, label: ndarray) -> CaseFiles:
    """A case of two channels on an oblique grid that is not RAS+."""
    folder.mkdir(exist_ok=True)
    x, y, z = label.shape
    grid = Grid((x, y, z), affine_of("LPS"))
    random = np.random.default_rng(5)
    paths = tuple(folder / f"{name}_{channel}.nii.gz" for channel in range(2))
    for path in paths:
        write_volume(path, Volume(random.normal(size=label.shape).astype(np.float32), grid))
    write_volume(folder / f"{name}.nii.gz", Volume(label.astype(np.uint8), grid))
    return CaseFiles(name, paths, folder / f"{name}.nii.gz")


@pytest.fixture
def case(tmp_path: Path) -> CaseFiles:
    label = np.random.default_rng(6).integers(0, 3, (9, 8, 5))
    return write_case(tmp_path / "data", "one", label)


@pytest.fixture
def dataset(tmp_path: Path, case: CaseFiles) -> Dataset:
    labels = {"background": 0, "near": 1, "far": 2}
    return Dataset(tmp_path / "data", (case,), ("T1", "T2"), labels)


def store_in(
    folder: Path,
    dataset: Dataset,
    *,
    spacing: Sequence[float] = SPACING,
    order: Literal[1, 3] = 1,
    settings: Any = "halved",
) -> StoredCase:
    (stored,) = store_cases(
        dataset.cases,
        dataset,
        folder=folder,
        spacing=spacing,
        normalisers=[halved, torch.exp],
        order=order,
        settings=settings,
    )
    return stored


@pytest.mark.parametrize("order", [1, 3])
def test_stored_arrays_are_those_of_prepare(
    order: Literal[1, 3], tmp_path: Path, case: CaseFiles, dataset: Dataset
) -> None:
    stored = store_in(tmp_path / "cache", dataset, order=order)
    volume, label = read_case(case, dataset)
    prepared = prepare_image(volume, spacing=SPACING, normalisers=[halved, torch.exp], order=order)
    assert stored.name == "one"
    assert stored.image.dtype == np.float16 and stored.label.dtype == np.uint8
    assert_array_equal(stored.image, prepared.image.half().numpy())
    assert_array_equal(stored.label, prepare_label(label, prepared).numpy())


def test_stored_arrays_are_mapped_and_read_only(tmp_path: Path, dataset: Dataset) -> None:
    stored = store_in(tmp_path / "cache", dataset)
    for array in (stored.image, stored.label, *stored.positions.values()):
        assert isinstance(array, np.memmap) and array.mode == "r"


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="open files are told by Linux")
def test_visiting_cases_keeps_no_file_open_and_no_array_in_memory(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    cases = []
    for number in range(40):
        label = random.integers(0, 4, (9, 8, 7)).astype(np.uint8)
        write_arrays(tmp_path / f"{number}", random.normal(size=(1, 9, 8, 7)), label)
        cases.append(StoredCase(f"{number}", tmp_path / f"{number}"))
    patches = PatchDataset(
        cases, patch_size=(4, 4, 4), sampler=ForegroundSampler((4, 4, 4), 0.5), seed=0
    )

    def open_files() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count(str(tmp_path))

    before = open_files()
    assert len({patches[index]["name"] for index in range(200)}) == 40
    assert open_files() == before
    assert all(set(vars(case)) == {"name", "folder"} for case in cases)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_case_without_foreground_has_no_positions(share: float, tmp_path: Path) -> None:
    write_arrays(tmp_path / "case", np.zeros((1, 4, 5, 6)), np.zeros((4, 5, 6), np.uint8))
    case = StoredCase("case", tmp_path / "case")
    assert case.positions == {}
    patches = PatchDataset(
        [case], patch_size=(2, 2, 2), sampler=ForegroundSampler((2, 2, 2), share), seed=0
    )
    assert patches[0]["label"].sum() == 0


# In half precision


@given(st.integers(0, 2**32 - 1), st.floats(1e-3, 5e3), st.floats(-4, 4))
def test_half_precision_is_off_by_2_to_the_minus_11_of_a_value_at_most(
    seed: int, deviation: float, offset: float
) -> None:
    noise = np.random.default_rng(seed).normal(offset, 1, (2, 5, 6, 7)) * deviation
    image = noise.astype(np.float32)
    half = half_if_exact(image)
    assert half.dtype == np.float16
    bound = np.maximum(np.abs(image) * 2.0**-11, 2.0**-25)
    assert (np.abs(half.astype(float) - image) <= bound).all()


@given(st.integers(0, 2**32 - 1), st.floats(0, 0.95), st.floats(30, 120), st.floats(10, 60))
def test_z_scores_and_ct_windows_are_kept_in_half_precision(
    seed: int, air: float, mean: float, deviation: float
) -> None:
    random = np.random.default_rng(seed)
    tissue = random.normal(mean, deviation, (1, 9, 10, 11))
    scan = torch.from_numpy(np.where(random.random(tissue.shape) < air, -1000, tissue)).float()
    window = ct_window(scan, lower=-160.0, upper=240.0, mean=mean, std=deviation)
    for image in (zscore(scan, nonzero=False), window):
        assert half_if_exact(image.numpy()).dtype == np.float16


@pytest.mark.parametrize(
    "image",
    [
        np.array([0.0, 1.0, 65520.0]),  # infinite in half precision
        1000 + np.array([0.0, 0.2, 0.4]),  # half precision has steps of 0.5 there
        np.full(3, 0.1),  # a constant that would be another
        np.array([1e-9, 2e-9, 3e-9]),  # all would be 0
    ],
)
def test_single_precision_is_kept_if_half_would_lose_variation(image: ndarray) -> None:
    single = image.astype(np.float32).reshape(1, 3, 1, 1)
    both = np.concatenate([np.arange(3, dtype=np.float32).reshape(1, 3, 1, 1), single])
    for kept in (half_if_exact(single), half_if_exact(both)):
        assert kept.dtype == np.float32
    assert_array_equal(half_if_exact(both), both)


# In several processes


def three_cases(folder: Path) -> Dataset:
    random = np.random.default_rng(2)
    cases = tuple(
        write_case(folder, name, random.integers(0, 3, (9 + number, 8, 5)))
        for number, name in enumerate(("ada", "ben", "cyd"))
    )
    return Dataset(folder, cases, ("T1", "T2"), {"background": 0, "near": 1, "far": 2})


def test_several_processes_store_the_same_bytes_as_one(tmp_path: Path) -> None:
    dataset = three_cases(tmp_path / "data")
    contents = []
    for num_processes in (1, 2):
        cache = tmp_path / f"{num_processes}"
        stored = store_cases(
            dataset.cases,
            dataset,
            folder=cache,
            spacing=(0.8, 1.0, 3.0),
            normalisers=[partial(zscore, nonzero=False)] * 2,
            order=3,
            settings=None,
            num_processes=num_processes,
        )
        assert [case.name for case in stored] == ["ada", "ben", "cyd"]
        assert sorted(cache.iterdir()) == [case.folder for case in stored]
        files = sorted(path for path in cache.rglob("*") if path.is_file())
        contents.append({str(path.relative_to(cache)): path.read_bytes() for path in files})
    assert len(contents[0]) == 12
    assert contents[0] == contents[1]


def die_half_way(image: torch.Tensor) -> torch.Tensor:
    """As a process does that is killed while it writes a case."""
    (partial_folder,) = Path(os.environ["SEGKIT_TEST_CACHE"]).glob(".partial-*")
    (partial_folder / "ada").mkdir(exist_ok=True)  # the other process dies here as well
    (partial_folder / "ada" / "image.npy").write_bytes(b"half")
    os._exit(9)


def test_a_process_killed_half_way_is_told_in_one_sentence_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = three_cases(tmp_path / "data")
    monkeypatch.setenv("SEGKIT_TEST_CACHE", str(tmp_path / "cache"))
    with pytest.raises(WorkerError, match=r"one of 2 processes .* was killed, .* run again"):
        store_cases(
            dataset.cases,
            dataset,
            folder=tmp_path / "cache",
            spacing=SPACING,
            normalisers=[die_half_way] * 2,
            settings=None,
            num_processes=2,
        )
    assert list((tmp_path / "cache").iterdir()) == []


def test_an_error_in_a_case_is_reported_from_any_process(tmp_path: Path) -> None:
    dataset = three_cases(tmp_path / "data")
    few = Dataset(dataset.folder, dataset.cases, dataset.channels, {"background": 0, "near": 1})
    with pytest.raises(DatasetError, match=r"ada\.nii\.gz: holds label 2, which"):
        store_cases(
            few.cases,
            few,
            folder=tmp_path / "cache",
            spacing=SPACING,
            normalisers=[halved] * 2,
            settings=None,
            num_processes=2,
        )
    assert list((tmp_path / "cache").iterdir()) == []


def test_processes_are_as_many_as_work_cores_and_memory_bear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = three_cases(tmp_path / "data")
    monkeypatch.setattr(case_processes, "num_cores", lambda: 8)
    monkeypatch.setattr(case_processes, "free_memory", lambda: 10**12)
    # RAS+ voxels of 0.7, 1.3 and 4 mm; at half of that along x, twice as many.
    finer = (0.35, 1.3, 4.0)
    voxels = 2 * 2 * 8 * 5 * (9 + 10 + 11)
    largest = 2 * 2 * 8 * 5 * 11

    def processes(spacing: tuple[float, float, float] = finer) -> int:
        return store.preparing_processes(dataset.cases, dataset, spacing, 2)

    assert processes() == 1  # little work: this process
    monkeypatch.setattr(store, "VOXELS_PER_PROCESS", voxels // 3)
    assert processes() == 3
    assert processes((0.7, 1.3, 4.0)) == processes((7.0, 1.3, 4.0)) == 1
    monkeypatch.setattr(store, "VOXELS_PER_PROCESS", 1)
    assert processes() == 8
    monkeypatch.setattr(case_processes, "free_memory", lambda: 5 * largest * store.BYTES_PER_VOXEL)
    assert processes() == 5
    monkeypatch.setattr(case_processes, "free_memory", lambda: 0)
    assert processes() == 1


# Positions


def test_positions_are_all_voxels_of_their_class(tmp_path: Path, dataset: Dataset) -> None:
    stored = store_in(tmp_path / "cache", dataset)
    assert sorted(stored.positions) == [1, 2]
    for number, voxels in stored.positions.items():
        assert_array_equal(voxels, np.argwhere(np.array(stored.label) == number))


def test_positions_of_a_large_class_are_ten_thousand_from_end_to_end(tmp_path: Path) -> None:
    label = np.ones((30, 30, 30), np.uint8)
    label[0, 0, :3] = 2
    label[:, :, 29] = 0
    case = write_case(tmp_path / "data", "large", label)
    dataset = Dataset(tmp_path, (case,), ("T1", "T2"), {"background": 0, "large": 1, "small": 2})
    stored = store_in(tmp_path / "cache", dataset, spacing=(0.7, 1.3, 4.0))
    whole = np.argwhere(np.array(stored.label) == 1)
    voxels = stored.positions[1]
    assert len(whole) > 20_000 and len(voxels) == 10_000 and len(stored.positions[2]) == 3
    assert len(np.unique(voxels, axis=0)) == 10_000
    assert (stored.label[tuple(voxels.T)] == 1).all()
    assert_array_equal(voxels[[0, -1]], whole[[0, -1]])
    # Spread evenly over the planes.
    counts = np.bincount(voxels[:, 0], minlength=30)
    assert np.ptp(counts) <= 2


def test_a_stored_case_is_not_read_again(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_in(tmp_path / "cache", dataset)

    def refuse(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(store, "read_case", refuse)
    again = store_in(tmp_path / "cache", dataset)
    assert again == first
    assert_array_equal(again.image, first.image)


def test_other_spacing_settings_or_files_go_to_other_folders(
    tmp_path: Path, case: CaseFiles, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    folders = [
        store_in(cache, dataset).folder,
        store_in(cache, dataset, spacing=(1.0, 1.5, 2.0)).folder,
        store_in(cache, dataset, settings=["zscore"]).folder,
        store_in(cache, dataset, order=3).folder,
    ]
    for path in (case.label, *case.images):
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        folders.append(store_in(cache, dataset).folder)
    monkeypatch.setattr(store, "ANISOTROPY", 4.0)
    folders.append(store_in(cache, dataset).folder)
    assert len(set(folders)) == len(folders) == 8
    assert sorted(cache.iterdir()) == sorted(folders)


def test_a_store_that_dies_midway_leaves_nothing_and_the_next_completes(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store, "_positions", full)  # the image lies there by now
        with pytest.raises(OSError, match="no space"):
            store_in(cache, dataset)
    assert list(cache.iterdir()) == []

    stored = store_in(cache, dataset)
    assert list(cache.iterdir()) == [stored.folder]
    assert sorted(stored.positions) == [1, 2]


def test_of_two_runs_that_store_a_case_at_once_the_first_stays(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = store_in(tmp_path / "cache", dataset)
    before = (first.folder / "image.npy").stat().st_ino
    # As if the other run's folder had appeared after the first look for it.
    looks: list[Path] = []
    found = Path.is_dir

    def is_dir(path: Path) -> bool:
        if path != first.folder:
            return found(path)
        looks.append(path)
        return len(looks) > 1

    monkeypatch.setattr(Path, "is_dir", is_dir)
    again = store_in(tmp_path / "cache", dataset)
    assert again == first
    assert (again.folder / "image.npy").stat().st_ino == before
    assert list((tmp_path / "cache").iterdir()) == [first.folder]


def test_a_case_without_an_image_is_stored_as_zero(tmp_path: Path, case: CaseFiles) -> None:
    bare = CaseFiles("bare", (), case.label)
    dataset = Dataset(tmp_path, (bare,), ("T1", "T2"), {"background": 0, "near": 1, "far": 2})
    (stored,) = store_cases(
        [bare],
        dataset,
        folder=tmp_path / "cache",
        spacing=SPACING,
        normalisers=[halved, halved],
        settings=None,
    )
    assert_array_equal(stored.image, np.zeros((2, *stored.label.shape)))
    assert sorted(stored.positions) == [1, 2]


def test_cases_are_tracked_and_keep_their_order(tmp_path: Path) -> None:
    label = np.ones((4, 4, 4), np.uint8)
    cases = tuple(write_case(tmp_path / "data", name, label) for name in ("b", "a", "c"))
    dataset = Dataset(tmp_path, cases, ("T1", "T2"), {"background": 0, "near": 1})
    seen: list[str] = []

    def track(tracked: Any) -> Any:
        for case in tracked:
            seen.append(case.name)
            yield case

    stored = store_cases(
        cases,
        dataset,
        folder=tmp_path / "cache",
        spacing=SPACING,
        normalisers=[halved, halved],
        settings=None,
        track=track,
    )
    assert [case.name for case in stored] == seen == ["b", "a", "c"]


def test_stored_positions_leave_out_ignored_voxels(tmp_path: Path) -> None:
    label = np.random.default_rng(6).integers(0, 4, (9, 8, 5))
    case = write_case(tmp_path / "data", "one", label)
    classes = {"background": 0, "near": 1, "far": 2}
    dataset = Dataset(tmp_path / "data", (case,), ("T1", "T2"), classes, ignore=3)
    stored = store_in(tmp_path / "cache", dataset)
    assert sorted(stored.positions) == [0, 1, 2]
    for number in (1, 2):
        assert_array_equal(stored.positions[number], np.argwhere(np.array(stored.label) == number))
    assert_array_equal(stored.positions[0], np.argwhere(np.array(stored.label) != 3))
    # The same files, with 3 as a class of its own, are stored apart.
    dataset = Dataset(tmp_path / "data", (case,), ("T1", "T2"), {**classes, "farther": 3})
    again = store_in(tmp_path / "cache", dataset)
    assert again.folder != stored.folder and sorted(again.positions) == [1, 2, 3]


def test_a_first_stages_labels_are_the_last_channel_and_name_the_folder(
    tmp_path: Path, case: CaseFiles, dataset: Dataset
) -> None:
    volume, reference = read_case(case, dataset)
    prepared = prepare_image(volume, spacing=SPACING, normalisers=[halved, torch.exp])
    stored = []
    for number in (1, 2):
        path = tmp_path / f"first-{number}.nii.gz"
        said = reference.like((reference.data == number).astype(np.uint8))
        write_volume(path, said)
        (one,) = store_cases(
            [case],
            dataset,
            folder=tmp_path / "cache",
            spacing=SPACING,
            normalisers=[halved, torch.exp],
            settings="halved",
            first_labels={"one": path},
        )
        assert_array_equal(one.image[:2], prepared.image.numpy().astype(one.image.dtype))
        assert_array_equal(one.image[2], prepare_label(said, prepared).numpy())
        stored.append(one)
    stored.append(store_in(tmp_path / "cache", dataset))
    assert len({one.folder for one in stored}) == 3
    assert len(stored[2].image) == 2
