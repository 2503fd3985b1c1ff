"""From the settings of the data to what draws patches."""

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
    """What draws patches from the training cases.

    Args:
        config: how often cases and classes are drawn.
        dataset: whose cases they are.
        cases: prepared, to train on.
        patch_size: of the volume, in voxels.

    Raises:
        ConfigError: a weight has another name, or all weights are 0.
        DatasetError: a column of weights does not fit.
    """
    if config.draw_cases is None and not config.draw_classes:
        return ForegroundSampler(patch_size, config.foreground_share)
    weights = _case_weights(config, dataset)
    of_cases = tuple(weights.get(case.name, 1.0) for case in cases)
    if not sum(of_cases) > 0:
        raise ConfigError("data.draw_cases gives every training case 0; give one of them more")
    if not config.draw_classes:
        return WeightedSampler(patch_size, config.foreground_share, of_cases)
    members = dataset.labelling.members
    if unknown := [name for name in config.draw_classes if name not in members]:
        raise ConfigError(
            f"data.draw_classes has {unknown[0]!r}, which is none of {', '.join(members)}; correct "
            f"the name"
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
            "data.draw_classes gives 0 to every class that training cases hold; give one more"
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
    names = [*(case.name for case in dataset.cases), *dataset.test]
    if config.draw_cases is None:
        return {}
    if not isinstance(config.draw_cases, ColumnConfig):
        if unknown := sorted(config.draw_cases.keys() - set(names)):
            raise ConfigError(
                f"data.draw_cases names {first_few(unknown, NAMES_SHOWN)}, no case of "
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
                f"{table_of(config)}: column {column} says {value!r} of {name}; expected a weight "
                f"from 0 on"
            )
    return found
