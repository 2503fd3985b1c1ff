"""A shared model: its files, its card, what leaves and what does not."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image, PngImagePlugin
from safetensors.torch import load_file, save_file

from segkit.config.load import dump_yaml, load_config
from segkit.config.training import Config
from segkit.errors import ModelError
from segkit.export.push import push_model
from segkit.io.atomic import write_json
from segkit.io.checksums import checksum
from segkit.model.folder import load_description, load_model, model_folders, save_model
from tests.hub import TOKEN, Hub
from tests.models import model_of
from tests.small import small_config

PATIENTS = ("Doe_John_19700101", "Mustermann_Erika", "Roe_Jane")
CLINIC = "Kreiskrankenhaus_Nord"
HAND_MADE = {"one": [0.5, 0.7, 0.9], "two": [0.2, None, 0.4]}


def make_run(folder: Path, dice: dict[str, list[float | None]] = HAND_MADE) -> Path:
    """A run as training leaves it, with names of patients and a clinic wherever one may be."""
    save_model(folder / "model", model_of({"skip": "additive_grid"}, 3))
    config = small_config(
        folder / CLINIC,
        data={
            "validation": list(PATIENTS),
            "cache": str(folder / CLINIC / "cache"),
            "splits": [{"train": [PATIENTS[0]], "val": list(PATIENTS[1:])}],
            "group_by": {"pattern": "(Doe|Roe)_.*"},
            "draw_cases": {PATIENTS[0]: 2.0},
            "labelled": {PATIENTS[1]: ["one"]},
            "test": [PATIENTS[2]],
            "case_table": f"{CLINIC}/patients.csv",
            "spacing": [1.0, 1.5, 2.0],
        },
        train={"start_from": str(folder / CLINIC / "runs" / "before"), "learning_rate": 0.002},
    ).model_copy(update={"name": CLINIC})
    (folder / "config.yaml").write_text(f"# {PATIENTS[0]} is the largest\n{dump_yaml(config)}")
    write_json(folder / "split.json", {"train": [PATIENTS[0]], "held_out": list(PATIENTS[1:])})
    cases = {
        name: {label: values[place] for label, values in dice.items()}
        for place, name in enumerate(PATIENTS)
    }
    write_json(
        folder / "summary.json",
        {
            "run": CLINIC,
            "steps": 1000,
            "seconds_of_training": 12.5,
            "parameters": 12345,
            "seed": 7,
            "training_cases": 20,
            "validation": {
                "cases": 3, "dice": dict.fromkeys(dice, 0.0), "dice_of_cases": cases,
                "held_out": list(PATIENTS),
            },
            "start_from": {"model": str(folder / CLINIC), "told": f"copied from {CLINIC}"},
            "environment": {"device": "cpu"},
            "versions": {"torch": "2.13.0"},
        },
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp(CLINIC) / "run")


@pytest.fixture
def token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> str:
    """A token that the hub knows; large files go by the protocol that the hub of the tests has."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return TOKEN


def verdicts_of(run: Path, folder: Path, **changes: object) -> Path:
    """A file as `segkit explain --verdicts` writes it over four scans."""
    row = {
        "map": "skip.1/gate",
        "channel": 0,
        "structure": "one",
        "direction": "lets through",
        "word": "informative",
        "reason": "Over 4 scans, the gate lets one through, the network needs it.",
        "figures": {"AUROC": 0.9},
    }
    weights = checksum(run / "model" / "weights.safetensors")
    content = {
        "scans": 4,
        "made": {"scans left out": f"{PATIENTS[0]}.nii.gz: too small"},
        "provenance": {
            "models": [{"run": CLINIC, "weights.safetensors": weights}],
            "inputs": [{"file": f"{PATIENTS[0]}.nii.gz", "sha256": "0"}],
        },
        "verdicts": [row, {**row, "structure": "two", "word": "uninformative"}],
        "evidence": [{"case": name} for name in PATIENTS],
        **changes,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "cohort.json", content)
    return folder


def picture_with_notes(path: Path) -> np.ndarray:
    """A picture whose file names a patient, and its pixels."""
    pixels = np.random.default_rng(0).integers(0, 255, (6, 8, 3), np.uint8)
    notes = PngImagePlugin.PngInfo()
    notes.add_text("Patient", PATIENTS[0])
    exif = Image.Exif()
    exif[0x010E] = PATIENTS[1]
    Image.fromarray(pixels).save(path, pnginfo=notes, exif=exif)
    assert PATIENTS[0].encode() in path.read_bytes()
    return pixels


def private_words(run: Path) -> list[bytes]:
    words = [*PATIENTS, CLINIC, "Doe_", "Mustermann", str(run), str(run.parent), str(Path.home())]
    return [word.encode() for word in words]


def test_a_folder_holds_the_model_its_settings_its_scores_and_its_card(
    run: Path, tmp_path: Path
) -> None:
    pushed = push_model(run, tmp_path / "brains")
    names = ["README.md", "SHA256SUMS", "config.yaml", "model.json", "scores.json"]
    assert pushed.files == (*names, "weights.safetensors")
    assert (pushed.place, pushed.commit) == (str(tmp_path / "brains"), None)
    weights = tmp_path / "brains" / "weights.safetensors"
    assert weights.read_bytes() == (run / "model" / weights.name).read_bytes()
    before, after = load_description(run / "model"), load_description(tmp_path / "brains")
    assert after == before.model_copy(update={"run": "brains"})
    sums = (tmp_path / "brains" / "SHA256SUMS").read_text()
    expected = {hashlib.sha256(weights.read_bytes()).hexdigest(): weights.name}
    expected[checksum(tmp_path / "brains" / "model.json")] = "model.json"
    assert dict(line.split("  ") for line in sums.splitlines()) == expected
    load_model(tmp_path / "brains")


def test_nothing_private_is_in_any_byte_of_a_folder(run: Path, tmp_path: Path) -> None:
    picture = tmp_path / f"{PATIENTS[0]}.png"
    pixels = picture_with_notes(picture)
    verdicts = verdicts_of(run, tmp_path / CLINIC)
    push_model(run, tmp_path / "brains", picture=picture, verdicts=verdicts, licence="mit")
    files = [path for path in (tmp_path / "brains").rglob("*") if path.is_file()]
    assert len(files) == 8
    for path in files:
        for word in private_words(run):
            assert word.lower() not in path.read_bytes().lower(), (path.name, word)
            assert word.decode().lower() not in path.name.lower()
    shared = Image.open(tmp_path / "brains" / "picture.png")
    assert np.array_equal(np.asarray(shared), pixels) and not shared.info


def test_no_image_is_shared_unless_one_is_given(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    (copied / "samples").mkdir()
    picture_with_notes(copied / "samples" / "step_10.png")
    (copied / "metrics.csv").write_text("step\n")
    pushed = push_model(copied, tmp_path / "brains")
    assert not [name for name in pushed.files if name.endswith((".png", ".csv"))]
    assert "![" not in (tmp_path / "brains" / "README.md").read_text()


def test_notes_in_the_header_of_weights_are_dropped(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    weights = copied / "model" / "weights.safetensors"
    save_file(load_file(weights), weights, {"trained_on": PATIENTS[0]})
    assert PATIENTS[0].encode() in weights.read_bytes()
    push_model(copied, tmp_path / "brains")
    shared = tmp_path / "brains" / "weights.safetensors"
    assert PATIENTS[0].encode() not in shared.read_bytes()
    before, after = load_file(weights), load_file(shared)
    assert before.keys() == after.keys() and all((before[k] == after[k]).all() for k in before)


def test_the_shared_config_has_the_settings_but_not_those_of_files(
    run: Path, tmp_path: Path
) -> None:
    push_model(run, tmp_path / "brains")
    own = load_config(run / "config.yaml")
    shared = load_config(tmp_path / "brains" / "config.yaml", ["data.folder=/elsewhere"])
    assert (shared.network, shared.name) == (own.network, "brains")
    assert shared.train == own.train.model_copy(update={"start_from": None})
    assert shared.data.spacing == (1.0, 1.5, 2.0)
    assert shared.data.patch_size == own.data.patch_size
    assert shared.data.validation == 0.2 and shared.data.splits is None
    assert isinstance(shared, Config)


def test_the_card_has_each_class_with_its_interval(run: Path, tmp_path: Path) -> None:
    push_model(run, tmp_path / "brains")
    card = (tmp_path / "brains" / "README.md").read_text()
    # Three cases: each of 27 resamples is drawn with probability 1/27 = 3.7 %, so the middle 95 %
    # reach from the smallest score to the largest. Two cases: likewise.
    assert "| one | Dice | 0.700 | 0.500 to 0.900 | 3 |" in card
    assert "| two | Dice | 0.300 | 0.200 to 0.400 | 2 |" in card
    assert "| mean over classes | Dice | 0.500 |" in card
    assert "The model was trained on 20 cases; 3 others were held out" in card
    assert "| steps | 1,000 |" in card and "| weights of the network | 12,345 |" in card
    assert "| attention | skip: additive_grid |" in card
    assert "| optimiser | adamw, schedule one_cycle |" in card
    told = json.loads((tmp_path / "brains" / "scores.json").read_text())
    assert told["held_out"]["classes"]["one"]["dice"]["mean"] == pytest.approx(0.7)
    assert told["held_out"]["classes"]["two"]["dice"]["num_undefined"] == 1
    assert told["training"]["training_cases"] == 20


def test_one_score_has_no_interval(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {"one": [0.5, None, None], "two": [None, None, None]})
    push_model(run, tmp_path / "brains")
    card = (tmp_path / "brains" / "README.md").read_text()
    assert "| one | Dice | 0.500 | – | 1 |" in card and "| two | Dice | – | – | 0 |" in card


def test_the_card_has_the_authors_statements_and_lists_the_missing_ones(
    run: Path, tmp_path: Path
) -> None:
    push_model(run, tmp_path / "silent")
    card = (tmp_path / "silent" / "README.md").read_text()
    assert "Without a licence, nobody but the author" in card
    assert "not a medical device" in card and "gives no warning" in card
    assert "Source of the training data: the author has not stated it." in card
    _, header, _ = card.split("---\n", 2)
    assert "license" not in yaml.safe_load(header)
    words = {
        "data": "MRI of *twenty* volunteers.",
        "intended_use": "Volumetry.",
        "limits": "Fails on children.",
    }
    for licence, written in {
        "CC-BY-4.0": {"license": "cc-by-4.0"},
        "our own": {"license": "other", "license_name": "our own"},
    }.items():
        push_model(run, tmp_path / "b", licence=licence, overwrite=True, **words)  # type: ignore[arg-type]
        card = (tmp_path / "b" / "README.md").read_text()
        assert all(text in card for text in (*words.values(), licence))
        header = yaml.safe_load(card.split("---\n", 2)[1])
        assert header | written == header
        assert (header["library_name"], header["pipeline_tag"]) == ("segkit", "image-segmentation")


def test_verdicts_on_this_model_are_found_in_its_run_and_those_of_another_are_refused(
    run: Path, tmp_path: Path
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    verdicts_of(run, copied / "explained" / "all")
    push_model(copied, tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| skip.1/gate | one | informative | Over 4 scans, the gate lets one through" in card
    rows = json.loads((tmp_path / "a" / "verdicts.json").read_text())
    assert (rows["scans"], [row["structure"] for row in rows["verdicts"]]) == (4, ["one", "two"])
    told = json.loads((copied / "explained" / "all" / "cohort.json").read_text())
    (tmp_path / "one").mkdir()
    of_one_scan = {"worth": {"verdicts": told["verdicts"][:1]}, "provenance": told["provenance"]}
    write_json(tmp_path / "one" / "measures.json", of_one_scan)
    push_model(run, tmp_path / "one_scan", verdicts=tmp_path / "one")
    assert "Over 1 scan, the best verdict" in (tmp_path / "one_scan" / "README.md").read_text()
    provenance = {"models": [{"run": "x", "weights.safetensors": "0" * 64}]}
    other = verdicts_of(run, tmp_path / "other", provenance=provenance)
    with pytest.raises(
        ModelError, match="verdicts on the gates of this model, found those of another model"
    ):
        push_model(run, tmp_path / "b", verdicts=other)
    with pytest.raises(ModelError, match="found none"):
        push_model(run, tmp_path / "b", verdicts=verdicts_of(run, tmp_path / "none", verdicts=[]))
    assert not (tmp_path / "b").exists()


def test_the_folds_of_a_cross_validation_are_pushed_together(tmp_path: Path) -> None:
    for fold in range(2):
        make_run(tmp_path / "cv" / f"fold_{fold}")
    summary = json.loads((tmp_path / "cv" / "fold_0" / "summary.json").read_text())
    write_json(
        tmp_path / "cv" / "summary.json",
        {"steps": 2000, "validation": {**summary["validation"], "note": "before post-processing"}},
    )
    pushed = push_model(tmp_path / "cv", tmp_path / "brains")
    assert "fold_1/model/weights.safetensors" in pushed.files
    assert len(model_folders(tmp_path / "brains")) == 2
    card = (tmp_path / "brains" / "README.md").read_text()
    assert "2 models, whose predictions are averaged" in card and "3 cases in 2 folds" in card
    assert "Note: before post-processing." in card and "| seed | 7 |" in card
    alone = push_model(tmp_path / "cv" / "fold_1", tmp_path / "alone")
    assert "weights.safetensors" in alone.files


def test_a_model_folder_is_pushed_without_the_facts_that_only_a_run_has(
    run: Path, tmp_path: Path
) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(run / "model", bare)
    pushed = push_model(bare, tmp_path / "brains")
    assert pushed.files == ("README.md", "SHA256SUMS", "model.json", "weights.safetensors")
    card = (tmp_path / "brains" / "README.md").read_text()
    assert "None were shared." in card and "is not known, because only the model" in card
    assert "scores.json" in push_model(run / "model", tmp_path / "of_run").files


def test_a_push_that_is_refused_says_so_in_one_sentence(run: Path, tmp_path: Path) -> None:
    (tmp_path / "not.png").write_text("no picture")
    (tmp_path / "not.json").write_text("{}")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").write_text("")
    begun = tmp_path / "begun"
    shutil.copytree(run, begun)
    (begun / "model" / "weights.safetensors").unlink()
    to = tmp_path / "brains"
    for call, sentence in {
        lambda: push_model(tmp_path / "nothing", to): "expected a run or a model folder",
        lambda: push_model(begun, to): "found none; let its training end first",
        lambda: push_model(run, to, picture=tmp_path / "not.png"): "cannot be read as a picture",
        lambda: push_model(run, to, scores=tmp_path / "not.json"): "cannot be read as scores",
        lambda: push_model(run, to, verdicts=tmp_path): "cannot be read as verdicts",
        lambda: push_model(run, tmp_path / "taken"): "exists already; pass --overwrite",
        lambda: push_model(run, tmp_path / "taken", overwrite=True): "expected a shared mod",
        lambda: push_model(run, "hf:clinic"): "expected hf:OWNER/NAME",
        lambda: push_model(run, "hf:clinic/brains@v1"): "without a revision",
        lambda: push_model(
            run, "https://a.org/m.zip"
        ): "expected hf:OWNER/NAME without a revision, or a folder",
    }.items():
        with pytest.raises(ModelError, match=sentence):
            call()
        assert not to.exists()
    assert (tmp_path / "taken" / "thesis.tex").exists()


def test_a_pushed_model_is_loaded_back_and_nothing_private_was_sent(
    hub: Hub, token: str, run: Path, tmp_path: Path
) -> None:
    pushed = push_model(run, "hf:clinic/brains", licence="cc-by-4.0", private=True)
    assert pushed.place == f"{hub.url}/clinic/brains"
    assert pushed.commit == hub.branches["clinic/brains"]["main"]
    files = hub.files("clinic/brains")
    assert set(pushed.files) == set(files) - {".gitattributes"}
    assert "clinic/brains" in hub.private
    push_model(run, tmp_path / "brains", licence="cc-by-4.0")
    for name in set(pushed.files) - {"README.md"}:
        assert files[name] == (tmp_path / "brains" / name).read_bytes(), name
    assert b"--model hf:clinic/brains\n" in files["README.md"]
    loaded = load_model("hf:clinic/brains")
    assert loaded.description == load_description(tmp_path / "brains")
    assert len(hub.received) > 5
    for content in (*hub.received, *files.values(), *hub.large.values()):
        for word in private_words(run):
            assert word.lower() not in content.lower(), word


def test_another_version_is_a_new_commit_and_only_if_that_is_asked_for(
    hub: Hub, token: str, run: Path
) -> None:
    stale = {"fold_4/model/model.json": b"{}", "first/0/weights.safetensors": b"", "notes.txt": b""}
    before = hub.put("clinic/brains", {"README.md": b"# Mine", **stale})
    with pytest.raises(ModelError, match=r"holds README\.md, fold_4/model/model\.json already; "):
        push_model(run, "hf:clinic/brains")
    assert hub.branches["clinic/brains"]["main"] == before
    pushed = push_model(run, "hf:clinic/brains", overwrite=True)
    assert set(hub.files("clinic/brains")) == {*pushed.files, "notes.txt"}
    assert before in hub.commits["clinic/brains"]


def test_a_push_that_a_hub_refuses_is_one_sentence(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ModelError, match="needs a token that may write to clinic, found none"):
        push_model(run, "hf:clinic/brains")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ModelError, match="refused the token; log in again"):
        push_model(run, "hf:clinic/brains")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.forbidden.add("clinic")
    with pytest.raises(ModelError, match=r"the token does not allow it: .*; use a token that may"):
        push_model(run, "hf:clinic/brains")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelError, match="cannot be reached"):
        push_model(run, "hf:clinic/brains")
