"""A check of a bundle runs it, and says what it found."""

import subprocess
from pathlib import Path

import pytest

from segkit.errors import ModelError
from segkit.export import bundle_check
from segkit.export.bundle_check import run_bundle, same_labels, scan_for
from segkit.export.export import export_model
from segkit.model.folder import Model
from tests.bundles import model_for


def test_a_check_of_a_bundle_compares_its_network_and_monais_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_for()
    asked: list[Path] = []

    def ran(model: Model, folder: Path, scan: object) -> float:
        asked.append(folder)
        return 0.9

    monkeypatch.setattr("segkit.export.export.same_labels", ran)
    exported = export_model(model, "monai-bundle", tmp_path / "bundle", check=True)
    assert asked == [tmp_path / "bundle"]
    assert exported.agreement is not None and exported.agreement.holds
    assert not exported.holds
    assert "same label as segkit's: 90.0000% of voxels" in exported.lines()[-1]


def test_a_bundle_that_monai_cannot_run_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = subprocess.CompletedProcess([], 1, "", "Traceback …\nOSError: no model.ts")
    monkeypatch.setattr(bundle_check.subprocess, "run", lambda *given, **options: failed)
    with pytest.raises(ModelError, match=r"bundle: MONAI cannot run .*OSError: no model\.ts"):
        same_labels(model_for(), tmp_path / "bundle", scan_for(model_for()))
    monkeypatch.setattr(bundle_check, "BUNDLE_LIBRARIES", ("monai_of_the_future",))
    with pytest.raises(ModelError, match="monai_of_the_future is not installed; run pip install"):
        run_bundle(tmp_path / "bundle", scan_for(model_for()))
