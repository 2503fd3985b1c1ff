"""The provenance of a result is written beside it and compared by the next run."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from segkit.errors import VolumeError
from segkit.io.checksums import checksums
from segkit.provenance import check_asked, versions


def test_a_folder_has_the_checksums_of_its_files_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    assert checksums([tmp_path, tmp_path / "b"]) == [
        {"file": name, "sha256": hashlib.sha256(name.encode()).hexdigest()} for name in "abb"
    ]


def test_versions_are_those_of_python_and_of_the_libraries() -> None:
    found = versions()
    assert found["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
    assert {"python", "segkit", "numpy"} < set(found)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"provenance": 3}', '{"provenance": {}}'])
def test_a_sidecar_without_provenance_is_refused(tmp_path: Path, content: str) -> None:
    sidecar = tmp_path / "a.json"
    sidecar.write_text(content)
    with pytest.raises(VolumeError, match=r"a\.nii: exists already, but a\.json does not say"):
        check_asked(tmp_path / "a.nii", sidecar, {"models": []})


def test_a_result_of_the_same_models_and_settings_is_accepted(tmp_path: Path) -> None:
    sidecar = tmp_path / "a.json"
    asked = {"models": [{"run": "small"}], "settings": {"overlap": 0.5}}
    sidecar.write_text(json.dumps({"provenance": {**asked, "versions": {}}}))
    check_asked(tmp_path / "a.nii", sidecar, asked)
    for other in ({**asked, "settings": {"overlap": 0.25}}, {**asked, "tolerance_mm": 2.0}):
        with pytest.raises(VolumeError, match="not say that this model and these settings made it"):
            check_asked(tmp_path / "a.nii", sidecar, other)
