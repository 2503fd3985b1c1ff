"""Write attention maps to files: on the input's grid, on their own grid, and as figures in JSON."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.inference.attention_maps import AttentionMap, map_on_source
from segkit.io.atomic import write_json
from segkit.io.disk_arrays import OnDisk
from segkit.io.file_names import safe_name
from segkit.io.volume import Volume, write_volume


def write_maps(
    folder: Path,
    stem: str,
    maps: Mapping[str, AttentionMap],
    source: Volume,
    *,
    heads: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    made: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write every map of a volume.

    `STEM_map-skip.2-gate.nii.gz` is on the input's grid. The file of the same name in `native/` is
    on the map's own grid. Both are float32 with the map's raw values, and NaN if no value was
    computed. If the input is a picture, the first file is a TIFF (`.tif`) with the same pixels.
    `STEM_maps.json` describes each map; `file` is the name of its files, without the suffix. A map
    over channels has no position, so it is only in the JSON file.

    Args:
        folder: the folder to write to.
        stem: beginning of the files' names.
        maps: the maps by key.
        source: the volume that was predicted.
        heads: figures of each head of attention, by the position of the attention in the network;
            they are written with the map of kind `received`.
        made: provenance, written to the JSON file.

    Returns:
        The files that were written.
    """
    written = []
    figures = []
    names = names_of_maps(maps)
    for key, attention_map in maps.items():
        figures.append(_figures(attention_map))
        of_heads = (heads or {}).get(key.split("/")[0])
        if of_heads is not None and attention_map.info.kind == "received":
            figures[-1]["heads"] = list(of_heads)
        if attention_map.volume is None:
            continue
        name = f"{stem}_map-{names[key]}"
        figures[-1]["file"] = name
        # Always NIfTI, because a TIFF cannot store the position of a coarser grid.
        native = folder / "native" / f"{name}.nii.gz"
        path = folder / f"{name}{'.tif' if source.picture else '.nii.gz'}"
        write_volume(path, map_on_source(attention_map, source, allocate=OnDisk(folder)))
        write_volume(native, attention_map.volume)
        written += [path, native]
    summary = folder / f"{stem}_maps.json"
    write_json(summary, {"maps": figures, **(made or {})})
    return [*written, summary]


def names_of_maps(keys: Iterable[str]) -> dict[str, str]:
    """The name of each map in file names, by its key.

    Keys may contain any name of a structure. Names differ on Windows too, which does not tell
    capital from small letters.

    Example:
        >>> names_of_maps(["skip.2/gate", "occlusion/a/b", "occlusion/A:B"]).values()
        dict_values(['skip.2-gate', 'occlusion-a-b', 'occlusion-A-B-2'])
    """
    names: dict[str, str] = {}
    taken = set[str]()
    for key in keys:
        wanted = name = safe_name(key)
        for number in itertools.count(2):
            if name.lower() not in taken:
                break
            name = f"{wanted}-{number}"
        taken.add(name.lower())
        names[key] = name
    return names


def _figures(attention_map: AttentionMap) -> dict[str, Any]:
    info = attention_map.info
    values = attention_map.volume.data if attention_map.volume else attention_map.channel_mean
    assert values is not None
    figures: dict[str, Any] = {
        "key": info.key,
        "kind": info.kind,
        "level": info.level,
        "stride": info.placement and list(info.placement.stride),
        "offset": info.placement and list(info.placement.offset),
        "shape": list(values.shape),
        "range": [end if math.isfinite(end) else None for end in (info.lowest, info.highest)],
        **_span(values),
    }
    if attention_map.channel_mean is not None and attention_map.channel_std is not None:
        figures["channel_mean"] = attention_map.channel_mean.tolist()
        figures["channel_std"] = attention_map.channel_std.tolist()
    return figures


def _span(values: ndarray) -> dict[str, float]:
    """Minimum, mean and maximum of the finite values; NaN if there are none."""
    known = values[np.isfinite(values)]
    if not known.size:
        return {"min": math.nan, "mean": math.nan, "max": math.nan}
    return {
        "min": float(known.min()),
        "mean": float(known.mean(dtype=np.float64)),
        "max": float(known.max()),
    }
