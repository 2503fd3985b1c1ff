"""No loaded file runs code or allocates without limit; bad files are refused in one sentence."""

import json
import os
import pickle
import re
import shutil
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from segkit.cli.main import main
from segkit.config.dataset_files import FilesConfig
from segkit.config.load import load_config
from segkit.config.model import ModelDescription
from segkit.data import preprocess
from segkit.data.dataset import read_dataset
from segkit.errors import ConfigError, DatasetError, ModelError, SegkitError, VolumeError
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.safe_text import parse_yaml, read_json, read_text
from segkit.io.volume import Volume, write_volume
from segkit.model import build
from segkit.model.build import build_network, weight_shapes
from segkit.model.folder import load_model, save_model
from segkit.training.fit import train
from segkit.training.resume import resume
from segkit.training.run_folder import LAST
from tests.model.test_folder import small_model
from tests.networks import FAMILIES, PATCH, settings
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError

Run = Callable[..., tuple[int, str]]


class Malicious:
    """What a pickle may be: an order to run something."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.canary),)


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """What is there only where something ran."""
    return tmp_path / "it_ran"


def test_the_canary_detects_code_that_runs(canary: Path) -> None:
    pickle.loads(pickle.dumps(Malicious(canary)))
    assert canary.is_dir()


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The exit code of a command, and what it says on stderr."""

    def command(*words: str | Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["segkit", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    return command


def refused(told: tuple[int, str], reason: str) -> None:
    """One sentence that gives this reason, or one for each case, and exit code 2."""
    code, err = told
    assert code == 2, err
    assert re.search(reason, err), err
    lines = err.splitlines()
    assert all(line.startswith("segkit: ") for line in lines), err
    assert len(lines) == 1 or "problems, listed above" in lines[-1], err


def scan_at(path: Path, channels: int = 2) -> Path:
    values = np.random.default_rng(0).normal(size=(9, 9, 9, channels)).astype(np.float32)
    write_volume(path, Volume(values, Grid((9, 9, 9), np.eye(4))))
    return path


# Pickles


def pickles(canary: Path, folder: Path) -> dict[str, bytes]:
    """A malicious pickle in each dress that a loader might open."""
    bad = Malicious(canary)
    torch.save(bad, folder / "zip.pt")
    torch.save(bad, folder / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": bad, "global_step": 1}, folder / "inside.pt")
    np.save(folder / "object.npy", np.array([bad], dtype=object), allow_pickle=True)
    np.savez(folder / "object.npz", a=np.array([bad], dtype=object))
    found = {path.name: path.read_bytes() for path in folder.glob("*.*p*")}
    return {"plain.pkl": pickle.dumps(bad), **found}


DRESSES = ["plain.pkl", "zip.pt", "old.pt", "inside.pt", "object.npy", "object.npz"]


@pytest.mark.parametrize("dress", DRESSES)
def test_a_pickle_as_weights_runs_nothing(
    tmp_path: Path, canary: Path, run: Run, dress: str
) -> None:
    save_model(tmp_path / "model", small_model())
    (tmp_path / "dresses").mkdir()
    (tmp_path / "model" / "weights.safetensors").write_bytes(
        pickles(canary, tmp_path / "dresses")[dress]
    )
    scan = scan_at(tmp_path / "scan.nii.gz")
    refused(run("predict", scan, "--model", tmp_path / "model"), "its weights do not fit")
    assert not canary.exists() and not (tmp_path / "scan_seg.nii.gz").exists()


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and a run that was stopped behind its first checkpoint."""
    folder = tmp_path_factory.mktemp("stopped")
    config = small_config(small_dataset(folder / "data"))
    with pytest.raises(StoppedError):
        train(config, runs=folder / "runs", callbacks=[StopAfter(3)])
    return folder


@pytest.fixture
def run_folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of its run, with prepared cases of its own."""
    shutil.copytree(stopped / "runs", tmp_path / "runs")
    config = tmp_path / "runs" / "small" / "config.yaml"
    text = config.read_text().replace(str(stopped / "runs"), str(tmp_path / "runs"))
    config.write_text(text)
    return config.parent


@pytest.mark.parametrize("dress", DRESSES)
@pytest.mark.parametrize("with_metrics", [True, False])
def test_a_pickle_as_checkpoint_runs_nothing(
    run_folder: Path, tmp_path: Path, canary: Path, run: Run, dress: str, with_metrics: bool
) -> None:
    if not with_metrics:
        (run_folder / "metrics.csv").unlink()
    (tmp_path / "dresses").mkdir()
    (run_folder / LAST).write_bytes(pickles(canary, tmp_path / "dresses")[dress])
    refused(run("train", "--resume", run_folder), r"last\.ckpt: expected a checkpoint of this run")
    assert not canary.exists()


def change_checkpoint(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = torch.load(path, weights_only=True)
    change(content)
    torch.save(content, path)


def widen(content: dict[str, Any]) -> None:
    name = next(iter(content["state_dict"]))
    content["state_dict"][name] = torch.zeros(1000, 3)


def fatten(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["state"][0]["exp_avg"] = torch.zeros(1000, 3)


def forget(content: dict[str, Any]) -> None:
    content["optimizer_states"][0]["param_groups"][0]["params"].pop()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (widen, "does not fit the network"),
        (fatten, "does not fit the network"),
        (forget, "does not fit the network"),
        (lambda content: content.pop("optimizer_states"), "lacks optimizer_states"),
        (lambda content: content.update(state_dict=3), "lacks 'int' object"),
        (lambda content: content["state_dict"].popitem(), "does not fit the network"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(
    run_folder: Path, run: Run, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    change_checkpoint(run_folder / LAST, change)
    refused(run("train", "--resume", run_folder), reason)


def test_a_checkpoint_that_is_cut_off_is_refused(run_folder: Path) -> None:
    whole = (run_folder / LAST).read_bytes()
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 10):
        (run_folder / LAST).write_bytes(whole[:size])
        with pytest.raises(ConfigError, match="cannot be read as plain data"):
            resume(run_folder)
    (run_folder / LAST).write_bytes(whole)
    (run_folder / "metrics.csv").write_text("step\nmany\n")
    with pytest.raises(ConfigError, match=r"metrics\.csv: cannot be read"):
        resume(run_folder)


@pytest.mark.parametrize("name", ["image", "label", "voxels", "classes"])
def test_a_pickle_among_prepared_cases_runs_nothing(
    run_folder: Path, tmp_path: Path, canary: Path, run: Run, name: str
) -> None:
    (tmp_path / "dresses").mkdir()
    (case,) = (run_folder.parent / ".cache").glob("case_1-*/")
    for content in pickles(canary, tmp_path / "dresses").values():
        (case / f"{name}.npy").write_bytes(content)
        told = run("train", "--resume", run_folder)
        refused(told, f"{case.name}: expected a prepared case, found damaged or wrong arrays")
    assert not canary.exists()


PREPARED: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "other channels": ("image", lambda image: np.concatenate([image, image])),
    "another size": ("label", lambda label: label[1:]),
    "another type": ("image", lambda image: image.astype(np.complex64)),
    "voxels beyond": ("voxels", lambda voxels: voxels + 200),
    "voxels before": ("voxels", lambda voxels: voxels.astype(np.int64) - 200),
    "ranges beyond": ("classes", lambda classes: classes + np.array([0, 0, 10**6])),
    "ranges that run back": ("classes", lambda classes: classes[:, [0, 2, 1]]),
    "no table": ("classes", lambda classes: classes.ravel()),
}


@pytest.mark.parametrize("kind", PREPARED)
def test_prepared_arrays_of_another_kind_are_refused(run_folder: Path, kind: str) -> None:
    name, change = PREPARED[kind]
    (case,) = (run_folder.parent / ".cache").glob("case_1-*/")
    np.save(case / f"{name}.npy", change(np.load(case / f"{name}.npy")))
    with pytest.raises(DatasetError, match="damaged or wrong arrays; delete the folder"):
        resume(run_folder)


def test_a_prepared_array_that_claims_more_than_it_holds_is_refused(run_folder: Path) -> None:
    (case,) = (run_folder.parent / ".cache").glob("case_1-*/")
    header = str({"descr": "<i8", "fortran_order": False, "shape": (10**15, 3)}).ljust(117) + "\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode()
    (case / "classes.npy").write_bytes(content)
    with pytest.raises(DatasetError, match="damaged or wrong arrays"):
        resume(run_folder)


@pytest.mark.parametrize("content", ["[]", "{", '{"size": {}, "samples": []}', "[" * 10**5])
def test_a_measurement_of_another_kind_is_refused(tmp_path: Path, run: Run, content: str) -> None:
    folder = small_dataset(tmp_path / "data")
    words = ("plan", folder, "--preset", "nnunet", "--runs", tmp_path, "--out", tmp_path / "a.yaml")
    assert run(*words)[0] == 0
    (path,) = (tmp_path / ".cache").glob("case_2-*.json")
    path.write_text(content)
    refused(run(*words, "--overwrite"), "the stored measurement of case_2.*delete the file")


# Models


def described(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "model.json").read_text())
    return content


def put(tree: Any, path: tuple[str | int, ...], value: object) -> Any:
    """The tree with another value in one place."""
    if not path:
        return value
    copied = dict(tree) if isinstance(tree, dict) else list(tree)
    copied[path[0]] = put(tree[path[0]], path[1:], value)
    return copied


ABSURD: dict[str, tuple[tuple[str | int, ...], object]] = {
    "width": (("network", "channels", 0), 10**9),
    "product of widths": (("network", "channels"), [60000, 60000, 60000]),
    "depth": (("network", "channels"), [4] * 10**5),
    "stride": (("network", "strides"), [[10**9] * 3] * 2),
    "kernel": (("network", "kernels"), [[10**9 + 1] * 3] * 3),
    "patch": (("patch_size"), [2**30] * 3),
    "patch of many voxels": (("patch_size",), [2**12] * 3),
    "patch of two numbers": (("patch_size",), [8, 8]),
    "patch between strides": (("patch_size",), [9, 8, 8]),
    "gates": (("network", "attention", "skip", "gates"), 10**9),
    "spacing": (("spacing", 0), 1e300),
    "spacing that is none": (("spacing", 0), float("nan")),
    "label numbers": (("labels", "lesion"), 10**30),
    "label order": (("labels",), {"lesion": 1, "background": 0}),
    "classes": (("labels",), {str(number): number for number in range(60000)}),
    "no classes": (("labels",), {}),
    "regions": (("regions",), {"lesion": []}),
    "ignored": (("ignore",), -1),
    "stages": (("first_stage",), {"models": 10**9, "classes": ["a"]}),
    "normalisation": (("normalisation",), [{"kind": "zscore"}]),
    "window in HU": (("normalisation", 0), {"kind": "ct"}),
    "channels": (("channels",), ["T1"] * 10**4),
}


@pytest.mark.parametrize("what", ABSURD)
def test_a_model_that_asks_for_absurd_sizes_is_refused_by_its_description(
    tmp_path: Path, run: Run, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", small_model())
    path, value = ABSURD[what]
    path = (path,) if isinstance(path, str) else path
    changed = put(described(tmp_path / "model"), path, value)
    (tmp_path / "model" / "model.json").write_text(json.dumps(changed))
    monkeypatch.setattr("segkit.model.folder.build_network", must_not_be_called)
    told = run("predict", scan_at(tmp_path / "scan.nii.gz"), "--model", tmp_path / "model")
    refused(told, "model")


def must_not_be_called(*_: object) -> None:
    raise AssertionError("a network was made before its sizes were held against the weights")


def test_no_value_in_a_description_causes_a_traceback(
    tmp_path: Path,
) -> None:
    model = small_model()
    save_model(tmp_path, model)
    whole = described(tmp_path)
    volume = Volume(
        np.random.default_rng(0).normal(size=(5, 5, 5, 2)).astype(np.float32),
        Grid((5, 5, 5), np.eye(4)),
    )
    values = (
        -1,
        0,
        3,
        10**6,
        10**40,
        1e300,
        -0.5,
        None,
        "a",
        "../x",
        [],
        [10**9] * 3,
        {},
        {"a": 1},
    )

    def places(tree: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
        keys = tree if isinstance(tree, dict) else range(len(tree) if isinstance(tree, list) else 0)
        return [path, *(place for key in keys for place in places(tree[key], (*path, key)))]

    outcomes = []
    # A patch may be as large as memory is; see below.
    for place in [place for place in places(whole) if place[:1] != ("patch_size",)]:
        for value in values:
            (tmp_path / "model.json").write_text(json.dumps(put(whole, place, value)))
            try:
                Predictor(load_model(tmp_path), engine="torch")(volume)
                outcomes.append(True)
            except SegkitError as error:
                assert "\n" not in str(error)
                outcomes.append(False)
    assert any(outcomes) and not all(outcomes)


@pytest.mark.parametrize("kind", ["one more", "one less", "another shape", "not a number"])
def test_tensors_that_do_not_fit_the_description_are_refused(
    tmp_path: Path, run: Run, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", small_model())
    path = tmp_path / "model" / "weights.safetensors"
    weights = load_file(path)
    first = next(iter(weights))
    if kind == "one more":
        weights["stowaway"] = torch.zeros(3)
    elif kind == "another shape":
        weights[first] = torch.zeros(2, *weights[first].shape)
    elif kind == "not a number":
        name = next(name for name, value in weights.items() if value.is_floating_point())
        weights[name] = torch.full_like(weights[name], torch.nan)
    else:
        del weights[first]
    save_file(weights, path)
    if kind != "not a number":
        monkeypatch.setattr("segkit.model.folder.build_network", must_not_be_called)
    told = run("predict", scan_at(tmp_path / "scan.nii.gz"), "--model", tmp_path / "model")
    refused(told, "its weights do not fit its model.json")


def test_a_header_of_weights_that_claims_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    claimed = {
        name: {"dtype": "F32", "shape": [10**6, 10**6], "data_offsets": [0, 4 * 10**12]}
        for name in ("a",)
    }
    header = json.dumps(claimed).encode()
    for content in (
        struct.pack("<Q", len(header)) + header,
        struct.pack("<Q", 2**62) + header,
        b"",
        b"\0" * 8,
    ):
        (tmp_path / "weights.safetensors").write_bytes(content)
        with pytest.raises(ModelError, match="its weights do not fit its model"):
            load_model(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_weights_are_described_without_allocation_or_random_numbers(
    family: str, spatial_dims: int
) -> None:
    description = family_description(family, spatial_dims)
    state = torch.get_rng_state()
    shapes = weight_shapes(description)
    assert torch.equal(torch.get_rng_state(), state)
    network = build_network(description)
    unet = getattr(network, "network", network)
    assert shapes == {name: tuple(value.shape) for name, value in unet.state_dict().items()}


def family_description(family: str, spatial_dims: int) -> ModelDescription:
    told = small_model(spatial_dims=spatial_dims).description.model_dump()
    attention = FAMILIES[family]
    if family == "self-attention":
        attention = {"bottleneck": {**attention["bottleneck"], "window": [2] * spatial_dims}}
    network = settings(attention, spatial_dims)
    return ModelDescription.model_validate(
        {**told, "network": network, "patch_size": PATCH[spatial_dims]}
    )


# What a machine's memory decides


def test_weights_beyond_free_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    description = small_model().description
    monkeypatch.setattr(build, "free_memory", lambda: 1000)
    with pytest.raises(ConfigError, match=r"weights need .* memory, but only 0.001 MB are free"):
        build_network(description)


def test_windows_beyond_free_memory_are_refused(
    tmp_path: Path, run: Run, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tmp_path / "model", small_model())
    changed = put(described(tmp_path / "model"), ("patch_size",), [512, 512, 512])
    (tmp_path / "model" / "model.json").write_text(json.dumps(changed))
    monkeypatch.setattr(build, "free_memory", lambda: 8 * 10**9)
    told = run("predict", scan_at(tmp_path / "scan.nii.gz"), "--model", tmp_path / "model")
    refused(told, "features of 512 x 512 x 512 voxels need at least 8.59 GB of memory")
    config = small_config(stopped / "data", data={"patch_size": [256] * 3, "batch_size": 8})
    with pytest.raises(ConfigError, match="8 x 256 x 256 x 256 voxels need"):
        train(config, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_a_volume_that_would_outgrow_free_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    volume = Volume(np.ones((4, 5, 6), np.float32), Grid((4, 5, 6), np.eye(4)))

    def prepared(spacing: float) -> tuple[int, ...]:
        normalisers = [lambda values: values]
        found = preprocess.prepare_image(volume, spacing=[spacing] * 3, normalisers=normalisers)
        return found.grid.shape

    for spacing in (1e-300, 1e-6):
        with pytest.raises(VolumeError, match=r"voxels, which need .* check the spacing"):
            prepared(spacing)
    monkeypatch.setattr(preprocess, "free_memory", lambda: 4 * 4 * 5 * 6)
    assert prepared(1.0) == (4, 5, 6)
    with pytest.raises(VolumeError, match="check the spacing"):
        prepared(0.99)


# Settings and tables


YAML: dict[str, tuple[str, str]] = {
    "tag of a call": ("!!python/object/apply:os.mkdir [CANARY]", "asks for code"),
    "tag of a class": ("!!python/object:os.system {}", "asks for code"),
    "tag of a module": ("!!python/module:os ''", "asks for code"),
    "tag of its own": ("!call [CANARY]", "asks for code"),
    "aliases": (
        "\n".join(
            ["a: &a [x, x, x, x, x, x, x, x, x]"]
            + [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghi")]
        ),
        r"\*a is an alias, which is not allowed; write its value out",
    ),
    "itself": ("a: &a [*a]", r"\*a is an alias"),
    "depth": ("[" * 10**5, "nested too deeply"),
    "a number of many digits": (f"name: {'9' * 10**5}", "cannot be read as YAML"),
    "no text": ("\udcff", "cannot be read as YAML"),
}


@pytest.mark.parametrize("kind", YAML)
@pytest.mark.parametrize("command", ["train", "check"])
def test_yaml_that_is_not_plain_data_is_refused(
    tmp_path: Path, canary: Path, run: Run, kind: str, command: str
) -> None:
    text, reason = YAML[kind]
    path = tmp_path / "config.yaml"
    path.write_bytes(text.replace("CANARY", str(canary)).encode(errors="surrogateescape"))
    refused(run(command, path), reason)
    path.write_text("data: {folder: data, patch_size: [8, 8, 8]}")
    word = text.replace("CANARY", str(canary))
    if "\n" not in word and len(word) < 100 and word.isprintable():
        refused(run("check", path, f"name={word.removeprefix('a: ')}"), "as YAML; quote it")
    assert not canary.exists()


def test_aliases_are_the_only_plain_yaml_that_is_refused() -> None:
    text = "a: [1, 2.5, true, null, 2024-01-01]\nb: {c: 'd'}\n"
    assert parse_yaml(text) == {
        "a": [1, 2.5, True, None, parse_yaml("2024-01-01")],
        "b": {"c": "d"},
    }


@pytest.mark.parametrize(
    "override",
    [
        "network.channels=[1000000000, 16]",
        "network.channels=[60000, 60000, 60000, 60000]",
        "data.patch_size=[16384, 16384, 16384]",
        "data.batch_size=1000000000",
        "data.workers=1000000",
        "data.spacing=[1.0e+300, 1, 1]",
        "data.spacing=[1.0e-9, 1.0e-9, 1.0e-9]",
        "network.attention.bottleneck={kind: self_attention, window: [4096, 4096, 4096]}",
        "train.seed=-1",
    ],
)
def test_settings_of_absurd_sizes_are_refused(
    stopped: Path, tmp_path: Path, run: Run, override: str
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(f"data: {{folder: {stopped / 'data'}, patch_size: [16, 16, 16]}}")
    words = ("network.channels=[4, 8, 8]", "trainer.accelerator=cpu", "trainer.precision=32-true")
    refused(run("train", path, *words, override, "--runs", tmp_path / "runs"), ".")


@pytest.mark.parametrize("content", ["[" * 10**5, "9" * 10**5, "{}", "[]", "\0", "NaN"])
@pytest.mark.parametrize("name", ["data/dataset.json", "model/model.json", "five/record"])
def test_json_of_another_kind_is_refused(
    tmp_path: Path, run: Run, stopped: Path, name: str, content: str
) -> None:
    path = tmp_path / name.replace("record", "cross_validation.json")
    path.parent.mkdir()
    path.write_text(content)
    words: dict[str, tuple[str | Path, ...]] = {
        "data": ("check", path.parent),
        "model": ("predict", stopped / "data" / "imagesTr" / "case_0.nii.gz", "--model"),
        "five": ("train", "--resume"),
    }
    command = words[path.parent.name]
    told = run(*command, *([] if command[0] == "check" else [path.parent]))
    refused(told, path.name.replace(".", r"\."))


ESCAPE = "\x1b]0;owned\x07"


def test_control_characters_in_names_never_reach_a_terminal(
    tmp_path: Path, run: Run, stopped: Path
) -> None:
    save_model(tmp_path / "model", small_model())
    changed = put(described(tmp_path / "model"), ("labels",), {"background": 0, ESCAPE: 1})
    (tmp_path / "model" / "model.json").write_text(json.dumps(changed))
    shutil.copytree(stopped / "data", tmp_path / "data")
    content = (tmp_path / "data" / "dataset.json").read_text()
    content = content.replace('"ball"', json.dumps(ESCAPE))
    (tmp_path / "data" / "dataset.json").write_text(content)
    (tmp_path / "config.yaml").write_text('"\\e]0;owned\\a": 1\ndata: {folder: a, patch_size: [8]}')
    scan = scan_at(tmp_path / "scan.nii.gz")
    commands: list[tuple[str | Path, ...]] = [
        ("predict", scan, "--model", tmp_path / "model"),
        ("check", tmp_path / "data"),
        ("check", tmp_path / "config.yaml"),
        ("check", tmp_path / f"{ESCAPE}.nii"),
        ("check", tmp_path / "two\nlines.nii"),
    ]
    for words in commands:
        told = run(*words)
        refused(told, ".")
        assert told[1].removesuffix("\n").isprintable(), told


def test_text_beyond_a_size_limit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("segkit.io.safe_text.MOST_BYTES", 2**20)
    path = tmp_path / "long.json"
    path.write_text(f'"{"a" * (2**20 - 2)}"')
    assert len(read_json(path)) == 2**20 - 2
    path.write_text(path.read_text() + "\n")
    with pytest.raises(ValueError, match="longer than 1 MiB"):
        read_text(path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="not a plain file"):
        read_text(tmp_path / "pipe")


def test_labels_of_an_untrusted_dataset_name_no_file_outside_the_cache(tmp_path: Path) -> None:
    """A case is named by the last part of its label's path, whatever stands before it."""
    folder = small_dataset(tmp_path / "data")
    shutil.move(folder / "labelsTr", tmp_path / "elsewhere")
    content = json.loads((folder / "dataset.json").read_text())
    for entry in content["training"]:
        entry["label"] = entry["label"].replace("./labelsTr", "../elsewhere")
    (folder / "dataset.json").write_text(json.dumps(content))
    before = {path for path in tmp_path.rglob("*")}
    train(small_config(folder), runs=tmp_path / "runs")
    written = {path for path in tmp_path.rglob("*")} - before
    assert all(path.is_relative_to(tmp_path / "runs") for path in written)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_byte_order_mark_is_not_part_of_the_text(tmp_path: Path, encoding: str) -> None:
    folder = small_dataset(tmp_path / "data")
    content = (folder / "dataset.json").read_text()
    (folder / "dataset.json").write_text(content.replace("MRI", "Fläche"), encoding=encoding)
    assert read_dataset(folder).channels == ("Fläche",)
    config = tmp_path / "config.yaml"
    text = f"data: {{folder: {folder}, patch_size: [16, 16, 16]}}\n"
    config.write_text(text, encoding=encoding)
    assert load_config(config).data.folder == folder
    table = tmp_path / "table.csv"
    table.write_text("id,image,label\na,imagesTr/case_0.nii.gz,labelsTr/case_0.nii.gz\n", encoding)
    files = FilesConfig(table=table, labels={"background": 0, "ball": 1})
    assert [case.name for case in read_dataset(folder, files).cases] == ["a"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"labels": {"0": "back', "it is incomplete and ends at line 1, column 18"),
        ('{"labels":\n {"0": "x"},', "it is incomplete and ends at line 2, column 13"),
        ("", "it is incomplete and ends at line 1, column 1"),
        ('{"a": 1,}', "line 1, column 9: "),
        ("{'a': 1}", "line 1, column 2: expecting property name enclosed in double quotes"),
    ],
)
def test_the_error_for_half_a_file_names_the_place(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "dataset.json").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(reason)}"):
        read_json(tmp_path / "dataset.json")
    with pytest.raises(DatasetError, match=rf"cannot be read as JSON: {re.escape(reason)}.*repair"):
        read_dataset(tmp_path)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("name: a\nsteps: 5: 6\n", "line 2: a second ': ' stands in one line"),
        ("name: a\n steps: 5\n", "line 2: a second ': ' stands in one line, or the line is"),
        ("data:\n\tfolder: scans\n", "line 2: a tab indents the line; indent with spaces"),
        ("name: @a\n", "line 1: a value begins with a character that YAML keeps for itself"),
        ("size: [1, 2\n", "line 2: a bracket that was opened is not closed"),
        ("name: 'a\n", "line 2: a quotation mark is not closed; close it"),
        ("- a\nname: b\n", "line 2: the line is indented unlike those beside it"),
        ("folder: scans\nname\n", "line 3: a line has no ':' behind its name"),
        ('folder: "C:\\scans"\n', "line 1: a backslash stands within double quotes"),
        ("names: - a\n", "line 1: a list begins behind a name; begin it on the next line"),
        ("name: !!python/object:os.system a\n", "line 1: a tag such as !!python asks for code"),
        ("a: 1\n---\nb: 2\n", "line 2: a second document begins with '---'"),
    ],
)
def test_an_error_in_yaml_is_reported_with_its_line(text: str, told: str) -> None:
    with pytest.raises(ValueError) as refusal:
        parse_yaml(text)
    assert str(refusal.value).startswith(told) and "\n" not in str(refusal.value)
