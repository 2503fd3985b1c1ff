"""`segkit push`: a model with its card, to a model hub or into a folder."""

import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from segkit.errors import ModelError, first_few
from segkit.export.model_card import AuthorsWords
from segkit.export.shared_files import CARD, outdated, shared_paths, write_shared
from segkit.io.atomic import whole_folder
from segkit.model.addresses import HubAddress, hub_server, parse_address
from segkit.model.file_names import DESCRIPTION, SUMS
from segkit.model.hub import hub_errors


@dataclass(frozen=True)
class Push:
    """The place that a model was pushed to, and the files that were written.

    Example:
        pushed = segkit.push_model("runs/mine", "hf:clinic/hippocampus", licence="cc-by-4.0")
        print(pushed.place, pushed.commit, pushed.files)
    """

    place: str
    """The page of the repository, or the folder."""
    files: tuple[str, ...]
    """Paths of the files inside it."""
    commit: str | None = None
    """The commit of the repository; None for a folder."""


def push_model(
    path: str | Path,
    to: str | Path,
    *,
    licence: str | None = None,
    data: str | None = None,
    intended_use: str | None = None,
    limits: str | None = None,
    scores: str | Path | None = None,
    verdicts: str | Path | None = None,
    picture: str | Path | None = None,
    private: bool = False,
    overwrite: bool = False,
) -> Push:
    """Write a model with its card to a model hub, or into a folder, in one commit or not at all.

    Paths, names of cases and images are not written. The name of the run is replaced by that of the
    repository or folder. A picture is written only if you give one.

    Args:
        path: a finished run, a cross-validation (all its folds are pushed), or a model folder.
        to: `hf:OWNER/NAME`, a repository that is made if it does not exist; or a folder, to look at
            the files first.
        licence: licence of the weights, such as `cc-by-4.0`.
        data: origin of the training data, as Markdown for the card.
        intended_use: purpose of the model, as Markdown for the card.
        limits: cases in which the model fails, as Markdown for the card.
        scores: a file of `segkit evaluate --out` with scores of other cases.
        verdicts: a folder of `segkit explain --verdicts`. By default, verdicts on this model in the
            folder of the run are taken, if there are any.
        picture: a picture for the card. It is written without the notes in its file.
        private: whether a repository that is made is private.
        overwrite: whether a model that is there already may be replaced.

    Returns:
        The place, the files and the commit.

    Raises:
        ModelError: there is no finished model, a file cannot be read, the folder or repository
            holds a model already, no token for the hub is found, or the hub cannot be reached or
            refuses it.
        ConfigError: the config of the run cannot be read.

    Example:
        segkit.push_model("runs/mine", "to_look_at")
        segkit.push_model("runs/mine", "hf:clinic/hippocampus", licence="cc-by-4.0")
    """
    address = parse_address(to)
    if address is not None and (not isinstance(address, HubAddress) or address.revision):
        raise ModelError(
            f"{to}: expected hf:OWNER/NAME without a revision, or a folder, found something else; "
            "correct the address"
        )
    target = Path(to)
    name = address.name if address is not None else target.resolve().name
    loaded_by = str(address) if address is not None else f"hf:OWNER/{name}"
    if address is not None:
        _check_token(address)
    elif target.exists():
        _check_replaceable(target, overwrite)

    def write(folder: Path) -> tuple[str, ...]:
        write_shared(
            Path(path),
            folder,
            name,
            loaded_by,
            AuthorsWords(licence, data, intended_use, limits),
            scores=None if scores is None else Path(scores),
            verdicts=None if verdicts is None else Path(verdicts),
            picture=None if picture is None else Path(picture),
        )
        return tuple(shared_paths(folder))

    if address is None:
        with whole_folder(target, overwrite=overwrite) as folder:
            files = write(folder)
        return Push(str(target), files)
    with tempfile.TemporaryDirectory(prefix="segkit-") as temporary:
        files = write(Path(temporary))
        commit = _upload(address, Path(temporary), files, private=private, overwrite=overwrite)
    return Push(f"{hub_server()}/{address.repository}", files, commit)


def _check_replaceable(folder: Path, overwrite: bool) -> None:
    if not overwrite:
        raise ModelError(f"{folder}: exists already; pass --overwrite or choose another folder")
    if not folder.is_dir() or (any(folder.iterdir()) and not (folder / SUMS).is_file()):
        raise ModelError(
            f"{folder}: expected a shared model to overwrite, found something else; choose another "
            f"folder"
        )


def _check_token(address: HubAddress) -> None:
    with hub_errors(address):
        from huggingface_hub import get_token

        if get_token() is None:
            raise ModelError(
                f"{address}: needs a token that may write to {address.owner}, found none; log in "
                f"with: hf auth login, or set HF_TOKEN"
            )


def _upload(
    address: HubAddress, folder: Path, files: tuple[str, ...], *, private: bool, overwrite: bool
) -> str:
    """Commit the files to the repository; the commit."""
    with hub_errors(address):
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

        hub = HfApi(endpoint=hub_server())
        hub.create_repo(address.repository, private=private or None, exist_ok=True)
        there = [file.rfilename for file in hub.model_info(address.repository).siblings or ()]
        before = [path for path in there if path.rpartition("/")[2] in (DESCRIPTION, CARD)]
        if before and not overwrite:
            raise ModelError(
                f"{address}: holds {first_few(before, 3)} already; pass --overwrite to add a new "
                f"version, or choose another repository"
            )
        committed = hub.create_commit(
            address.repository,
            [
                *(CommitOperationDelete(path) for path in outdated(there, files)),
                *(CommitOperationAdd(path, str(folder / path)) for path in files),
            ],
            commit_message=f"Pushed by segkit {version('segkit')}",
        )
    return str(committed.oid)
