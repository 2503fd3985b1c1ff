"""`segkit train DATASET` in two stages: one run and then another, also after a stop of either.

runs/NAME_low/second_stage.yaml   what is to be trained next, beside all that a run has
runs/NAME/                        given the labels of NAME_low
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from segkit.config.load import dump_yaml, load_config
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.model.folder import SUMMARY
from segkit.system.progress import Track, untracked
from segkit.training.fit import Run, fit_beside, resume, train
from segkit.training.parts import prepare
from segkit.training.resolve import with_whole_paths
from segkit.training.run_folder import CONFIG, SECOND_STAGE


def train_two_stages(
    low: Config,
    full: Config,
    *,
    runs: Path,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    spent: float = 0.0,
) -> Run:
    """Train a first stage and then a second that is given its labels, which is the run returned.

    `tell` takes the first; `callbacks`, `track` and `spent` are those of `train`, which says what
    is raised.
    """
    first = train_first(low, full, runs=runs, callbacks=callbacks, track=track, spent=spent)
    tell(first)
    return train(after(full, first.folder), runs=runs, callbacks=callbacks, track=track)


def train_first(
    low: Config,
    full: Config,
    *,
    runs: Path,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
    spent: float = 0.0,
) -> Run:
    """Train a first stage; the second's config lies in its folder, so that no stop forgets it."""
    return fit_beside(
        {SECOND_STAGE: dump_yaml(with_whole_paths(full))},
        prepare(low, runs=runs, track=track),
        runs=runs,
        callbacks=callbacks,
        track=track,
        spent=spent,
    )


def after(config: Config, first: Path) -> Config:
    """The config of a second stage, which is given the labels of a run."""
    data = config.data.model_copy(update={"first_stage": [first]})
    return config.model_copy(update={"data": data})


def resume_two_stages(
    folder: Path,
    overrides: Sequence[str] = (),
    *,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> Run:
    """Go on with a run, and then with its second stage if it is the first of two.

    `overrides` change settings of a run that is no first stage.

    Where the second was begun, it is gone on with in turn. Raises ConfigError where nothing is left
    to do, and whatever `training.resume` raises.
    """
    if not (folder / SECOND_STAGE).is_file():
        return resume(folder, overrides=overrides, callbacks=callbacks, track=track)
    if overrides:
        raise ConfigError(
            f"{folder}: is the first of two stages, and {overrides[0]} would change only it; "
            f"resume without settings, or edit its {CONFIG} or {SECOND_STAGE} first"
        )
    if not (folder / SUMMARY).is_file():
        tell(resume(folder, callbacks=callbacks, track=track))
    begun = second_of(folder)
    if begun is not None:
        return resume(begun, callbacks=callbacks, track=track)
    config = after(load_config(folder / SECOND_STAGE), folder)
    return train(config, runs=folder.parent, callbacks=callbacks, track=track)


def second_of(folder: Path) -> Path | None:
    """The run beside this one that is given its labels alone, if there is one."""
    for config in sorted(folder.parent.glob(f"*/{CONFIG}")):
        try:
            first_stage = load_config(config).data.first_stage
        except ConfigError:  # of another version of segkit
            continue
        if first_stage == [folder.resolve()]:
            return config.parent
    return None
