import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from tests.hub import Hub, hub_server_here

# Every shape in a signature is checked at each call, which is too uneven for a clock. A commit gets
# the same examples everywhere and always. `pytest --hypothesis-profile search` draws others.
settings.register_profile("segkit", deadline=None, derandomize=True)
settings.register_profile("search", deadline=None, print_blob=True)
settings.load_profile("segkit")

ROOT = Path(__file__).parents[1]
numbers = itertools.count()


@pytest.fixture(autouse=True)
def cache_of_its_own(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test leaves converted networks to the user or to another test."""
    cache = tmp_path_factory.getbasetemp() / f"cache-{next(numbers)}"
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real volumes, one dataset in each of its folders."""
    named = os.environ.get("SEGKIT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real volumes not found: set SEGKIT_DATA")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A model hub on this machine, which huggingface_hub asks, without a token of the user's."""
    pytest.importorskip("huggingface_hub", reason="the hub needs its library: install segkit[hub]")
    with hub_server_here() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield hub
