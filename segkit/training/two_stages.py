"""`segkit train DATASET` in two stages: one run and then another, also after a stop of either.

runs/NAME_low/second_stage.yaml   what is to be trained next, beside all that a run has
runs/NAME/                        given the labels of NAME_low
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from lightning.pytorch.callbacks import Callback

from segkit.config.load import load_config
from segkit.config.training import Config
from segkit.errors import ConfigError
from segkit.model.folder import SUMMARY
from segkit.system.progress import Track, untracked
from segkit.training import fit as training
from segkit.training.fit import Run, after
from segkit.training.run_folder import CONFIG, SECOND_STAGE


def train_two_stages(
    low: Config,
    full: Config,
    *,
    runs: Path,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> Run:
    """Train a first stage and then a second that is given its labels, which is the run returned.

    `tell` takes the first; `callbacks` and `track` are those of `training.train`, which says what
    is raised.
    """
    first = training.train(low, runs=runs, then=full, callbacks=callbacks, track=track)
    tell(first)
    return training.train(after(full, first.folder), runs=runs, callbacks=callbacks, track=track)


def resume_two_stages(
    folder: Path,
    *,
    tell: Callable[[Run], None] = lambda run: None,
    callbacks: Sequence[Callback] = (),
    track: Track = untracked,
) -> Run:
    """Go on with a run, and then with its second stage if it is the first of two.

    Where the second was begun, it is gone on with in turn. Raises ConfigError where nothing is left
    to do, and whatever `training.resume` raises.
    """
    if not (folder / SECOND_STAGE).is_file():
        return training.resume(folder, callbacks=callbacks, track=track)
    if not (folder / SUMMARY).is_file():
        tell(training.resume(folder, callbacks=callbacks, track=track))
    begun = second_of(folder)
    if begun is not None:
        return training.resume(begun, callbacks=callbacks, track=track)
    config = after(load_config(folder / SECOND_STAGE), folder)
    return training.train(config, runs=folder.parent, callbacks=callbacks, track=track)


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
