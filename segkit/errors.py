"""What can go wrong in a user's hands, each with the one sentence that the user reads.

    SegkitError
    ├── ConfigError    a setting: unknown, of the wrong type, or at odds with another
    ├── VolumeError    a file that is not the volume it should be
    ├── DatasetError   a dataset folder whose parts do not fit together
    ├── ModelError     a model folder that cannot be used
    ├── TrainingError  training that went astray
    └── WorkerError    a process that was killed at its work

What the system refuses, an OSError, is told by `sentence_of`. `Stopped` is no error: somebody asked
for the end. Anything else that is raised is our own bug and keeps its traceback.
"""

import errno
import signal

ADVICE = {
    errno.ENOSPC: "free some space there and run the same command again",
    errno.EDQUOT: "free some of your quota there and run the same command again",
    errno.EFBIG: "the limit of a file's size is reached; raise it and run the same command again",
    errno.EROFS: "name a folder that can be written",
    errno.EACCES: "look at its permissions, or name another",
    errno.EPERM: "look at its permissions, or name another",
    errno.ENOENT: "it was moved or deleted; run the same command again once it is back",
    errno.EMFILE: "raise the limit of open files (ulimit -n) and run the same command again",
}
OTHERWISE = "look at the disk, and run the same command again"
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class SegkitError(Exception):
    """One sentence: what was expected, what was found, what to do.

    It may quote a stranger's file: what a terminal would obey rather than show is spelt out.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__("".join(map(_shown, sentence)))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")


class ConfigError(SegkitError):
    """A setting is unknown, of the wrong type, or at odds with another."""


class VolumeError(SegkitError):
    """A file is missing, unreadable, or not the volume it should be."""


class DatasetError(SegkitError):
    """The parts of a dataset folder do not fit together."""


class ModelError(SegkitError):
    """A model folder is missing, incomplete, or does not fit the input."""


class TrainingError(SegkitError):
    """Training went astray: the loss is no number."""


class WorkerError(SegkitError):
    """A process that shared the work was killed."""


class Stopped(BaseException):
    """A user's Ctrl-C, or the SIGTERM of a scheduler, with the one sentence that the user reads.

    Args:
        signum: the signal's number.
        advice: how to go on.
    """

    def __init__(self, signum: int, advice: str = "run the same command again to go on") -> None:
        super().__init__(f"stopped by {SIGNALS.get(signal.Signals(signum), signum)}; {advice}")
        self.signum = signum


def sentence_of(error: OSError) -> str:
    """What the system refused, where, and what to do: one line.

    Of an error that another process passed on, with its traceback as its text, the last line.
    """
    if error.errno is None or error.strerror is None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{lines[-1].strip()}; {OTHERWISE}"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror.lower()}; {ADVICE.get(error.errno, OTHERWISE)}"
