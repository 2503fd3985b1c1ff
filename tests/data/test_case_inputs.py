"""What can be trained on can be given to predict: datasets, tables and BIDS folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from segkit.checking.check import check
from segkit.config.dataset_files import DatasetConfig
from segkit.config.load import dataset_in
from segkit.data.bids import bids_labels, parts_of
from segkit.data.case_inputs import inputs_in
from segkit.data.dataset import dataset_of
from segkit.errors import ConfigError, DatasetError, VolumeError
from segkit.evaluation.evaluate import evaluate
from segkit.geometry.grid import Grid
from segkit.inference.bids_layout import bids_path, write_bids_root
from segkit.io.inputs import Input, find_inputs, read_input
from segkit.io.picture_rules import PictureRules
from segkit.io.series_rules import parse_series
from segkit.io.volume import Volume, write_volume
from tests.dicom import write_series
from tests.small import small_dataset

GRID = Grid((4, 4, 4), np.eye(4))
MODEL = ("T1", "FLAIR")


def save(path: Path, value: int) -> Path:
    write_volume(path, Volume(np.full(GRID.shape, value, np.uint8), GRID))
    return path


@pytest.fixture
def bids(tmp_path: Path) -> Path:
    """Three subjects, of which the last has no FLAIR and the first two have labels."""
    root = tmp_path / "bids"
    for number in (1, 2, 3):
        subject, name = root / f"sub-{number:02}" / "ses-b", f"sub-{number:02}_ses-b"
        save(subject / "anat" / f"{name}_T1w.nii.gz", number)
        save(subject / "func" / f"{name}_task-rest_bold.nii.gz", 99)
        if number < 3:
            save(subject / "anat" / f"{name}_FLAIR.nii.gz", number + 10)
            labels = root / "derivatives" / "manual" / f"sub-{number:02}" / "ses-b" / "anat"
            save(labels / f"{name}_dseg.nii.gz", 1)
            save(labels / f"{name}_desc-other_probseg.nii.gz", 1)
    (root / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1.10.0"}')
    (root / "derivatives" / "manual" / "dseg.tsv").write_text("index\tname\n1\tball\n")
    return root


def values(source: Input) -> list[int]:
    """The value of each channel."""
    return [int(value) for value in read_input(source).data[0, 0, 0].ravel()]


def test_a_bids_folder_gives_the_images_of_the_models_channels(bids: Path) -> None:
    found = inputs_in([bids], MODEL)
    assert [source.name for source in found] == ["sub-01_ses-b", "sub-02_ses-b"]
    assert [values(source) for source in found] == [[1, 11], [2, 12]]
    (*_, last) = inputs_in([bids], ["T1w"])
    assert last.name == "sub-03_ses-b" and values(last) == [3]
    with pytest.raises(
        DatasetError, match="expected a case with images of the channels PD, found F"
    ):
        inputs_in([bids], ["PD"])


def test_a_bids_folder_with_labels_is_a_dataset(bids: Path) -> None:
    dataset = dataset_of(DatasetConfig(folder=bids))
    assert dataset.channels == ("FLAIR", "T1w") and dataset.labels == {"background": 0, "ball": 1}
    assert [case.name for case in dataset.cases] == ["sub-01_ses-b", "sub-02_ses-b"]
    (bids / "derivatives" / "manual" / "dseg.tsv").unlink()
    with pytest.raises(
        DatasetError, match=r"expected a table dseg\.tsv with the names of the labels"
    ):
        dataset_of(DatasetConfig(folder=bids))


def test_what_a_bids_folder_leaves_out_is_named(
    bids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(bids / "sub-01" / "ses-b" / "anat" / "sub-01_ses-b_T2w.nii.gz", 1)
    assert dataset_of(DatasetConfig(folder=bids)).channels == ("FLAIR", "T1w")
    left, unused = (record.getMessage() for record in caplog.records)
    assert left == f"{bids}: left out because they have no label: sub-03_ses-b"
    assert unused.endswith(
        "T2w is not used as a channel, because these labelled cases lack it: sub-02_ses-b"
    )
    caplog.clear()
    inputs_in([bids], MODEL)
    (torn,) = (record.getMessage() for record in caplog.records)
    assert torn == f"{bids}: left out, as they lack a channel: sub-03_ses-b"
    caplog.clear()
    inputs_in([bids], ["T1w"])
    assert not caplog.records


def test_predictions_among_the_derivatives_are_no_labels(bids: Path) -> None:
    before = dataset_of(DatasetConfig(folder=bids))
    own = bids / "derivatives" / "segkit"
    for case in before.cases:
        subject = case.name[:6]
        save(own / subject / "ses-b" / "anat" / f"{case.name}_desc-segkit_dseg.nii.gz", 0)
    (own / "desc-segkit_dseg.tsv").write_text("index\tname\n0\tbackground\n1\tother\n")
    assert dataset_of(DatasetConfig(folder=bids)) == before
    # As references, such a folder is what it is.
    assert [path.parent.parent.parent.parent for path in bids_labels(own).values()] == [own] * 2


@pytest.mark.parametrize("name", ["anat/sub-01_ses-b_acq-x_T1w", "func/sub-01_ses-b_task-x_bold"])
def test_two_files_for_a_channel_of_a_case_in_a_bids_folder_are_refused(
    name: str, bids: Path
) -> None:
    save(bids / "sub-01" / "ses-b" / f"{name}.nii.gz", 5)
    channels = [name.rpartition("_")[2], "T1w"]
    with pytest.raises(DatasetError, match="are two images of the same kind and case; select one"):
        inputs_in([bids], channels)
    if "anat" in name:
        with pytest.raises(
            DatasetError, match=r"_T1w\.nii\.gz and .*_acq-x_T1w\.nii\.gz are two images"
        ):
            dataset_of(DatasetConfig(folder=bids))


def test_several_files_of_a_kind_that_is_no_channel_do_no_harm_in_a_bids_folder(
    bids: Path,
) -> None:
    before = dataset_of(DatasetConfig(folder=bids))
    inputs = inputs_in([bids], MODEL)
    anatomy = bids / "sub-01" / "ses-b" / "anat"
    for name in ("inv-1_MP2RAGE", "inv-2_MP2RAGE", "echo-1_MEGRE", "echo-2_MEGRE"):
        save(anatomy / f"sub-01_ses-b_{name}.nii.gz", 7)
    for name in ("acq-a_T2w", "acq-b_T2w"):  # of a case without labels
        save(bids / "sub-03" / "ses-b" / "anat" / f"sub-03_ses-b_{name}.nii.gz", 7)
    for name in ("acq-a_FLAIR", "acq-b_FLAIR"):  # of a case that lacks the other channel
        save(bids / "sub-04" / "ses-b" / "anat" / f"sub-04_ses-b_{name}.nii.gz", 7)
    assert dataset_of(DatasetConfig(folder=bids)) == before
    assert inputs_in([bids], MODEL) == inputs


def test_an_anatomical_image_counts_more_than_others_of_its_kind(bids: Path) -> None:
    save(bids / "sub-01" / "ses-b" / "aaa" / "sub-01_ses-b_T1w.nii.gz", 99)
    save(bids / "sub-01" / "ses-b" / "fmap" / "sub-01_ses-b_T1w.nii.gz", 99)
    assert values(inputs_in([bids], MODEL)[0]) == [1, 11]


def test_patterns_and_tables_give_images_with_or_without_labels(bids: Path) -> None:
    images = {
        "FLAIR": "sub-*/ses-*/anat/sub-*_ses-*_FLAIR.nii.gz",
        "T1": "sub-*/ses-*/anat/sub-*_ses-*_T1w.nii.gz",
    }
    study = bids.parent / "study.yaml"
    study.write_text(json.dumps({"data": {"folder": str(bids), "files": {"images": images}}}))
    found = inputs_in([study], MODEL)
    assert [(source.name, values(source)) for source in found] == [
        ("01_b", [1, 11]),
        ("02_b", [2, 12]),
    ]
    with pytest.raises(DatasetError, match=r"expected label, the pattern of the labels|labels"):
        dataset_of(DatasetConfig.model_validate({"folder": str(bids), "files": {"images": images}}))
    one, two = sorted(bids.glob("sub-0[12]/ses-b/anat/*_FLAIR.nii.gz"))
    table = bids.parent / "cases.csv"
    rows = [f"{path.name[:6]},{str(path).replace('FLAIR', 'T1w')},{path}" for path in (one, two)]
    table.write_text("\n".join(["id,t1,FLAIR", *rows]))
    assert [(source.name, values(source)) for source in inputs_in([table], MODEL)] == [
        ("sub-01", [1, 11]),
        ("sub-02", [2, 12]),
    ]
    with pytest.raises(DatasetError, match=r"expected the columns id and image, or one for each"):
        inputs_in([table], ["CT"])


def test_results_beside_the_inputs_of_a_pattern_are_no_inputs(tmp_path: Path) -> None:
    study = tmp_path / "study.yaml"
    files = {"images": {"CT": "ct/*.nii.gz"}}
    study.write_text(json.dumps({"data": {"folder": str(tmp_path), "files": files}}))
    for name in ("12:30", "12-30_seg", "b_seg", "c", "c_prob"):
        save(tmp_path / "ct" / f"{name}.nii.gz", 1)
    assert [source.name for source in inputs_in([study], ["CT"])] == ["12:30", "b_seg", "c"]


def test_channels_of_other_names_are_taken_in_order_and_this_is_said(
    bids: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = {"a": "sub-*/*/anat/sub-*_T1w.nii.gz", "b": "sub-*/*/anat/sub-*_FLAIR.nii.gz"}
    study = bids.parent / "study.yaml"
    study.write_text(json.dumps({"data": {"folder": str(bids), "files": {"images": images}}}))
    assert values(inputs_in([study], MODEL)[0]) == [1, 11]
    assert "its channels a, b are taken as the model's T1, FLAIR, in this order" in caplog.text
    with pytest.raises(DatasetError, match=r"channels of the model, x, .*, found a, b"):
        inputs_in([study], ["x", "y", "z"])


def test_a_dataset_folder_gives_all_its_cases(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data", num_cases=3)
    found = inputs_in([data], ["MRI"])
    assert [source.name for source in found] == ["case_0", "case_1", "case_2"]
    assert found[0].files == (data / "imagesTr" / "case_0.nii.gz",)
    with pytest.raises((ConfigError, VolumeError), match="no such file"):
        inputs_in([tmp_path / "absent.yaml"], ["MRI"])


def test_nested_folders_are_looked_into_but_not_that_of_results(tmp_path: Path) -> None:
    for name in ("p1/CT", "p2/CT", "p2/b", "out/CT"):
        save(tmp_path / f"{name}.nii.gz", 1)
    found = find_inputs([tmp_path], 1, but=tmp_path / "out")
    assert [source.name for source in found] == ["p1_CT", "p2_CT", "p2_b"]
    assert len(find_inputs([tmp_path], 1, but=tmp_path)) == 4


# A tree of DICOM series


def test_a_media_tree_is_a_cohort_whose_names_are_paths(tmp_path: Path) -> None:
    stored = np.zeros((4, 4, 3), np.uint16)
    for place, text in (("PA0/ST0/SE0", "thorax"), ("PA0/ST0/SE1", "head"), ("b/CT", "Thorax 2")):
        write_series(tmp_path / place, stored, Grid((4, 4, 3), np.eye(4)), description=text)
    names = [source.name for source in inputs_in([tmp_path], ["CT"])]
    assert names == ["PA0_ST0_SE0", "PA0_ST0_SE1", "b_CT"]
    rule = parse_series(["description=thorax*", "slices=2.."])
    found = inputs_in([tmp_path], ["CT"], series=rule)
    assert [source.name for source in found] == ["PA0_ST0_SE0", "b_CT"]
    assert [source.files for source in found] == [
        (tmp_path / "PA0" / "ST0" / "SE0",),
        (tmp_path / "b" / "CT",),
    ]
    with pytest.raises(VolumeError, match=r"no DICOM series in it is modality MR; it holds .*thor"):
        inputs_in([tmp_path], ["CT"], series=parse_series(["modality=MR"]))


def test_series_that_share_a_folder_are_told_apart(tmp_path: Path) -> None:
    for number in range(2):
        stored = np.full((4, 4, 3), number + 1024, np.uint16)
        for path in write_series(tmp_path / "tmp", stored, Grid((4, 4, 3), np.eye(4))):
            (tmp_path / "all").mkdir(exist_ok=True)
            path.rename(tmp_path / "all" / f"{number}{path.name}")
    (tmp_path / "tmp").rmdir()
    found = inputs_in([tmp_path], ["CT"], series=parse_series(["modality=CT"]))
    assert len({source.name for source in found}) == 2
    assert all(source.name.startswith("all_") for source in found)
    assert sorted(int(read_input(source).data.max()) for source in found) == [0, 1]


def test_a_damaged_series_of_a_cohort_is_the_only_input_that_fails(tmp_path: Path) -> None:
    write_series(tmp_path / "a", np.zeros((4, 4, 3), np.uint16), Grid((4, 4, 3), np.eye(4)))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.dcm").write_bytes(b"nothing")
    found = inputs_in([tmp_path], ["CT"], series=parse_series(["modality=CT"]))
    assert [source.name for source in found] == ["a", "b"]
    assert read_input(found[0]).data.shape == (4, 4, 3)
    with pytest.raises(VolumeError, match=r"x\.dcm: cannot be read as DICOM"):
        read_input(found[1])


# Derivatives


def test_entities_are_read_from_names() -> None:
    told = parts_of(Path("sub-01_ses-b_acq-x_T1w.nii.gz"))
    assert told == ({"sub": "01", "ses": "b", "acq": "x"}, "T1w")


def test_labels_of_derivatives_have_the_entities_that_all_images_share(
    bids: Path, tmp_path: Path
) -> None:
    (source, *_) = inputs_in([bids], MODEL)
    path = bids_path(source, tmp_path / "out")
    inside = "sub-01/ses-b/anat/sub-01_ses-b_desc-segkit_dseg.nii.gz"
    assert path == tmp_path / "out" / inside
    scan = Input("PA0_ST0 x", (save(tmp_path / "scan.nii.gz", 1),))
    assert bids_path(scan, tmp_path).parts[-3:] == (
        "sub-PA0ST0x",
        "anat",
        "sub-PA0ST0x_desc-segkit_dseg.nii.gz",
    )
    with pytest.raises(
        VolumeError, match="BIDS derivatives are written into a folder; pass a folder"
    ):
        bids_path(source, None)


def test_derivatives_are_not_written_into_a_raw_dataset(bids: Path, tmp_path: Path) -> None:
    labelling = dataset_of(DatasetConfig(folder=bids)).labelling
    with pytest.raises(
        VolumeError, match="expected a BIDS folder of derivatives, found one of the type raw"
    ):
        write_bids_root(bids, labelling, models=["run"])
    write_bids_root(tmp_path / "out", labelling, models=["run"])
    told = json.loads((tmp_path / "out" / "dataset_description.json").read_text())
    assert told["DatasetType"] == "derivative" and told["GeneratedBy"][0]["Name"] == "segkit"
    table = (tmp_path / "out" / "desc-segkit_dseg.tsv").read_text()
    assert table == "index\tname\n0\tbackground\n1\tball\n"


@pytest.mark.parametrize("by", ["bids", "derivative", "table"])
def test_derivatives_are_scored_against_bids_folders_and_tables(
    by: str, bids: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    for name, path in bids_labels(bids).items():
        subject, session = name.split("_")
        save(out / subject / session / "anat" / f"{name}_desc-segkit_dseg.nii.gz", 1)
        save(out / subject / session / "anat" / f"{name}_desc-segkit_probseg.nii.gz", 1)
        assert path.is_file()
    references = {"bids": bids, "derivative": bids / "derivatives" / "manual"}.get(by)
    if references is None:
        references = tmp_path / "cases.csv"
        rows = [f"{name},{path.relative_to(tmp_path)}" for name, path in bids_labels(bids).items()]
        references.write_text("\n".join(["id,label", *rows]))
    scores = evaluate(out, references)
    assert [row.case for row in scores.cases] == ["sub-01_ses-b", "sub-02_ses-b"]
    assert scores.summary.overall.metrics["dice"].mean == 1.0 and not scores.extra


def test_a_table_of_labelled_scans_is_a_dataset_without_yaml(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path / "data")
    names = sorted(path.name for path in (folder / "labelsTr").iterdir())
    rows = [
        f"c{number},imagesTr/{image.name},labelsTr/{label},p{number // 2}"
        for number, (image, label) in enumerate(
            zip(sorted((folder / "imagesTr").iterdir()), names, strict=True)
        )
    ]
    table = folder / "cases.csv"
    table.write_text("\n".join(["id,image,label,patient", *rows]) + "\n")
    words = "data.labels={background: 0, ball: 1}"
    found = dataset_in(table, [words, "data.group_by={column: patient}"])
    assert found is not None
    dataset = dataset_of(found)
    assert [case.name for case in dataset.cases] == [f"c{number}" for number in range(len(rows))]
    assert dataset.channels == ("image",) and dataset.labels == {"background": 0, "ball": 1}
    understood = check(table, [words])
    assert understood.facts["cases"] == [case.name for case in dataset.cases]
    with pytest.raises(
        DatasetError, match=r"expected the names of the labels, found none; set data"
    ):
        check(table)


# Pictures


def coloured(path: Path, value: int, channels: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((4, 4, channels), value, np.uint8) + np.arange(channels, dtype=np.uint8)
    Image.fromarray(pixels.squeeze()).save(path)
    return path


def test_files_of_several_channels_are_brought_to_the_models_order(tmp_path: Path) -> None:
    coloured(tmp_path / "colours" / "a.png", 10)
    coloured(tmp_path / "grey" / "a.png", 20, channels=1)
    coloured(tmp_path / "label" / "a.png", 1, channels=1)
    images = {"grey": "grey/*.png", "photo": "colours/*.png"}
    files = {"images": images, "label": "label/*.png", "labels": {"background": 0, "cell": 1}}
    data = {"folder": str(tmp_path), "files": files}
    study = tmp_path / "study.yaml"
    study.write_text(json.dumps({"data": data}))
    trained = dataset_of(DatasetConfig.model_validate(data)).channels
    assert trained == ("grey", "photo red", "photo green", "photo blue")
    assert values(inputs_in([study], trained)[0]) == [20, 10, 11, 12]
    colours = trained[1:]
    assert values(inputs_in([study], (*colours, "grey"))[0]) == [10, 11, 12, 20]
    assert values(inputs_in([study], colours)[0]) == [10, 11, 12]
    with pytest.raises(DatasetError, match="model, photo red, found grey, photo red, photo green"):
        inputs_in([study], ["photo red"])
    table = tmp_path / "cases.csv"
    table.write_text("id,photo,grey\na,colours/a.png,grey/a.png\n")
    assert values(inputs_in([table], trained)[0]) == [20, 10, 11, 12]


@pytest.mark.parametrize("in_json", [False, True])
def test_the_pixel_size_of_a_dataset_counts_more_than_the_models(
    in_json: bool, tmp_path: Path
) -> None:
    coloured(tmp_path / "imagesTr" / "a_0000.png", 10, channels=1)
    coloured(tmp_path / "labelsTr" / "a.png", 1, channels=1)
    labels, pictures = {"background": 0, "cell": 1}, {"pixel_size": "3 µm"}
    if in_json:
        content = {"channel_names": {"0": "c"}, "labels": labels, "file_ending": ".png"}
        (tmp_path / "dataset.json").write_text(json.dumps({**content, "pictures": pictures}))
        study = tmp_path
    else:
        files = {"images": {"c": "imagesTr/*_0000.png"}}
        study = tmp_path / "study.yaml"
        data = {"folder": str(tmp_path), "files": files, "pictures": pictures}
        study.write_text(json.dumps({"data": data}))

    def size(rules: PictureRules, *, sized: bool = False) -> float:
        return read_input(inputs_in([study], ["c"], rules=rules, sized=sized)[0]).grid.spacing[0]

    of_model = PictureRules(pixel_mm=(0.002, 0.002))
    assert size(PictureRules()) == size(of_model) == pytest.approx(0.003)
    assert size(of_model, sized=True) == pytest.approx(0.002)
    assert size(PictureRules(in_pixels=True)) == 1
