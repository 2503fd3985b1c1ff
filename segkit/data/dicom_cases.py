"""The cases of a folder of DICOM files: series as channels, and structures as their labels."""

import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from segkit.config.dicom import DicomConfig, SeriesConfig
from segkit.config.labels import Labelling
from segkit.data.dataset_json import DatasetJson, NamedFiles, labelling_of
from segkit.errors import DatasetError, Problems, counted, first_few, printable
from segkit.io.dicom_labels import (
    StructureFile,
    absent_structure,
    read_structure_file,
    structure_kind,
    told_names,
)
from segkit.io.dicom_listing import Series
from segkit.io.dicom_tree import DicomTree, name_in, path_of, read_tree
from segkit.io.name_patterns import matches_any
from segkit.io.series_rules import SeriesRule
from segkit.io.structure_rules import IGNORED, StructureRules
from segkit.io.volume import is_dicom_path

logger = logging.getLogger(__name__)

MOST_SERIES = 5
"""A sentence names at most so many series, names or cases."""


@dataclass(frozen=True)
class DicomCase:
    """A case: its name, the path of the series of each channel, and its labels, if it has any."""

    name: str
    images: tuple[Path, ...]
    label: Path | None
    series: tuple[Series, ...]


def list_dicom(folder: Path, dicom: DicomConfig) -> list[DicomCase]:
    """The cases in a folder by the rules of a config, also those without labels.

    Raises:
        DatasetError: no series fits, several series fit a channel of a case, or several files of
            structures fit a case. `problems` has a sentence for each case.
    """
    tree = read_tree(folder)
    problems = Problems()
    for failure in tree.failures.values():
        with problems.noted():
            raise DatasetError(failure)
    problems.refuse()
    chosen = {
        channel: [one for one in tree.series if rule_of(rule).admits(one, folder)]
        for channel, rule in dicom.images.items()
    }
    for channel, found in chosen.items():
        if not found:
            raise DatasetError(
                f"{folder}: no DICOM series in it is {rule_of(dicom.images[channel])} "
                f"(data.dicom.images.{channel}); it holds {_told(tree.series)}; change the rule"
            )
    labels = [
        file
        for file in tree.structures
        if (dicom.label.modality in (None, file.modality))
        and matches_any(file.description, dicom.label.description)
        and matches_any(_inside(file.path.parent, folder), dicom.label.folder)
    ]
    groups = _groups(chosen, dicom, folder)
    cases = []
    for name, channels in groups.items():
        with problems.noted():
            series = [_one(name, channel, found, dicom) for channel, found in channels.items()]
            paths = tuple(path_of(one, tree.series) for one in series)
            cases.append(DicomCase(name, paths, _label_of(name, series, labels), tuple(series)))
    problems.refuse()
    return cases


def labelled_cases(folder: Path, dicom: DicomConfig) -> list[NamedFiles]:
    """The cases with labels; a warning names the others.

    Raises:
        DatasetError: no case has labels, or `list_dicom` refuses the folder.
    """
    cases = list_dicom(folder, dicom)
    if bare := [case.name for case in cases if case.label is None]:
        told = printable(
            f"{folder}: cases without labels are left out, because no file of structures refers to "
            f"them: {first_few(bare)}"
        )
        logger.warning("%s", told)
    found = [(case.name, case.images, case.label) for case in cases if case.label is not None]
    if not found:
        raise DatasetError(
            f"{folder}: none of {counted(len(cases), 'case')} has labels, because no structure "
            f"set or "
            f"segmentation that fits data.dicom.label refers to their series; correct "
            f"data.dicom.label, or add the files"
        )
    return found


def list_dicom_files(
    folder: Path, dicom: DicomConfig, given: Labelling | None = None
) -> DatasetJson:
    """Channels, labelling and cases of a folder, by the rules of a config.

    Args:
        folder: the folder with DICOM files.
        dicom: the rules.
        given: names and numbers of labels; if None, structures get the numbers 1, 2, … in order.

    Raises:
        DatasetError: no structures are named, or `labelled_cases` refuses the folder.
    """
    if given is None and not dicom.structures:
        raise DatasetError(
            "data.dicom: expected the names of classes and of their structures; give "
            "data.dicom.structures, such as {tumour: [GTV*]}"
        )
    numbered = {name: (number,) for number, name in enumerate(dicom.structures, start=1)}
    labelling = given or labelling_of(
        "data.dicom.structures", {"background": (0,), **numbered}, None, {}
    )
    return DatasetJson(tuple(dicom.images), labelling, tuple(labelled_cases(folder, dicom)))


def structure_rules(dicom: DicomConfig, labelling: Labelling) -> StructureRules:
    """The rules that turn structures into labels, from the config.

    Args:
        dicom: settings of the structures.
        labelling: the classes or regions and their numbers.

    Raises:
        DatasetError: the config names an unknown class.
    """
    numbers = labelling.numbers_in_files
    classes = list(labelling.members)
    if labelling.ignore is not None:
        numbers[IGNORED] = labelling.in_file(labelling.ignore)
    known = {*classes, *([] if labelling.ignore is None else [IGNORED])}
    if unknown := [name for name in dicom.structures if name not in known]:
        raise DatasetError(
            f"data.dicom.structures: expected classes ({', '.join(known)}), found {unknown[0]}; "
            f"correct the name"
        )
    if not labelling.regions:  # whose order is that of labels
        given = [name for name in dicom.structures if name != IGNORED]
        classes = [*(name for name in classes if name not in given), *given]
    classes += [IGNORED] if IGNORED in dicom.structures else []
    patterns = {name: tuple(dicom.structures.get(name, [name])) for name in classes}
    return StructureRules(
        patterns,
        numbers,
        labelling.in_file(0),
        dicom.absent,
        bool(labelling.regions),
    )


def check_structures(
    cases: Sequence[tuple[str, Path]], rules: StructureRules
) -> dict[str, tuple[str, ...]]:
    """Check that each case has the structures that the rules need.

    Args:
        cases: the name of each case, and its file of labels.
        rules: the structures of each class.

    Returns:
        The unlabelled classes of each case by its name, if the rules allow such cases.

    Raises:
        DatasetError: a case lacks a class; `problems` has a sentence for each such case.
    """
    problems, lacking = Problems(), {}
    for name, path in cases:
        if not is_dicom_path(path) or structure_kind(path) is None:
            continue
        with problems.noted():
            file = read_structure_file(path)
            absent = rules.lacking(file.names, file.undrawn)
            if rules.refuses(absent):
                raise DatasetError(f"case {name}: {absent_structure(file, absent, rules)}")
            if absent and rules.absent == "unlabelled":
                lacking[name] = tuple(absent)
    problems.refuse()
    return lacking


def rule_of(rule: SeriesConfig) -> SeriesRule:
    """The rule of these settings."""
    return SeriesRule(
        rule.modality,
        tuple(rule.description),
        rule.min_slices,
        rule.max_slices,
        tuple(rule.folder),
    )


def told_tree(tree: DicomTree) -> list[str]:
    """Lines of text about a folder of DICOM files: kinds of series, and names of structures."""
    kinds = Counter((one.modality, one.description) for one in tree.series)
    lines = []
    for (modality, description), count in kinds.most_common():
        slices = [
            len(one.slices)
            for one in tree.series
            if (one.modality, one.description) == (modality, description)
        ]
        few = "" if min(slices) == max(slices) else f"{min(slices)} to "
        lines.append(
            f"{count} series: {modality or 'no modality'}, {description or 'no description'}, "
            f"{few}{counted(max(slices), 'slice')}"
        )
    names = told_names(tree.structures)
    files = counted(len(tree.structures), "file")
    lines += [f"structure {name}: in {count} of {files}" for name, count in names.items()]
    return [*lines, *tree.failures.values()]


def _groups(
    chosen: Mapping[str, list[Series]], dicom: DicomConfig, folder: Path
) -> dict[str, dict[str, list[Series]]]:
    """The series that fit, by case and channel."""
    if len(chosen) == 1:
        ((channel, every),) = chosen.items()
        in_folder = Counter(one.folder for one in every)
        return {
            name_in(folder, one.folder, one.uid if in_folder[one.folder] > 1 else None): {
                channel: [one]
            }
            for one in every
        }
    groups: dict[str, dict[str, list[Series]]] = defaultdict(lambda: {each: [] for each in chosen})
    for channel, found in chosen.items():
        for one in found:
            groups[one.study if dicom.cases == "study" else one.patient][channel].append(one)
    places = {
        key: Path(os.path.commonpath([one.folder for found in group.values() for one in found]))
        for key, group in groups.items()
    }
    shared = Counter(places.values())
    return {
        name_in(folder, places[key], key if shared[places[key]] > 1 else None): group
        for key, group in groups.items()
    }


def _one(name: str, channel: str, found: list[Series], dicom: DicomConfig) -> Series:
    """The only series that fits a channel of a case. Raises DatasetError for none or several."""
    if len(found) == 1:
        return found[0]
    rule = rule_of(dicom.images[channel])
    if not found:
        raise DatasetError(
            f"case {name}: lacks a DICOM series for the channel {channel} ({rule}); complete the "
            f"{dicom.cases}, or make the other channels' rules narrower"
        )
    raise DatasetError(
        f"case {name}: {len(found)} DICOM series fit the channel {channel} ({rule}): "
        f"{_told(found)}; make data.dicom.images.{channel} narrower"
    )


def _label_of(name: str, series: Sequence[Series], labels: Sequence[StructureFile]) -> Path | None:
    """The only file of structures for a series of a case, or for their coordinate system."""
    uids = {one.uid for one in series}
    worlds = {one.frame_of_reference for one in series} - {""}
    found = [file for file in labels if file.series & uids]
    found = found or [
        file for file in labels if not file.series and file.frames_of_reference & worlds
    ]
    if len(found) > 1:
        listing = first_few([str(file.path) for file in found], MOST_SERIES)
        raise DatasetError(
            f"case {name}: expected one file of structures, found {len(found)}: {listing}; select "
            "one with data.dicom.label"
        )
    return found[0].path if found else None


def _inside(folder: Path, root: Path) -> str:
    return folder.relative_to(root).as_posix()


def _told(series: Sequence[Series]) -> str:
    return first_few([str(one) for one in series], MOST_SERIES, between="; ") or "no series"
