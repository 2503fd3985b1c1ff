"""The volumes for a model: files, folders, tables and datasets."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segkit.config.dataset_files import TABLE_SUFFIXES, DatasetConfig, FilesConfig
from segkit.config.load import dataset_in, load_config
from segkit.config.pictures import pixel_mm_of
from segkit.data.bids import bids_images, is_bids
from segkit.data.dataset import dataset_of
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
        rules: how pictures are read; a dataset's pixel size counts if they give none.
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
            found += _of_dataset(path, channels, rules)
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
    if all(channel.lower() in own for channel in channels):
        images = {channel: own[channel.lower()] for channel in channels}
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


def _of_dataset(path: Path, channels: Sequence[str], rules: PictureRules) -> list[Input]:
    if not path.exists():
        raise VolumeError(f"{path}: no such file; check the path")
    is_table = path.suffix.lower() in TABLE_SUFFIXES and not path.is_dir()
    data = table_config(path, channels) if is_table else config_at(path)
    names, cases = _images_of(data, channels)
    if data.pictures is not None and not rules.pixel_mm and not rules.in_pixels:
        pixel_mm, in_pixels = pixel_mm_of(data.pictures.pixel_size)
        rules = replace(rules, pixel_mm=pixel_mm, in_pixels=in_pixels, pages=data.pictures.pages)
    found = [
        Input(name, _in_order(path, names, images, channels), of_folder=True, rules=rules)
        for name, images in sorted(cases)
    ]
    # A pattern such as `images/*.nii.gz` also matches results. A table names its files exactly.
    by_pattern = data.files is not None and data.files.table is None
    return without_results(found) if by_pattern else found


def _images_of(data: DatasetConfig, channels: Sequence[str]) -> tuple[Sequence[str], NamedImages]:
    """Names of the channels and the images of each case, whether it has labels or not."""
    if data.dicom is not None and data.dicom.images:
        found = list_dicom(data.folder, data.dicom)
        return tuple(data.dicom.images), [(case.name, case.images) for case in found]
    if data.files is not None:
        return list_images(data.folder, data.files)
    if not (data.folder / DATASET_JSON).is_file() and is_bids(data.folder):
        return tuple(channels), bids_images(data.folder, channels)
    dataset = dataset_of(data, with_test=True)
    bare = [case.name for case in dataset.cases if not case.images]
    if bare:
        raise DatasetError(
            f"{data.folder}: expected an image for each case, found none for {first_few(bare, 3)}; "
            "pass the scans themselves"
        )
    return dataset.channels, [(case.name, case.images) for case in dataset.cases]


def _in_order(
    path: Path, names: Sequence[str], images: tuple[Path, ...], channels: Sequence[str]
) -> tuple[Path, ...]:
    """A case's images in the order of the model's channels.

    Args:
        path: the dataset, for messages.
        names: names of the channels in the dataset.
        images: the files of the case, one for each channel, or one with all channels.
        channels: names of the model's channels.
    """
    if len(images) != len(names) or (len(images) == 1 and is_picture(images[0])):
        return images  # a file holds them all
    if set(channels) <= set(names):
        return tuple(images[names.index(channel)] for channel in channels)
    if len(names) == len(channels):
        if len(names) > 1:
            logger.warning(
                "%s: its channels %s are taken as the model's %s, in this order",
                *(path, ", ".join(names), ", ".join(channels)),
            )
        return images
    if len(images) == 1:
        return images
    raise DatasetError(
        f"{path}: expected the channels of the model, {', '.join(channels)}, found "
        f"{', '.join(names)}; rename the channels"
    )
