"""A resumed run applies each setting that was changed, or refuses it by name; none is ignored."""

import csv
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from torch import Tensor

from segkit.config.base import Section
from segkit.config.load import changed
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.io.safe_text import read_json_object
from segkit.io.volume import read_volume, write_volume
from segkit.training import trainer as trainer_module
from segkit.training.changed_settings import APPLIED, REFUSED, is_one_of
from segkit.training.fit import Run, train
from segkit.training.module import SegmentationModule
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


def leaves(section: type[Section], above: str = "") -> Iterator[str]:
    """The dotted keys of all settings that are not sections of one kind themselves."""
    for name, setting in section.model_fields.items():
        inner = _section(setting.annotation)
        if inner is None:
            yield f"{above}{name}"
        else:
            yield from leaves(inner, f"{above}{name}.")


def _section(annotation: Any) -> type[Section] | None:
    """The section that a setting is, if it is nothing else, apart from null."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    inside = get_args(annotation)
    if get_origin(annotation) is Annotated:
        return _section(inside[0])
    kinds = [each for each in inside if each is not type(None)]
    is_union = get_origin(annotation) in (Union, UnionType)
    return _section(kinds[0]) if is_union and len(kinds) == 1 else None


ALL = frozenset(leaves(Config))

# Runs of four of six steps, whose next step shows what a setting does. The words of a table may
# name cases (TRAINED, HELD_OUT) and the folder of the data (DATA).
ALL_TERMS = (
    "{dice: 1, focal: 1, top_k: 1, tversky: 1, focal_tversky: 1, boundary: 1, centre_line: 1}"
)
BEGUN: dict[str, list[str]] = {
    "adamw": [],
    "sgd": ["train.optimiser=sgd"],
    "muon": ["train.optimiser=muon", "train.schedule=cosine"],
    "terms": [f"train.loss.terms={ALL_TERMS}"],
    "deep": ["network.channels=[4, 8, 8, 8]"],
    "two classes": ["data.labels={background: 0, ball: 1, other: 2}"],
    "files": [
        "data.files.images={MRI: imagesTr/*.nii.gz}",
        "data.files.label=labelsTr/*.nii.gz",
        "data.files.labels={background: 0, ball: 1}",
    ],
}
STEPS = {"steps": 6, "validate_every": 2}


def squared(data: Path, to: str) -> None:
    """The same cases with other intensities."""
    for path in sorted((data / "imagesTr").iterdir()):
        volume = read_volume(path)
        write_volume(data / to / path.name, volume.like(volume.data**2))


def shifted(data: Path, to: str) -> None:
    """The same cases with other labels."""
    for path in sorted((data / "labelsTr").iterdir()):
        volume = read_volume(path)
        write_volume(data / to / path.name, volume.like(np.roll(volume.data, 3, 0)))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = small_dataset(tmp_path_factory.mktemp("settings") / "data")
    squared(folder, "squared")
    shifted(folder, "shifted")
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    shutil.rmtree(other / "imagesTr")
    (other / "squared").rename(other / "imagesTr")
    names = sorted(path.name for path in (folder / "imagesTr").iterdir())
    rows = [f"{name[:-7]},squared/{name},labelsTr/{name}" for name in names]
    (folder / "cases.csv").write_text("\n".join(["id,image,label", *rows, ""]))
    weights = [f"{name[:-7]},{number * 5}" for number, name in enumerate(names)]
    (folder / "weights.csv").write_text("\n".join(["id,weight", *weights, ""]))
    return folder


@pytest.fixture(scope="module")
def begun(data: Path) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            config = small_config(data, train=STEPS)
            runs = data.parent / kind
            with pytest.raises(StoppedError):
                train(changed(config, BEGUN[kind]), runs=runs, callbacks=[StopAfter(5)])
            made[kind] = runs / "small"
        return made[kind]

    return of


class NextStep(Callback):
    """Notes the next step of a resumed run, and then stops the run."""

    weights: Tensor
    batch: tuple[int, ...]
    trainer: L.Trainer
    data: Any
    decides: bool
    """Whether it is measured if a step should be compiled."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.trainer, self.data = trainer, trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(pl_module, SegmentationModule)
        self.decides = pl_module.compiled.deciding

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.batch = tuple(batch["image"].shape)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *details: Any
    ) -> None:
        if trainer.global_step == 5:
            found = [weight.detach().flatten() for weight in pl_module.parameters()]
            self.weights = torch.cat(found)
            raise StoppedError


@dataclass
class Resumed:
    """What a run did with changed settings."""

    folder: Path
    next: NextStep
    run: Run | None = None
    given_to_lightning: dict[str, Any] = field(default_factory=dict)


Effect = Callable[[Resumed, Resumed], bool]
"""Whether a setting did something, from the run with it and the one without."""


def other_weights(found: Resumed, before: Resumed) -> bool:
    return not torch.equal(found.next.weights, before.next.weights)


def smaller_batch(axis: int) -> Effect:
    return lambda found, before: found.next.batch[axis] < before.next.batch[axis]


def lightning_has(name: str, value: Any) -> Effect:
    return lambda found, before: (
        found.given_to_lightning[name] == value != before.given_to_lightning[name]
    )


def described(name: str) -> Effect:
    def told(found: Resumed, before: Resumed) -> bool:
        texts = [read_json_object(each.folder / "model" / "model.json") for each in (found, before)]
        return bool(texts[0][name] != texts[1][name])

    return told


def workers(found: Resumed, before: Resumed) -> bool:
    return bool(found.next.data.workers == 1 != before.next.data.workers)


def cached_elsewhere(found: Resumed, before: Resumed) -> bool:
    return any((found.folder.parents[1] / "elsewhere").iterdir())


def compiled(found: Resumed, before: Resumed) -> bool:
    return found.next.decides and not before.next.decides


def stops_early(found: Resumed, before: Resumed) -> bool:
    stops = [
        [each for each in one.next.trainer.callbacks if isinstance(each, EarlyStopping)]  # type: ignore[attr-defined]
        for one in (found, before)
    ]
    return len(stops[0]) == 1 and not stops[1]


def rows(found: Resumed) -> list[str]:
    table = csv.DictReader((found.folder / "metrics.csv").read_text().splitlines())
    return [row["step"] for row in table if row["validation/dice"]]


# What is seen only at the end of a run, which is then trained to its end.
AT_END: dict[str, Effect] = {
    "train.validate_every": lambda found, before: rows(found) == ["1", "3", "4"],
    "train.validation_cases": lambda found, before: rows(found) == ["1", "3"],
    "train.pictures": lambda found, before: not (found.folder / "samples/step_000006.png").exists(),
    "train.keep_held_out": lambda found, before: any((found.folder / "held_out").iterdir()),
    "train.calibrate": lambda found, before: "temperature" in found.run.summary,  # type: ignore[union-attr]
}  # fmt: skip

# Each setting that a run applies: the run, the words, and what shows that they did something.
Row = tuple[str, list[str], Effect]
APPLIED_BY: dict[str, Row] = {
    "data.folder": ("adamw", ["data.folder=OTHER"], other_weights),
    "data.files.images": ("files", ["data.files.images={MRI: squared/*.nii.gz}"], other_weights),
    "data.files.label": ("files", ["data.files.label=shifted/*.nii.gz"], other_weights),
    "data.files.table": (
        "files",
        ["data.files={table: cases.csv, images: {MRI: image}, label: label, labels: "
         "{background: [0], ball: [1]}}"],
        other_weights,
    ),
    "data.files.codes": (
        "files",
        ["data.files.codes={ball: {scheme: SCT, value: 1, meaning: Ball}}"],
        described("codes"),
    ),
    "data.nan": ("adamw", ["data.nan=background"], described("nan")),
    "data.case_table": (
        "adamw",
        ["data.case_table=weights.csv", "data.draw_cases={column: weight}"],
        other_weights,
    ),
    "data.labelled": ("two classes", ["data.labelled={TRAINED: [ball]}"], other_weights),
    "data.patch_size": ("adamw", ["data.patch_size=[16,16,8]"], smaller_batch(4)),
    "data.batch_size": ("adamw", ["data.batch_size=1"], smaller_batch(0)),
    "data.foreground_share": ("adamw", ["data.foreground_share=1.0"], other_weights),
    "data.draw_cases": ("adamw", ["data.draw_cases={TRAINED: 0}"], other_weights),
    "data.draw_classes": ("adamw", ["data.draw_classes={ball: 2.0}"], other_weights),
    "data.augment": ("adamw", ["data.augment=false"], other_weights),
    "data.augment_share": ("adamw", ["data.augment_share=0.5"], other_weights),
    "data.elastic": ("adamw", ["data.elastic=true"], other_weights),
    "data.mirror": ("adamw", ["data.mirror=[x,y,z]"], other_weights),
    "data.synthesis.intensities": (
        "adamw",
        ["data.synthesis.intensities={ball: [0.9, 1]}"],
        other_weights,
    ),
    "data.synthesis.deformation": ("adamw", ["data.synthesis.deformation=1"], other_weights),
    "data.workers": ("adamw", ["data.workers=1"], workers),
    "data.cache": ("adamw", ["data.cache=ELSEWHERE"], cached_elsewhere),
    "train.steps": ("adamw", ["train.steps=60"], other_weights),
    "train.adamw.highest_momentum": ("adamw", ["train.adamw.highest_momentum=0.9"], other_weights),
    "train.adamw.lowest_momentum": ("adamw", ["train.adamw.lowest_momentum=0.5"], other_weights),
    "train.adamw.square_decay": ("adamw", ["train.adamw.square_decay=0.9"], other_weights),
    "train.adamw.epsilon": ("adamw", ["train.adamw.epsilon=0.1"], other_weights),
    "train.sgd.momentum": ("sgd", ["train.sgd.momentum=0.5"], other_weights),
    "train.sgd.nesterov": ("sgd", ["train.sgd.nesterov=false"], other_weights),
    "train.muon.momentum": ("muon", ["train.muon.momentum=0.5"], other_weights),
    "train.muon.nesterov": ("muon", ["train.muon.nesterov=false"], other_weights),
    "train.muon.iterations": ("muon", ["train.muon.iterations=1"], other_weights),
    "train.schedule": ("adamw", ["train.schedule=cosine"], other_weights),
    "train.one_cycle.rise": ("adamw", ["train.one_cycle.rise=0.9"], other_weights),
    "train.one_cycle.rise_factor": ("adamw", ["train.one_cycle.rise_factor=1"], other_weights),
    "train.one_cycle.fall_factor": ("adamw", ["train.one_cycle.fall_factor=1"], other_weights),
    "train.polynomial.power": ("sgd", ["train.polynomial.power=3"], other_weights),
    "train.cosine.warm_up": ("muon", ["train.cosine.warm_up=0.9"], other_weights),
    "train.cosine.lowest": ("muon", ["train.cosine.lowest=0.5"], other_weights),
    "train.learning_rate": ("adamw", ["train.learning_rate=0.1"], other_weights),
    "train.weight_decay": ("adamw", ["train.weight_decay=0.9"], other_weights),
    "train.gradient_clip": ("sgd", ["train.gradient_clip=0.001"], other_weights),
    "train.loss.terms": ("adamw", ["train.loss.terms={focal: 1}"], other_weights),
    "train.loss.class_weights": ("adamw", ["train.loss.class_weights={ball: 9}"], other_weights),
    "train.loss.level_weights": ("deep", ["train.loss.level_weights=[1, 3]"], other_weights),
    "train.loss.focal_gamma": ("terms", ["train.loss.focal_gamma=5"], other_weights),
    "train.loss.top_share": ("terms", ["train.loss.top_share=0.5"], other_weights),
    "train.loss.false_positives": ("terms", ["train.loss.false_positives=0.9"], other_weights),
    "train.loss.false_negatives": ("terms", ["train.loss.false_negatives=0.1"], other_weights),
    "train.loss.focal_tversky_gamma": (
        "terms",
        ["train.loss.focal_tversky_gamma=3"],
        other_weights,
    ),
    "train.loss.boundary_reach": ("terms", ["train.loss.boundary_reach=1"], other_weights),
    "train.loss.centre_line_iterations": (
        "terms",
        ["train.loss.centre_line_iterations=1"],
        other_weights,
    ),
    "train.batch_dice": ("adamw", ["train.batch_dice=true"], other_weights),
    "train.validate_every": ("adamw", ["train.validate_every=5"], AT_END["train.validate_every"]),
    "train.validation_cases": (
        "adamw",
        ["train.validation_cases=0"],
        AT_END["train.validation_cases"],
    ),
    "train.pictures": ("adamw", ["train.pictures=0"], AT_END["train.pictures"]),
    "train.patience": ("adamw", ["train.patience=1"], stops_early),
    "train.freeze": ("adamw", ["train.freeze={'encoder*': 9}"], other_weights),
    "train.keep_held_out": ("adamw", ["train.keep_held_out=labels"], AT_END["train.keep_held_out"]),
    "train.calibrate": ("adamw", ["train.calibrate=true"], AT_END["train.calibrate"]),
    "trainer.devices": ("adamw", ["trainer.devices=2"], lightning_has("devices", 2)),
    "trainer.precision": ("adamw", ["trainer.precision=bf16-mixed"], other_weights),
    "trainer.strategy": ("adamw", ["trainer.strategy=ddp"], lightning_has("strategy", "ddp")),
    "trainer.num_nodes": ("adamw", ["trainer.num_nodes=2"], lightning_has("num_nodes", 2)),
    "trainer.max_time": (
        "adamw",
        ["trainer.max_time='00:01:00:00'"],
        lightning_has("max_time", "00:01:00:00"),
    ),
    "trainer.accumulate_grad_batches": (
        "adamw",
        ["trainer.accumulate_grad_batches=2"],
        other_weights,
    ),
    "trainer.deterministic": (
        "adamw",
        ["trainer.deterministic=warn"],
        lightning_has("deterministic", "warn"),
    ),
    "trainer.compile": ("adamw", ["trainer.compile=auto"], compiled),
}  # fmt: skip
STARTS_OTHERS = ("trainer.devices", "trainer.num_nodes", "trainer.strategy")
"""Settings that would start other processes, so that the run ends when its trainer is made."""

# Each setting that a run refuses, and a value of it that is valid.
REFUSED_WORDS: dict[str, str | tuple[str, ...]] = {
    "name": "other",
    "data.files.labels": "{background: 0, other: 1}",
    "data.files.regions_class_order": "[1]",
    "data.labels": "{background: 0, other: 1}",
    "data.regions_class_order": "[1]",
    "data.test": "[TRAINED]",
    "data.validation": "[TRAINED]",
    "data.fold": "1",
    "data.num_folds": "3",
    "data.splits": "[{train: [TRAINED], val: [HELD_OUT]}]",
    "data.group_by": "subject",
    "data.stratify_by": "classes",
    "data.dicom.images": "{MRI: {modality: MR}}",
    "data.dicom.label.modality": "SEG",
    "data.dicom.label.description": "['*']",
    "data.dicom.label.folder": "['*']",
    "data.dicom.structures": "{ball: ['*']}",
    "data.dicom.absent": "background",
    "data.dicom.cases": "patient",
    "data.pictures.pixel_size": "1 mm",
    "data.pictures.pages": "slices",
    "data.pictures.label_colours": "{ball: '#ff0000'}",
    "data.spacing": "[2, 2, 2]",
    "data.interpolation": "linear",
    "data.normalisation": "ct",
    "data.slices": "coronal",
    "data.first_stage": "[runs/other]",
    "network.spatial_dims": (
        "network={spatial_dims: 2, channels: [4, 8, 8]}",
        "data.patch_size=[16, 16]",
    ),
    "network.channels": "[4, 8, 16]",
    "network.strides": "[[2, 2, 1], [2, 2, 2]]",
    "network.kernels": "[[1, 3, 3], [3, 3, 3], [3, 3, 3]]",
    "network.block": "mednext",
    "network.normalisation": "group",
    "network.downsampling": "pool",
    "network.deep_supervision": "false",
    "network.attention.skip": "additive_same_level",
    "network.attention.encoder": "se",
    "network.attention.decoder": "se",
    "network.attention.bottleneck": "self_attention",
    "network.attention.head": "mean",
    "network.given.multiple": ("network={given: {multiple: [4, 4, 4]}}",),
    "network.given.name": ("network={given: {multiple: [4, 4, 4], name: mine}}",),
    "train.optimiser": "sgd",
    "train.minutes": "5",
    "train.averaging": "0.9",
    "train.start_from": "runs/other",
    "train.other_channels": "zero",
    "train.seed": "1",
    "replaced": "[loss]",
}
NOT_HERE = {"trainer.loggers", "trainer.accelerator"}
"""Applied, but they need packages and devices that a machine may lack; they have own tests."""


def test_each_setting_is_in_exactly_one_table() -> None:
    tables = [set(APPLIED_BY), set(REFUSED_WORDS), NOT_HERE]
    assert set().union(*tables) == ALL
    assert sum(map(len, tables)) == len(ALL)
    assert {key for key in ALL if is_one_of(key, REFUSED)} == set(REFUSED_WORDS)
    assert all(is_one_of(key, APPLIED) for key in (*APPLIED_BY, *NOT_HERE))


def filled(word: str, run: Path, data: Path) -> str:
    split = read_json_object(run / "split.json")
    for name, value in (
        ("TRAINED", split["train"][0]),
        ("HELD_OUT", split["held_out"][0]),
        ("OTHER", data.parent / "other"),
        ("ELSEWHERE", run.parents[1] / "elsewhere"),
    ):
        word = word.replace(name, str(value))
    return word


def resumed(
    begun: Path, data: Path, words: list[str], runs: Path, monkeypatch: pytest.MonkeyPatch,
    *, to_end: bool = False, ends_with_trainer: bool = False,
) -> Resumed:  # fmt: skip
    """A copy of a run, resumed with these words until its next step, or to its end."""
    run = Path(shutil.copytree(begun, runs / "runs" / "small"))
    found = Resumed(run, NextStep())
    made = L.Trainer

    def noted(**settings: Any) -> L.Trainer:
        found.given_to_lightning = settings
        if ends_with_trainer:
            raise StoppedError
        return made(**settings)

    monkeypatch.setattr(trainer_module.L, "Trainer", noted)
    words = [filled(word, run, data) for word in words]
    if to_end:
        found.run = resume(run, overrides=words)
    else:
        with pytest.raises(StoppedError):
            resume(run, overrides=words, callbacks=[found.next])
    monkeypatch.undo()
    return found


@pytest.fixture(scope="module")
def unchanged(
    begun: Callable[[str], Path], data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Resumed]:
    made: dict[str, Resumed] = {}

    def of(kind: str) -> Resumed:
        if kind not in made:
            folder = tmp_path_factory.mktemp(f"unchanged_{kind}")
            with pytest.MonkeyPatch.context() as patch:
                made[kind] = resumed(begun(kind), data, [], folder, patch)
        return made[kind]

    return of


FAST = (
    "train.learning_rate",
    "data.interpolation",
    "network.block",
    "train.other_channels",
    "train.sgd.momentum=0.5",
    "train.loss.focal_gamma=5",
)
"""Rows that are tried each time; the others are slow, as there are many."""


def mostly_slow(keys: Iterable[str]) -> list[Any]:
    return [pytest.param(key, marks=[pytest.mark.slow] * (key not in FAST)) for key in keys]


@pytest.mark.parametrize("key", mostly_slow(APPLIED_BY))
def test_a_setting_that_may_change_does_what_it_says_from_the_next_step_on(
    key: str, begun: Callable[[str], Path], unchanged: Callable[[str], Resumed], data: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    kind, words, effect = APPLIED_BY[key]
    found = resumed(
        begun(kind), data, words, tmp_path, monkeypatch,
        to_end=key in AT_END, ends_with_trainer=key in STARTS_OTHERS,
    )  # fmt: skip
    assert effect(found, unchanged(kind)), f"{words} changed nothing"


@pytest.mark.parametrize("key", mostly_slow(REFUSED_WORDS))
def test_a_setting_that_a_run_keeps_is_refused_in_one_sentence(
    key: str, begun: Callable[[str], Path], data: Path
) -> None:
    run = begun("files" if key.startswith("data.files") else "adamw")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    value = REFUSED_WORDS[key]
    words = (f"{key}={value}",) if isinstance(value, str) else value
    with pytest.raises(ConfigError) as told:
        resume(run, overrides=[filled(word, run, data) for word in words])
    text = str(told.value)
    assert "; " in text and "\n" not in text and ". " not in text.replace("... ", "")
    if key != "replaced":
        named = [".".join(key.split(".")[:count]) for count in range(1, key.count(".") + 2)]
        assert any(f"{name} was changed from" in text for name in named), text
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


UNUSED = {
    "train.sgd.momentum=0.5": "train.optimiser is adamw",
    "train.muon.iterations=1": "train.optimiser is adamw",
    "train.polynomial.power=3": "train.schedule is one_cycle",
    "train.cosine.lowest=0.5": "train.schedule is one_cycle",
    "train.loss.focal_gamma=5": "train.loss.terms has none of focal",
    "train.loss.boundary_reach=1": "train.loss.terms has none of boundary",
    "data.case_table=weights.csv": "no setting names one of its columns",
}


@pytest.mark.parametrize("word", mostly_slow(UNUSED))
def test_a_change_that_would_do_nothing_is_refused(word: str, begun: Callable[[str], Path]) -> None:
    key = word.partition("=")[0]
    with pytest.raises(
        ConfigError, match=f"{key} was changed, but this has no effect, because {UNUSED[word]}; "
    ):
        resume(begun("adamw"), overrides=[word])


@pytest.mark.slow
def test_a_change_that_another_one_brings_into_use_is_applied(
    begun: Callable[[str], Path], unchanged: Callable[[str], Resumed], data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With focal as a term, focal_gamma counts; 0 makes it the cross-entropy."""
    words = ["train.loss.terms={focal: 1}", "train.loss.focal_gamma=0"]
    found = resumed(begun("adamw"), data, words, tmp_path / "both", monkeypatch)
    other = resumed(begun("adamw"), data, words[:1], tmp_path / "one", monkeypatch)
    assert other_weights(found, unchanged("adamw")) and other_weights(found, other)


@pytest.mark.slow
def test_a_tracker_that_is_not_installed_is_told(begun: Callable[[str], Path]) -> None:
    if find_spec("wandb") is not None:
        pytest.skip("wandb is installed")
    with pytest.raises(ConfigError, match="wandb"):
        resume(begun("adamw"), overrides=["trainer.loggers=[wandb]"])


@pytest.mark.slow
def test_a_device_that_is_not_here_is_told(
    begun: Callable[[str], Path], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    if torch.backends.mps.is_available():
        pytest.skip("this machine has such a device")
    resumed(begun("adamw"), data, ["trainer.accelerator=mps"], tmp_path, monkeypatch)
    assert "trainer.accelerator is mps, but this machine has none" in caplog.text
