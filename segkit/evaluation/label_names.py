"""Names of labels and regions, from the file of a dataset, a config or a model."""

from pathlib import Path

from segkit.config.dataset_files import DatasetConfig
from segkit.config.labels import Labelling
from segkit.config.load import DatasetFileConfig, read_yaml, validated
from segkit.data.bids import is_bids
from segkit.data.dataset import dataset_of
from segkit.data.dataset_json import (
    labelling_of,
    picture_rules,
    read_labelling,
    read_picture_rules,
)
from segkit.errors import VolumeError
from segkit.io.picture_rules import PictureRules
from segkit.model.addresses import is_address
from segkit.model.file_names import DESCRIPTION
from segkit.model.folder import load_description, model_folder


def labels_file(references: Path, labels: str | Path | None) -> Path | None:
    """The file that names the labels; None if there is none.

    Args:
        references: a file or folder of references.
        labels: the wanted file, or a folder with a dataset.json or a model, or the address of a
            model. If None, a dataset.json beside the references or one folder above is used.

    Raises:
        VolumeError: if `labels` does not exist or is not such a file or folder.
        ModelError: if the model at an address cannot be fetched.
    """
    if labels is not None and is_address(labels):
        labels = model_folder(labels)
    folder = references if references.is_dir() else references.parent
    candidates = [folder / "dataset.json", folder.parent / "dataset.json"]
    if labels is not None:
        candidates = [Path(labels)]
        if Path(labels).is_dir():
            inside = ("dataset.json", DESCRIPTION, f"model/{DESCRIPTION}")
            candidates = [Path(labels) / name for name in inside]
    for path in candidates:
        if path.is_file():
            return path
    if labels and not Path(labels).exists():
        raise VolumeError(f"{labels}: no such file or folder; check the path")
    if labels:
        raise VolumeError(
            f"{labels}: expected a dataset.json, a config, a run or a model folder; check the path"
        )
    return None


def labelling_in(path: Path) -> Labelling:
    """The classes or regions in a dataset.json, a config or the description of a model.

    Raises:
        DatasetError: if a dataset.json is not valid.
        ConfigError: if a config is not valid.
        ModelError: if the description of a model is not valid.
    """
    if path.name == DESCRIPTION:
        return load_description(path.parent).labelling
    if path.suffix.lower() not in (".yaml", ".yml"):
        return read_labelling(path)
    source = _dataset_in(path)
    if source.labels is not None:
        return labelling_of(str(path), source.labels, source.regions_class_order, {})
    if source.files is not None and source.files.labels:
        files = source.files
        return labelling_of(str(path), files.labels, files.regions_class_order, {})
    if source.dicom is not None or is_bids(source.folder):
        return dataset_of(source, with_test=True).labelling
    return read_labelling(source.folder / "dataset.json")


def picture_rules_in(path: Path) -> PictureRules:
    """The rules for reading pictures in such a file. It raises the errors of `labelling_in`."""
    if path.name == DESCRIPTION:
        return picture_rules(str(path), load_description(path.parent).pictures, labelling_in(path))
    if path.suffix.lower() in (".yaml", ".yml"):
        return picture_rules(str(path), _dataset_in(path).pictures, labelling_in(path))
    return read_picture_rules(path)


def _dataset_in(path: Path) -> DatasetConfig:
    """The settings of the dataset in the section `data` of a config."""
    data = read_yaml(path).get("data")
    settings = data if isinstance(data, dict) else {}
    own = {name: settings[name] for name in DatasetConfig.model_fields if name in settings}
    return validated(DatasetFileConfig, {"data": own}, str(path)).data
