"""DICOM segmentations lie where the labels lie, read back by paths that share no code with ours."""

import sys
from pathlib import Path

import highdicom
import numpy as np
import pytest
from numpy import ndarray
from numpy.testing import assert_allclose
from pydicom import Dataset, dcmread

from segkit.config.dataset_files import LabelCodeConfig
from segkit.config.labels import Labelling
from segkit.errors import SegkitError, VolumeError
from segkit.geometry.grid import Grid
from segkit.inference.dicom_seg import PRIVATE, private_code, write_dicom_segmentation
from segkit.io.dicom import read_series
from segkit.io.dicom_listing import Series, choose_series
from segkit.io.volume import Volume
from tests.dicom import Change, write_series
from tests.helpers import affine_of

SHAPE = (6, 5, 4)
CLASSES = Labelling({"background": 0, "liver": 1, "lesion": 2})
REGIONS = Labelling({"background": 0, "whole": 2, "core": 1}, {"whole": (1, 2), "core": (1,)})
LIVER = LabelCodeConfig(scheme="SCT", value="10200004", meaning="Liver")
LPS = np.array([-1, -1, 1])


def written(
    folder: Path,
    labels: ndarray | None = None,
    *,
    labelling: Labelling = CLASSES,
    code: str = "LPS",
    change: Change = lambda number, one: None,
) -> tuple[Series, Volume, Path]:
    """An oblique series, labels on its grid, and the file with both."""
    stored = np.random.default_rng(0).integers(0, 100, SHAPE).astype(np.uint16)
    write_series(folder / "series", stored, Grid(SHAPE, affine_of(code)), change=change)
    series = choose_series(folder / "series")
    if labels is None:
        labels = np.random.default_rng(1).integers(0, 3, SHAPE).astype(np.uint8)
    volume = read_series(series).like(labels)
    path = folder / "seg.dcm"
    write_dicom_segmentation(
        path, volume, series, labelling, codes={"liver": LIVER}, algorithm="run 7"
    )
    return series, volume, path


def in_order(points: ndarray) -> ndarray:
    points = points.round(3)
    return points[np.lexsort(points.T)]


def voxels_of(path: Path) -> dict[int, ndarray]:
    """World coordinates (LPS+ mm) of each segment's voxels, as PS3.3 C.7.6.2.1.1 places them."""
    file = dcmread(path)
    shared = file.SharedFunctionalGroupsSequence[0]
    cosines = np.array(shared.PlaneOrientationSequence[0].ImageOrientationPatient, float).reshape(
        2, 3
    )
    between = np.array(shared.PixelMeasuresSequence[0].PixelSpacing, float)
    frames = file.pixel_array.reshape(-1, file.Rows, file.Columns)
    found: dict[int, list[ndarray]] = {}
    for frame, groups in zip(frames, file.PerFrameFunctionalGroupsSequence, strict=True):
        number = groups.SegmentIdentificationSequence[0].ReferencedSegmentNumber
        origin = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, float)
        rows, columns = np.nonzero(frame)
        points = origin + np.outer(columns * between[1], cosines[0])
        found.setdefault(number, []).append(points + np.outer(rows * between[0], cosines[1]))
    return {number: np.concatenate(points) for number, points in found.items()}


@pytest.mark.parametrize("code", ["LPS", "LAS", "PSR", "SLA"])
def test_every_voxel_of_a_segment_lies_where_its_label_does(tmp_path: Path, code: str) -> None:
    _, labels, path = written(tmp_path, code=code)
    found = voxels_of(path)
    assert sorted(found) == [1, 2]
    for number, points in found.items():
        world = labels.grid.centres()[labels.data == number] * LPS
        assert_allclose(in_order(points), in_order(world), atol=2e-3)


def test_highdicom_reads_the_same_voxels(tmp_path: Path) -> None:
    _, labels, path = written(tmp_path)
    read = highdicom.seg.segread(path).get_volume(combine_segments=True)
    numbers = np.argwhere(read.array > 0)
    lps = numbers @ read.affine[:3, :3].T + read.affine[:3, 3]
    index = labels.grid.index(lps * LPS).round().astype(int)
    assert_allclose(labels.grid.world(index.astype(float)) * LPS, lps, atol=2e-3)
    assert (labels.data[tuple(index.T)] == read.array[tuple(numbers.T)]).all()
    assert len(numbers) == (labels.data > 0).sum()


def test_regions_keep_the_voxels_that_they_share(tmp_path: Path) -> None:
    _, labels, path = written(tmp_path, labelling=REGIONS)
    found = voxels_of(path)
    for number, members in ((1, (1, 2)), (2, (1,))):
        world = labels.grid.centres()[np.isin(labels.data, members)] * LPS
        assert_allclose(in_order(found[number]), in_order(world), atol=2e-3)
    file = dcmread(path)
    assert file.SegmentsOverlap == "YES"
    assert [segment.SegmentLabel for segment in file.SegmentSequence] == ["whole", "core"]


def test_it_refers_to_the_slices_that_it_is_of(tmp_path: Path) -> None:
    series, _, path = written(tmp_path)
    file = dcmread(path)
    sources = {str(one.SOPInstanceUID): one for one in (dcmread(s.path) for s in series.slices)}
    first = next(iter(sources.values()))
    for keyword in ("StudyInstanceUID", "FrameOfReferenceUID", "PatientID", "PatientName"):
        assert file[keyword].value == first[keyword].value
    assert file.SeriesInstanceUID != series.uid and file.Modality == "SEG"
    (referenced,) = file.ReferencedSeriesSequence
    assert referenced.SeriesInstanceUID == series.uid
    named = {item.ReferencedSOPInstanceUID for item in referenced.ReferencedInstanceSequence}
    assert named == set(sources)
    for groups in file.PerFrameFunctionalGroupsSequence:
        (source,) = groups.DerivationImageSequence[0].SourceImageSequence
        slice_ = sources[str(source.ReferencedSOPInstanceUID)]
        place = groups.PlanePositionSequence[0].ImagePositionPatient
        assert_allclose(np.array(place, float), np.array(slice_.ImagePositionPatient, float))


def test_segments_have_their_labels_names_and_codes(tmp_path: Path) -> None:
    _, _, path = written(tmp_path)
    file = dcmread(path)
    liver, lesion = file.SegmentSequence
    assert (liver.SegmentNumber, liver.SegmentLabel) == (1, "liver")
    concept = liver.SegmentedPropertyTypeCodeSequence[0]
    assert (concept.CodeValue, concept.CodingSchemeDesignator) == ("10200004", "SCT")
    assert liver.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Anatomical Structure"
    concept = lesion.SegmentedPropertyTypeCodeSequence[0]
    assert concept.CodingSchemeDesignator == PRIVATE and concept.CodeMeaning == "lesion"
    # printf lesion | sha256sum
    assert concept.CodeValue == private_code("lesion").value == "CD5F70CA8D37"
    (scheme,) = file.CodingSchemeIdentificationSequence
    assert scheme.CodingSchemeDesignator == PRIVATE
    assert liver.SegmentAlgorithmType == "AUTOMATIC"
    made_by = liver.SegmentationAlgorithmIdentificationSequence[0]
    assert made_by.AlgorithmName == "run 7"


def test_names_in_any_script_are_kept(tmp_path: Path) -> None:
    def western(number: int, one: Dataset) -> None:
        one.SpecificCharacterSet, one.PatientName = "ISO_IR 100", "Müller^Jörg"

    labelling = Labelling({"background": 0, "Nière": 1, "肝臓": 2})
    _, _, path = written(tmp_path, labelling=labelling, change=western)
    file = dcmread(path)
    assert str(file.PatientName) == "Müller^Jörg"
    assert [segment.SegmentLabel for segment in file.SegmentSequence] == ["Nière", "肝臓"]


def test_labels_without_a_voxel_make_a_segmentation_all_the_same(tmp_path: Path) -> None:
    _, _, path = written(tmp_path, np.zeros(SHAPE, np.uint8))
    assert not dcmread(path).pixel_array.any()


def test_a_series_without_a_patient_is_segmented_all_the_same(tmp_path: Path) -> None:
    def anonymous(number: int, one: Dataset) -> None:
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "StudyDate"):
            delattr(one, keyword)
        for keyword in ("StudyTime", "StudyID", "AccessionNumber", "SeriesNumber"):
            delattr(one, keyword)

    _, labels, path = written(tmp_path, change=anonymous)
    assert sum(map(len, voxels_of(path).values())) == (labels.data > 0).sum()


def test_a_series_without_a_frame_of_reference_is_refused(tmp_path: Path) -> None:
    def lost(number: int, one: Dataset) -> None:
        del one.FrameOfReferenceUID

    with pytest.raises(VolumeError, match="a DICOM segmentation needs the tag FrameOfReferenceUID"):
        written(tmp_path, change=lost)


def test_headers_that_do_not_fit_are_refused_in_one_sentence(tmp_path: Path) -> None:
    def odd(number: int, one: Dataset) -> None:
        one.PatientSex = "X"

    with pytest.raises(VolumeError, match="the headers of this series do not allow a DICOM seg"):
        written(tmp_path, change=odd)
    assert not (tmp_path / "seg.dcm").exists()


def test_labels_of_another_grid_are_refused(tmp_path: Path) -> None:
    series, labels, path = written(tmp_path)
    elsewhere = Volume(labels.data, Grid(SHAPE, np.eye(4)))
    with pytest.raises(VolumeError, match="expected the series that was segmented, found another"):
        write_dicom_segmentation(path, elsewhere, series, CLASSES, codes={}, algorithm="x")


def test_without_highdicom_the_error_names_the_package_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    series, labels, path = written(tmp_path)
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(SegkitError, match=r"pip install 'segkit\[dicom\]'"):
        write_dicom_segmentation(path, labels, series, CLASSES, codes={}, algorithm="x")
