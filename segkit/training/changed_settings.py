"""Settings that may change when a run is resumed, and settings that may not."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.training import SCHEDULE_OF, Config
from segkit.errors import ConfigError, counted
from segkit.io.safe_text import read_json_object
from segkit.model.file_names import CONFIG
from segkit.training.resolve import with_absolute_paths
from segkit.training.run_folder import BEGUN

OF_SPLIT = (
    "data.validation",
    "data.fold",
    "data.num_folds",
    "data.splits",
    "data.group_by",
    "data.stratify_by",
    "data.test",
)
"""Settings that decide which cases are held out."""
REFUSED = {
    "name": "a run keeps its name",
    **dict.fromkeys(OF_SPLIT, "a run keeps its split"),
    "data.labels": "the weights were trained with it",
    "data.regions_class_order": "the weights were trained with it",
    "data.files.labels": "the weights were trained with it",
    "data.files.regions_class_order": "the weights were trained with it",
    "data.dicom": "the weights were trained with these series and structures",
    "data.pictures": "the weights were trained with these pixels",
    "data.spacing": "the weights were trained with it",
    "data.interpolation": "the weights were trained with it",
    "data.normalisation": "the weights were trained with it",
    "data.slices": "the weights were trained with it",
    "data.first_stage": "the weights were trained with it",
    "network": "the weights were trained with it",
    "train.optimiser": "another optimiser has no state of the earlier steps",
    "train.averaging": "the average covers all steps",
    "train.minutes": "the time was planned for the whole run",
    "train.start_from": "the run has its own weights now",
    "train.other_channels": "the run has its own weights now",
    "train.seed": "the earlier steps used it",
    "replaced": "the same parts must be replaced",
}
"""Settings that must not change during a run, and the reason. They include parts of sections that
may change."""
APPLIED = {
    "data.folder",
    "data.files",
    "data.case_table",
    "data.labelled",
    "data.nan",
    "data.patch_size",
    "data.batch_size",
    "data.foreground_share",
    "data.draw_cases",
    "data.draw_classes",
    "data.augment",
    "data.augment_share",
    "data.elastic",
    "data.mirror",
    "data.synthesis",
    "data.workers",
    "data.cache",
    "train.steps",
    "train.adamw",
    "train.sgd",
    "train.muon",
    "train.schedule",
    "train.one_cycle",
    "train.polynomial",
    "train.cosine",
    "train.learning_rate",
    "train.weight_decay",
    "train.gradient_clip",
    "train.freeze",
    "train.loss",
    "train.batch_dice",
    "train.validate_every",
    "train.validation_cases",
    "train.pictures",
    "train.patience",
    "train.keep_held_out",
    "train.calibrate",
    "trainer",
}
"""Settings that may change, from the next step on. Each setting is in one of the two lists."""
OF_SCHEDULE = (
    "train.steps",
    "train.adamw",
    "train.sgd",
    "train.muon",
    "train.schedule",
    "train.one_cycle",
    "train.polynomial",
    "train.cosine",
    "train.learning_rate",
    "train.weight_decay",
)
"""Settings that define the optimiser and the schedule."""

OF_FOLDER = ("name", "data.fold")
"""Settings that a run keeps from the beginning, because its folder is named after them."""
WORKED_OUT = ("data.normalisation",)
"""Settings that are given in several forms. They are compared when their values are known."""

Change = tuple[str, Any, Any]
"""The key of a setting, its old value, and its new value."""


def settings_of(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings in a checkpoint's record, with all settings of this version.

    A setting that is newer than the checkpoint gets its default, because training worked this way
    before the setting existed. Empty without a record.

    Raises:
        ConfigError: the record does not hold a valid config.
    """
    if "config" not in record:
        return {}
    config = validated(Config, record["config"], source)
    schedule = config.train.schedule or SCHEDULE_OF[config.train.optimiser]
    train = config.train.model_copy(update={"schedule": schedule})
    return config.model_copy(update={"train": train}).model_dump(mode="json")


def changes(begun: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[Change]:
    """The settings whose values differ between a checkpoint's config and the config of now.

    Settings that the checkpoint lacks, because they are newer, are left out.

    Args:
        begun: the config in the checkpoint.
        now: the config of the resumed run.
        above: the dotted key of these sections, with a dot at its end.
    """
    for key, before in begun.items():
        if key not in now:
            continue
        after, name = now[key], f"{above}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping) and set(before) == set(after):
            yield from changes(before, after, f"{name}.")
        elif before != after:
            yield name, before, after


def is_one_of(key: str, names: Any) -> bool:
    """Whether `names` contains a setting or a section that it belongs to."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))


def check_changes(source: str, found: Iterable[Change], steps_done: int) -> None:
    """Check that a run allows these changes.

    Args:
        source: the run's folder, for messages.
        found: the key of each change, with the values before and after.
        steps_done: number of steps that the run has done.

    Raises:
        ConfigError: a setting that must not change was changed, or no step is left.
    """
    for key, before, after in found:
        reason = next((why for name, why in REFUSED.items() if is_one_of(key, {name})), None)
        if reason is not None:
            raise ConfigError(
                f"{source}: {key} was changed from {_short(before)} to {_short(after)}, but "
                f"{reason}; change it back, or train a new run, with train.start_from to begin "
                f"with these weights"
            )
        if key == "train.steps" and after <= steps_done:
            raise ConfigError(
                f"{source}: train.steps is {after}, but the run has already done "
                f"{counted(steps_done, 'step')}; set it higher"
            )


def asked_changes(begun: Mapping[str, Any], config: Config) -> Iterator[Change]:
    """The changes that a config asks for, before values that it leaves open are worked out."""
    now = with_absolute_paths(config).model_dump(mode="json")
    for key, before, after in changes(begun, now):
        if after is not None and key not in WORKED_OUT:
            yield key, before, after


def split_is_edited(run: Path, config: Config) -> bool:
    """Whether settings of the split were edited in a run that has no checkpoint yet.

    Args:
        run: the run's folder, with the settings that it began with.
        config: its settings now.

    Raises:
        ConfigError: the name or the fold was edited, which the folder of a run keeps.
    """
    try:
        begun = settings_of(read_json_object(run / BEGUN), str(run / BEGUN))
    except FileNotFoundError:  # a run of an older version
        return False
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run / BEGUN}: cannot be read as JSON: {error}; delete it") from None
    found = list(changes(begun, with_absolute_paths(config).model_dump(mode="json")))
    check_changes(str(run / CONFIG), [each for each in found if each[0] in OF_FOLDER], 0)
    return any(is_one_of(key, OF_SPLIT) for key, *_ in found)


def check_same_classes(run: Path, begun: ModelDescription, now: ModelDescription) -> None:
    """Check that labels and channels are still those that a run's weights were trained with.

    Args:
        run: the run's folder.
        begun: the model of the run, as it was described at its start.
        now: its description by the dataset as it is now.

    Raises:
        ConfigError: the dataset has other channels, or its labels have other names or numbers.
    """
    for what, before, after in (
        ("channels", begun.channels, now.channels),
        ("labels", begun.labelling.numbers_in_files, now.labelling.numbers_in_files),
        ("regions", begun.regions, now.regions),
        ("number to ignore", begun.ignore, now.ignore),
        ("numbers in label files", _numbers(begun), _numbers(now)),
    ):
        # The order counts: it is the order of the network's outputs.
        if str(before) != str(after):
            raise ConfigError(
                f"{run}: the {what} of the dataset were {_short(before)} when the run began, but "
                f"are now {_short(after)}; restore them, or train a new run, with train.start_from "
                f"to begin with these weights"
            )


def _numbers(description: ModelDescription) -> tuple[list[list[int]], int | None]:
    """The numbers in files of each number in memory, and the number of all others."""
    return description.in_files, description.others


def in_a_sentence(found: list[Change]) -> str:
    """The changes in one line, such as `train.steps 500 -> 1000`."""
    return ", ".join(f"{key} {_short(before)} -> {_short(after)}" for key, before, after in found)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
