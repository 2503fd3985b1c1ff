"""Which settings of a run may be others when it goes on, and which are refused."""

from collections.abc import Iterator, Mapping
from typing import Any

from segkit.config.load import validated
from segkit.config.training import SCHEDULE_OF, Config
from segkit.errors import ConfigError

REFUSED = {
    "name": "a run keeps its name",
    "data.validation": "a run keeps its split",
    "data.fold": "a run keeps its split",
    "data.spacing": "the weights belong to it",
    "data.interpolation": "the weights belong to it",
    "data.normalisation": "the weights belong to it",
    "data.slices": "the weights belong to it",
    "data.first_stage": "the weights belong to it",
    "network": "the weights belong to it",
    "train.optimiser": "the other optimiser knows nothing of the steps before",
    "train.averaging": "the average belongs to all steps",
    "train.minutes": "the time was planned for the whole run",
    "train.start_from": "the run has its own weights by now",
    "train.other_channels": "the run has its own weights by now",
    "train.seed": "it has drawn the steps before",
    "replaced": "replace the same parts",
}
"""Settings that a run keeps to its end, and why."""
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
"""Settings that count from the next step on; a setting that is in neither list is refused."""
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
"""Settings that optimiser and schedule are made of."""

Change = tuple[str, Any, Any]
"""A setting's key, its value until now, and its value from here on."""


def settings_of(record: Mapping[str, Any], source: str) -> dict[str, Any]:
    """The settings in a checkpoint's record, as this version has them; empty without a record.

    A setting that is newer than the checkpoint has its default, which is what was done before there
    was such a setting. Raises ConfigError if the settings are not those of a config.
    """
    if "config" not in record:
        return {}
    config = validated(Config, record["config"], source)
    schedule = config.train.schedule or SCHEDULE_OF[config.train.optimiser]
    train = config.train.model_copy(update={"schedule": schedule})
    return config.model_copy(update={"train": train}).model_dump(mode="json")


def changes(begun: Mapping[str, Any], now: Mapping[str, Any], above: str = "") -> Iterator[Change]:
    """The settings of a checkpoint's config that are others now; those it does not have are not."""
    for key, before in begun.items():
        if key not in now:
            continue
        after, name = now[key], f"{above}{key}"
        if isinstance(before, Mapping) and isinstance(after, Mapping) and set(before) == set(after):
            yield from changes(before, after, f"{name}.")
        elif before != after:
            yield name, before, after


def is_one_of(key: str, names: Any) -> bool:
    """Whether a setting, or a section that it is in, is named."""
    parts = key.split(".")
    return any(".".join(parts[:count]) in names for count in range(1, len(parts) + 1))


def check_changes(source: str, found: list[Change], steps_done: int) -> None:
    """Raise ConfigError for the first change that a run cannot take."""
    for key, before, after in found:
        if not is_one_of(key, APPLIED):
            reason = next(
                (why for name, why in REFUSED.items() if is_one_of(key, {name})),
                "a run keeps it",
            )
            raise ConfigError(
                f"{source}: {key} was {_short(before)} until now and is {_short(after)}: {reason}; "
                f"set it back, or train a new run, with train.start_from to begin with its weights"
            )
        if key == "train.steps" and after <= steps_done:
            raise ConfigError(
                f"{source}: has done {steps_done} steps, and train.steps is {after}; give it more"
            )


def in_a_sentence(found: list[Change]) -> str:
    """The changes in words."""
    return ", ".join(f"{key} {_short(before)} -> {_short(after)}" for key, before, after in found)


def _short(value: Any) -> str:
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
