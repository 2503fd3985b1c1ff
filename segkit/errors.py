"""What can go wrong in a user's hands, each with the one sentence that the user reads.

    SegkitError
    ├── ConfigError    a setting: unknown, of the wrong type, or at odds with another
    ├── VolumeError    a file that is not the volume it should be
    ├── DatasetError   a dataset folder whose parts do not fit together
    ├── ModelError     a model folder that cannot be used
    ├── TrainingError  training that went astray
    └── WorkerError    a process that was killed at its work

Anything else that is raised is our own bug and keeps its traceback.
"""


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
