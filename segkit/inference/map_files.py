"""Attention maps as files: on the input's grid, on their own, and their figures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.inference.attention_maps import AttentionMap, map_on_source
from segkit.io.atomic import write_json
from segkit.io.disk_arrays import OnDisk
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
    """Write every map of a volume and return the files.

    `STEM_map-skip.2-gate.nii.gz` lies on the input's grid, its namesake in `native/` on the map's
    own, both float32 and on the map's raw scale, NaN where nothing was computed; of a picture the
    first is a TIFF, `.tif`, pixel upon pixel. `STEM_maps.json` tells what each is. A map over
    channels has no place and stands only in the JSON. `heads` holds figures of each head of
    attention, by position; they stand with the map that the heads receive. `made` says in the JSON
    what made the maps.
    """
    written = []
    figures = []
    for key, attention_map in maps.items():
        figures.append(_figures(attention_map))
        of_heads = (heads or {}).get(key.split("/")[0])
        if of_heads is not None and attention_map.info.kind == "received":
            figures[-1]["heads"] = list(of_heads)
        if attention_map.volume is None:
            continue
        name = f"{stem}_map-{key.replace('/', '-')}"
        # Only NIfTI says where a coarser grid lies.
        native = folder / "native" / f"{name}.nii.gz"
        path = folder / f"{name}{'.tif' if source.picture else '.nii.gz'}"
        write_volume(path, map_on_source(attention_map, source, allocate=OnDisk(folder)))
        write_volume(native, attention_map.volume)
        written += [path, native]
    summary = folder / f"{stem}_maps.json"
    write_json(summary, {"maps": figures, **(made or {})})
    return [*written, summary]


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
        "range": [info.lowest, info.highest if math.isfinite(info.highest) else None],
        **_span(values),
    }
    if attention_map.channel_mean is not None and attention_map.channel_std is not None:
        figures["channel_mean"] = attention_map.channel_mean.tolist()
        figures["channel_std"] = attention_map.channel_std.tolist()
    return figures


def _span(values: ndarray) -> dict[str, float]:
    """The lowest value, the mean and the highest of those that were computed; NaN if none was."""
    known = values[np.isfinite(values)]
    if not known.size:
        return {"min": math.nan, "mean": math.nan, "max": math.nan}
    return {
        "min": float(known.min()),
        "mean": float(known.mean(dtype=np.float64)),
        "max": float(known.max()),
    }
