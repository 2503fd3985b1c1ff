"""Results as BIDS derivatives: their folders, their names, and the files that describe them.

out/dataset_description.json
out/desc-segkit_dseg.tsv                                     names of labels
out/sub-01/ses-b/anat/sub-01_ses-b_desc-segkit_dseg.nii.gz   labels
out/sub-01/ses-b/anat/sub-01_ses-b_desc-segkit_dseg.json     their provenance
"""

import hashlib
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from segkit.config.labels import Labelling
from segkit.data.bids import ANATOMY, DESCRIPTION_FILE, parts_of
from segkit.errors import VolumeError
from segkit.io.atomic import write_json, write_text
from segkit.io.inputs import Input
from segkit.io.safe_text import read_json_object
from segkit.io.volume_names import has_volume_suffix, is_picture

VERSION_OF_BIDS = "1.10.0"
DESCRIBED = "desc-segkit"
TABLE_OF_LABELS = f"{DESCRIBED}_dseg.tsv"
IGNORED_FILE = ".bidsignore"
NOT_IN_BIDS = ("*_entropy.*", "*_variance.*", "*_presence.json", "*_statistics.json")
"""Results that BIDS has no name for."""
MORE_NOT_IN_BIDS = ("*_preview.png",)
KEPT_APART = ("desc", "label", "seg")
"""Entities of a source that would not be true of its labels."""
NOT_ALPHANUMERIC = re.compile(r"[^a-zA-Z0-9]")


def bids_path(source: Input, out: Path | None) -> Path:
    """The path of an input's labels in a folder of derivatives.

    Entities are those that the names of all its files have. An input that has no name in BIDS is
    the subject of its own name: `sub-PA0ST0SE1`. A name without letters from a to z and digits
    becomes a digest.

    Raises VolumeError: no folder is given, or the input is a picture.
    """
    if out is None or has_volume_suffix(out):
        raise VolumeError(
            f"{out or source.files[0]}: BIDS derivatives are written into a folder; pass a folder "
            "as --out"
        )
    if is_picture(source.files[0]):
        raise VolumeError(
            f"{source.files[0]}: BIDS derivatives need a volume, found a picture; leave out "
            "--layout bids"
        )
    entities = _entities(source)
    folder = out / f"sub-{entities['sub']}"
    if "ses" in entities:
        folder /= f"ses-{entities['ses']}"
    name = "_".join(f"{key}-{value}" for key, value in entities.items())
    return folder / _datatype(source) / f"{name}_{DESCRIBED}_dseg.nii.gz"


def bids_stem(labels: Path) -> str:
    """The start of the other results' names: the labels' name without `_dseg` and the suffix."""
    return labels.name.removesuffix("_dseg.nii.gz")


def told_of_sources(source: Input) -> dict[str, Any]:
    """Fields that BIDS requires in the JSON file beside labels: the files they were made from."""
    return {"Sources": [_relative(file) for file in source.files], "Manual": False}


def write_bids_root(out: Path, labelling: Labelling, *, models: Sequence[str]) -> None:
    """Write the files that describe a folder of derivatives, if they are not there yet.

    Raises VolumeError if the folder's dataset_description.json is not that of derivatives.
    """
    described = out / DESCRIPTION_FILE
    if described.is_file():
        try:
            kind = read_json_object(described).get("DatasetType")
        except (OSError, ValueError) as error:
            raise VolumeError(
                f"{described}: cannot be read as JSON: {error}; repair it, or choose another folder"
            ) from None
        if kind != "derivative":
            raise VolumeError(
                f"{out}: expected a BIDS folder of derivatives, found one of the type "
                f"{kind or 'raw'}; choose another folder, such as {out / 'derivatives' / 'segkit'}"
            )
    else:
        write_json(
            described,
            {
                "Name": "Segmentations by segkit",
                "BIDSVersion": VERSION_OF_BIDS,
                "DatasetType": "derivative",
                "GeneratedBy": [
                    {
                        "Name": "segkit",
                        "Version": version("segkit"),
                        "Description": f"Models: {', '.join(models)}",
                    }
                ],
            },
        )
    rows = [f"{number}\t{name}" for name, number in labelling.numbers_in_files.items()]
    write_text(out / TABLE_OF_LABELS, "\n".join(["index\tname", *rows]) + "\n")
    if not (out / IGNORED_FILE).exists():
        write_text(out / IGNORED_FILE, "\n".join([*NOT_IN_BIDS, *MORE_NOT_IN_BIDS]) + "\n")


def _entities(source: Input) -> dict[str, str]:
    """The entities that names of all files have, the subject first; of other names, the subject."""
    told = [parts_of(file)[0] if has_volume_suffix(file) else {} for file in source.files]
    common = {
        key: value
        for key, value in told[0].items()
        if key not in KEPT_APART and all(each.get(key) == value for each in told)
    }
    if "sub" in common:
        return {"sub": common.pop("sub"), **common}
    named = parts_of(Path(f"{source.name}_x.nii"))[0]
    if "sub" in named:
        return {"sub": named["sub"], **({"ses": named["ses"]} if "ses" in named else {})}
    plain = NOT_ALPHANUMERIC.sub("", source.name)
    if not plain:  # such as a name in Chinese
        plain = hashlib.sha256(source.name.encode(errors="surrogateescape")).hexdigest()[:8]
    return {"sub": plain}


def _datatype(source: Input) -> str:
    """The folder of a kind of data, such as `anat`, that the input lies in; else `anat`."""
    parent = source.files[0].parent
    inside = parent.parent.name.startswith(("sub-", "ses-"))
    return parent.name if inside and has_volume_suffix(source.files[0]) else ANATOMY


def _relative(file: Path) -> str:
    """A file from its subject's folder on, as a URI of BIDS; else its name."""
    for place, part in enumerate(file.parts):
        if part.startswith("sub-") and place < len(file.parts) - 1:
            return "bids::" + "/".join(file.parts[place:])
    return file.name
