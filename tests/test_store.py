import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy import ndarray
from numpy.testing import assert_array_equal

from segkit.data import store
from segkit.data.cases import Case, Dataset, read_case
from segkit.data.preprocess import prepare, prepare_label
from segkit.data.store import StoredCase, store_cases
from segkit.geometry import Grid
from segkit.volume import Volume, write_volume
from tests.helpers import affine_of

SPACING = (1.0, 1.5, 3.0)


def halved(image: torch.Tensor) -> torch.Tensor:
    return image / 2


def write_case(folder: Path, name: str, label: ndarray) -> Case:
    """A case of two channels on an oblique grid that is not RAS+."""
    folder.mkdir(exist_ok=True)
    x, y, z = label.shape
    grid = Grid((x, y, z), affine_of("LPS"))
    random = np.random.default_rng(5)
    paths = tuple(folder / f"{name}_{channel}.nii.gz" for channel in range(2))
    for path in paths:
        write_volume(path, Volume(random.normal(size=label.shape).astype(np.float32), grid))
    write_volume(folder / f"{name}.nii.gz", Volume(label.astype(np.uint8), grid))
    return Case(name, paths, folder / f"{name}.nii.gz")


@pytest.fixture
def case(tmp_path: Path) -> Case:
    label = np.random.default_rng(6).integers(0, 3, (9, 8, 5))
    return write_case(tmp_path / "data", "one", label)


@pytest.fixture
def dataset(tmp_path: Path, case: Case) -> Dataset:
    labels = {"background": 0, "near": 1, "far": 2}
    return Dataset(tmp_path / "data", (case,), ("T1", "T2"), labels)


def store_in(
    folder: Path,
    dataset: Dataset,
    *,
    spacing: Sequence[float] = SPACING,
    settings: Any = "halved",
) -> StoredCase:
    (stored,) = store_cases(
        dataset.cases,
        dataset,
        folder=folder,
        spacing=spacing,
        normalisers=[halved, torch.exp],
        settings=settings,
    )
    return stored


def test_stored_arrays_are_those_of_prepare(tmp_path: Path, case: Case, dataset: Dataset) -> None:
    stored = store_in(tmp_path / "cache", dataset)
    volume, label = read_case(case, dataset)
    prepared = prepare(volume, spacing=SPACING, normalisers=[halved, torch.exp])
    assert stored.name == "one"
    assert stored.image.dtype == np.float32 and stored.label.dtype == np.uint8
    assert_array_equal(stored.image, prepared.image.numpy())
    assert_array_equal(stored.label, prepare_label(label, prepared).numpy())


def test_stored_arrays_are_mapped_and_read_only(tmp_path: Path, dataset: Dataset) -> None:
    stored = store_in(tmp_path / "cache", dataset)
    for array in (stored.image, stored.label):
        assert isinstance(array, np.memmap) and array.mode == "r"


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
    tmp_path: Path, case: Case, dataset: Dataset
) -> None:
    cache = tmp_path / "cache"
    folders = [
        store_in(cache, dataset).folder,
        store_in(cache, dataset, spacing=(1.0, 1.5, 2.0)).folder,
        store_in(cache, dataset, settings=["zscore"]).folder,
    ]
    for path in (case.label, *case.images):
        state = path.stat()
        os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
        folders.append(store_in(cache, dataset).folder)
    assert len(set(folders)) == len(folders) == 6
    assert sorted(cache.iterdir()) == sorted(folders)


def test_a_store_that_dies_midway_leaves_nothing_and_the_next_completes(
    tmp_path: Path, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"

    def full(*_: Any, **__: Any) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", full)
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


def test_a_case_without_an_image_is_stored_as_zero(tmp_path: Path, case: Case) -> None:
    bare = Case("bare", (), case.label)
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


def test_a_first_stages_labels_are_the_last_channel_and_name_the_folder(
    tmp_path: Path, case: Case, dataset: Dataset
) -> None:
    volume, reference = read_case(case, dataset)
    prepared = prepare(volume, spacing=SPACING, normalisers=[halved, torch.exp])
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
        assert_array_equal(one.image[:2], prepared.image.numpy())
        assert_array_equal(one.image[2], prepare_label(said, prepared).numpy())
        stored.append(one)
    stored.append(store_in(tmp_path / "cache", dataset))
    assert len({one.folder for one in stored}) == 3
    assert len(stored[2].image) == 2
