"""The folds that a dataset is cut into if nothing else is asked for."""

from segkit.config.data import DataConfig
from segkit.data.dataset import Dataset
from segkit.data.folds import drawn
from segkit.data.split import Split, nth_of


def fold_of(dataset: Dataset, fold: int) -> Split:
    """The split that holds out one of five."""
    return nth_of(
        dataset, drawn(dataset, DataConfig(folder=dataset.folder, patch_size=[8] * 3)), fold
    )
