"""The files of each case in a folder without a dataset.json, found by patterns or in a table."""

import logging
from collections import Counter
from pathlib import Path

from segkit.config.dataset_files import FilesConfig
from segkit.config.labels import Labelling
from segkit.data.dataset_json import DatasetJson, NamedFiles, check_codes, labelling_of
from segkit.data.proposed_files import told_labels
from segkit.data.wildcards import case_name, expression_of
from segkit.errors import DatasetError, Problems, first_few, printable
from segkit.io.tables import read_csv
from segkit.io.volume import check_readable, is_dicom_path

logger = logging.getLogger(__name__)

ID, IMAGE, LABEL = "id", "image", "label"


def list_files(folder: Path, files: FilesConfig, given: Labelling | None = None) -> DatasetJson:
    """Channels, labels and cases of a folder, by the patterns or the table of a config.

    Args:
        folder: the folder of the dataset.
        files: the patterns or the table.
        given: classes and numbers, instead of those in `files`.

    Raises:
        DatasetError: files are missing, or patterns, table or labels are wrong.
        VolumeError: a file is not a volume.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such dataset folder; set data.folder")
    if files.table is None and not files.label:
        raise DatasetError(
            "data.files: expected label, the pattern of the labels, found none"
            "; give data.files.label"
        )
    channels, found = _in_table(folder, files) if files.table else _by_patterns(folder, files)
    if given is None and not files.labels:
        raise DatasetError(
            f"data.files: expected the names of the labels, found none; set data.labels, such as "
            f"{told_labels([label for *_, label in found])} for the numbers in {found[0][2]}"
        )
    if given is None:
        labelling = labelling_of("data.files", files.labels, files.regions_class_order, files.codes)
    else:
        labelling = given
        check_codes("data.files", files.codes, labelling)
    return DatasetJson(channels, labelling, tuple(found), dict(files.codes))


def list_images(
    folder: Path, files: FilesConfig
) -> tuple[tuple[str, ...], list[tuple[str, tuple[Path, ...]]]]:
    """Channels, and the name and the images of each case, whether it has a label or not.

    Cases that lack a channel's image are left out, with a warning. Raises DatasetError, or
    VolumeError for a file that is not a volume.
    """
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such dataset folder; set data.folder")
    if files.table is not None:
        channels, rows = _rows_of(folder, files, labelled=False)
        return channels, [(name, images) for name, images, _ in rows]
    found = _images(folder, files, matched(folder, files.label) if files.label else {})
    for pattern, paths in zip(files.images.values(), found, strict=True):
        if not paths:
            raise DatasetError(
                f"{folder}: no file in it matches {pattern}; correct the pattern in data.files"
            )
    whole = set.intersection(*(set(paths) for paths in found))
    if torn := sorted(set[str]().union(*found) - whole):
        told = printable(f"{folder}: left out, as they lack a channel: {first_few(torn)}")
        logger.warning("%s", told)
    if not whole:
        raise DatasetError(
            f"{folder}: no case has an image for each of {', '.join(files.images)}; use patterns "
            "in data.files.images whose wildcards match the same text for all images of a case"
        )
    cases = [(name, tuple(paths[name] for paths in found)) for name in sorted(whole)]
    return tuple(files.images), cases


def _by_patterns(folder: Path, files: FilesConfig) -> tuple[tuple[str, ...], list[NamedFiles]]:
    """All cases that have a label. Images without a label are left out, with a warning."""
    labels = matched(folder, files.label)
    images = _images(folder, files, labels)
    for pattern, found in ((files.label, labels), *zip(files.images.values(), images, strict=True)):
        if not found:
            raise DatasetError(
                f"{folder}: no file matches {pattern}; correct the pattern in data.files"
            )
    problems = Problems()
    for pattern, found in zip(files.images.values(), images, strict=True):
        for name in sorted(labels.keys() - found.keys()):
            with problems.noted():
                raise DatasetError(
                    f"{labels[name]}: is the label of case {name!r}, but {pattern} matches no "
                    f"image of this case (it matches {_some(found)}); use patterns whose wildcards "
                    "match the same text for the image and the label of a case"
                )
    problems.refuse()
    if bare := sorted(set[str]().union(*images) - labels.keys()):
        left_out = printable(f"{folder}: left out because they have no label: {first_few(bare)}")
        logger.warning("%s", left_out)
    cases = [(name, tuple(found[name] for found in images), labels[name]) for name in labels]
    return tuple(files.images), cases


def _images(folder: Path, files: FilesConfig, labels: dict[str, Path]) -> list[dict[str, Path]]:
    """The files that match each pattern of images, but no labels: `a_mask.png` also fits `*.png`.

    If the pattern of labels is also that of images, its files are both.

    Args:
        folder: the folder of the dataset.
        files: the patterns.
        labels: the label of each case.
    """
    of_labels = set(labels.values())
    return [
        {
            name: path
            for name, path in matched(folder, pattern).items()
            if pattern == files.label or path not in of_labels
        }
        for pattern in files.images.values()
    ]


def matched(folder: Path, pattern: str) -> dict[str, Path]:
    """The files in a folder that match a pattern, by the texts that its wildcards match.

        sub-*/ses-*/sub-*_T1w.nii.gz  on  sub-01/ses-b/sub-01_T1w.nii.gz  ──▶  "01_b"

    Equal texts are taken once. Hidden files are left out.

    Raises:
        DatasetError: two files would have the same name.
        VolumeError: a file is not a volume.
    """
    expression = expression_of(pattern)
    found: dict[str, Path] = {}
    for path in sorted(folder.glob(pattern.replace("[", "[[]"))):
        inside = path.relative_to(folder)
        match = expression.fullmatch(inside.as_posix())
        hidden = any(part[0] == "." for part in inside.parts)
        if match is None or hidden or not (path.is_file() or is_dicom_path(path)):
            continue
        name = case_name(match)
        if name in found:
            raise DatasetError(
                f"{folder}: {pattern} matches {found[name].relative_to(folder)} and {inside}, both "
                f"as case {name!r}; change it to match only one file of each case"
            )
        check_readable(path)
        found[name] = path
    return found


def _in_table(folder: Path, files: FilesConfig) -> tuple[tuple[str, ...], list[NamedFiles]]:
    """The case in each row of a CSV file, whose paths are relative to the folder."""
    channels, rows = _rows_of(folder, files, labelled=True)
    return channels, [(name, images, label) for name, images, label in rows if label]


def _rows_of(
    folder: Path, files: FilesConfig, *, labelled: bool
) -> tuple[tuple[str, ...], list[tuple[str, tuple[Path, ...], Path | None]]]:
    """Channels, and the case in each row of a CSV file: its name, images and, if asked, label."""
    assert files.table is not None
    path = folder / files.table
    rows, columns = read_csv(path)
    label = files.label or LABEL
    images = files.images or {
        column: column for column in columns if column.strip() and column not in (ID, label)
    }
    paths = (*images.values(), *([label] if labelled else []))
    for column in (ID, *([label] if labelled else []), *(images.values() or [IMAGE])):
        if column not in columns:
            raise DatasetError(
                f"{path}: expected a column {column}, found {', '.join(columns) or 'none'}; add it "
                f"or correct the name"
            )
    if not rows:
        raise DatasetError(f"{path}: expected a row for each case, found none; add rows")
    problems = Problems()
    for name, count in Counter(row[ID] for row in rows).items():
        with problems.noted():
            if count > 1:
                raise DatasetError(f"{path}: case {name} has several rows; give each case one")
    cases = []
    for number, row in enumerate(rows, start=2):
        with problems.noted():
            if not row[ID].strip():
                raise DatasetError(
                    f"{path}: row {number} has an empty {ID}; give the case a name there"
                )
        named = [folder / row[column] for column in paths]
        for column, file in zip(paths, named, strict=True):
            with problems.noted():
                if not row[column] or not (file.is_file() or is_dicom_path(file)):
                    raise DatasetError(
                        f"{path}: row {number} has {row[column] or 'nothing'} in column {column}, "
                        f"which is not a file in {folder}; correct it, or set data.files.images if "
                        f"{column} is not a column of files"
                    )
                check_readable(file)
        cases.append((row[ID], tuple(named[: len(images)]), named[-1] if labelled else None))
    problems.refuse()
    return tuple(images), cases


def _some(found: dict[str, Path]) -> str:
    names = [repr(name) for name in sorted(found)]
    return ", ".join([*names[:3], *["…"] * (len(names) > 3)])
