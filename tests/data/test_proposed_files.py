"""A folder without a dataset.json is refused with the YAML that fits its files."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml

from segkit.checking.check import check
from segkit.config.dataset_files import DatasetConfig
from segkit.config.load import dataset_in
from segkit.data.case_inputs import inputs_in
from segkit.data.dataset import dataset_of
from segkit.data.proposed_files import proposed_files
from segkit.errors import DatasetError
from segkit.geometry.grid import Grid
from segkit.io.volume import Volume, write_volume

GRID = Grid((4, 4, 4), np.eye(4))

VALUES = np.zeros((4, 4, 1), np.uint8)
VALUES[0], VALUES[1] = 2, 5
FLAT = Volume(VALUES, Grid((4, 4, 1), np.diag([-1.0, -1, 1, 1])))


def fill(folder: Path, names: Sequence[str]) -> Path:
    """Volumes of these names; their voxels are 0, 2 and 5."""
    values = np.zeros(GRID.shape, np.uint8)
    values[0], values[1] = 2, 5
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        is_flat = name.endswith(".png") or name.endswith(".tif")
        write_volume(folder / name, FLAT if is_flat else Volume(values, GRID))
    return folder


LAYOUTS = {
    "a folder for each patient": (
        [f"p{n}/{kind}.nii.gz" for n in (1, 2) for kind in ("t1", "t2", "label")],
        {"t1": "*/t1.nii.gz", "t2": "*/t2.nii.gz"},
        "*/label.nii.gz",
        ["p1", "p2"],
    ),
    "a folder for each patient, whose name is in the files": (
        [f"BraTS_{n}/BraTS_{n}_{kind}.nii" for n in (1, 2, 3) for kind in ("flair", "seg")],
        {"flair": "*/*_flair.nii"},
        "*/*_seg.nii",
        ["BraTS_1", "BraTS_2", "BraTS_3"],
    ),
    "patients with several visits": (
        [f"a/visit{n}/{kind}.nrrd" for n in (1, 2) for kind in ("image", "mask")],
        {"image": "*/*/image.nrrd"},
        "*/*/mask.nrrd",
        ["a_visit1", "a_visit2"],
    ),
    "a folder of images and one of labels": (
        [f"{part}/case_{n}.nii.gz" for n in range(3) for part in ("images", "labels")],
        {"image": "images/*.nii.gz"},
        "labels/*.nii.gz",
        ["case_0", "case_1", "case_2"],
    ),
    "several images in a folder, and endings of labels": (
        [f"scans/c{n}_{kind}.mha" for n in range(3) for kind in ("ct", "pet")]
        + [f"masks/c{n}_seg.mha" for n in range(3)],
        {"ct": "scans/*_ct.mha", "pet": "scans/*_pet.mha"},
        "masks/*_seg.mha",
        ["c0", "c1", "c2"],
    ),
    "folders of images and labels in a folder for each part": (
        [
            name
            for part in ("train", "val")
            for n in range(4)
            for name in (f"{part}/images/{n}.tif", f"{part}/masks/{n}.png")
        ],
        {"image": "*/images/*.tif"},
        "*/masks/*.png",
        [f"{part}_{n}" for part in ("train", "val") for n in range(4)],
    ),
    "only one part": (
        [f"train/{part}/{n}.nii.gz" for n in range(3) for part in ("images", "labels")],
        {"image": "train/images/*.nii.gz"},
        "train/labels/*.nii.gz",
        ["0", "1", "2"],
    ),
    "labels beside the images of each kind, as in BUSI": (
        [
            f"{kind}/{kind} ({n}){end}.png"
            for kind in ("benign", "malignant")
            for n in range(4)
            for end in ("", "_mask")
        ],
        {"image": "*/*.png"},
        "*/*_mask.png",
        [f"{kind}_{kind} ({n})" for kind in ("benign", "malignant") for n in range(4)],
    ),
    "two folders with endings of their own, as in DRIVE": (
        [
            name
            for n in range(21, 25)
            for name in (
                f"training/images/{n}_training.tif",
                f"training/1st_manual/{n}_manual1.png",
            )
        ],
        {"training": "training/images/*_training.tif"},
        "training/1st_manual/*_manual1.png",
        ["21", "22", "23", "24"],
    ),
    "images and labels in one folder": (
        [f"im_{n}{end}.png" for n in range(4) for end in ("", "_mask")],
        {"image": "*.png"},
        "*_mask.png",
        ["im_0", "im_1", "im_2", "im_3"],
    ),
    "images in a folder for each patient, and labels likewise": (
        [f"{part}/p{n}/scan.mha" for n in range(3) for part in ("images", "labels")],
        {"image": "images/*/*.mha"},
        "labels/*/*.mha",
        ["p0_scan", "p1_scan", "p2_scan"],
    ),
    "BIDS with masks": (
        [f"sub-{n}/ses-b/anat/sub-{n}_ses-b_T1w.nii.gz" for n in "12"]
        + [
            f"derivatives/manual/sub-{n}/ses-b/anat/sub-{n}_ses-b_label-tumour_mask.nii.gz"
            for n in "12"
        ],
        {"T1w": "sub-*/ses-*/anat/sub-*_ses-*_T1w.nii.gz"},
        "derivatives/manual/sub-*/ses-*/anat/sub-*_ses-*_label-tumour_mask.nii.gz",
        ["1_b", "2_b"],
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_proposed_yaml_reads_the_folder(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, images, label, cases = LAYOUTS[layout]
    monkeypatch.chdir(tmp_path)
    fill(Path("study"), names)
    with pytest.raises(DatasetError) as refused:
        check("study")
    told = str(refused.value)
    assert "write this line to study.yaml, correct it, and give that file: data: {" in told
    line = told[told.index("data: {") :]
    assert yaml.safe_load(line)["data"] == {
        "folder": "study",
        "files": {"images": images, "label": label},
        "labels": {"background": 0, "class_2": 2, "class_5": 5},
    }
    Path("study.yaml").write_text(line)
    found = dataset_in(Path("study.yaml"))
    assert found is not None
    dataset = dataset_of(found)
    assert [case.name for case in dataset.cases] == cases
    assert dataset.channels == tuple(images)
    assert check("study.yaml").facts["cases"] == cases
    found_images = inputs_in([Path("study.yaml")], dataset.channels)
    assert [source.name for source in found_images] == cases
    assert [list(source.files) for source in found_images] == [
        list(case.images) for case in dataset.cases
    ]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["a.nii.gz", "b.nii.gz"],
        ["p1/a.nii.gz", "p2/a.nii.gz"],
    ],
)
def test_no_yaml_is_proposed_if_no_pattern_fits(names: list[str], tmp_path: Path) -> None:
    fill(tmp_path, names)
    assert proposed_files(tmp_path) is None
    with pytest.raises(DatasetError, match=r"found none; add one, or write a YAML file with data"):
        dataset_of(DatasetConfig(folder=tmp_path))


def test_labels_without_names_in_bids_are_refused_with_their_numbers(tmp_path: Path) -> None:
    names = ["sub-1/anat/sub-1_T1w.nii.gz", "derivatives/m/sub-1/anat/sub-1_dseg.nii.gz"]
    fill(tmp_path, names)
    words = r"data\.labels='\{background: 0, class_2: 2, class_5: 5\}'"
    with pytest.raises(DatasetError, match=words):
        check(tmp_path)
    found = check(tmp_path, ["data.labels={background: 0, class_2: 2, class_5: 5}"])
    assert found.facts["cases"] == ["sub-1"] and found.facts["channels"] == ["T1w"]
