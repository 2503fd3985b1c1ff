"""A page as a real browser shows it: Chromium without a screen."""

import re
import shutil
import subprocess
from dataclasses import dataclass
from html import unescape
from pathlib import Path
from urllib.parse import parse_qs, urlencode

import numpy as np
from numpy import ndarray

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next((found for name in NAMES if (found := shutil.which(name))), None)
QUIET = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--window-size=1200,900",
    "--virtual-time-budget=10000",  # of the page's clock, which does not wait for ours
)


@dataclass(frozen=True, eq=False)
class Shown:
    """What came of opening a page."""

    dom: str
    console: list[str]
    pixels: ndarray
    """(row, column, red green blue), 0 to 255."""

    def value(self, row: int) -> float:
        """What lies under the cross-hair: row 0 is the scan's, then one for each layer."""
        found = re.search(rf'id="value-{row}"[^>]* data-value="([^"]+)"', self.dom)
        assert found, "the page shows no such value"
        return float(found[1])

    def text(self, element: str) -> str:
        """The text of the element of this id, or of this class."""
        found = re.search(rf'(?:id|class)="{element}"[^>]*>([^<]*)<', self.dom)
        assert found, f"the page has no {element}"
        return unescape(found[1])

    @property
    def view(self) -> dict[str, list[str]]:
        """The view that the page says it shows."""
        found = re.search(r'id="link" href="[^"]*#([^"]*)"', self.dom)
        assert found, "the page links to no view"
        return parse_qs(unescape(found[1]))


def show(
    page: Path, folder: Path, view: list[tuple[str, str]] | None = None, query: str = ""
) -> Shown:
    """Open a page at a view or with a query, such as "?q=word", in a browser that is new."""
    from matplotlib.image import imread

    assert CHROMIUM is not None
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / "page.png"
    address = f"{page.as_uri()}{query}#{urlencode(view or [])}"
    command = [CHROMIUM, *QUIET, f"--user-data-dir={folder / 'profile'}"]
    done = subprocess.run(
        [*command, "--dump-dom", f"--screenshot={picture}", address],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Shown(done.stdout, console, np.rint(imread(picture)[..., :3] * 255).astype(int))
