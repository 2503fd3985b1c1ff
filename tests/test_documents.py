"""Every code block of the documentation does what it says, or says why it cannot be run."""

import contextlib
import io
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from segkit.cli import terminal
from segkit.cli.main import main
from segkit.data.dataset_json import read_labelling
from segkit.io.volume import read_volume
from segkit.training.fit import train
from tests.dicom import write_series
from tests.documents import (
    PAGES,
    blocks_of,
    check_other_command,
    check_yaml,
    commands,
    has_option,
    is_slow,
    merged,
    named_options,
    parsed,
    segkit_words,
)
from tests.small import small_config, small_dataset

each_page = pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])


@pytest.fixture(scope="module")
def furnished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that the documentation's commands speak of."""
    folder = tmp_path_factory.mktemp("furnished")
    data = small_dataset(folder / "my_dataset", num_cases=3)
    described = json.loads((data / "dataset.json").read_text())
    described["labels"]["1"] = "kidney"
    (data / "dataset.json").write_text(json.dumps(described))
    config = small_config(data, train={"steps": 1})
    run = train(config, runs=folder / "runs").folder
    text = "".join(page.read_text() for page in PAGES)
    for name in set(re.findall(r"\bruns/(\w+)", text)) - {run.name}:
        shutil.copytree(run, folder / "runs" / name)
    for name in ("imagesTr", "labelsTr"):
        shutil.copytree(data / name, folder / name)
    shutil.copytree(data / "imagesTr", folder / "scans")
    for name in ("predictions", "references"):
        shutil.copytree(data / "labelsTr", folder / name)
    for name in ("volume", "scan", "a"):
        shutil.copy(data / "imagesTr" / "case_0.nii.gz", folder / f"{name}.nii.gz")
    for name in ("label", "b"):
        shutil.copy(data / "labelsTr" / "case_0.nii.gz", folder / f"{name}.nii.gz")
    scan = read_volume(data / "imagesTr" / "case_0.nii.gz")
    stored = np.round(100 * scan.data).astype(np.int16)
    write_series(folder / "thorax_ct", stored, scan.grid)
    return folder


@pytest.fixture
def here(furnished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to work in, on a machine so fast that plans are in one stage and none races."""
    shutil.copytree(furnished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("segkit.planning.planning_task.multiply_adds_per_second", lambda *_: 1e11)
    monkeypatch.setattr("segkit.planning.planned_seconds.seconds_of_step", lambda *_, **__: 1.0)
    monkeypatch.setattr("segkit.racing.SHARE", 0.0)
    return tmp_path


def run_segkit(words: list[str]) -> None:
    """Run a command in this process, and again over what is there already. Its failure is ours."""
    before, sys.argv = sys.argv, ["segkit", *words]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as stop:
            main()
    finally:
        sys.argv = before
        terminal.start()
    complaint = said.getvalue()
    if stop.value.code and "exists already" in complaint and "--overwrite" not in words:
        return run_segkit([*words, "--overwrite"])
    assert not stop.value.code, f"segkit {' '.join(words)}: {complaint}"


@each_page
def test_every_block_of_a_page_runs(page: Path, here: Path) -> None:
    names: dict[str, object] = {}
    for block in blocks_of(page):
        match block.language:
            case "python":
                code = compile(block.text, str(block), "exec")
                if block.reason is None:
                    exec(code, names)
            case "json":
                path = here / "block.json"
                path.write_text(block.text)
                if "labels" in json.loads(block.text):
                    assert read_labelling(path).outputs
            case "yaml":
                check_yaml(block.text, here)
            case "sh":
                for words in commands(block.text):
                    told = segkit_words(words)
                    if told is not None:
                        parsed(_before_shell(told))
                    if block.reason is not None:
                        continue
                    if told is None:
                        check_other_command(words)
                    elif words[0] == "segkit" and not is_slow(told):
                        run_segkit(_before_shell(told))


@each_page
def test_options_that_a_sentence_or_a_table_names_exist(page: Path) -> None:
    assert not [named for named in named_options(page) if not has_option(*named)]


def _before_shell(words: list[str]) -> list[str]:
    """The words before a redirection, with a number where a variable stands."""
    end = words.index(">") if ">" in words else len(words)
    return [word.replace("$SLURM_ARRAY_TASK_ID", "3") for word in words[:end]]


# The runner itself.


def write_page(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text)
    return page


def test_a_block_without_a_language_and_an_indented_one_are_refused(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"page\.md:1: no language"):
        blocks_of(write_page(tmp_path, "```\nx\n```\n"))
    with pytest.raises(AssertionError, match="fence this block: segkit check"):
        blocks_of(write_page(tmp_path, "Look:\n\n    segkit check\n"))
    with pytest.raises(AssertionError, match="expected <!-- not run: REASON -->"):
        blocks_of(write_page(tmp_path, "<!-- not run -->\n```sh\nx\n```\n"))


def test_a_reason_belongs_to_the_block_that_it_precedes(tmp_path: Path) -> None:
    text = "<!-- not run: needs a cluster -->\n```sh\nx\n```\n\n```sh\ny\n```\n"
    first, second = blocks_of(write_page(tmp_path, text))
    assert (first.reason, first.line) == ("needs a cluster", 2)
    assert (second.reason, second.text) == (None, "y\n")


def test_a_shell_block_is_read_as_a_shell_would() -> None:
    text = "A=1 segkit check x  # a comment\n# one more\nsrun segkit \\\n    predict 'a b'\n"
    assert list(commands(text)) == [["segkit", "check", "x"], ["srun", "segkit", "predict", "a b"]]
    assert segkit_words(["srun", "segkit", "predict", "a b"]) == ["predict", "a b"]
    assert segkit_words(["torchrun", "--nnodes", "2", "-m", "segkit", "train"]) == ["train"]
    assert segkit_words(["make", "demo"]) is None


def test_unknown_options_and_settings_in_documents_are_found() -> None:
    assert parsed(["predict", "x.nii.gz", "--tta"])["tta"] is True
    with pytest.raises(Exception, match="No such option"):
        parsed(["predict", "x.nii.gz", "--tea"])
    with pytest.raises(Exception, match=r"train\.stepps is not a setting"):
        parsed(["train", "c.yaml", "train.stepps=2"])
    with pytest.raises(AssertionError, match="segkit fly is no command"):
        parsed(["fly"])
    with pytest.raises(AssertionError, match="docker is not known here"):
        check_other_command(["docker", "build"])
    with pytest.raises(AssertionError):
        check_other_command(["make", "coffee"])
    with pytest.raises(AssertionError):
        check_other_command(["pip", "install", "segkit[coffee]"])


def test_options_in_a_sentence_and_in_a_table_are_found(tmp_path: Path) -> None:
    text = "Use `segkit train --folds all`.\n\n| a |\n|---|\n| `segkit predict X --tea` |\n"
    found = list(named_options(write_page(tmp_path, text)))
    assert found == [("train", "--folds"), ("predict", "--tea")]
    assert [has_option(*named) for named in found] == [True, False]


def test_part_of_a_config_is_held_against_all_settings(tmp_path: Path) -> None:
    check_yaml("network: {attention: {skip: u_transformer}}\n", tmp_path)
    with pytest.raises(Exception, match=r"skip\.kind is 'u_transistor'"):
        check_yaml("network: {attention: {skip: u_transistor}}\n", tmp_path)
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}, "d": 4}) == {
        "a": {"b": 3, "c": 2},
        "d": 4,
    }
