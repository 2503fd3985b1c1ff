"""Addresses of models that lie elsewhere: on a model hub, or in an archive on a web server.

hf:OWNER/NAME   hf:OWNER/NAME@REVISION   https://SERVER/model.zip   https://…/model.zip#sha256=…
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urlsplit

from segkit.errors import ModelError

PREFIX_OF_HUB = "hf:"
MAIN = "main"
"""The branch that an address without a revision means."""
HUB_PAGE = "https://huggingface.co"
HUB_FORM = re.compile(
    r"hf:(?://)?(?P<owner>[A-Za-z0-9][\w.-]*)/(?P<name>[A-Za-z0-9][\w.-]*)"
    r"(?:@(?P<revision>\w[\w./-]*))?"
)
WEB_FORM = re.compile(r"(https?):/{1,2}(?=[^/])")
"""The beginning of a web address; pathlib turns its two slashes into one."""
SUM_FORM = re.compile(r"sha256=([0-9a-f]{64})", re.IGNORECASE)
SEVERAL = re.compile(
    rf"(?:hf:|https?://[^/:;]*(?::\d+)?)?[^{re.escape(os.pathsep)}]+",
)
"""One of several paths or addresses that are separated as in PATH."""


@dataclass(frozen=True)
class HubAddress:
    """A repository of a model hub, and its branch, tag or commit; None means its main branch."""

    owner: str
    name: str
    revision: str | None = None

    @property
    def repository(self) -> str:
        """The repository as the hub writes it, OWNER/NAME."""
        return f"{self.owner}/{self.name}"

    def __str__(self) -> str:
        return f"{PREFIX_OF_HUB}{self.repository}" + f"@{self.revision}" * bool(self.revision)


@dataclass(frozen=True)
class ArchiveAddress:
    """An archive on a web server, and the SHA-256 that it must have, if that is known."""

    url: str
    sha256: str | None = None

    @property
    def stem(self) -> str:
        """The name of the archive without its suffix, as a name of a folder."""
        return PurePosixPath(unquote(urlsplit(self.url).path)).stem or "model"

    def __str__(self) -> str:
        return self.url


def parse_address(path: str | Path) -> HubAddress | ArchiveAddress | None:
    """The address that a text holds, or None if it is the path of a folder or a file.

    Raises:
        ModelError: it begins like an address, but is not valid.

    Example:
        >>> parse_address("hf:clinic/hippocampus@v1")
        HubAddress(owner='clinic', name='hippocampus', revision='v1')
    """
    text = path.as_posix() if isinstance(path, Path) else path
    if text.startswith(PREFIX_OF_HUB):
        form = HUB_FORM.fullmatch(text)
        if form is None or ".." in text or "--" in f"{form['owner']} {form['name']}":
            raise ModelError(
                f"{text}: expected hf:OWNER/NAME or hf:OWNER/NAME@REVISION, found something else; "
                f"copy the two names from the page of the model"
            )
        return HubAddress(form["owner"], form["name"], form["revision"])
    web = WEB_FORM.match(text)
    if web is None:
        return None
    url, wanted = urldefrag(f"{web[1]}://{text[web.end() :]}")
    parts = [part for part in urlsplit(url).path.split("/") if part]
    if url.startswith((f"{HUB_PAGE}/", f"{hub_server()}/")) and "resolve" not in parts:
        named = "/".join(parts[:2]) if len(parts) > 1 else "OWNER/NAME"
        raise ModelError(
            f"{url}: expected an archive, found a page of a model hub; write hf:{named} instead"
        )
    if wanted and (form := SUM_FORM.fullmatch(wanted)) is None:
        raise ModelError(
            f"{text}: expected #sha256= and 64 hexadecimal digits after the address, found "
            f"#{wanted}; correct this part or leave it out"
        )
    return ArchiveAddress(url, form[1].lower() if wanted and form else None)


def is_address(path: str | Path) -> bool:
    """Whether a text names a model that lies elsewhere, and not the path of a folder or file."""
    text = path.as_posix() if isinstance(path, Path) else path
    return text.startswith(PREFIX_OF_HUB) or WEB_FORM.match(text) is not None


def hub_server() -> str:
    """The address of the model hub's server: the variable HF_ENDPOINT, or Hugging Face."""
    return (os.environ.get("HF_ENDPOINT") or HUB_PAGE).rstrip("/")


def split_paths(text: str) -> list[str]:
    """The paths and addresses in a text that separates them as in PATH.

    Example:
        >>> split_paths("runs/a:hf:clinic/hippocampus")
        ['runs/a', 'hf:clinic/hippocampus']
    """
    return SEVERAL.findall(text)
