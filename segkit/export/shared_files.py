"""The files of a shared model: weights, description, settings, scores, card.

README.md  model.json  weights.safetensors  config.yaml  scores.json  verdicts.json  picture.png
SHA256SUMS

The folds of a cross-validation lie in fold_0/model, fold_1/model, …
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from segkit.errors import ModelError
from segkit.export.model_card import AuthorsWords, card_text
from segkit.export.shared_facts import (
    SharedFacts,
    config_text,
    facts_of_run,
    found_verdicts,
    read_verdicts,
    run_of,
    tested_scores,
)
from segkit.io.atomic import write_json, write_text
from segkit.io.checksums import checksum
from segkit.model.file_names import CONFIG, DESCRIPTION, FIRST, FOLD, SUMS, WEIGHTS
from segkit.model.folder import load_description, load_model, model_folders, save_description

CARD = "README.md"
SHARED_SCORES = "scores.json"
SHARED_VERDICTS = "verdicts.json"
PICTURE = "picture.png"
OF_FORMAT = {"format": "pt"}
"""The only note that is kept in the header of a file of weights."""


def write_shared(
    source: Path,
    folder: Path,
    name: str,
    address: str,
    words: AuthorsWords,
    *,
    scores: Path | None = None,
    verdicts: Path | None = None,
    picture: Path | None = None,
) -> None:
    """Write all files of a shared model into a folder.

    Args:
        source: a finished run, a cross-validation, or a model folder.
        folder: the folder to write the files to.
        name: name of the shared model, which replaces that of the run.
        address: the value of `--model` that loads it.
        words: the author's statements about it.
        scores: a file of `segkit evaluate --out`, if its scores shall be shared.
        verdicts: a folder of `segkit explain --verdicts`. If None, verdicts on this model in the
            folder of the run are taken.
        picture: a picture that shall be shared.

    Raises:
        ModelError: there is no finished model, it cannot be loaded, or a file cannot be read.
        ConfigError: the config of the run cannot be read.
    """
    folders = model_folders(source)
    for model in folders:
        if not (model / WEIGHTS).is_file():
            raise ModelError(f"{model}: expected {WEIGHTS}, found none; let its training end first")
    run = run_of(source)
    facts = facts_of_run(run, name) if run is not None else SharedFacts()
    descriptions = [load_description(model) for model in folders]
    if scores is not None:
        facts = replace(facts, tested=tested_scores(scores, descriptions[0]))
    if verdicts is not None:
        facts = replace(facts, verdicts=read_verdicts(verdicts, folders))
    elif run is not None:
        facts = replace(facts, verdicts=found_verdicts(run, folders))
    targets = [folder]
    if folders[0].parent.parent == source and folders[0].parent.name.startswith(FOLD):
        targets = [folder / model.parent.name / "model" for model in folders]
    for model, target in zip(folders, targets, strict=True):
        _copy_model(model, target, name)
        if load_description(target).network.given is None:
            load_model(target)  # checks that the shared model can be read
    write_text(folder / SUMS, "".join(_sums(folder)))
    if facts.config is not None:
        write_text(folder / CONFIG, config_text(facts.config))
    _write_facts(folder, facts)
    if picture is not None:
        _copy_picture(picture, folder / PICTURE)
    shown = PICTURE if picture is not None else None
    write_text(folder / CARD, card_text(name, address, descriptions, facts, words, picture=shown))


def shared_paths(folder: Path) -> list[str]:
    """The files in a folder of a shared model, by their paths inside it."""
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _write_facts(folder: Path, facts: SharedFacts) -> None:
    told = {
        "training": dict(facts.training),
        "held_out": facts.held_out.to_json() if facts.held_out else None,
        "tested": facts.tested.to_json() if facts.tested else None,
    }
    if any(told.values()):
        write_json(folder / SHARED_SCORES, told)
    if facts.verdicts is not None:
        rows = [dict(row) for row in facts.verdicts.rows]
        write_json(folder / SHARED_VERDICTS, {"scans": facts.verdicts.scans, "verdicts": rows})


def _copy_model(source: Path, target: Path, name: str) -> None:
    """Copy a model, and those of its first stage, under another name. Weights stay as they are."""
    description = load_description(source)
    save_description(target, description.model_copy(update={"run": name}))
    try:
        with safe_open(source / WEIGHTS, framework="pt") as file:
            noted = file.metadata() or {}
        if noted.items() <= OF_FORMAT.items():
            shutil.copyfile(source / WEIGHTS, target / WEIGHTS)
        else:
            save_file(load_file(source / WEIGHTS), target / WEIGHTS)
    except SafetensorError as error:
        raise ModelError(f"{source / WEIGHTS}: cannot be read: {error}; train it again") from None
    for number in range(description.first_stage.models if description.first_stage else 0):
        _copy_model(source / FIRST / str(number), target / FIRST / str(number), name)


def _sums(folder: Path) -> Iterator[str]:
    """A line of SHA256SUMS for each file of the models in a folder."""
    for path in shared_paths(folder):
        if path.rpartition("/")[2] in (DESCRIPTION, WEIGHTS):
            yield f"{checksum(folder / path)}  {path}\n"


def _copy_picture(source: Path, target: Path) -> None:
    """The pixels of a picture as a PNG, without the notes in its file.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        with Image.open(source) as opened:
            turned = ImageOps.exif_transpose(opened)
            colours = "RGBA" if "A" in turned.getbands() or "transparency" in turned.info else "RGB"
            pixels = turned.convert(colours)
            bare = Image.frombytes(colours, pixels.size, pixels.tobytes())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(
            f"{source}: cannot be read as a picture: {reason}; give a PNG or a JPEG"
        ) from None
    bare.save(target, format="PNG")


def outdated(there: Sequence[str], new: Sequence[str]) -> list[str]:
    """Paths in a repository that segkit wrote before and that the new files do not replace."""
    own = (DESCRIPTION, WEIGHTS, SUMS, CONFIG, SHARED_SCORES, SHARED_VERDICTS, PICTURE, CARD)
    places = ("", "model", FIRST)
    return [
        path
        for path in there
        if path not in new
        and path.rpartition("/")[2] in own
        and (path.partition("/")[0] in (*own, *places) or path.startswith(FOLD))
    ]
