"""What is kept of a conversion is whole, and its own."""

from pathlib import Path

import pytest

from segkit.inference.engines.conversion_cache import (
    MANIFEST,
    cached_folder,
    find_cached,
    user_cache,
)
from segkit.inference.engines.converted import (
    ENGINES_FOLDER,
    ConvertedEngine,
)
from segkit.inference.engines.openvino import OpenVino
from segkit.io.atomic import write_text
from tests.engines import assert_agree, windows_of
from tests.models import saved


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, conversions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    (folder,) = (user_cache() / ENGINES_FOLDER).iterdir()
    numbers = bytearray((folder / "network.bin").read_bytes())
    numbers[len(numbers) // 2] ^= 0xFF
    (folder / "network.bin").write_bytes(numbers)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    assert len(conversions) == 2
    assert "is damaged and is made again" in caplog.text
    (folder / MANIFEST).write_text("{}")
    assert not ConvertedEngine(model, OpenVino()).is_ready(batch[:, :, :4])
    assert not ConvertedEngine(model, OpenVino()).is_ready(batch)


def test_a_conversion_holds_the_files_of_its_manifest_and_no_others(tmp_path: Path) -> None:
    folder = cached_folder("name", [tmp_path], lambda made: write_text(made / "a", "a"))
    assert find_cached("name", [tmp_path]) == folder
    write_text(folder / "b", "an extension")
    assert find_cached("name", [tmp_path]) is None
    (folder / "b").unlink()
    (folder / "a").unlink()
    assert find_cached("name", [tmp_path]) is None


def test_a_cached_folder_is_complete_or_absent(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        cached_folder("name", [tmp_path], fail)
    assert not list(tmp_path.iterdir())
