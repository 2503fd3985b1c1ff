"""Settings that a run does not use, because other settings turn them off.

If such a setting is changed when a run is resumed, the change is refused, so that none is silently
without effect.
"""

from collections.abc import Iterable, Iterator

from segkit.config.dataset_files import ColumnConfig
from segkit.config.loss import TermName
from segkit.config.training import SCHEDULE_OF, Config, OptimiserName, ScheduleName
from segkit.errors import ConfigError
from segkit.training.changed_settings import Change, is_one_of

OPTIMISERS: dict[str, tuple[OptimiserName, ...]] = {
    "train.adamw": ("adamw", "muon"),
    "train.sgd": ("sgd",),
    "train.muon": ("muon",),
}
"""The optimisers that use each section."""
SCHEDULES: tuple[ScheduleName, ...] = ("one_cycle", "polynomial", "cosine")
OVERLAP: tuple[TermName, ...] = (
    "dice",
    "tversky",
    "focal_tversky",
    "generalised_dice",
    "centre_line",
)
"""Terms of the loss whose sums `train.batch_dice` pools."""
TERMS: dict[str, tuple[TermName, ...]] = {
    "train.batch_dice": OVERLAP,
    "train.loss.focal_gamma": ("focal",),
    "train.loss.top_share": ("top_k",),
    "train.loss.false_positives": ("tversky", "focal_tversky"),
    "train.loss.false_negatives": ("tversky", "focal_tversky"),
    "train.loss.focal_tversky_gamma": ("focal_tversky",),
    "train.loss.boundary_reach": ("boundary",),
    "train.loss.centre_line_iterations": ("centre_line",),
}
"""The terms of the loss that use each setting."""
OF_HELD_OUT = (
    "train.validation_cases",
    "train.pictures",
    "train.patience",
    "train.keep_held_out",
    "train.calibrate",
)
"""Settings that concern held-out cases."""
OF_PART = {
    "loss": ("train.loss", "train.batch_dice"),
    "optimiser": (*OPTIMISERS, "train.weight_decay"),
    "schedule": ("train.schedule", *(f"train.{name}" for name in SCHEDULES)),
    "sampler": ("data.foreground_share", "data.draw_cases", "data.draw_classes"),
    "augmentation": (
        "data.augment",
        "data.augment_share",
        "data.elastic",
        "data.mirror",
        "data.synthesis",
    ),
}
"""Settings from which a part is made that can be replaced from Python."""


def why_unused(key: str, config: Config, *, held_out: bool) -> str | None:
    """The reason why a training does not use a setting; None if it does.

    Args:
        key: the dotted key of the setting.
        config: all settings.
        held_out: whether any case is held out.

    Example:
        >>> why_unused("train.sgd.momentum", config, held_out=True)
        'train.optimiser is adamw'
    """
    return next((why for used, why in _conditions(key, config, held_out) if not used), None)


def refuse_unused(source: str, found: Iterable[Change], config: Config, *, held_out: bool) -> None:
    """Refuse changes of settings that a run does not use.

    Args:
        source: the file or folder, for messages.
        found: the settings that were changed.
        config: the settings of now.
        held_out: whether any case is held out.

    Raises:
        ConfigError: a changed setting has no effect.
    """
    for key, _, _ in found:
        if reason := why_unused(key, config, held_out=held_out):
            raise ConfigError(
                f"{source}: {key} was changed, but this has no effect, because {reason}; change it "
                f"back"
            )


def told_of_unused(overrides: Iterable[str], config: Config) -> list[str]:
    """A sentence on each `KEY=VALUE` that has no effect on a training.

    A plan may have chosen what turns a setting off, such as another optimiser.
    """
    keys = [word.partition("=")[0] for word in overrides]
    reasons = {key: why_unused(key, config, held_out=True) for key in keys}
    return [f"{key} has no effect, because {why}" for key, why in reasons.items() if why]


def _conditions(key: str, config: Config, held_out: bool) -> Iterator[tuple[bool, str]]:
    """Whether a training uses a setting, by several conditions, each with the reason if not."""
    data, train = config.data, config.train
    schedule = train.schedule or SCHEDULE_OF[train.optimiser]
    for part in config.replaced:
        yield not is_one_of(key, OF_PART.get(part, ())), f"{part} is a part from Python"
    for section, optimisers in OPTIMISERS.items():
        if is_one_of(key, {section}):
            yield train.optimiser in optimisers, f"train.optimiser is {train.optimiser}"
    if key == "train.adamw.lowest_momentum":
        why = f"train.optimiser is {train.optimiser}, and only adamw changes its momentum"
        yield train.optimiser == "adamw", why
        yield schedule == "one_cycle", f"train.schedule is {schedule}"
    for name in SCHEDULES:
        if is_one_of(key, {f"train.{name}"}):
            yield schedule == name, f"train.schedule is {schedule}"
    if key in TERMS:
        used = not {*TERMS[key]}.isdisjoint(train.loss.terms)
        yield used, f"train.loss.terms has none of {', '.join(TERMS[key])}"
    if key in OF_HELD_OUT:
        yield held_out, "no case is held out"
    if key == "train.pictures":
        yield train.validation_cases != 0, "train.validation_cases is 0"
    if key == "data.mirror":
        yield data.augment or data.synthesis is not None, "data.augment is false"
    if key == "data.augment_share":
        yield data.synthesis is None, "data.synthesis draws the images"
        yield data.augment, "data.augment is false"
    if is_one_of(key, {"data.draw_classes"}):
        yield data.foreground_share > 0, "data.foreground_share is 0"
    if key == "data.case_table":
        yield _names_a_column(config), "no setting names one of its columns"


def _names_a_column(config: Config) -> bool:
    data = config.data
    settings = (
        data.splits,
        data.group_by,
        data.stratify_by,
        data.draw_cases,
        data.labelled,
        data.test,
    )
    return any(isinstance(setting, ColumnConfig) for setting in settings)
