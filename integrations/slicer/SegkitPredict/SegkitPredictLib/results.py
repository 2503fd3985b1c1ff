"""What to ask of segkit, and what its files say: labels with colours and concepts, and maps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ExtensionError

INPUT, LABELS, MAPS = "scan", "labels.nrrd", "maps"
"""Names inside the folder of a prediction."""
CONTEXT = "Segmentation category and type - segkit"
"""The name of the terminology that Slicer shows for the concepts of segkit's models."""


@dataclass(frozen=True)
class Label:
    """A class or region of the segmentation, as its file numbers it."""

    number: int
    name: str
    colour: tuple[float, float, float] | None
    """Red, green and blue from 0 to 1; None if the file does not say."""
    terminology: str | None
    """Its concept as Slicer stores it in a segment's tag; None if the model has none."""


@dataclass(frozen=True)
class Overlay:
    """An attention map on its own grid."""

    path: Path
    key: str
    """Its place in the network, such as `skip.1/gate`."""
    low: float
    high: float
    """The values between which its colours lie."""


@dataclass(frozen=True)
class Result:
    """The files of a prediction."""

    labels: Path
    classes: tuple[Label, ...]
    """Without the background."""
    background: int
    maps: tuple[Overlay, ...]
    """Those that can be shown, the finest first."""
    notes: tuple[str, ...] = ()
    """What cannot be shown, in sentences."""


def channels_of(model: str) -> list[str]:
    """Names of the channels that a model takes, in order.

    Args:
        model: a run, a model folder or a cross-validation. For a model that is not a folder of
            this machine, such as `hf:owner/name`, one channel without a name is assumed.

    Raises:
        ExtensionError: the folder holds no model.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        if folder.is_absolute() or folder.exists():
            raise ExtensionError(f"expected the folder of a model, found {model}; choose another")
        return [""]
    found = [folder / "model.json", folder / "model" / "model.json"]
    found += sorted(folder.glob("fold_*/model/model.json"))
    for path in found:
        if path.is_file():
            try:
                names = json.loads(path.read_text("utf-8"))["channels"]
                return [str(name) for name in names]
            except (OSError, ValueError, KeyError, TypeError):
                raise ExtensionError(
                    f"{path}: is damaged; train the model again, or choose another"
                ) from None
    raise ExtensionError(
        f"{model}: expected the folder of a run or of a model, found no model.json in it; choose "
        f"another"
    )


def input_names(num_channels: int) -> list[str]:
    """The names under which each channel of the scan is saved, in the folder of the prediction."""
    if num_channels == 1:
        return [f"{INPUT}.nrrd"]
    return [f"{INPUT}_{number:04d}.nrrd" for number in range(num_channels)]


def predict_words(
    segkit: Path,
    folder: Path,
    models: Sequence[str],
    *,
    num_channels: int = 1,
    maps: bool = True,
    mirrors: bool = False,
    device: str = "auto",
) -> list[str]:
    """The command that segments the scan in a folder.

    Args:
        segkit: the command.
        folder: holds the files `input_names`; the results are written into it.
        models: one model, or several, which are averaged.
        num_channels: number of channels of the scan.
        maps: also write the attention maps.
        mirrors: average over mirror images.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        ExtensionError: no model is given.
    """
    named = [model.strip() for model in models if model.strip()]
    if not named:
        raise ExtensionError("expected a model, found none; choose the folder of a run or a model")
    words = [str(segkit), "predict", str(folder / input_names(num_channels)[0])]
    for model in named:
        words += ["--model", model]
    words += ["--out", str(folder / LABELS), "--device", device, "--json", "--progress"]
    words += ["--maps", str(folder / MAPS)] * maps
    return words + ["--tta"] * mirrors


def result_of(folder: Path, printed: str) -> Result:
    """The results that a prediction wrote, from what `segkit predict --json` printed.

    Raises:
        ExtensionError: the output is not that of segkit, or a file is missing or damaged.
    """
    try:
        (volume,) = json.loads(printed)["volumes"]
        labels = Path(volume["written"][0])
        told = _json(labels.with_name(f"{labels.name.split('.')[0]}.json"))
        classes, background = _classes(told)
        described = folder / MAPS / f"{INPUT}_maps.json"
        overlays, notes = maps_of(described) if described.is_file() else ((), ())
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ExtensionError(
            f"expected the results of segkit in {folder}, found others ({error}); install the "
            f"version of segkit that belongs to this extension"
        ) from None
    if any(label.number == 0 for label in classes):
        notes += ("the label with number 0 is not shown, because Slicer takes 0 for background",)
    return Result(labels, classes, background, overlays, notes)


def _classes(told: dict[str, Any]) -> tuple[tuple[Label, ...], int]:
    """The classes without the background, and the background's number."""
    (_, background), *rest = told["labels"].items()
    colours, codes = told.get("colours", {}), told.get("codes", {})
    classes = tuple(
        Label(
            int(number),
            str(name),
            _rgb(colours[name]) if name in colours else None,
            terminology_of(codes[name]) if name in codes else None,
        )
        for name, number in rest
    )
    return classes, int(background)


def maps_of(described: Path) -> tuple[tuple[Overlay, ...], tuple[str, ...]]:
    """The maps beside a `NAME_maps.json`, each on its own grid, and sentences on those left out."""
    overlays: list[tuple[int, Overlay]] = []
    left_out: dict[str, list[str]] = {}
    stem = described.name[: -len("_maps.json")]
    for entry in _json(described)["maps"]:
        key = str(entry["key"])
        name = entry.get("file") or f"{stem}_map-{key.replace('/', '-')}"
        path = described.parent / "native" / f"{Path(str(name)).name}.nii.gz"
        low, high = entry.get("range") or (None, None)
        low = entry["min"] if low is None else low
        high = entry["max"] if high is None else high
        if entry["stride"] is None or not path.is_file():
            left_out.setdefault("they have no place in the scan", []).append(key)
        elif len(entry["shape"]) != 3:
            left_out.setdefault("they have several values in each cell", []).append(key)
        elif low is None or high is None:
            left_out.setdefault("they have no value", []).append(key)
        else:
            overlays.append((int(entry["level"]), Overlay(path, key, float(low), float(high))))
    notes = tuple(
        f"maps that are not shown, because {reason}: {', '.join(keys)}"
        for reason, keys in left_out.items()
    )
    return tuple(overlay for _, overlay in sorted(overlays, key=lambda pair: pair[0])), notes


def terminology_of(code: dict[str, Any]) -> str:
    """A coded concept in the form of Slicer's terminology tag.

    The parts are separated by `~`: a context, category, type, its modifier, a context of regions,
    region and its modifier. Each of them is scheme, value and meaning, separated by `^`.
    """
    category = code["category"]
    return "~".join((CONTEXT, _triple(category), _triple(code), "^^", "", "^^", "^^"))


def _triple(code: dict[str, Any]) -> str:
    parts = (str(code[part]) for part in ("scheme", "value", "meaning"))
    return "^".join(part.replace("^", " ").replace("~", " ") for part in parts)


def _rgb(colour: str) -> tuple[float, float, float]:
    red, green, blue = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    return red, green, blue


def _json(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text("utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not a JSON object")
    return content


def remove(folder: Path) -> None:
    """Remove the folder of a prediction, in which copies of a patient's scan lie."""
    shutil.rmtree(folder)
