"""What `segkit explain` writes, and what it refuses."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from segkit.config.attention import AdditiveGridGateConfig, CrossAttentionConfig
from segkit.errors import ModelError, VolumeError
from segkit.evaluation.references import NamedVolume
from segkit.explain.explain_files import explain_files
from segkit.explain.explain_heads import explain_heads
from segkit.explain.explain_scan import explain_volume
from segkit.explain.heads.study import (
    HeadFigures,
    PositionFigures,
    ScoredVolume,
    head_table,
    study_heads,
)
from segkit.explain.references import find_references
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.inputs import Input, find_inputs
from segkit.io.volume import Volume, read_volume, write_volume
from segkit.model.folder import save_model
from tests.explain.heads.test_study import attending_model, noise_case, self_attention


def predictor_of(**attention: Any) -> Predictor:
    return Predictor(attending_model(**attention), device="cpu")


def written_scans(folder: Path) -> Path:
    """Two volumes in `scans`, and their references of the same names in `labels`."""
    for seed, name in enumerate(("a", "b")):
        case = noise_case(8, 8, 8, seed=seed)
        write_volume(folder / "scans" / f"{name}.nii.gz", case.volume)
        write_volume(folder / "labels" / f"{name}.nii.gz", case.reference)
    return folder / "scans"


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return written_scans(tmp_path)


def saved_model(folder: Path, **attention: Any) -> Path:
    save_model(folder, attending_model(**attention))
    return folder


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def files_of(name: str, *maps: str, within: str = "") -> set[str]:
    shown = {f"{name}_map-{key}.nii.gz" for key in maps}
    found = {
        f"{name}_seg.nii.gz",
        f"{name}_seg.json",
        f"{name}_maps.json",
        *shown,
        *(f"native/{m}" for m in shown),
    }
    found |= {"measures.csv", "measures.json", "index.html"}
    return {f"{within}{path}" for path in found}


OVER_ALL = {"cohort.csv", "cohort.json", "index.html"}


def test_labels_maps_and_figures_of_every_volume_are_written(scans: Path, tmp_path: Path) -> None:
    predictor, out = predictor_of(bottleneck=self_attention(2)), tmp_path / "out"
    explained = list(explain_files(predictor, find_inputs([scans], 1), out))
    expected = [files_of(name, "bottleneck-received", within=f"{name}/") for name in ("a", "b")]
    assert files_in(out) == expected[0] | expected[1] | OVER_ALL
    for found, wanted, name in zip(explained, expected, ("a", "b"), strict=True):
        assert found.name == name
        assert found.written[0] == out / name / f"{name}_seg.nii.gz"
        assert {str(path.relative_to(out)) for path in found.written} == wanted
        plain = predictor(read_volume(scans / f"{name}.nii.gz")).labels
        written = read_volume(found.written[0])
        assert_array_equal(written.data, plain.data)
        assert written.grid.agrees_with(plain.grid, tolerance=1e-3)


def test_maps_json_has_the_figures_of_heads_with_their_map(scans: Path, tmp_path: Path) -> None:
    predictor = predictor_of(
        skip=CrossAttentionConfig(levels=[0, 1], heads=[1, 3], head_channels=4),
        bottleneck=self_attention(2),
        encoder="sse",
    )
    (explained,) = explain_files(predictor, find_inputs([scans / "a.nii.gz"], 1), tmp_path)
    told = json.loads((tmp_path / "a_maps.json").read_text())["maps"]
    received = {entry["key"]: entry for entry in told if entry["kind"] == "received"}
    assert set(received) == {"skip.0/received", "skip.1/received", "bottleneck/received"}
    counts = {"skip.0": 1, "skip.1": 3, "bottleneck": 2}
    assert {position: len(heads) for position, heads in explained.reach.items()} == counts
    for position, heads in explained.reach.items():
        entry = received[f"{position}/received"]
        assert entry["range"] == [0, None]
        assert entry["heads"] == [head.figures() for head in heads]
        for figures in entry["heads"]:
            assert figures["distance_mm"] > 0 and figures["entropy"] > 0
            assert 0 < figures["entropy_over_uniform"] < 1
        # A map of what is received is 1 where attention is fair, and its mean is that anyway.
        assert_allclose(entry["mean"], 1, rtol=1e-4)
        assert entry["min"] < 1 < entry["max"]
    others = [entry for entry in told if entry["kind"] != "received"]
    assert others and all("heads" not in entry for entry in others)
    assert all(entry["range"] == [0, 1] for entry in others)


def test_a_model_with_only_gates_has_maps_and_no_reach(scans: Path, tmp_path: Path) -> None:
    predictor = predictor_of(skip=AdditiveGridGateConfig(), encoder="se")
    (explained,) = explain_files(predictor, find_inputs([scans / "a.nii.gz"], 1), tmp_path / "out")
    assert explained.reach == {}
    assert files_in(tmp_path / "out") == files_of("a", "skip.1-gate")


def test_explanations_are_overwritten_only_with_overwrite(scans: Path, tmp_path: Path) -> None:
    inputs, out = find_inputs([scans / "a.nii.gz"], 1), tmp_path / "out"
    list(explain_files(predictor_of(bottleneck=self_attention(2)), inputs, out))
    before = {name: (out / name).read_bytes() for name in files_in(out)}
    other = predictor_of(bottleneck=self_attention(2), seed=1)
    message = r"a_seg\.nii\.gz: exists already; pass --overwrite or choose another --out$"
    with pytest.raises(VolumeError, match=message):
        list(explain_files(other, inputs, out))
    assert {name: (out / name).read_bytes() for name in files_in(out)} == before
    list(explain_files(other, inputs, out, overwrite=True))
    after = {name: (out / name).read_bytes() for name in files_in(out)}
    assert set(after) == set(before)
    assert all(after[name] != before[name] for name in before)


def test_maps_of_an_earlier_model_do_not_stay_beside_those_of_a_new_one(
    scans: Path, tmp_path: Path
) -> None:
    inputs, out = find_inputs([scans / "a.nii.gz"], 1), tmp_path / "out"
    list(explain_files(predictor_of(skip=AdditiveGridGateConfig(levels=[0, 1])), inputs, out))
    (out / "notes.txt").write_text("mine")
    list(explain_files(predictor_of(bottleneck=self_attention(2)), inputs, out, overwrite=True))
    assert files_in(out) == files_of("a", "bottleneck-received") | {"notes.txt"}


def test_a_volume_that_vanished_is_not_in_the_provenance_of_the_cohort(
    scans: Path, tmp_path: Path
) -> None:
    inputs, out = find_inputs([scans], 1), tmp_path / "out"
    (scans / "a.nii.gz").unlink()
    first, second = explain_files(predictor_of(skip=AdditiveGridGateConfig()), inputs, out)
    assert first.error is not None and second.written
    told = json.loads((out / "cohort.json").read_text())["provenance"]
    assert [entry["file"] for entry in told["inputs"]] == ["b.nii.gz"]


def test_the_files_of_heads_hold_the_figures_of_the_study(scans: Path, tmp_path: Path) -> None:
    predictor = predictor_of(
        skip=CrossAttentionConfig(heads=1, head_channels=4), bottleneck=self_attention(2)
    )
    labels, out = scans.parent / "labels", tmp_path / "out"
    figures = explain_heads(predictor, find_inputs([scans], 1), labels, out)
    assert files_in(out) == {"heads.csv", "heads.json"}
    cases = [
        ScoredVolume(name, *(read_volume(folder / f"{name}.nii.gz") for folder in (scans, labels)))
        for name in ("a", "b")
    ]
    studied = study_heads(predictor, cases)
    assert [vars(head) for head in heads_of(figures)] == [vars(head) for head in heads_of(studied)]
    with (out / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    expected = head_table(studied)
    assert [list(row) for row in rows] == [list(row) for row in expected]
    assert rows == [{name: str(value) for name, value in row.items()} for row in expected]
    told = json.loads((out / "heads.json").read_text())
    assert told["cases"] == ["a", "b"]
    assert [entry["position"] for entry in told["positions"]] == [f.position for f in studied]
    for entry, position in zip(told["positions"], studied, strict=True):
        assert entry["answer"] == position.answer()
        assert entry["p_value"] == position.p_value
        assert entry["dice"] == position.dice
        assert entry["dice_without_any"] == position.dice_without_any
        assert entry["dice_least_important_masked_first"] == position.least_first
        assert entry["dice_most_important_masked_first"] == position.most_first
        assert entry["heads"] == [vars(head) for head in position.heads]


def test_heads_are_studied_on_the_volumes_that_have_a_reference(
    scans: Path, tmp_path: Path
) -> None:
    predictor, labels = predictor_of(bottleneck=self_attention(1)), scans.parent / "labels"
    (labels / "a.nii.gz").unlink()
    figures = explain_heads(predictor, find_inputs([scans], 1), labels, tmp_path / "out")
    told = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert told["cases"] == ["b"]
    assert [entry["file"] for entry in told["provenance"]["inputs"]] == ["b.nii.gz"]
    alone = explain_heads(
        predictor, find_inputs([scans / "b.nii.gz"], 1), labels, tmp_path / "alone"
    )
    assert [one.dice for one in figures] == [one.dice for one in alone]


def heads_of(figures: list[PositionFigures]) -> list[HeadFigures]:
    return [head for position in figures for head in position.heads]


@pytest.mark.parametrize("existing", ["heads.csv", "heads.json"])
def test_the_files_of_heads_are_overwritten_only_with_overwrite(
    existing: str, scans: Path, tmp_path: Path
) -> None:
    predictor, labels = predictor_of(bottleneck=self_attention(1)), scans.parent / "labels"
    inputs, out = find_inputs([scans], 1), tmp_path / "out"
    out.mkdir()
    (out / existing).write_text("mine")
    message = rf"{existing}: exists already; pass --overwrite or choose another --out$"
    with pytest.raises(VolumeError, match=message):
        explain_heads(predictor, inputs, labels, out)
    assert files_in(out) == {existing} and (out / existing).read_text() == "mine"
    explain_heads(predictor, inputs, labels, out, overwrite=True)
    assert files_in(out) == {"heads.csv", "heads.json"}
    assert (out / existing).read_text() != "mine"


def paths_of(found: Mapping[str, NamedVolume]) -> dict[str, Path]:
    return {name: volume.path for name, volume in found.items()}


def test_a_reference_is_the_file_itself_or_its_namesake_in_a_folder(tmp_path: Path) -> None:
    volume = Volume(np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    for name in ("x.nii.gz", "x_1.nii.gz", "y.nrrd"):
        write_volume(tmp_path / name, volume)
    x, y, z = (Input(name, (Path(f"scans/{name}.mha"),)) for name in "xyz")
    assert paths_of(find_references([x, y], tmp_path)) == {
        "x": tmp_path / "x.nii.gz",
        "y": tmp_path / "y.nrrd",
    }
    single = tmp_path / "x_1.nii.gz"
    assert paths_of(find_references([z], single)) == {"z": single}
    assert paths_of(find_references([y, z], tmp_path)) == {"y": tmp_path / "y.nrrd"}
    message = (
        r"expected references named like the volumes \(z\), found x, x_1, y; rename the files or "
        r"leave out --reference$"
    )
    with pytest.raises(VolumeError, match=message):
        find_references([z], tmp_path)
    with pytest.raises(VolumeError, match=r"nowhere: no such file or folder; check the path$"):
        find_references([x], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("scan", "label"),
    [
        ("{}", "{}_seg.nii.gz"),
        ("{}_0000", "{}.nii.gz"),
        ("{}", "{}-label.nrrd"),
        ("{}", "{}/seg.nii.gz"),
        ("{}", "sub/{}.nii.gz"),
    ],
)
def test_references_pair_by_the_rule_of_evaluation(tmp_path: Path, scan: str, label: str) -> None:
    volume = Volume(np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    for folder in ("apart", "together"):
        labels = tmp_path / folder
        scans = labels if folder == "together" else tmp_path / "scans"
        sources = []
        wanted = {}
        for case in ("p", "q"):
            name = scan.format(case)
            write_volume(scans / f"{name}.mha", volume)  # no reference of itself
            sources.append(Input(name, (scans / f"{name}.mha",)))
            wanted[name] = labels / label.format(case)
            write_volume(wanted[name], volume)
        assert paths_of(find_references(sources, labels)) == wanted


def test_two_references_of_one_scan_are_refused(tmp_path: Path) -> None:
    volume = Volume(np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    for name in ("a.nii", "a.nii.gz"):
        write_volume(tmp_path / name, volume)
    with pytest.raises(VolumeError, match="is the same case as"):
        find_references([Input("a", (Path("scans/a.mha"),))], tmp_path)


def test_a_study_of_a_model_without_heads_writes_nothing(scans: Path, tmp_path: Path) -> None:
    predictor, labels = predictor_of(skip=AdditiveGridGateConfig()), scans.parent / "labels"
    with pytest.raises(ModelError, match="expected a model with attention heads"):
        explain_heads(predictor, find_inputs([scans], 1), labels, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "left",
    [
        "a/a_maps.json",
        "a/a_seg.nii.gz",
        "a/a_map-skip.1-gate.nii.gz",
        "b/measures.csv",
        "a/index.html",
        "cohort.csv",
        "index.html",
    ],
)
def test_any_file_that_is_there_already_stops_it_before_anything_is_written(
    left: str, scans: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (out / left).parent.mkdir(parents=True)
    (out / left).write_bytes(b"precious")
    predictor = predictor_of(bottleneck=self_attention(2))
    with pytest.raises(VolumeError, match=rf"{left}: exists already"):
        list(explain_files(predictor, find_inputs([scans], 1), out))
    assert files_in(out) == {left} and (out / left).read_bytes() == b"precious"


def test_an_input_is_never_written_over(scans: Path) -> None:
    inside = scans / "a" / "a_seg.nii.gz"
    inside.parent.mkdir()
    inside.write_bytes((scans / "a.nii.gz").read_bytes())
    both = [scans / "a.nii.gz", inside]
    predictor = predictor_of(bottleneck=self_attention(2))
    with pytest.raises(VolumeError, match=r"a_seg\.nii\.gz: this output file is also an input"):
        list(explain_files(predictor, find_inputs(both, 1), scans, overwrite=True))
    assert inside.read_bytes() == both[0].read_bytes()


def test_volumes_of_one_name_are_refused(scans: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "a.nii.gz"
    other.parent.mkdir()
    other.write_bytes((scans / "a.nii.gz").read_bytes())
    inputs = find_inputs([scans / "a.nii.gz", other], 1)
    with pytest.raises(
        VolumeError, match=r"other/a\.nii\.gz: .* are also called a; .* another --out"
    ):
        list(explain_files(predictor_of(skip=AdditiveGridGateConfig()), inputs, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_the_table_of_a_cohort_joins_the_tables_of_its_scans(scans: Path, tmp_path: Path) -> None:
    out, labels = tmp_path / "out", scans.parent / "labels"
    for path in labels.iterdir():
        halves = np.zeros((8, 8, 8), np.uint8)
        halves[:4], halves[4:, 4:] = 1, 2
        write_volume(path, read_volume(path).like(halves))
    predictor = predictor_of(skip=AdditiveGridGateConfig(levels=[0, 1]))
    inputs = find_inputs([scans], 1)
    list(explain_files(predictor, inputs, out, references=labels, tolerance=2.0))
    rows = {name: rows_of(out / name / "measures.csv") for name in ("a", "b")}
    assert rows_of(out / "cohort.csv") == rows["a"] + rows["b"]
    for name in ("a", "b"):
        told = json.loads((out / name / "measures.json").read_text())
        assert told["against"] == "reference" and told["tolerance_mm"] == 2.0
        explanation = explain_volume(
            predictor,
            *(read_volume(folder / f"{name}.nii.gz") for folder in (scans, labels)),
            tolerance_mm=2.0,
        )
        for found, measure in zip(told["measures"], explanation.measures, strict=True):
            expected = {**vars(measure), "value": pytest.approx(measure.value, nan_ok=True)}
            assert {**found, "value": nan_of(found["value"])} == expected
        aurocs = {
            (row["map"], row["of"], row["structure"]): float(row["auroc"])
            for row in rows[name]
            if row["auroc"]
        }
        assert {key for key, _, _ in aurocs} == {"skip.0/gate", "skip.1/gate", "fused/gate"}
        for measure in explanation.measures:
            if measure.name == "auroc":
                place = (measure.map, measure.of, measure.structure)
                assert aurocs[place] == pytest.approx(measure.value)
    page = (out / "index.html").read_text()
    assert 'href="a/index.html"' in page and "<script" not in page


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def nan_of(value: float | None) -> float:
    return float("nan") if value is None else value


def test_one_reference_for_several_volumes_is_refused(scans: Path, tmp_path: Path) -> None:
    predictor = predictor_of(bottleneck=self_attention(2))
    message = r"a\.nii\.gz: expected a reference for each of 2 volumes, but this is a single file"
    with pytest.raises(VolumeError, match=message):
        explain_heads(predictor, find_inputs([scans], 1), scans / "a.nii.gz", tmp_path / "out")


def test_references_that_do_not_contain_labels_are_refused(scans: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels"
    reference = read_volume(labels / "a.nii.gz")
    for strange in (0.5, float("nan")):
        data = reference.data.astype(np.float32)
        data.flat[0] = strange
        write_volume(labels / "a.nii.gz", reference.like(data))
        with pytest.raises(VolumeError, match=r"a\.nii\.gz: expected whole numbers, one per"):
            explain_heads(
                predictor_of(bottleneck=self_attention(2)),
                find_inputs([scans / "a.nii.gz"], 1),
                labels,
                tmp_path / "out",
            )
