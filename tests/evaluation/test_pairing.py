"""Predictions and references pair by one rule, and what it cannot tell apart is refused."""

import itertools
import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import segkit
from segkit.evaluation.pairing import Pairing, pair_with
from segkit.evaluation.references import references_in
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume
from segkit.io.volume_names import stem_of
from tests.small import small_dataset


def find_pairs(predictions: Path, references: Path) -> Pairing:
    """The pairs of a prediction and a reference, as `evaluate` finds them."""
    return pair_with(predictions, references_in(references, but=predictions), references)


def touched(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def paired(tmp_path: Path, predictions: str, references: str) -> list[tuple[str, str, str]]:
    """Case, prediction and reference of each pair among files that are named in words."""
    for side in "pr":
        for path in sorted((tmp_path / side).rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    mine = touched(tmp_path / "p", *predictions.split())
    theirs = touched(tmp_path / "r", *references.split())
    return [
        (case, prediction.relative_to(mine).as_posix(), reference.relative_to(theirs).as_posix())
        for case, prediction, reference in find_pairs(mine, theirs).pairs
    ]


PAIRED = {
    "equal names": ("a.nii.gz b.nii.gz", "a.nii.gz b.nii.gz", "a-a b-b"),
    "formats differ": ("a.nii b.mha c.NII.GZ", "a.nii.gz b.nrrd c.nii", "a-a b-b c-c"),
    "_seg on both sides": ("a_seg.nii b_seg.nii", "a_seg.nii b_seg.nii", "a_seg-a_seg b_seg-b_seg"),
    "_seg on one side": ("a_seg.nii b.nii", "a.nii b_seg.nii", "a_seg-a b-b_seg"),
    "other words": ("a_pred.nii b_0000.nii c.seg.nrrd", "a-label.nii b_mask.nii c.nii",
                    "a_pred-a-label b_0000-b_mask c.seg-c"),
    "two words": ("a_0000_seg.nii", "a_Label.nii", "a_0000_seg-a_Label"),
    "ids of four digits": ("c_0000.nii c_0001.nii", "c_0001.nii c_0000.nii",
                           "c_0000-c_0000 c_0001-c_0001"),
    "ids of four digits with words": ("c_0001_seg.nii c_0010_seg.nii", "c_0010.nii c_0001.nii",
                                      "c_0001_seg-c_0001 c_0010_seg-c_0010"),
    "dots and other letters": ("a.b.nii.gz Äu_ß.nii", "Äu_ß.nii a.b.mha", "Äu_ß-Äu_ß a.b-a.b"),
    "names that Windows cannot write": ("12-30_seg.nii con-.nii x-1.nii",
                                       "12:30.nii con.nii x?1.nii",
                                        "12-30_seg-12:30 con--con x-1-x?1"),
    "such names beside their changed ones": ("12-30.nii 12:30.nii", "12:30.nii 12-30.nii",
                                             "12-30-12-30 12:30-12:30"),
    "hidden files": ("a.nii ._a.nii .b.nii .cache/a.nii", "a.nii ._a.nii", "a-a"),
    "the same subfolders": ("s1/m.nii s2/m.nii", "s2/m.nii s1/m.nii", "s1/m-s1/m s2/m-s2/m"),
    "deeper subfolders": ("x/s1/m.nii x/s2/m.nii", "s2/m.nii s1/m.nii", "x/s1/m-s1/m x/s2/m-s2/m"),
    "one side in subfolders": ("f0/a.nii f1/b.nii", "a.nii b.nii", "f0/a-a f1/b-b"),
    "folders that name cases": ("s1.nii s2_seg.nii", "s1/mri.nii s2/mri.nii",
                                "s1-s1/mri s2_seg-s2/mri"),
    "words in folders that name cases": ("s1/pred.nii s2/pred.nii", "x/s1/seg.nii x/s2/mask.nii",
                                         "s1/pred-x/s1/seg s2/pred-x/s2/mask"),
    "two structures of a case": ("s1/a.nii s1/b.nii s2/a.nii s2/b.nii",
                                 "s1/a.nii s1/b.nii s2/a.nii s2/b.nii",
                                 "s1/a-s1/a s1/b-s1/b s2/a-s2/a s2/b-s2/b"),
    "results beside predictions": ("a_seg.nii a_prob.nii a_entropy.nii", "a.nii", "a_seg-a"),
}  # fmt: skip


@pytest.mark.parametrize("kind", PAIRED)
def test_files_of_the_same_case_are_paired(tmp_path: Path, kind: str) -> None:
    mine, theirs, expected = PAIRED[kind]
    stems = [
        "-".join(str(Path(name).with_name(stem_of(Path(name)))) for name in pair[1:])
        for pair in paired(tmp_path, mine, theirs)
    ]
    assert sorted(stems) == sorted(expected.split())


def test_a_letter_with_two_encodings_is_the_same_letter(tmp_path: Path) -> None:
    mine = touched(tmp_path / "p", unicodedata.normalize("NFD", "é one.nii"))
    theirs = touched(tmp_path / "r", unicodedata.normalize("NFC", "é one.nii"))
    assert len(find_pairs(mine, theirs).pairs) == 1


UNCLEAR = {
    "two formats": ("a.nii.gz a.nii", "a.nii.gz", r"p/a\.nii\.gz: is the same case as a\.nii;"),
    "two words": ("a_seg.nii a_pred.nii", "a.nii", "2 predictions are called a"),
    "the scan beside": ("a.nii a_seg.nii", "a.nii", "a_seg.nii: is the same case as a.nii"),
    "two folders": ("f0/a.nii f1/a.nii", "a.nii", "2 predictions are called a"),
    "two references": ("a.nii", "a.nii a-label.nii", "2 references are called a"),
    "references in two folders": ("a.nii", "a.nii old/a.nii", "2 references are called a"),
    "one of which two may be": ("s3/mri.nii", "s1/mri.nii s2/mri.nii", "2 references are called"),
    "many": (
        " ".join(f"{name}.nii {name}_seg.nii" for name in "abcdef"),
        " ".join(f"{name}.nii" for name in "abcdef"),
        "and 3 more$",
    ),
}


@pytest.mark.parametrize("kind", UNCLEAR)
def test_ambiguous_files_are_refused_by_name(tmp_path: Path, kind: str) -> None:
    mine, theirs, words = UNCLEAR[kind]
    with pytest.raises(segkit.VolumeError, match=words):
        paired(tmp_path, mine, theirs)


def test_files_without_a_partner_are_missing_or_extra_and_are_not_paired_with_others(
    tmp_path: Path,
) -> None:
    for mine, theirs, missing, extra in (
        ("a.nii c.nii", "a.nii b.nii", ["b"], ["c"]),
        ("s2/mri.nii s3/mri.nii", "s1/mri.nii s2/mri.nii", ["s1/mri"], ["s3/mri"]),
        ("s1/a.nii s1/b.nii", "s1/a.nii s1/b.nii s2/a.nii", ["s2/a"], []),
        ("c_0000.nii c_0004.nii", "c_0000.nii c_0001.nii", ["c_0001"], ["c_0004"]),
        ("a.nii a_prob.nii a_map-skip.1-gate.nii", "a.nii", [], []),
    ):
        paired(tmp_path, mine, theirs)
        found = find_pairs(tmp_path / "p", tmp_path / "r")
        assert [name for name, _ in found.missing] == missing
        assert [path for path in found.extra] == [tmp_path / "p" / f"{name}.nii" for name in extra]


def test_files_pair_whatever_the_order_and_with_themselves(tmp_path: Path) -> None:
    names = ("a.nii", "s/b_seg.nii", "s/c.nii", "c_0001.nii")
    for some in itertools.permutations(names, 3):
        assert len(paired(tmp_path, " ".join(some), " ".join(some))) == 3


def test_predictions_inside_the_folder_of_references_are_not_taken_for_references(
    tmp_path: Path,
) -> None:
    theirs = touched(tmp_path, "a.nii", "b.nii", "found/a.nii", "found/b.nii")
    assert len(find_pairs(theirs / "found", theirs).pairs) == 2


def test_a_file_pairs_with_its_own_reference_in_a_folder(tmp_path: Path) -> None:
    theirs = touched(tmp_path / "r", "a.nii", "b.nii")
    (tmp_path / "a_seg.nii").touch()
    found = find_pairs(tmp_path / "a_seg.nii", theirs)
    assert found.pairs == (("a", tmp_path / "a_seg.nii", theirs / "a.nii"),)
    assert found.missing == ()
    # Of two files, nobody asks how they are called.
    (tmp_path / "x.nii").touch()
    assert len(find_pairs(tmp_path / "x.nii", theirs / "b.nii").pairs) == 1


def test_missing_paths_and_predictions_without_references_are_refused(tmp_path: Path) -> None:
    theirs = touched(tmp_path / "r", *(f"a{number}.nii" for number in range(9)))
    with pytest.raises(segkit.VolumeError, match="none: no such file or folder"):
        find_pairs(tmp_path / "none", theirs)
    with pytest.raises(segkit.VolumeError, match="none: no such file or folder"):
        find_pairs(theirs, tmp_path / "none")
    mine = touched(tmp_path / "p", "b.nii")
    with pytest.raises(segkit.VolumeError, match=r"\(a0, a1, a2 and 6 more\), found b; rename"):
        find_pairs(mine, theirs)


def labels(path: Path, *, size: int) -> None:
    data = np.zeros((4, 4, 4), np.uint8)
    data[:size] = 1
    write_volume(path, Volume(data, Grid((4, 4, 4), np.eye(4))))


@pytest.mark.parametrize("form", ["folder", "config", "files"])
def test_a_dataset_gives_the_references(tmp_path: Path, form: str) -> None:
    # What was found is half of each label, so that Dice is 2 * 1 / (1 + 2).
    source = tmp_path / "study.yaml"
    if form == "files":
        for name in ("01", "02"):
            labels(tmp_path / f"sub-{name}" / f"sub-{name}_dseg.nii.gz", size=2)
            labels(tmp_path / f"sub-{name}" / f"sub-{name}_T1w.nii.gz", size=2)
            labels(tmp_path / "found" / f"sub-{name}_T1w_seg.nii.gz", size=1)
        source.write_text(
            f"data:\n  folder: {tmp_path}\n  files:\n"
            "    images: {T1: sub-*/sub-*_T1w.nii.gz}\n"
            "    label: sub-*/sub-*_dseg.nii.gz\n    labels: {background: 0, ball: 1}\n"
        )
        cases = ["01", "02"]
    else:
        data = small_dataset(tmp_path / "data", num_cases=2)
        for name in ("case_0", "case_1"):
            labels(data / "labelsTr" / f"{name}.nii.gz", size=2)
            labels(tmp_path / "found" / f"{name}.nii.gz", size=1)
        text = f"data: {{folder: {data}, patch_size: [16, 16, 16]}}\nnetwork: {{channels: [4, 8]}}"
        source.write_text(text)
        source = data if form == "folder" else source
        cases = ["case_0", "case_1"]
    found = segkit.evaluate(tmp_path / "found", source)
    assert [(row.case, row.name) for row in found.cases] == [(case, "ball") for case in cases]
    assert [row.metrics["dice"] for row in found.cases] == [pytest.approx(2 / 3)] * 2


def test_missing_predictions_are_refused_left_out_or_taken_for_empty(tmp_path: Path) -> None:
    for name in "abc":
        labels(tmp_path / "r" / f"{name}.nii.gz", size=2)
    labels(tmp_path / "p" / "a.nii.gz", size=2)
    labels(tmp_path / "p" / "z.nii.gz", size=2)
    with pytest.raises(segkit.VolumeError, match=r"2 of 3 references in .*r: b, c; predict them"):
        segkit.evaluate(tmp_path / "p", tmp_path / "r")
    skipped = segkit.evaluate(tmp_path / "p", tmp_path / "r", missing="skip")
    assert [row.case for row in skipped.cases] == ["a"]
    assert skipped.summary.overall.metrics["dice"].mean == 1
    told = json.loads(json.dumps(skipped.to_json()))
    assert told["missing"] == ["b", "c"] and told["extra"] == [str(tmp_path / "p" / "z.nii.gz")]
    assert [entry["case"] for entry in told["provenance"]["inputs"]] == ["a"]
    empty = segkit.evaluate(tmp_path / "p", tmp_path / "r", missing="empty")
    assert [row.metrics["dice"] for row in empty.cases] == [1, 0, 0]
    # An image that holds a class on one side only is as far off as its diagonal is long.
    assert empty.cases[1].metrics["hd95_mm"] == pytest.approx(48**0.5)
    assert empty.cases[1].prediction_ml == 0 and empty.missing == ("b", "c")
    assert empty.made["inputs"][1]["prediction"] is None
    with pytest.raises(segkit.ConfigError, match="value 'zero' of missing; choose one of 'refuse'"):
        segkit.evaluate(tmp_path / "p", tmp_path / "r", missing="zero")


def test_dicom_segmentations_are_told_to_be_predicted_in_another_format(tmp_path: Path) -> None:
    volume = Volume(np.ones((2, 2, 2), np.uint8), Grid((2, 2, 2), np.eye(4)))
    write_volume(tmp_path / "references" / "a.nii.gz", volume)
    write_volume(tmp_path / "segs" / "a_prob.nii.gz", volume)
    (tmp_path / "segs" / "a.dcm").touch()
    known = references_in(tmp_path / "references")
    with pytest.raises(
        segkit.VolumeError,
        match=r"found \*\.dcm, which are not scored; predict again without --dicom-seg$",
    ):
        pair_with(tmp_path / "segs", known, tmp_path / "references")
