"""A command says each warning about labels and splits once, however often it reads the dataset."""

import json
import logging
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from segkit.cli.terminal import NoRepetition
from tests.small import small_dataset

SMALL = (
    *("train.steps=2", "train.validate_every=1", "network.channels=[4,8,8]"),
    *("network.strides=null", "network.kernels=null", "data.patch_size=[8,8,8]"),
    "trainer.accelerator=cpu",
)
SAID = (
    "labels come from data.labels instead of dataset.json",
    "no voxel in the 4 cases is labelled lump",
    "column patient is not used",
    "column set is not used",
    "'a:0' becomes 'a-0'",
)


def test_a_warning_with_another_path_to_the_same_folder_is_no_other_warning() -> None:
    passes = NoRepetition()

    def told(text: str, logger: str = "a") -> bool:
        return passes.filter(logging.LogRecord(logger, logging.WARNING, "", 0, text, (), None))

    assert told("data: has no labels")
    assert not told(f"{Path.cwd()}/data: has no labels", "b")
    assert told("other: has no labels")


@pytest.mark.slow
def test_each_warning_is_said_once(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data", num_cases=4)
    described = json.loads((folder / "dataset.json").read_text())
    described.pop("training", None)
    described["file_ending"] = ".nii.gz"
    (folder / "dataset.json").write_text(json.dumps(described))
    for number in range(4):
        (folder / "labelsTr" / f"case_{number}.nii.gz").rename(
            folder / "labelsTr" / f"a:{number}.nii.gz"
        )
        image = folder / "imagesTr" / f"case_{number}.nii.gz"
        image.rename(image.with_name(f"a:{number}_0000.nii.gz"))
    rows = [
        f"a:{number},p{number // 2},{'test' if number == 3 else 'train'}" for number in range(4)
    ]
    (folder / "cases.csv").write_text("\n".join(["id,patient,set", *rows]))
    names = [f"a:{number}" for number in range(4)]
    folds = [{"train": names[:2], "val": names[2:]}, {"train": names[2:], "val": names[:2]}]
    (folder / "splits_final.json").write_text(json.dumps(folds))
    (tmp_path / "d.yaml").write_text(
        "data: {folder: data, case_table: cases.csv, labels: {background: 0, ball: 1, lump: 2}}"
    )
    plan = ["plan", "d.yaml", "--minutes", "0.1", "--no-race", "--device", "cpu"]
    train = ["train", "d.yaml", *SMALL]
    fold = ["train", "plan.yaml", *SMALL]
    for words, more in (
        ([*plan, "--out", "plan.yaml"], ()),
        ([*train, "name=one"], ("splits_final.json is not used",)),
        ([*fold, "name=two", "--folds", "all"], ()),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "segkit", *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        lines = Counter(done.stderr.splitlines())
        assert max(lines.values()) == 1, lines
        for sentence in (*SAID, *more):
            if "4 cases" not in sentence or "--folds" not in words:
                assert done.stderr.count(sentence) == 1, (words, sentence, done.stderr)
