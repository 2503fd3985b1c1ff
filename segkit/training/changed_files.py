"""Whether the files of a run's cases are still those that it began with."""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path

from segkit.data.dataset import CaseFiles
from segkit.io.checksums import file_states
from segkit.training.kept_split import told

logger = logging.getLogger(__name__)

FileStates = dict[str, list[list[str | int]]]
"""By the name of a case, the name, bytes and time of change (ns) of each of its files."""


def states_of(cases: Iterable[CaseFiles]) -> FileStates:
    """The states of the files of each case, as a checkpoint keeps them.

    Args:
        cases: that a run trains on or holds out.

    Returns:
        File names without their folders, so that a dataset may be moved.

    Raises:
        DatasetError: a file is not there.
    """
    return {
        case.name: [
            [Path(name).name, size, changed]
            for name, size, changed in file_states((*case.images, case.label))
        ]
        for case in cases
    }


def warn_of_changed_files(source: Path, before: Mapping[str, object], now: FileStates) -> None:
    """Warn of cases whose files have another name, size or time of change than before.

    The run goes on with the files that are there now.

    Args:
        source: the run's folder.
        before: what the run's last checkpoint says; cases that it does not name are not compared.
        now: of the cases as they are.
    """
    changed = [name for name in now if name in before and before[name] != now[name]]
    if changed:
        logger.warning(
            "%s: the files of %d of %d cases changed since the run's last checkpoint (%s); it goes "
            "on with the new files, but the weights also learned from the old ones",
            source,
            len(changed),
            len(now),
            told(changed),
        )
