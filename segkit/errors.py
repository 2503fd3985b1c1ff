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
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

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


MOST_CHARACTERS = 4000
"""Of a sentence, which may quote a stranger's file."""
MOST_SENTENCES = 5
"""Of several problems in the text of one error; `problems` holds them all."""


class SegkitError(Exception):
    """One sentence: what was expected, what was found, what to do.

    It may quote a stranger's file: what a terminal would obey rather than show is spelt out, and
    the middle of an endless sentence is left out.
    """

    problems: tuple[str, ...] = ()
    """A sentence for each of several problems that were found in one go; else none."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(abridged(sentence)))


def printable(text: str) -> str:
    """The text with each character spelt out that a terminal would obey rather than show.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    # A lone surrogate stands for a byte of a file's name that is no UTF-8.
    return character.encode("unicode_escape").decode("ascii")


def abridged(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text; or its first and last parts, if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    start, end = most * 3 // 4, most // 4
    return f"{text[:start]} … ({len(text) - start - end:,} characters more) … {text[-end:]}"


def first_few(items: Iterable[object], most: int = 8, *, between: str = ", ") -> str:
    """The first items in a row, and how many more there are.

    Example:
        >>> first_few(range(300_000), 3)
        '0, 1, 2 and 299,997 more'
    """
    texts = list(items)
    shown = between.join(str(text) for text in texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most:,} more"


class Problems:
    """What is wrong with many files, told together once all were looked at.

    Example:
        problems = Problems()
        for path in paths:
            with problems.noted():
                read_volume(path)
        problems.refuse()
    """

    def __init__(self) -> None:
        self.errors: list[SegkitError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note a SegkitError that is raised inside, and go on behind it."""
        try:
            yield
        except SegkitError as error:
            self.errors.append(error)

    def refuse(self) -> None:
        """Raise what was noted, if anything: an only error as it is, or one that holds them all."""
        if len(self.errors) == 1:
            raise self.errors[0]
        if not self.errors:
            return
        sentences = tuple(
            dict.fromkeys(each for error in self.errors for each in error.problems or [str(error)])
        )
        together = type(self.errors[0])(first_few(sentences, MOST_SENTENCES, between="; "))
        together.problems = sentences
        raise together


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
