"""Arrays in files keep their values when their memory is freed, and leave no files behind."""

import os
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from segkit.io.disk_arrays import OnDisk, in_memory, release


def test_an_array_on_disk_is_zero_and_keeps_what_was_written_when_it_is_released(
    tmp_path: Path,
) -> None:
    on_disk = OnDisk(tmp_path / "out")((7, 1000, 5), np.dtype(np.float32))
    beside = in_memory((7, 1000, 5), np.dtype(np.float32))
    assert_array_equal(on_disk, beside)
    assert on_disk.flags.f_contiguous and beside.flags.f_contiguous
    values = np.random.default_rng(0).random(on_disk.shape)
    view = np.moveaxis(on_disk, 2, 0)[:, ::-1]
    for number in range(5):
        view[number] = np.moveaxis(values, 2, 0)[number, ::-1]
        release(view)
    assert_array_equal(on_disk, values.astype(np.float32))


def test_files_of_arrays_have_no_name(tmp_path: Path) -> None:
    array = OnDisk(tmp_path)((3, 4), np.dtype(np.int16))
    array[1, 2] = 7
    assert list(tmp_path.iterdir()) == []
    assert array.sum() == 7


def test_releasing_an_array_that_is_not_on_disk_or_private_changes_nothing(tmp_path: Path) -> None:
    held = np.arange(4096.0)
    release(held[::-1])
    assert_array_equal(held, np.arange(4096.0))
    held.tofile(tmp_path / "own")
    private = np.memmap(tmp_path / "own", np.float64, mode="c")
    private[10] = -1
    release(private)
    assert private[10] == -1


def test_a_full_disk_is_an_error_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        OnDisk(tmp_path)((8, 8), np.dtype(np.float32))
    assert list(tmp_path.iterdir()) == []
