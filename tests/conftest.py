import os
from pathlib import Path

import pytest
from hypothesis import settings

# Every shape in a signature is checked at each call, which is too uneven for a clock.
settings.register_profile("segkit", deadline=None)
settings.load_profile("segkit")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real volumes, one dataset in each of its folders."""
    named = os.environ.get("SEGKIT_DATA")
    folder = Path(named) if named else ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("real volumes not found: set SEGKIT_DATA")
    return folder
