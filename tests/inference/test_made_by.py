"""Every result says what made it, and the same work leaves the same bytes."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal

from segkit.geometry.grid import Grid
from segkit.inference.made_by import made_by, models_and_settings
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.inference.result_files import sidecar_of
from segkit.io.inputs import Input, find_inputs, read_input
from segkit.io.pictures import label_colour
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.folder import checksums_of
from segkit.provenance import check_asked
from tests.model.test_folder import small_model

SIZE = (7, 6, 5)


def scan_at(path: Path, seed: int = 0) -> Path:
    values = np.random.default_rng(seed).normal(size=(*SIZE, 2)).astype(np.float32)
    write_volume(path, Volume(values, Grid(SIZE, np.eye(4))))
    return path


def predictor_of(seed: int = 0, **settings: object) -> Predictor:
    return Predictor(small_model(seed), device="cpu", engine="torch", **settings)  # type: ignore[arg-type]


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def everything(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_every_written_volume_has_a_sidecar_with_its_provenance(tmp_path: Path) -> None:
    scan = scan_at(tmp_path / "in" / "scan.nii.gz")
    predictor, out = predictor_of(overlap=0.25), tmp_path / "out"
    (outcome,) = predict_files(
        predictor,
        find_inputs([scan], 2),
        out=out,
        maps=out / "maps",
        probabilities=True,
        uncertainty=True,
    )
    written = [path for path in outcome.written if path.parent == out]
    volumes = [path for path in written if path.suffix != ".json"]
    assert len(volumes) == 4
    assert {path for path in written if path.suffix == ".json"} == set(map(sidecar_of, volumes))
    told = json.loads((out / "scan.json").read_text())
    assert told["labels"] == {"background": 0, "lesion": 1}
    assert told["colours"] == {"lesion": label_colour(1)} and told["codes"] == {}
    provenance = told["provenance"]
    assert provenance["inputs"] == [{"file": "scan.nii.gz", "sha256": sha256(scan)}]
    assert provenance["models"] == [{"run": "small", **checksums_of(predictor.model)}]
    assert provenance["settings"]["overlap"] == 0.25 and provenance["engines"] == ["torch"]
    assert provenance["versions"]["torch"] == torch.__version__.partition("+")[0] or (
        provenance["versions"]["torch"] == torch.__version__
    )
    for path in (*map(sidecar_of, volumes), out / "maps" / "scan_maps.json"):
        assert json.loads(path.read_text())["provenance"] == provenance
        assert str(tmp_path) not in path.read_text()


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz", ".nrrd", ".mha"])
def test_the_same_prediction_leaves_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    inputs = find_inputs([scan_at(tmp_path / f"scan{suffix}")], 2)
    found = []
    for name in ("one", "two"):
        out = tmp_path / name
        (outcome,) = predict_files(
            predictor_of(),
            inputs,
            out=out,
            maps=out / "maps",
            probabilities=True,
            uncertainty=True,
        )
        assert outcome.error is None
        found.append(everything(out))
    assert found[0] == found[1]


def scans_in(folder: Path) -> Path:
    for seed, name in enumerate("abc"):
        scan_at(folder / f"{name}.nii.gz", seed)
    return folder


def test_a_cohort_is_continued_only_with_the_same_models_and_settings(tmp_path: Path) -> None:
    inputs, out = find_inputs([scans_in(tmp_path / "in")], 2), tmp_path / "out"
    for outcome in predict_files(predictor_of(), inputs[:2], out=out):
        assert outcome.error is None
    before = everything(out)
    for other in (predictor_of(1), predictor_of(overlap=0.0), predictor_of(skip_empty=False)):
        outcomes = list(predict_files(other, inputs[:2], out=out))
        assert [outcome.kept for outcome in outcomes] == [None, None]
        assert outcomes[0].error is not None
        assert (
            "a.nii.gz: exists already, but a.json does not say that this model" in outcomes[0].error
        )
        assert everything(out) == before
    outcomes = list(predict_files(predictor_of(), inputs, out=out))
    assert [bool(outcome.kept) for outcome in outcomes] == [True, True, False]
    assert before.items() < everything(out).items()
    assert all(not each.error for each in predict_files(other, inputs, out=out, overwrite=True))
    assert json.loads((out / "a.json").read_text())["provenance"]["settings"]["skip_empty"] is False


def test_labels_without_their_json_file_count_as_unfinished(tmp_path: Path) -> None:
    inputs, out = find_inputs([scans_in(tmp_path / "in")], 2), tmp_path / "out"
    list(predict_files(predictor_of(), inputs, out=out))
    whole = everything(out)
    (out / "a.json").unlink()
    (out / "b.nii.gz").unlink()  # as where the process was killed in between
    first, second, third = predict_files(predictor_of(), inputs, out=out)
    assert first.error is not None and first.error.endswith(
        "a.nii.gz: exists already; pass --overwrite or choose another --out"
    )
    assert second.written and third.kept is not None
    assert everything(out) == {name: whole[name] for name in whole if name != "a.json"}
    list(predict_files(predictor_of(), inputs, out=out, overwrite=True))
    assert everything(out) == whole


def test_a_sidecar_that_is_there_is_kept_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    inputs = find_inputs([scan_at(tmp_path / "scan.nii.gz")], 2)
    mine = tmp_path / "scan_seg.json"
    mine.write_text("mine")
    (outcome,) = predict_files(predictor_of(), inputs)
    assert outcome.error is not None and "scan_seg.json: exists already" in outcome.error
    assert mine.read_text() == "mine"
    assert not (tmp_path / "scan_seg.nii.gz").exists()


def test_results_that_would_share_a_sidecar_are_refused(tmp_path: Path) -> None:
    paths = [scan_at(tmp_path / "in" / f"scan{suffix}") for suffix in (".nii.gz", ".nrrd")]
    inputs = [Input("scan", (path,)) for path in paths]
    first, second = predict_files(predictor_of(), inputs, out=tmp_path / "out")
    assert first.written and second.error is not None
    assert second.error.endswith(
        f"would also be the prediction of {paths[0]}; give one of them another --out"
    )


def test_models_and_settings_are_part_of_the_provenance(tmp_path: Path) -> None:
    predictor = predictor_of()
    sidecar = tmp_path / "a.json"
    made = made_by(predictor, models_and_settings(predictor), [])
    sidecar.write_text(json.dumps({"provenance": made}))
    check_asked(tmp_path / "a.nii", sidecar, models_and_settings(predictor))


def channels_at(folder: Path, seed: int) -> Path:
    for channel in (0, 1):
        values = np.random.default_rng((seed, channel)).normal(size=SIZE).astype(np.float32)
        write_volume(folder / f"x_{channel:04d}.nii.gz", Volume(values, Grid(SIZE, np.eye(4))))
    return folder


@pytest.mark.parametrize("of_folder", [True, False])
@pytest.mark.parametrize("parts", [True, False])
def test_labels_of_a_scan_that_was_replaced_are_refused_and_kept(
    tmp_path: Path, of_folder: bool, parts: bool
) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    scan = channels_at(folder, 0) / "x_0001.nii.gz" if parts else scan_at(folder / "x.nii.gz")
    inputs = find_inputs([folder if of_folder else scan], 2)
    predictor = predictor_of()
    (first,) = predict_files(predictor, inputs, out=out)
    before = everything(out)
    (again,) = predict_files(predictor, inputs, out=out)
    assert first.written and again.error is None and again.kept == out / "x.nii.gz"
    # One channel is enough.
    new = (
        channels_at(tmp_path / "new", 7) / scan.name if parts else scan_at(tmp_path / "x.nii.gz", 7)
    )
    new.replace(scan)
    (refused,) = predict_files(predictor, inputs, out=out)
    assert refused.kept is None and refused.written == () and refused.error is not None
    assert "x.nii.gz: exists already" in refused.error
    assert "says that it was made from another version of" in refused.error
    assert everything(out) == before
    (redone,) = predict_files(predictor, inputs, out=out, overwrite=True)
    assert redone.error is None
    expected = predictor(read_input(inputs[0])).labels
    assert_array_equal(read_volume(out / "x.nii.gz").data, expected.data)
    told = json.loads((out / "x.json").read_text())["provenance"]["inputs"]
    assert [each["sha256"] for each in told] == [sha256(file) for file in inputs[0].files]
    # The same content from elsewhere is the same scan.
    (moved,) = predict_files(
        predictor,
        [Input("x", tuple(Path(shutil.copy(each, tmp_path)) for each in inputs[0].files))],
        out=out,
    )
    assert moved.kept == out / "x.nii.gz"


def test_a_result_beside_labels_that_is_of_another_scan_is_refused(tmp_path: Path) -> None:
    scan, out = scan_at(tmp_path / "in" / "x.nii.gz"), tmp_path / "out"
    inputs, predictor = find_inputs([scan.parent], 2), predictor_of()
    list(predict_files(predictor, inputs, out=out, probabilities=True))
    scan_at(scan, 7)
    (out / "x.nii.gz").unlink()
    (anew,) = predict_files(predictor, inputs, out=out)
    assert anew.error is None
    (refused,) = predict_files(predictor, inputs, out=out, probabilities=True)
    assert refused.error is not None
    expected = "x_prob.json says that it was made from another version of x.nii.gz"
    assert expected in refused.error
