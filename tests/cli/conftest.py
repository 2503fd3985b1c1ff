"""What several commands are tried on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from segkit.cli import terminal
from tests.small import trained_run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps on small made-up volumes of 1 mm."""
    return trained_run(tmp_path_factory.mktemp("finished"))


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """Options of one command are not those of the next."""
    yield
    terminal.start()
