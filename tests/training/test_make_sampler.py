"""Patches are drawn by the weights of cases and of classes, on a device as on the host."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from segkit.config.load import validated
from segkit.config.training import Config
from segkit.data.dataset import CaseFiles, Dataset
from segkit.data.patches import ForegroundSampler, PatchDataset
from segkit.data.prepared_cache import StoredCase, write_arrays
from segkit.data.resident import ResidentPatches
from segkit.errors import ConfigError, DatasetError
from segkit.training.make_sampler import make_sampler

NUM_CASES = 50
DRAWS = 4000
PATCH = (4, 4, 4)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[StoredCase]:
    """All hold class 1, in one corner; only case 7 holds class 2, one voxel of it."""
    folder = tmp_path_factory.mktemp("cases")
    found = []
    for number in range(NUM_CASES):
        label = np.zeros((8, 8, 8), np.uint8)
        label[:2, :2, :2] = 1
        if number == 7:
            label[6, 6, 6] = 2
        name = f"case_{number:02d}"
        write_arrays(folder / name, np.zeros((1, 8, 8, 8), np.float32), label)
        found.append(StoredCase(name, folder / name))
    return found


def dataset_of(cases: list[StoredCase], folder: Path) -> Dataset:
    files = tuple(CaseFiles(case.name, (), folder) for case in cases)
    return Dataset(folder, files, ("MR",), {"background": 0, "common": 1, "rare": 2})


def patches_of(cases: list[StoredCase], folder: Path, **settings: Any) -> PatchDataset:
    tree = {"folder": str(folder), "patch_size": [4, 4, 4], **settings}
    config = validated(Config, {"name": "x", "data": tree, "network": {"channels": [2, 2]}}, "x")
    sampler = make_sampler(config.data, dataset_of(cases, folder), cases, PATCH)
    return PatchDataset(cases, patch_size=PATCH, sampler=sampler, seed=0)


def test_without_weights_the_sampler_is_the_usual_one(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    found = patches_of(cases, tmp_path).sampler
    assert found == ForegroundSampler(PATCH, 0.33)


def test_cases_are_drawn_as_often_as_their_weights_say(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    weights = {f"case_{number:02d}": 0 for number in range(2, NUM_CASES)}
    weights |= {"case_00": 3, "case_40": 1}  # case 1 keeps 1
    patches = patches_of(cases, tmp_path, draw_cases=weights)
    drawn = Counter(patches.place(index)[0].name for index in range(DRAWS))
    expected = {"case_00": 0.6, "case_01": 0.2, "case_40": 0.2}
    assert set(drawn) == set(expected)
    counts = [drawn[name] for name in expected]
    assert chisquare(counts, [DRAWS * share for share in expected.values()]).pvalue > 0.001


@pytest.mark.slow
def test_a_class_of_one_case_in_fifty_is_drawn_as_often_as_its_weight_says(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    patches = patches_of(
        cases, tmp_path, foreground_share=0.5, draw_classes={"rare": 3, "common": 1}
    )
    on_rare = sum(
        patches.sampler(cases, index, np.random.default_rng([0, index]))[1] == [6, 6, 6]
        for index in range(DRAWS)
    )
    # Half of the patches, three of four of them on the rare class; others meet its voxel in 1 of
    # 50 cases and one place of 125, too seldom to count.
    counts, shares = [on_rare, DRAWS - on_rare], [0.375, 0.625]
    assert chisquare(counts, [DRAWS * share for share in shares]).pvalue > 0.001
    usual = patches_of(cases, tmp_path, foreground_share=0.5)
    rarely = sum(
        usual.sampler(cases, index, np.random.default_rng([0, index]))[1] == [6, 6, 6]
        for index in range(DRAWS)
    )
    # 4000 * 0.5 / 50 / 2 = 20, with a standard deviation of 4.5.
    assert rarely < 40


def test_weights_of_cases_hold_among_those_of_a_class(
    cases: list[StoredCase], tmp_path: Path
) -> None:
    patches = patches_of(
        cases[:3],
        tmp_path,
        foreground_share=1,
        draw_classes={"common": 1},
        draw_cases={"case_00": 0, "case_01": 4},
    )
    drawn = Counter(patches.place(index)[0].name for index in range(1000))
    assert set(drawn) == {"case_01", "case_02"}
    assert chisquare([drawn["case_01"], drawn["case_02"]], [800, 200]).pvalue > 0.001


def test_the_device_draws_the_same_patches(cases: list[StoredCase], tmp_path: Path) -> None:
    patches = patches_of(
        cases, tmp_path, draw_classes={"rare": 2}, draw_cases={"case_03": 5, "case_07": 0.5}
    )
    resident = ResidentPatches(patches, torch.device("cpu"))
    batch = resident.batch(range(40))
    for index in range(40):
        one = patches[index]
        assert batch["name"][index] == one["name"]
        assert torch.equal(batch["label"][index], one["label"])


def test_weights_stand_in_a_column(cases: list[StoredCase], tmp_path: Path) -> None:
    (tmp_path / "cases.csv").write_text("id,weight\ncase_00,2\ncase_01,0\n")
    settings = {"case_table": "cases.csv", "draw_cases": {"column": "weight"}}
    patches = patches_of(cases[:2], tmp_path, **settings)
    assert {patches.place(index)[0].name for index in range(50)} == {"case_00"}
    (tmp_path / "cases.csv").write_text("id,weight\ncase_00,often\n")
    with pytest.raises(DatasetError, match="has 'often' for case_00; give a weight of 0 or more"):
        patches_of(cases[:2], tmp_path, **settings)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"draw_classes": {"liver": 1}}, "has 'liver', which is not one of common, rare"),
        ({"draw_classes": {"common": 0, "rare": 0}}, "gives the weight 0 to every class"),
        ({"draw_cases": {"nobody": 1}}, "names nobody, which is not a case of"),
        ({"draw_cases": {"case_00": 0, "case_01": 0}}, "gives every training case the weight 0"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    cases: list[StoredCase], tmp_path: Path, settings: Any, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        patches_of(cases[:2], tmp_path, **settings)
