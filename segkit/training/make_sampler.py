"""The sampler of patches, made from the settings of the data."""

from collections.abc import Mapping, Sequence

from segkit.config.data import DataConfig
from segkit.config.dataset_files import ColumnConfig
from segkit.data.case_table import NAMES_SHOWN, column_of, table_of
from segkit.data.dataset import Dataset
from segkit.data.patches import ForegroundSampler, PatchSampler, WeightedSampler
from segkit.data.prepared_cache import StoredCase
from segkit.errors import ConfigError, DatasetError, first_few


def make_sampler(
    config: DataConfig, dataset: Dataset, cases: Sequence[StoredCase], patch_size: tuple[int, ...]
) -> PatchSampler:
    """The sampler that draws patches from the training cases.

    Args:
        config: settings, such as how often cases and classes are drawn.
        dataset: the dataset of the cases.
        cases: the prepared training cases.
        patch_size: size of a patch in voxels of the volume.

    Raises:
        ConfigError: a weight names an unknown case or class, or all weights are 0.
        DatasetError: a column of weights does not fit the dataset.
    """
    if config.draw_cases is None and not config.draw_classes:
        return ForegroundSampler(patch_size, config.foreground_share)
    weights = _case_weights(config, dataset)
    of_cases = tuple(weights.get(case.name, 1.0) for case in cases)
    if not sum(of_cases) > 0:
        raise ConfigError(
            "data.draw_cases gives every training case the weight 0; give at least one case a "
            "weight above 0"
        )
    if not config.draw_classes:
        return WeightedSampler(patch_size, config.foreground_share, of_cases)
    members = dataset.labelling.members
    if unknown := [name for name in config.draw_classes if name not in members]:
        raise ConfigError(
            f"data.draw_classes has {unknown[0]!r}, which is not one of {', '.join(members)}; "
            f"correct the name"
        )
    present = [set(case.positions) for case in cases]
    holders = tuple(
        tuple(
            number
            for number, labels in enumerate(present)
            if of_cases[number] > 0 and labels & set(group)
        )
        for group in members.values()
    )
    of_classes = tuple(config.draw_classes.get(name, 1.0) for name in members)
    if not any(weight for weight, held in zip(of_classes, holders, strict=True) if held):
        raise ConfigError(
            "data.draw_classes gives the weight 0 to every class in the training cases; give at "
            "least one class a weight above 0"
        )
    return WeightedSampler(
        patch_size,
        config.foreground_share,
        of_cases,
        tuple(members.values()),
        of_classes,
        holders,
    )


def _case_weights(config: DataConfig, dataset: Dataset) -> Mapping[str, float]:
    names = dataset.names_with_test
    if config.draw_cases is None:
        return {}
    if not isinstance(config.draw_cases, ColumnConfig):
        if unknown := sorted(config.draw_cases.keys() - set(names)):
            raise ConfigError(
                f"data.draw_cases names {first_few(unknown, NAMES_SHOWN)}, which is not a case of "
                f"{dataset.folder}; correct the name"
            )
        return config.draw_cases
    column = config.draw_cases.column
    found: dict[str, float] = {}
    for name, value in column_of(config, column, names, "data.draw_cases").items():
        try:
            found[name] = float(value) if value else 1.0
        except ValueError:
            found[name] = -1.0
        if not 0 <= found[name] <= 1e6:
            raise DatasetError(
                f"{table_of(config)}: column {column} has {value!r} for {name}; give a weight of 0 "
                f"or more"
            )
    return found
