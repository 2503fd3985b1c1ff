"""`segkit explain`: what it writes, says and refuses."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from segkit.config.attention import AdditiveGridGateConfig
from segkit.explain.verdicts.identity import judge_attention
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_labels, read_volume, write_volume
from segkit.model.folder import save_model
from tests.cli.command import run
from tests.explain.heads.test_study import attending_model, noise_case, self_attention
from tests.explain.test_explain_files import (
    OVER_ALL,
    files_in,
    files_of,
    rows_of,
    saved_model,
    written_scans,
)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    return written_scans(tmp_path)


def test_the_command_writes_verdicts_of_each_scan_and_of_all(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_scans(tmp_path)
    save_model(tmp_path / "model", attending_model(skip=AdditiveGridGateConfig(levels=[1])))
    out = tmp_path / "out"
    words = ["explain", tmp_path / "scans", "--model", tmp_path / "model", "--device", "cpu"]
    words += ["--reference", tmp_path / "labels", "--out", out, "--verdicts"]
    code, said, err = run(*words, capsys=capsys)
    assert (code, err) == (0, "")
    rows = {}
    for name in ("a", "b"):
        rows[name] = (out / name / "ablation.csv").read_text().splitlines()
        told = json.loads((out / name / "measures.json").read_text())["worth"]
        best = told["verdicts"][0]
        page = (out / name / "index.html").read_text()
        assert f'"verdict": "{best["word"]}", "reason": "Over 1 scan, ' in page
    assert (out / "ablation.csv").read_text().splitlines() == rows["a"] + rows["b"][1:]
    cohort = json.loads((out / "cohort.json").read_text())
    assert cohort["scans"] == 2 and [one["case"] for one in cohort["evidence"]] == ["a", "b"]
    page = (out / "index.html").read_text()
    verdict, *_ = cohort["verdicts"]
    # Two scans are too few for any other word.
    assert (verdict["map"], verdict["word"]) == ("skip.1/gate", "cannot tell")
    assert '</b>: <b class="cannot-tell">cannot tell</b>. Over 2 scans, ' in page
    # … and the terminal has one sentence for each map, below a table with the figures of the file.
    assert "Over 1 scan" not in said
    assert " ".join(said.split()).count("skip.1/gate: cannot tell. Over 2 scans, ") == 1
    table = said[said.index("Verdicts over 2 scans") :]
    (row,) = [line for line in table.splitlines() if "skip.1/gate " in line]
    for name, how in (("Dice lost without it", "+.3f"), ("AUROC", ".2f")):
        value = verdict["figures"][name]
        assert ("–" if value is None else format(value, how)) in row.split()
    # Without verdicts, nothing of the old ones stays beside the new pages.
    code, said, _ = run(*words[:-1], "--overwrite", capsys=capsys)
    assert code == 0 and "Verdicts over" not in said
    assert not list(out.rglob("ablation.csv"))
    assert "verdicts" not in json.loads((out / "cohort.json").read_text())
    assert (out / "a" / "measures.json").exists() and (out / "cohort.csv").exists()


def test_a_session_without_a_reference_is_explained_and_does_not_count_beside_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = attending_model(skip=AdditiveGridGateConfig(levels=[1]))
    told = model.description.model_copy(update={"channels": ["T1w"]})
    save_model(tmp_path / "model", replace(model, description=told))
    bids, derivatives = tmp_path / "bids", tmp_path / "bids" / "derivatives" / "manual"
    for seed, session in enumerate(("1", "2")):
        case, place = noise_case(8, 8, 8, seed=seed), Path("sub-a", f"ses-{session}", "anat")
        write_volume(bids / place / f"sub-a_ses-{session}_T1w.nii.gz", case.volume)
        if session == "1":
            dseg = derivatives / place / f"sub-a_ses-{session}_dseg.nii.gz"
            write_volume(dseg, case.reference)
    (bids / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.8.0"}')
    words = ["explain", bids, "--model", tmp_path / "model", "--device", "cpu", "--out"]
    code, said, err = run(*words, tmp_path / "out", "--reference", bids, capsys=capsys)
    assert (code, err) == (0, "")
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert len(names) == 2
    sentence = (
        "compared with the predicted labels, and left out of the results over all volumes, because "
        f"there is no reference: {names[1]}"
    )
    assert sentence in " ".join(said.split())
    against = [
        json.loads((tmp_path / "out" / name / "measures.json").read_text())["against"]
        for name in names
    ]
    assert against == ["reference", "prediction"]
    assert {row["case"] for row in rows_of(tmp_path / "out" / "cohort.csv")} == {names[0]}
    cohort = json.loads((tmp_path / "out" / "cohort.json").read_text())
    assert cohort["scans"] == 1
    assert cohort["made"]["scans without a reference, left out"] == names[1]
    (derivatives / "sub-a" / "ses-1" / "anat" / "sub-a_ses-1_dseg.nii.gz").rename(
        derivatives / "sub-b_dseg.nii.gz"
    )
    code, _, err = run(*words, tmp_path / "none", "--reference", bids, capsys=capsys)
    assert code == 2 and "expected references named like the volumes" in err
    assert not (tmp_path / "none").exists()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `segkit explain`; exit code, stdout and stderr."""
    return lambda *words: run("explain", *words, "--device", "cpu", capsys=capsys)


def test_the_command_prints_the_reach_of_heads_and_whether_several_are_better(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    model = saved_model(tmp_path / "model", bottleneck=self_attention(2))
    out, labels = tmp_path / "out", scans.parent / "labels"
    code, said, err = command(
        scans, "--out", out, "--model", model, "--heads", "--reference", labels
    )
    assert (code, err) == (0, "")
    expected = {"heads.csv", "heads.json"} | OVER_ALL
    for name in ("a", "b"):
        expected |= files_of(name, "bottleneck-received", within=f"{name}/")
        heads = json.loads((out / name / f"{name}_maps.json").read_text())["maps"][0]["heads"]
        for number, head in enumerate(heads):
            assert (
                f"{name} bottleneck head {number}: mean distance {head['distance_mm']:.3g} mm "
                f"({head['distance_over_uniform']:.2f} of uniform attention)"
            ) in said
    assert files_in(out) == expected
    answer = json.loads((out / "heads.json").read_text())["positions"][0]["answer"]
    assert answer in said.splitlines()


def test_the_command_writes_no_tables_of_heads_unless_they_are_requested(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    model = saved_model(tmp_path / "model", bottleneck=self_attention(2))
    words = (scans / "a.nii.gz", "--out", tmp_path / "out", "--model", model)
    code, _, err = command(*words)
    assert (code, err) == (0, "")
    assert files_in(tmp_path / "out") == files_of("a", "bottleneck-received")
    code, _, err = command(*words)
    assert code == 2 and err.startswith("segkit: ") and err.count("\n") == 1
    assert err.endswith("exists already; pass --overwrite or choose another --out\n")
    for name in ("heads.csv", "heads.json"):  # of a study of other volumes, or another model
        (tmp_path / "out" / name).write_text("earlier")
    assert command(*words, "--overwrite")[0] == 0
    assert files_in(tmp_path / "out") == files_of("a", "bottleneck-received")


def test_heads_without_a_reference_are_one_line_and_exit_code_2(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    model = saved_model(tmp_path / "model", bottleneck=self_attention(2))
    code, said, err = command(scans, "--out", tmp_path / "out", "--model", model, "--heads")
    assert (code, said) == (2, "")
    assert err == "segkit: --heads needs --reference; give a label file or a folder of labels\n"
    assert not (tmp_path / "out").exists()


def test_heads_of_a_model_without_any_are_one_line_and_exit_code_2(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    model = saved_model(tmp_path / "model", skip=AdditiveGridGateConfig())
    labels = scans.parent / "labels"
    words = (scans, "--out", tmp_path / "out", "--model", model, "--heads", "--reference", labels)
    code, _, err = command(*words)
    assert code == 2 and err.count("\n") == 1
    assert err.startswith("segkit: expected a model with attention heads, but this one has none;")
    assert not {"heads.csv", "heads.json"} & files_in(tmp_path / "out")


def test_one_bad_volume_does_not_stop_the_others_and_is_reported_at_the_end(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    (scans / "a.nii.gz").write_bytes(b"no volume")
    (tmp_path / "labels" / "c.nii.gz").write_bytes(b"no labels")
    (scans / "c.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes())
    model, out = saved_model(tmp_path / "model", skip=AdditiveGridGateConfig()), tmp_path / "out"
    words = ("--out", out, "--model", model, "--reference", tmp_path / "labels")
    code, said, err = command(scans, *words)
    assert code == 2 and f"wrote {out / 'b' / 'b_seg.nii.gz'}" in said
    first, second, last = err.splitlines()
    assert first.startswith("segkit: ") and "a.nii.gz" in first
    assert str(scans / "c.nii.gz") in second and str(tmp_path / "labels" / "c.nii.gz") in second
    assert last == "segkit: 2 of 3 volumes failed; see the messages above"
    assert files_in(out) == files_of("b", "skip.1-gate", within="b/") | OVER_ALL
    assert {row["case"] for row in rows_of(out / "cohort.csv")} == {"b"}
    page = (out / "index.html").read_text()
    assert "Attention maps of 1 scan<" in page
    assert "<td>scans left out</td>" in page and "labels/c.nii.gz" in page
    # A volume alone fails in one line, and nothing is left behind.
    code, said, err = command(scans / "a.nii.gz", *words[:1], tmp_path / "alone", *words[2:])
    assert code == 2 and err.count("\n") == 1 and "next" not in said
    assert not (tmp_path / "alone").exists()


def test_the_command_writes_attributions_beside_maps_and_measures_them(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    save_model(tmp_path / "model", attending_model(skip=AdditiveGridGateConfig(levels=[1])))
    out = tmp_path / "out"
    words = [scans / "a.nii.gz", "--model", tmp_path / "model", "--device", "cpu", "--out", out]
    code, said, err = command(*words, "--attribution", "occlusion", "--cell", 4)
    assert (code, err) == (0, "")
    told = json.loads((out / "measures.json").read_text())
    assert told["attributions"] and told["provenance"]["attributions"] == {
        **{"methods": ["occlusion"], "quantity": "logit", "baseline": None, "steps": 16},
        **{"draws": 16, "noise": 0.15, "cell_mm": 4.0, "samples": None, "seed": 0},
    }
    page, rows = (out / "index.html").read_text(), rows_of(out / "measures.csv")
    for one in told["attributions"]:
        name = f"a_map-occlusion-{one['structure']}.nii.gz"
        native, onto = read_volume(out / "native" / name), read_volume(out / name)
        assert native.grid.spacing == (4, 4, 4) and onto.grid.shape == (8, 8, 8)
        assert float(native.data.sum()) == pytest.approx(one["total"], rel=1e-4)
        assert f"a {one['key']}: the logit sums to {one['value']:.4g} over" in said
        assert {row["of"] for row in rows if row["map"] == one["key"]} >= {"map", "magnitude"}
        assert f'"{one["key"]}"' in page
    known = {one["structure"] for one in told["attributions"]}
    labels = json.loads((out / "a_seg.json").read_text())["labels"]
    missing = ", ".join(sorted({*list(labels)[1:]} - known))
    assert not missing or f"a {missing}: not predicted, so nothing is attributed" in said
    maps = {one["key"]: one for one in json.loads((out / "a_maps.json").read_text())["maps"]}
    shown = maps[told["attributions"][0]["key"]]
    assert (shown["kind"], shown["range"]) == ("attribution", [None, None])
    assert (shown["stride"], shown["offset"]) == ([4, 4, 4], [1.5, 1.5, 1.5])


def test_an_attribution_that_does_not_exist_is_one_line_and_exit_code_2(
    scans: Path, tmp_path: Path, command: Run
) -> None:
    words = [scans / "a.nii.gz", "--out", tmp_path / "out"]
    code, _, err = command(*words, "--attribution", "lime")
    assert code == 2 and err.startswith("segkit: expected a method out of integrated_gradients, ")
    assert "found 'lime'" in err and err.count("\n") == 1
    code, _, err = command(*words, "--cell", 4, "--attribution", "smoothgrad")
    assert code == 2 and "--cell needs --attribution" in err


def test_the_command_says_whether_the_network_attends_to_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_scans(tmp_path)
    model = attending_model(skip=AdditiveGridGateConfig(levels=[1]), bottleneck=self_attention(2))
    save_model(tmp_path / "model", model)
    out = tmp_path / "out"
    words = ["explain", tmp_path / "scans", "--model", tmp_path / "model", "--device", "cpu"]
    words += ["--reference", tmp_path / "labels", "--out", out, "--identity"]
    code, said, err = run(*words, capsys=capsys)
    assert (code, err) == (0, "")
    told = json.loads((out / "cohort.json").read_text())["identity"]
    assert told["blocks"] == ["bottleneck", "skip.1"]
    table = said[said.index("Dice with attention blocks as the identity") :]
    page = (out / "index.html").read_text()
    for verdict in told["verdicts"]:
        (row,) = [line for line in table.splitlines() if line.strip().startswith(verdict["block"])]
        assert verdict["word"] == "cannot tell" and "cannot tell" in row
        assert f"{verdict['dice_lost']:.3f}" in row.split()
        assert f"{verdict['block']} as the identity" in page
    rows = [(out / name / "identity.csv").read_text().splitlines() for name in ("a", "b")]
    assert (out / "identity.csv").read_text().splitlines() == rows[0] + rows[1][1:]
    assert f"{told['share']['parameters_outside']:,} of {told['share']['parameters']:,}" in said
    # The same as in Python.
    pairs = [
        (read_volume(tmp_path / "scans" / f"{n}.nii.gz"), read_labels(label))
        for n, label in (("a", "a"), ("b", "b"))
        for label in [tmp_path / "labels" / f"{n}.nii.gz"]
    ]
    study = judge_attention(Predictor.load(tmp_path / "model", device="cpu"), pairs)
    assert [vars(one)["dice_lost"] for one in study.verdicts] == pytest.approx(
        [one["dice_lost"] for one in told["verdicts"]], abs=1e-6
    )
    # Without it, nothing of the old one stays; one scan has it on its own page.
    code, said, _ = run(*words[:-1], "--overwrite", capsys=capsys)
    assert code == 0 and not list(out.rglob("identity.csv"))
    words[1] = tmp_path / "scans" / "a.nii.gz"
    words[6:] = ["--reference", tmp_path / "labels", "--out", tmp_path / "one", "--identity"]
    code, said, err = run(*words, capsys=capsys)
    assert (code, err) == (0, "") and "outside attention: " in said
    one = json.loads((tmp_path / "one" / "measures.json").read_text())["identity"]
    assert one["verdicts"][0]["dice_lost"] == pytest.approx(-one["ablation"][0]["change"])
    assert "Dice with attention blocks as the identity" in (tmp_path / "one/index.html").read_text()


def test_identity_of_a_model_without_attention_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written_scans(tmp_path)
    save_model(tmp_path / "model", attending_model())
    words = ["explain", tmp_path / "scans", "--model", tmp_path / "model", "--identity"]
    code, _, err = run(*words, "--out", tmp_path / "out", "--device", "cpu", capsys=capsys)
    assert code == 2 and "expected a model with attention blocks" in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()
