"""napari's reader: volumes, labels with names and colours, and attention maps where they lie."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from segkit import SegkitError, read_labels, read_volume
from segkit_napari.layers import LayerTuple, image_layers, labels_layer, map_layers

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd")
DESCRIBED = "_maps.json"
"""End of the name of the file that describes the maps of a scan."""
Paths = str | Sequence[str]


def get_reader(path: Paths) -> Callable[[Paths], list[LayerTuple]] | None:
    """The function that reads these paths; None for paths of other programs."""
    paths = [path] if isinstance(path, str) else list(path)
    return read if paths and all(map(_is_ours, map(Path, paths))) else None


def _is_ours(path: Path) -> bool:
    if path.is_dir():
        return any(path.glob(f"*{DESCRIBED}"))
    return path.name.lower().endswith((*SUFFIXES, DESCRIBED))


def read(path: Paths) -> list[LayerTuple]:
    """The layers of one path or of several.

    A volume is a grey layer. A volume beside which segkit wrote the names of labels is a layer of
    labels. `NAME_maps.json`, or its folder, gives all maps of a scan, and only the first is
    visible.

    Raises:
        SegkitError: a file is damaged or missing.
    """
    paths = [path] if isinstance(path, str) else list(path)
    return [layer for each in paths for layer in _read_one(Path(each))]


def _read_one(path: Path) -> list[LayerTuple]:
    if path.is_dir():
        return [layer for told in sorted(path.glob(f"*{DESCRIBED}")) for layer in read_maps(told)]
    if path.name.endswith(DESCRIBED):
        return read_maps(path)
    entry = _entry_of(path)
    if entry is not None:
        return map_layers(read_volume(path), str(entry["key"]), _limits(entry))
    stem = _stem(path)
    if "_map-" in stem:
        return map_layers(read_volume(path), stem.rpartition("_map-")[2])
    told = _told(path.with_name(f"{stem}.json"))
    if "labels" in told:
        return [labels_layer(read_labels(path), stem, told["labels"], told.get("colours"))]
    return image_layers(read_volume(path), stem, _classes_of(path))


def read_maps(described: Path) -> list[LayerTuple]:
    """All maps that a `NAME_maps.json` describes and that have a place, the finest first.

    Raises:
        SegkitError: a file is damaged, or the maps lie elsewhere.
    """
    stem = described.name[: -len(DESCRIBED)]
    entries = [each for each in _told(described).get("maps", ()) if each.get("stride") is not None]
    if not entries:
        raise SegkitError(
            f"{described}: expected attention maps with a place, found none; write them with "
            f"segkit predict --maps"
        )
    layers: list[LayerTuple] = []
    for entry in sorted(entries, key=lambda each: int(each["level"])):
        key = str(entry["key"])
        name = entry.get("file") or f"{stem}_map-{key.replace('/', '-')}"
        path = described.parent / "native" / f"{Path(str(name)).name}.nii.gz"
        layers += map_layers(read_volume(path), key, _limits(entry), visible=not layers)
    return layers


def _entry_of(path: Path) -> dict[str, Any] | None:
    """What the JSON file in a map's folder, or in the folder above, says of a map."""
    stem, found, name = _stem(path).rpartition("_map-")
    for folder in (path.parent, path.parent.parent) if found else ():
        for entry in _told(folder / f"{stem}{DESCRIBED}").get("maps", ()):
            named = str(entry.get("key", "")).replace("/", "-")
            if str(entry.get("file") or f"{stem}_map-{named}") == f"{stem}_map-{name}":
                return dict(entry)
    return None


def _limits(entry: dict[str, Any]) -> tuple[float, float]:
    low, high = entry.get("range") or (None, None)
    nan = float("nan")
    return nan if low is None else float(low), nan if high is None else float(high)


def _classes_of(path: Path) -> list[str]:
    """Names of the classes of `NAME_prob`, from the file beside the labels."""
    stem = _stem(path)
    if not stem.endswith("_prob"):
        return []
    for name in (f"{stem[: -len('_prob')]}_seg.json", f"{stem[: -len('_prob')]}.json"):
        if numbers := _told(path.with_name(name)).get("labels"):
            return list(numbers)
    return []


def _stem(path: Path) -> str:
    for suffix in SUFFIXES:
        if path.name.lower().endswith(suffix):
            return path.name[: -len(suffix)]
    return path.stem


def _told(path: Path) -> dict[str, Any]:
    """The content of a JSON file of segkit; nothing if there is no such file.

    Raises:
        SegkitError: it is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise SegkitError(f"{path}: cannot be read: {error}; make it again") from None
    if not isinstance(content, dict):
        raise SegkitError(f"{path}: expected a JSON object, found another value; make it again")
    return content
