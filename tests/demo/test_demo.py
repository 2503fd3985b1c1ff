"""The demo does what it says, on the real scan that nilearn ships."""

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.testing import assert_array_equal

pytest.importorskip("nilearn", reason="the demo's scan comes with nilearn: install segkit[demo]")
pytest.importorskip("matplotlib", reason="the montage needs matplotlib: install segkit[demo]")

from matplotlib.image import imread

from segkit.demo.demo import TISSUES, load_template, run_demo
from segkit.errors import SegkitError


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A demo of two steps, and what it said."""
    out = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    run_demo(out, contrast="t1", steps=2, overwrite=False, say=said.append)
    return out, said


def test_fluid_is_dark_grey_matter_medium_and_white_matter_bright_in_the_template() -> None:
    scan, tissue = load_template()
    means = [float(scan.data[tissue.data == number].mean()) for number in TISSUES.values()]
    assert means == sorted(means) and means[0] == 0
    assert means[3] - means[2] > 0.1 and means[2] - means[1] > 0.1
    assert scan.grid.spacing == (2.0, 2.0, 2.0)
    shares = [(tissue.data == number).mean() for number in TISSUES.values()]
    assert 0.1 < shares[2] < 0.2 and 0.05 < shares[3] < 0.1  # no ripples outside the brain


def test_the_demo_writes_all_its_files(written: tuple[Path, list[str]]) -> None:
    out, _ = written
    scan = nib.load(out / "scan.nii.gz")
    for name in ("segmentation", "reference", "maps/scan_map-skip.1-gate"):
        volume = nib.load(out / f"{name}.nii.gz")
        assert volume.shape == scan.shape
        assert_array_equal(volume.affine, scan.affine)
    summary = json.loads((out / "summary.json").read_text())
    assert summary["steps"] == 2 and summary["seconds_of_training"] > 0
    dice = summary["dice"]
    assert summary["mean_dice"] == pytest.approx((dice["grey matter"] + dice["white matter"]) / 2)
    picture = imread(out / "montage.png")
    assert picture.shape[0] > 500 and np.unique(picture.reshape(-1, 4), axis=0).shape[0] > 1000


def test_the_score_is_that_of_the_written_segmentation(written: tuple[Path, list[str]]) -> None:
    out, said = written
    summary = json.loads((out / "summary.json").read_text())
    predicted = np.asarray(nib.load(out / "segmentation.nii.gz").dataobj)
    reference = np.asarray(nib.load(out / "reference.nii.gz").dataobj)
    for name, dice in summary["dice"].items():
        a, b = predicted == TISSUES[name], reference == TISSUES[name]
        assert dice == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))
    assert any(f"{summary['mean_dice']:.3f}" in line for line in said)


def test_the_demo_says_which_data_training_has_seen(written: tuple[Path, list[str]]) -> None:
    _, said = written
    text = "\n".join(said)
    assert "Seen in training: the template's tissue map" in text
    assert "Not seen: the real T1 scan; but its anatomy is that of the tissue map" in text
    assert "segkit predict" in text


def test_the_demo_writes_only_to_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(SegkitError, match="choose another --out"):
            run_demo(tmp_path, contrast="t1", steps=1, overwrite=overwrite, say=print)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_the_whole_demo_segments_the_real_scan(tmp_path: Path) -> None:
    from segkit.demo.demo import DEMO_STEPS

    summary = run_demo(
        tmp_path / "out", contrast="t1", steps=DEMO_STEPS, overwrite=False, say=print
    )
    assert summary["mean_dice"] >= 0.82
