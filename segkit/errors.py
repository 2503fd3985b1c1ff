"""Errors that a user can cause. The text of each is the one sentence that the user reads.

    SegkitError
    ├── ConfigError    a setting is unknown, of the wrong type, or contradicts another
    ├── VolumeError    a file is not the volume that was expected
    ├── DatasetError   the parts of a dataset folder do not fit together
    ├── ModelError     a model folder cannot be used
    ├── TrainingError  training failed
    └── WorkerError    a worker process was killed

`sentence_of` turns an OSError into such a sentence. `Stopped` is not an error: the user or a
scheduler asked the command to end. Any other exception is a bug of ours and keeps its traceback.
"""

import errno
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

Result = TypeVar("Result")
ADVICE = {
    errno.ENOSPC: "free some space there and run the same command again",
    errno.EDQUOT: "free some of your quota there and run the same command again",
    errno.EFBIG: "raise the limit on the size of files and run the same command again",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "check its permissions, or choose another",
    errno.EPERM: "check its permissions, or choose another",
    errno.ENOENT: "it was moved or deleted; put it back and run the same command again",
    errno.EMFILE: "raise the limit on open files (ulimit -n) and run the same command again",
}
OTHERWISE = "check the disk and run the same command again"
SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


MOST_CHARACTERS = 4000
"""Longest text of an error, which may quote an untrusted file."""
MOST_SENTENCES = 5
"""Most problems that the text of one error lists; `problems` holds all of them."""


class SegkitError(Exception):
    """A mistake of a user. Its one sentence names the fault, the right value and the way out.

    The sentence may quote an untrusted file. So control characters are escaped (`printable`), and
    the middle of a very long sentence is left out (`abridged`). All other errors of segkit are
    subclasses.

    Args:
        sentence: the text of the error.

    Example:
        >>> try:
        ...     scan = segkit.read_volume("scan.nii.gz")
        ... except segkit.SegkitError as error:
        ...     print(error)
        scan.nii.gz: no such file; check the path
    """

    problems: tuple[str, ...] = ()
    """One sentence per problem if several were found together; empty otherwise."""

    def __init__(self, sentence: str) -> None:
        super().__init__(printable(abridged(sentence)))


def printable(text: str) -> str:
    """The text with control characters escaped, so that a terminal shows them and does not obey.

    Example:
        >>> printable("a\x1b[2Jb")
        'a\\x1b[2Jb'
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    # A lone surrogate stands for a byte of a file name that is not UTF-8.
    return character.encode("unicode_escape").decode("ascii")


def abridged(text: str, most: int = MOST_CHARACTERS) -> str:
    """The text, or only its beginning and end if it is longer than `most` characters."""
    if len(text) <= most:
        return text
    start, end = most * 3 // 4, most // 4
    return f"{text[:start]} … ({len(text) - start - end:,} characters more) … {text[-end:]}"


def first_few(items: Iterable[object], most: int = 8, *, between: str = ", ") -> str:
    """The first `most` items as text, and how many more there are.

    Example:
        >>> first_few(range(300_000), 3)
        '0, 1, 2 and 299,997 more'
    """
    texts = list(items)
    shown = between.join(str(text) for text in texts[:most])
    return shown if len(texts) <= most else f"{shown} and {len(texts) - most:,} more"


def counted(number: float, noun: str, *, form: str | None = None) -> str:
    """A number with its noun, in the plural unless the number is 1.

    Args:
        number: a number of things.
        noun: the noun in the singular; words may stand before it.
        form: format of the number; by default, whole numbers are written in full.

    Example:
        >>> counted(1, "case"), counted(2.5, "minute"), counted(2, "more class")
        ('1 case', '2.5 minutes', '2 more classes')
    """
    if form is None:
        form = "g" if isinstance(number, float) else "d"
    text = f"{number:{form}}"
    return f"{text} {noun if text == '1' else _plural(noun)}"


def _plural(noun: str) -> str:
    if noun.endswith(("s", "x", "ch", "sh")):
        return f"{noun}es"
    return f"{noun}s"


class Problems:
    """Collects the errors of many files and raises them together at the end.

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
        """Catch and record a SegkitError from the block; execution continues after the block."""
        try:
            yield
        except SegkitError as error:
            self.errors.append(error)

    def results(self, attempts: Iterable[Result | SegkitError]) -> Iterator[Result]:
        """The attempts that succeeded; those that are errors are recorded."""
        for attempt in attempts:
            if isinstance(attempt, SegkitError):
                self.errors.append(attempt)
            else:
                yield attempt

    def refuse(self) -> None:
        """Raise the recorded errors, if there are any.

        A single error is raised as it is. Several become one error whose `problems` lists them.
        """
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
    """A setting is unknown, of the wrong type, or contradicts another.

    Example:
        >>> text = "data: {folder: my_dataset, patch_size: [64, 64, 64]}"
        >>> num_bytes = Path("my_dataset.yaml").write_text(text)
        >>> try:
        ...     config = segkit.load_config("my_dataset.yaml", ["train.stepps=500"])
        ... except segkit.ConfigError as error:
        ...     print(error)
        my_dataset.yaml: train.stepps is not a setting (did you mean steps?)
    """


class VolumeError(SegkitError):
    """A file is missing, unreadable, or not the volume that was expected.

    Example:
        >>> grid = segkit.Grid((2, 2, 2), np.eye(4))
        >>> fractions = segkit.Volume(np.full(grid.shape, 0.5), grid)
        >>> segkit.write_volume("labels.nii.gz", fractions)
        >>> try:
        ...     labels = segkit.read_labels("labels.nii.gz")
        ... except segkit.VolumeError as error:
        ...     print(error)
        labels.nii.gz: expected whole numbers, one per voxel, as labels, found 0.5; ...
    """


class DatasetError(SegkitError):
    """The parts of a dataset folder do not fit together.

    Example:
        >>> Path("my_dataset").mkdir()
        >>> try:
        ...     planned = segkit.plan_dataset("my_dataset")
        ... except segkit.DatasetError as error:
        ...     print(error)
        my_dataset: expected a dataset.json in it, found none; add one, or ...
    """


class ModelError(SegkitError):
    """A model folder is missing, incomplete, or does not fit the input.

    Example:
        >>> try:
        ...     model = segkit.load_model("runs/mine")
        ... except segkit.ModelError as error:
        ...     print(error)
        runs/mine: expected a run or a model folder with model.json, found neither; ...
    """


class TrainingError(SegkitError):
    """Training failed: the loss is NaN or infinite, or the device's memory is too small.

    Example:
        >>> config = segkit.load_config("my_dataset.yaml", ["train.learning_rate=1e30"])
        >>> try:
        ...     run = segkit.train(config)
        ... except segkit.TrainingError as error:
        ...     print(error)
        the loss of step ... is nan, with patches of ...; check these images, ...
    """


class WorkerError(SegkitError):
    """A process that reads cases or loads patches was killed.

    Example:
        >>> try:
        ...     planned = segkit.plan_dataset("my_dataset")
        ... except segkit.WorkerError as error:
        ...     print(error)  # the cases that were measured are kept: run it again
    """


class Stopped(BaseException):
    """A user pressed Ctrl-C, or a scheduler sent SIGTERM. The user reads its text.

    Args:
        signum: the number of the signal.
        advice: how the user can continue.
    """

    def __init__(self, signum: int, advice: str = "run the same command again to go on") -> None:
        super().__init__(f"stopped by {SIGNALS.get(signal.Signals(signum), signum)}; {advice}")
        self.signum = signum


def sentence_of(error: OSError) -> str:
    """One line: the file, the operating system's reason, and advice.

    An error from a worker process has a traceback as its text. Only its last line is used.
    """
    if error.errno is None or error.strerror is None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return f"{lines[-1].strip()}; {OTHERWISE}"
    where = f"{error.filename}: " if error.filename is not None else ""
    return f"{where}{error.strerror.lower()}; {ADVICE.get(error.errno, OTHERWISE)}"
