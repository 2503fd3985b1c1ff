"""The volumes for a model: files, folders, tables and datasets."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segkit.config.dataset_files import TABLE_SUFFIXES, DatasetConfig, FilesConfig
from segkit.config.load import dataset_in, load_config
from segkit.config.pictures import PicturesConfig, pixel_mm_of
from segkit.data.bids import bids_images, is_bids
from segkit.data.dataset import channels_of_pictures, dataset_of
from segkit.data.dicom_cases import list_dicom
from segkit.data.file_patterns import ID, IMAGE, list_images
from segkit.errors import DatasetError, VolumeError, first_few
from segkit.io.inputs import Input, find_inputs, without_results
from segkit.io.picture_rules import PictureRules
from segkit.io.series_rules import SeriesRule
from segkit.io.tables import read_csv
from segkit.io.volume import AS_IT_SAYS
from segkit.io.volume_names import is_picture, volumes_among

logger = logging.getLogger(__name__)

YAML_SUFFIXES = (".yaml", ".yml")
DATASET_JSON = "dataset.json"
NamedImages = list[tuple[str, tuple[Path, ...]]]
"""The name of each case and its images, one for each channel or one of all."""


def inputs_in(
    paths: Sequence[Path],
    channels: Sequence[str],
    *,
    series: str | SeriesRule | None = None,
    rules: PictureRules = AS_IT_SAYS,
    sized: bool = False,
    but: Path | None = None,
) -> list[Input]:
    """The volumes that paths name, for a model of these channels.

    Args:
        paths: volumes, DICOM series, or folders of either, as `find_inputs` has it; or a dataset: a
            folder with a dataset.json or in the form of BIDS, a YAML file with `data`, or a table
            (.csv, .tsv) with the columns `id`, and `image` or one for each channel. All cases of a
            dataset are taken, with labels or without.
        channels: names of the model's channels. Those of a dataset are brought to their order.
        series: the choice of series in a folder of DICOM files, as for `find_inputs`.
        rules: how pictures are read for the model. A dataset's pixel size counts more than theirs,
            unless they measure in pixels.
        sized: whether the user gave the pixel size of `rules`, so that it counts most.
        but: a folder inside these, such as that of results, which is skipped.

    Raises:
        SegkitError: a path names no volume, or its channels are others.
    """
    found: list[Input] = []
    plain = [path for path in paths if not is_dataset(path)]
    if plain or series is not None:
        volumes = paths if series is not None else plain
        found += find_inputs(volumes, len(channels), series=series, rules=rules, but=but)
    for path in paths if series is None else ():
        if path not in plain:
            found += _of_dataset(path, channels, rules, sized=sized)
    return found


def is_dataset(path: Path) -> bool:
    """Whether a path names a dataset instead of volumes: a YAML, a table, BIDS or dataset.json."""
    if not path.is_dir():
        return path.suffix.lower() in (*YAML_SUFFIXES, *TABLE_SUFFIXES)
    if volumes_among(file for file in path.iterdir() if not file.name.startswith(".")):
        return False
    return (path / DATASET_JSON).is_file() or is_bids(path)


def config_at(path: Path) -> DatasetConfig:
    """The dataset settings of a YAML file or of a folder. Raises ConfigError."""
    return dataset_in(path) or load_config(path).data


def table_config(path: Path, channels: Sequence[str]) -> DatasetConfig:
    """The settings of a dataset for a table that is given by itself. Raises DatasetError."""
    _, columns = read_csv(path)
    own = {column.strip().lower(): column for column in columns}
    # The channel `photo red` is in the column `photo` if there is none of its own name.
    named = [
        channel if channel.lower() in own else channel.rpartition(" ")[0] for channel in channels
    ]
    if all(name.lower() in own for name in named):
        images = {name: own[name.lower()] for name in named}
    elif IMAGE in columns:
        images = {IMAGE: IMAGE}
    else:
        raise DatasetError(
            f"{path}: expected the columns {ID} and {IMAGE}, or one for each channel "
            f"({', '.join(channels)}), found {', '.join(columns) or 'none'}"
            "; rename the columns"
        )
    return DatasetConfig(
        folder=path.parent, files=FilesConfig(table=Path(path.name), images=images)
    )


def _of_dataset(
    path: Path, channels: Sequence[str], rules: PictureRules, *, sized: bool
) -> list[Input]:
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the path")
    is_table = path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()
    data = table_config(path, channels) if is_table else config_at(path)
    names, cases, pictures = _images_of(data, channels)
    if pictures is not None and pictures.pages is not None:
        rules = replace(rules, pages=pictures.pages)
    if pictures is not None and pictures.pixel_size and not (sized or rules.in_pixels):
        pixel_mm, in_pixels = pixel_mm_of(pictures.pixel_size)
        rules = replace(rules, pixel_mm=pixel_mm, in_pixels=in_pixels)
    found = [
        Input(name, _in_order(path, names, images, channels, rules), of_folder=True, rules=rules)
        for name, images in sorted(cases)
    ]
    # A pattern such as `images/*.nii.gz` also matches results. A table names its files exactly.
    by_pattern = data.files is not None and data.files.table is None
    return without_results(found) if by_pattern else found


def _images_of(
    data: DatasetConfig, channels: Sequence[str]
) -> tuple[Sequence[str], NamedImages, PicturesConfig | None]:
    """Names of the channels, the images of each case, with labels or without, and information that
    pictures lack."""
    if data.dicom is not None and data.dicom.images:
        found = list_dicom(data.folder, data.dicom)
        return tuple(data.dicom.images), [(case.name, case.images) for case in found], None
    if data.files is not None:
        return *list_images(data.folder, data.files), data.pictures
    if not (data.folder / DATASET_JSON).is_file() and is_bids(data.folder):
        return tuple(channels), bids_images(data.folder, channels), None
    dataset = dataset_of(data, with_test=True)
    bare = [case.name for case in dataset.cases if not case.images]
    if bare:
        raise DatasetError(
            f"{data.folder}: expected an image for each case, found none for {first_few(bare, 3)}; "
            "pass the scans themselves"
        )
    cases = [(case.name, case.images) for case in dataset.cases]
    return dataset.channels, cases, dataset.pictures


def _in_order(
    path: Path,
    names: Sequence[str],
    images: tuple[Path, ...],
    channels: Sequence[str],
    rules: PictureRules,
) -> tuple[Path, ...]:
    """A case's images in the order of the model's channels.

    Args:
        path: the dataset, for messages.
        names: names of the files of each case, or of all channels in them.
        images: the files of the case, one for each channel, or with several channels.
        channels: names of the model's channels.
        rules: how pictures are read.
    """
    pictures = all(map(is_picture, images))
    if len(images) == 1 and (pictures or len(names) > 1):
        return images  # a file holds them all
    held: list[tuple[str, ...]] = [(name,) for name in names]
    if pictures:
        held = channels_of_pictures(names, images, rules)
    found = [name for group in held for name in group]
    if set(channels) <= set(found):
        groups = dict(zip(held, images, strict=True))
        wanted = sorted(
            (group for group in groups if set(group) & set(channels)),
            key=lambda group: min(channels.index(name) for name in group if name in channels),
        )
        if [name for group in wanted for name in group] == list(channels):
            return tuple(groups[group] for group in wanted)
    elif len(found) == len(channels):
        if len(found) > 1:
            logger.warning(
                "%s: its channels %s are taken as the model's %s, in this order",
                *(path, ", ".join(found), ", ".join(channels)),
            )
        return images
    elif len(images) == 1:
        return images
    raise DatasetError(
        f"{path}: expected the channels of the model, {', '.join(channels)}, found "
        f"{', '.join(found)}; rename the channels"
    )
