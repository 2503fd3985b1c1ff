"""Folders in the Brain Imaging Data Structure (BIDS): images, labels, and the meaning of labels.

bids/dataset_description.json
bids/sub-01/ses-b/anat/sub-01_ses-b_T1w.nii.gz                   an image
bids/derivatives/lesions/sub-01/ses-b/anat/sub-01_ses-b_dseg.nii.gz    its labels
bids/derivatives/lesions/dseg.tsv                                their names
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from segkit.config.labels import Labelling
from segkit.data.dataset_json import DatasetJson, NamedFiles, labelling_of
from segkit.data.proposed_files import DERIVATIVES, told_labels, told_proposal
from segkit.errors import DatasetError, Problems, first_few, printable
from segkit.io.dicom_listing import find_folders
from segkit.io.tables import read_csv
from segkit.io.volume_names import NIFTI_SUFFIXES, stem_of

logger = logging.getLogger(__name__)

DESCRIPTION_FILE = "dataset_description.json"
ENTITY = re.compile(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)")
OF_CASE = ("sub", "ses", "run")
"""Entities that tell cases apart."""
LABEL_SUFFIX = "dseg"
LABEL_SUFFIXES = (LABEL_SUFFIX, "probseg", "mask", "defacemask")
ANATOMY = "anat"
PREDICTED = "segkit"
"""The entity `desc` of labels that segkit predicted."""
MOST_CASES = 5

Images = dict[str, dict[str, list[Path]]]
"""By the name of a case, the files of each suffix."""


def is_bids(folder: Path) -> bool:
    """Whether a folder has a dataset_description.json, or folders called sub-…."""
    if not folder.is_dir():
        return False
    return (folder / DESCRIPTION_FILE).is_file() or any(
        inside.is_dir() for inside in folder.glob("sub-*")
    )


def parts_of(path: Path) -> tuple[dict[str, str], str]:
    """The entities in a file's name and its suffix.

    Example:
        >>> parts_of(Path("sub-01_ses-b_T1w.nii.gz"))
        ({'sub': '01', 'ses': 'b'}, 'T1w')
    """
    *parts, suffix = stem_of(path).split("_")
    found = [match for part in parts if (match := ENTITY.fullmatch(part))]
    return {match[1]: match[2] for match in found}, suffix


def bids_images(folder: Path, channels: Sequence[str]) -> list[tuple[str, tuple[Path, ...]]]:
    """The images of each case that has all channels; `T1` and `T1w` are both `…_T1w.nii.gz`.

    A warning names the other cases.

    Raises DatasetError: no case has all channels, or a case has all, and several files for one.
    """
    images = _images(folder, anywhere=True)
    found, suffixes = [], set[str]()
    problems = Problems()
    for name, files in images.items():
        suffixes |= set(files)
        own = [_of_channel(files, channel) for channel in channels]
        if all(own):
            with problems.noted():
                found.append((name, tuple(_only(paths, folder) for paths in own)))
    problems.refuse()
    if not found:
        raise DatasetError(
            f"{folder}: expected a case with images of the channels {', '.join(channels)}, found "
            f"{first_few(sorted(suffixes)) or 'no images'}; write a YAML file whose data.files "
            "names the files"
        )
    if torn := sorted(images.keys() - {name for name, _ in found}):
        told = f"{folder}: left out, as they lack a channel: {first_few(torn, MOST_CASES)}"
        logger.warning("%s", printable(told))
    return found


def bids_labels(folder: Path) -> dict[str, Path]:
    """The file of labels (`…_dseg.nii.gz`) of each case, in the folder or in its derivatives.

    Predictions by segkit (`…_desc-segkit_dseg.nii.gz`) in its derivatives are no labels.

    Raises DatasetError if a case has several.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    depth = len(folder.parts)
    for path, entities, suffix in _files(folder, derivatives=True):
        predicted = entities.get("desc") == PREDICTED and DERIVATIVES in path.parts[depth:]
        if suffix == LABEL_SUFFIX and not predicted:
            found[_name(entities)].append(path)
    labels: dict[str, Path] = {}
    problems = Problems()
    for name, paths in found.items():
        with problems.noted():
            labels[name] = _only(paths, folder)
    problems.refuse()
    return labels


def bids_label_names(folder: Path) -> dict[str, tuple[int, ...]] | None:
    """Names of labels and their numbers, from the only table `…dseg.tsv`; None if there is none.

    Raises DatasetError for a table without the columns index and name, or for several that differ.
    """
    roots = [folder, *sorted((folder / DERIVATIVES).glob("*"))]
    tables = [
        path
        for root in roots
        for path in sorted(root.glob(f"*{LABEL_SUFFIX}.tsv"))
        if root == folder or not path.name.startswith(f"desc-{PREDICTED}_")
    ]
    told: dict[str, tuple[int, ...]] | None = None
    for path in tables:
        rows, columns = read_csv(path)
        if not {"index", "name"} <= set(columns):
            raise DatasetError(
                f"{path}: expected columns index and name, found {', '.join(columns) or 'none'}"
                "; correct the table"
            )
        names: dict[str, tuple[int, ...]] = {}
        for row in rows:
            if not re.fullmatch(r"-?[0-9]+", row["index"].strip()):
                raise DatasetError(
                    f"{path}: expected whole numbers as index, found {row['index']}"
                    "; correct the table"
                )
            names[row["name"]] = (*names.get(row["name"], ()), int(row["index"]))
        if told is not None and told != names:
            raise DatasetError(
                f"{path}: has other labels than {tables[0]}; set data.labels to the labels that "
                "are right"
            )
        told = names
    if told is not None and not any(0 in numbers for numbers in told.values()):
        told = {"background": (0,), **told}
    return told


def list_bids(folder: Path, given: Labelling | None = None) -> DatasetJson:
    """Channels, labelling and labelled cases of a BIDS folder.

    Channels are the suffixes of anatomical images that every labelled case has, in alphabetical
    order. Other images are not used, and a case may have several of a kind. Warnings name the cases
    without labels, and the kinds of image that only some labelled cases have.

    Args:
        folder: the BIDS folder.
        given: names and numbers of labels; if None, those in the table `dseg.tsv`.

    Raises:
        DatasetError: no case has labels and all channels, a case has several files for a channel,
            or labels have no names.
    """
    labels, images = bids_labels(folder), _images(folder, anywhere=False)
    if not labels:
        raise DatasetError(
            f"{folder}: expected label files derivatives/*/sub-*/**/*_dseg.nii.gz of its subjects, "
            f"found none; {told_proposal(folder)}"
        )
    bare = [name for name in labels if not images.get(name)]
    if bare:
        raise DatasetError(
            f"{folder}: found labels but no anatomical image of {first_few(bare, MOST_CASES)}; add "
            f"the images, or {told_proposal(folder)}"
        )
    common = set.intersection(*(set(images[name]) for name in labels))
    if not common:
        raise DatasetError(
            f"{folder}: expected a kind of image, such as T1w, that every labelled case has, found "
            f"none; {told_proposal(folder)}"
        )
    names = bids_label_names(folder)
    if given is None and names is None:
        raise DatasetError(
            f"{folder}: expected a table dseg.tsv with the names of the labels, found none; add "
            f"names to the command, such as {told_labels(list(labels.values()))}"
        )
    labelling = given or labelling_of(str(folder), names or {}, None, {})
    channels = tuple(sorted(common))
    cases: list[NamedFiles] = []
    problems = Problems()
    for name, label in labels.items():
        with problems.noted():
            own = tuple(_only(images[name][channel], folder) for channel in channels)
            cases.append((name, own, label))
    problems.refuse()
    _tell_left_out(folder, images, list(labels))
    return DatasetJson(channels, labelling, tuple(cases))


def _tell_left_out(folder: Path, images: Images, labelled: Sequence[str]) -> None:
    """Warn of cases without labels, and of kinds of image that only some labelled cases have.

    Args:
        folder: the BIDS folder.
        images: the images of all cases.
        labelled: names of the cases with labels.
    """
    told = []
    if bare := sorted(images.keys() - set(labelled)):
        told.append(f"left out because they have no label: {first_few(bare, MOST_CASES)}")
    for kind in sorted(set[str]().union(*(images[name] for name in labelled))):
        if lacking := [name for name in labelled if kind not in images[name]]:
            told.append(
                f"{kind} is not used as a channel, because these labelled cases lack it: "
                f"{first_few(lacking, MOST_CASES)}"
            )
    for sentence in told:
        logger.warning("%s", printable(f"{folder}: {sentence}"))


def _of_channel(files: Mapping[str, list[Path]], channel: str) -> list[Path]:
    wanted = channel.lower()
    for suffix, paths in files.items():
        if suffix.lower() in (wanted, f"{wanted}w"):
            return paths
    return []


def _images(folder: Path, *, anywhere: bool) -> Images:
    """The images of subjects, by case and suffix: only anatomical ones unless `anywhere`.

    If a case has anatomical images of a suffix, its other images of that suffix do not count.
    """
    found: Images = defaultdict(lambda: defaultdict(list))
    for path, entities, suffix in _files(folder, derivatives=False):
        if suffix not in LABEL_SUFFIXES and (anywhere or path.parent.name == ANATOMY):
            found[_name(entities)][suffix].append(path)
    return {
        name: {
            suffix: [path for path in paths if path.parent.name == ANATOMY] or paths
            for suffix, paths in files.items()
        }
        for name, files in found.items()
    }


def _only(paths: Sequence[Path], folder: Path) -> Path:
    """The only file of a kind and case. Raises DatasetError for several."""
    if len(paths) > 1:
        first, second = (path.relative_to(folder) for path in paths[:2])
        raise DatasetError(
            f"{folder}: {first} and {second} are two images of the same kind and case; select one "
            "of them with a pattern in data.files"
        )
    return paths[0]


def _name(entities: Mapping[str, str]) -> str:
    return "_".join(f"{key}-{entities[key]}" for key in OF_CASE if key in entities)


def _files(folder: Path, *, derivatives: bool) -> Iterator[tuple[Path, dict[str, str], str]]:
    """The NIfTI files of subjects, with entities and suffix, sorted by path."""
    roots = [folder, *(sorted((folder / DERIVATIVES).glob("*")) if derivatives else [])]
    for root in roots:
        for subject in sorted(root.glob("sub-*")):
            if not subject.is_dir():
                continue
            for inner in find_folders(subject):
                for path in sorted(inner.iterdir()):
                    if path.name.startswith("sub-") and path.name.endswith(NIFTI_SUFFIXES):
                        yield path, *parts_of(path)
