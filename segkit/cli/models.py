"""The models that a command is asked to use: folders, addresses, or the newest run."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from segkit.cli.options import MODEL_VARIABLE
from segkit.cli.terminal import console, say
from segkit.errors import ModelError

if TYPE_CHECKING:
    from segkit.model.folder import Model


@dataclass(frozen=True)
class NamedModel:
    """A model folder, with the words in which its user named it."""

    folder: Path
    given: str
    """A path or an address; a model from a zip or an address lies in the cache."""
    root: Path
    """The folder that `given` names."""
    checkpoint: str | None = None
    """The checkpoint whose weights are asked for; None for those of the finished run."""
    is_only: bool = True
    """Whether `given` names no other model."""

    def __str__(self) -> str:
        """The model as its user knows it, such as `model.zip (fold_1)` or `runs/ct/model`."""
        notes = [] if self.checkpoint is None else [f"{self.checkpoint}.ckpt"]
        if self.root == Path(self.given):
            name = str(self.folder)
        else:
            name = self.given
            if not self.is_only:
                notes.insert(0, self.folder.relative_to(self.root).parts[0])
        return f"{name} ({', '.join(notes)})" if notes else name

    def load(self) -> "Model":
        """The model. Raises ModelError, with the name that the user gave."""
        from segkit.model.folder import load_model

        try:
            return load_model(self.folder, checkpoint=self.checkpoint)
        except ModelError as error:
            raise _in_given_words(error, self.root, self.given) from None


def find_models(
    named: Sequence[str] | None, checkpoint: str | None = None
) -> list[list[NamedModel]]:
    """For each model that a user has named, its model folders; by default, the newest run's.

    Models at addresses are fetched if they are not in the cache, and their versions are printed.
    Several folders of one model are the folds of a cross-validation.

    Args:
        named: paths and addresses; if there are none, those in the variable SEGKIT_MODEL are used.
        checkpoint: `best` or `last` if weights of a checkpoint are wanted.

    Raises:
        ModelError: there is no model, or it cannot be fetched.
    """
    from segkit.model.addresses import parse_address, split_paths
    from segkit.model.fetch_model import fetch_model, fetched
    from segkit.model.folder import newest_model
    from segkit.system.progress import Tracker

    found: list[tuple[str, Path]] = []
    for path in named or split_paths(os.environ.get(MODEL_VARIABLE, "")):
        address = parse_address(path)
        if address is None:
            found.append((str(path), fetch_model(path)))
            continue
        model = fetched(address, track=Tracker(console))
        say(f"{address}: version {model.version}")
        found.append((str(address), model.folder))
    if not found:
        newest = newest_model(Path("runs"))
        found = [(str(newest), newest)]
    return [_models_in(root, given, checkpoint) for given, root in found]


def _models_in(root: Path, given: str, checkpoint: str | None) -> list[NamedModel]:
    from segkit.model.folder import model_folders

    try:
        folders = model_folders(root, checkpoint)
    except ModelError as error:
        raise _in_given_words(error, root, given) from None
    return [NamedModel(folder, given, root, checkpoint, len(folders) == 1) for folder in folders]


def _in_given_words(error: ModelError, root: Path, given: str) -> ModelError:
    """The error with the user's name for a model instead of the path of its cache."""
    return ModelError(str(error).replace(str(root), given))
