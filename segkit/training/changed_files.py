"""A warning if the files of a run's cases have changed since its last checkpoint."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from segkit.data.dataset import CaseFiles
from segkit.io.checksums import file_states
from segkit.training.kept_split import case_names

logger = logging.getLogger(__name__)

FileStates = dict[str, list[list[str | int]]]
"""The name, size in bytes and time of change (ns) of each file of a case, by the case's name."""


def states_of(cases: Iterable[CaseFiles]) -> FileStates:
    """The states of the files of each case, for a checkpoint.

    Args:
        cases: training and held-out cases of a run.

    Returns:
        File names without their folders, so that a dataset may be moved.

    Raises:
        DatasetError: a file does not exist.
    """
    return {
        case.name: [
            [Path(name).name, size, changed]
            for name, size, changed in file_states((*case.images, case.label))
        ]
        for case in cases
    }


def warn_of_changed_files(source: Path, before: Mapping[str, object], now: FileStates) -> None:
    """Warn about cases whose files have another name, size or time of change than before.

    The run continues with the new files.

    Args:
        source: the run's folder.
        before: the states in the run's last checkpoint; cases that it lacks are not compared.
        now: the current states.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        logger.warning(
            "%s: the files of %d of %d cases changed since the run's last checkpoint (%s); the "
            "run continues with the new files, but was also trained on the old ones",
            source,
            len(changed),
            len(now),
            case_names(changed),
        )
