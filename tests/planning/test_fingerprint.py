import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose

from segkit.data.dataset import CaseFiles, Dataset, read_case
from segkit.errors import DatasetError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from segkit.planning import fingerprint as module
from segkit.planning.fingerprint import fingerprint
from segkit.planning.nnunet_rules import Intensities
from segkit.planning.plan import plan_for_memory
from tests.helpers import affine_of

LABELS = {"background": 0, "near": 1, "far": 2}


def write_case(
    folder: Path, name: str, channels: list[ndarray], label: ndarray, code: str = "RAS"
) -> CaseFiles:
    """A case of voxels of 0.7, 1.3 and 4 mm along its own axes; no channels for a label alone."""
    x, y, z = label.shape
    grid = Grid((x, y, z), affine_of(code, rotation=(0.0, 0.0, 0.0)))
    paths = tuple(folder / f"{name}_{number}.nii.gz" for number in range(len(channels)))
    for path, values in zip(paths, channels, strict=True):
        write_volume(path, Volume(values.astype(np.float32), grid))
    write_volume(folder / f"{name}.nii.gz", Volume(label.astype(np.uint8), grid))
    return CaseFiles(name, paths, folder / f"{name}.nii.gz")


def line(*values: float, length: int = 4) -> ndarray:
    """Values along x, and zeros up to the length."""
    row = np.zeros((length, 1, 1))
    row[: len(values), 0, 0] = values
    return row


def dataset_of(folder: Path, *cases: CaseFiles, channels: tuple[str, ...] = ("MRI",)) -> Dataset:
    return Dataset(folder, cases, channels, LABELS)


@pytest.fixture
def three(tmp_path: Path) -> Dataset:
    random = np.random.default_rng(3)
    cases = [
        write_case(
            tmp_path, name, [random.normal(5, 1, (6, 5, 4))], random.integers(0, 3, (6, 5, 4))
        )
        for name in ("ada", "ben", "cyd")
    ]
    return dataset_of(tmp_path, *cases)


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the cases that are read from now on."""
    names: list[str] = []

    def counted(case: CaseFiles, dataset: Dataset) -> tuple[Volume, Volume]:
        names.append(case.name)
        return read_case(case, dataset)

    monkeypatch.setattr(module, "read_case", counted)
    return names


# What is measured


def test_statistics_equal_values_by_hand_and_every_case_has_the_same_weight(tmp_path: Path) -> None:
    # The foreground of one case is 1 and 3, of the other a single 10; 9 and 7 are background.
    ada = write_case(tmp_path, "ada", [line(1, 9, 3, 7)], line(1, 0, 2, 0))
    ben = write_case(tmp_path, "ben", [line(9, 10, 7, 7)], line(0, 1, 0, 0))
    found = fingerprint(dataset_of(tmp_path, ada, ben), cache=tmp_path / "cache", workers=0)
    # Means 2 and 10, variances 1 and 0: together 6 and 1 / 2 + 4².
    assert found.intensities == (
        Intensities(
            mean=6.0,
            std=16.5**0.5,
            median=6.5,  # half of the values are 10, those next to them 3
            minimum=1.0,
            maximum=10.0,
            lower=1.0,
            upper=10.0,
        ),
    )
    assert [case.classes for case in found.cases] == [(1, 2), (1,)]


def test_spacing_and_shape_are_those_of_the_bodys_box_in_ras(tmp_path: Path) -> None:
    image, label = np.zeros((5, 6, 7)), np.zeros((5, 6, 7))
    image[1:3, 1:4, 2:6] = 4.0
    label[1, 2, 3] = 1
    cases = [
        write_case(tmp_path, f"case{code}", [image], label, code) for code in ("LPS", "SLA", "PIR")
    ]
    found = fingerprint(dataset_of(tmp_path, *cases), cache=tmp_path / "cache", workers=0)
    # Array axes of 0.7, 1.3 and 4 mm and 2, 3 and 4 voxels run along x, y, z; z, x, y; y, z, x.
    assert [case.spacing for case in found.cases] == [
        (0.7, 1.3, 4.0),
        (1.3, 4.0, 0.7),
        (4.0, 0.7, 1.3),
    ]
    assert [case.shape for case in found.cases] == [(2, 3, 4), (3, 4, 2), (4, 2, 3)]
    assert {case.box_share for case in found.cases} == {2 * 3 * 4 / (5 * 6 * 7)}
    assert found.intensities[0] is not None and found.intensities[0].mean == 4.0


def test_every_channel_has_its_own_statistics(tmp_path: Path) -> None:
    case = write_case(tmp_path, "ada", [line(1, 2, 3), line(-5, -6, 0)], line(1, 1, 0))
    dataset = dataset_of(tmp_path, case, channels=("T1", "CT"))
    found = fingerprint(dataset, cache=tmp_path / "cache", workers=0)
    first, second = found.intensities
    assert first is not None and (first.mean, first.minimum, first.maximum) == (1.5, 1.0, 2.0)
    assert second is not None and (second.mean, second.minimum, second.maximum) == (-5.5, -6, -5)


def test_a_large_foreground_is_kept_by_rank(tmp_path: Path) -> None:
    values = np.random.default_rng(0).gamma(2.0, 50.0, (24, 24, 24)).astype(np.float32)
    case = write_case(tmp_path, "ada", [values], np.ones_like(values))
    cache = tmp_path / "cache"
    (found,) = fingerprint(dataset_of(tmp_path, case), cache=cache, workers=0).intensities
    assert found is not None
    exact = values.astype(float)
    assert_allclose([found.mean, found.std], [exact.mean(), exact.std()], rtol=1e-12)
    assert (found.minimum, found.maximum) == (exact.min(), exact.max())
    ranks = [(exact < value).mean() for value in (found.lower, found.median, found.upper)]
    assert_allclose(ranks, [0.005, 0.5, 0.995], rtol=0, atol=1 / 4000)
    (path,) = cache.iterdir()
    (sample,) = json.loads(path.read_text())["samples"]
    assert len(sample["values"]) == 4000 and sample["values"] == sorted(sample["values"])


def test_a_case_without_an_image_is_measured_by_its_label(tmp_path: Path) -> None:
    label = np.zeros((5, 4, 3))
    label[1:4, 2, :2] = 2
    bare = write_case(tmp_path, "bare", [], label)
    found = fingerprint(dataset_of(tmp_path, bare), cache=tmp_path / "cache", workers=0)
    assert found.intensities == (None,)
    (size,) = found.cases
    assert (size.shape, size.classes, size.box_share) == ((3, 1, 2), (2,), 0.1)

    full = write_case(tmp_path, "full", [line(1, 3)], line(1, 1))
    both = fingerprint(dataset_of(tmp_path, bare, full), cache=tmp_path / "cache", workers=0)
    assert both.intensities[0] is not None and both.intensities[0].mean == 2.0


def test_a_case_without_foreground_does_not_affect_intensities(tmp_path: Path) -> None:
    empty = write_case(tmp_path, "ada", [line(50, 60)], line(0, 0))
    full = write_case(tmp_path, "ben", [line(1, 3)], line(1, 1))
    found = fingerprint(dataset_of(tmp_path, empty, full), cache=tmp_path / "cache", workers=0)
    assert found.intensities[0] is not None and found.intensities[0].mean == 2.0
    assert [case.classes for case in found.cases] == [(), (1,)]
    alone = fingerprint(dataset_of(tmp_path, empty), cache=tmp_path / "cache", workers=0)
    assert alone.intensities == (None,)


def test_intensities_do_not_depend_on_the_order_of_cases(three: Dataset, tmp_path: Path) -> None:
    forth = fingerprint(three, cache=tmp_path / "forth", workers=0)
    turned = replace(three, cases=three.cases[::-1])
    back = fingerprint(turned, cache=tmp_path / "back", workers=0)
    assert back.cases == forth.cases[::-1]
    for one, other in zip(back.intensities, forth.intensities, strict=True):
        assert one is not None and other is not None
        assert list(vars(one).values()) == pytest.approx(list(vars(other).values()), rel=1e-12)


def test_a_plan_is_made_of_a_fingerprints_numbers(three: Dataset, tmp_path: Path) -> None:
    found = fingerprint(three, cache=tmp_path / "cache", workers=0)
    plan = plan_for_memory(found.numbers(), spatial_dims=3)
    assert plan.spacing == (0.7, 1.3, 4.0)
    assert plan.slices == "axial"


# How it is measured


def test_several_processes_measure_the_same_as_one(three: Dataset, tmp_path: Path) -> None:
    alone = fingerprint(three, cache=tmp_path / "alone", workers=1)
    shared = fingerprint(three, cache=tmp_path / "shared", workers=2)
    assert shared == alone
    names = [
        sorted(path.name for path in (tmp_path / cache).iterdir()) for cache in ("alone", "shared")
    ]
    assert names[0] == names[1] and len(names[0]) == 3


def test_measured_cases_are_not_read_again(
    three: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    fresh = fingerprint(three, cache=tmp_path / "cache", workers=0)
    assert reads == ["ada", "ben", "cyd"]
    assert fingerprint(three, cache=tmp_path / "cache", workers=0) == fresh
    assert len(reads) == 3


@pytest.mark.parametrize("part", ["image", "label"])
def test_a_changed_file_is_measured_again(
    part: str, three: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint(three, cache=tmp_path / "cache", workers=0)
    ben = three.cases[1]
    path = ben.label if part == "label" else ben.images[0]
    state = path.stat()
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    reads = count_reads(monkeypatch)
    fingerprint(three, cache=tmp_path / "cache", workers=0)
    assert reads == ["ben"]


def test_stopped_measurements_continue_without_measuring_cases_again(
    three: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies_at_ben(case: CaseFiles, dataset: Dataset) -> tuple[Volume, Volume]:
        if case.name == "ben":
            raise KeyboardInterrupt
        return read_case(case, dataset)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "read_case", dies_at_ben)
        fingerprint(three, cache=tmp_path / "cache", workers=0)
    reads = count_reads(monkeypatch)
    resumed = fingerprint(three, cache=tmp_path / "cache", workers=0)
    assert reads == ["ben", "cyd"]
    assert resumed == fingerprint(three, cache=tmp_path / "fresh", workers=0)


def test_a_case_added_leaves_the_others_as_they_were(
    three: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fingerprint(replace(three, cases=three.cases[:2]), cache=tmp_path / "cache", workers=0)
    reads = count_reads(monkeypatch)
    grown = fingerprint(three, cache=tmp_path / "cache", workers=0)
    assert reads == ["cyd"]
    assert grown == fingerprint(three, cache=tmp_path / "fresh", workers=0)


def test_progress_counts_what_is_measured_now(three: Dataset, tmp_path: Path) -> None:
    told: list[tuple[str, int, list[str]]] = []

    def track(measurements, what, count):  # type: ignore[no-untyped-def]
        if what != "measuring cases":
            yield from measurements
            return
        done: list[str] = []
        told.append((what, count, done))
        for measurement in measurements:
            done.append(measurement.size.name)
            yield measurement

    for _ in range(2):
        fingerprint(three, cache=tmp_path / "cache", workers=0, track=track)
    assert told == [("measuring cases", 3, ["ada", "ben", "cyd"]), ("measuring cases", 0, [])]


def test_a_label_that_is_not_declared_is_refused_in_one_sentence(tmp_path: Path) -> None:
    bad = write_case(tmp_path, "bad", [line(1, 2)], line(1, 3))
    with pytest.raises(DatasetError, match=r"bad\.nii\.gz: holds label 3, which") as refusal:
        fingerprint(dataset_of(tmp_path, bad), cache=tmp_path / "cache", workers=0)
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "cache").exists()


def test_a_file_that_is_gone_is_refused_in_one_sentence(three: Dataset, tmp_path: Path) -> None:
    three.cases[1].label.unlink()
    with pytest.raises(DatasetError, match=r"ben\.nii\.gz: cannot be read: No such file"):
        fingerprint(three, cache=tmp_path / "cache", workers=0)
