"""Description of DICOM series in folders as segkit reads them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from segkit.checking.describe_volume import describe_volume
from segkit.checking.understood import Understood
from segkit.data.dicom_cases import told_tree
from segkit.io.dicom import read_series
from segkit.io.dicom_labels import told_names
from segkit.io.dicom_listing import Series, choose_series, list_series
from segkit.io.dicom_tree import read_tree
from segkit.io.series_rules import SeriesRule


def describe_tree(folder: Path, rule: SeriesRule) -> Understood:
    """The DICOM series in a folder to any depth that a rule admits, and names of structures."""
    tree = read_tree(folder)
    chosen = tuple(series for series in tree.series if rule.admits(series, folder))
    tree = replace(tree, series=chosen)
    places = len({series.folder for series in chosen})
    lines = [f"{folder}: {len(chosen)} DICOM series in {places} folders", *told_tree(tree)]
    facts = {
        "series": [
            {**_series_facts(series), "folder": series.folder.relative_to(folder).as_posix()}
            for series in chosen
        ],
        "structures": dict(told_names(tree.structures)),
        "failures": list(tree.failures.values()),
    }
    return Understood("series", "\n".join(lines), facts)


def describe_series(folder: Path, uid: str | None) -> Understood:
    """Description of a DICOM series as a volume.

    If `uid` is None and the folder holds several series, the series are listed instead.
    """
    found = list_series(folder)
    if uid is None and len(found) > 1:
        lines = [f"{folder}: {len(found)} DICOM series; pass the UID of one as --series"]
        facts = {"series": [_series_facts(series) for series in found]}
        return Understood("series", "\n".join([*lines, *map(str, found)]), facts)
    chosen = choose_series(folder, uid)
    volume = describe_volume(folder, read_series(chosen))
    facts = {**volume.facts, "series": [_series_facts(chosen)]}
    return Understood("series", f"DICOM series {chosen}\n{volume}", facts)


def _series_facts(series: Series) -> dict[str, Any]:
    return {
        "uid": series.uid,
        "description": series.description,
        "modality": series.modality,
        "slices": len(series.slices),
    }
