"""Settings that may change when a run is resumed, and settings that may not."""

from collections.abc import Iterator, Mapping
from typing import Any

from segkit.config.load import validated
from segkit.config.training import SCHEDULE_OF, Config
from segkit.errors import ConfigError

REFUSED = {
    "name": "a run keeps its name",
    "data.validation": "a run keeps its split",
    "data.fold": "a run keeps its split",
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
"""Settings that must not change during a run, and the reason."""
APPLIED = {
    "data.folder",
    "data.files",
    "data.patch_size",
    "data.batch_size",
    "data.foreground_share",
    "data.augment",
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
"""Settings that may change, from the next step on. A setting in neither list must not change."""
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


def check_changes(source: str, found: list[Change], steps_done: int) -> None:
    """Check that a run allows these changes.

    Raises:
        ConfigError: a setting that must not change was changed, or no step is left.
    """
    for key, before, after in found:
        if not is_one_of(key, APPLIED):
            reason = next(
                (why for name, why in REFUSED.items() if is_one_of(key, {name})),
                "a run keeps it",
            )
            raise ConfigError(
                f"{source}: {key} was changed from {_short(before)} to {_short(after)}, but "
                f"{reason}; change it back, or train a new run, with train.start_from to begin "
                f"with these weights"
            )
        if key == "train.steps" and after <= steps_done:
            raise ConfigError(
                f"{source}: train.steps is {after}, but {steps_done} steps are done; set it higher"
            )


def in_a_sentence(found: list[Change]) -> str:
    """The changes in one line, such as `train.steps 500 -> 1000`."""
    return ", ".join(f"{key} {_short(before)} -> {_short(after)}" for key, before, after in found)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
