"""DICOM segmentations: labels of a series as a DICOM object that refers to the series' slices.

Each class or region is one BINARY segment, which viewers and archives can read. Patient, study and
frame of reference are those of the series, and every frame refers to its slice. A segment has the
name of its label. Its coded concept is that of the model's `codes`; a label without a code gets a
concept of the private scheme 99SEGKIT. Such a concept's meaning is the name of the label, and its
value is the beginning of the SHA-256 of the name, so that a name always has the same value.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray

from segkit.config.dataset_files import CodeConfig, LabelCodeConfig
from segkit.config.labels import Labelling
from segkit.data.label_numbers import within
from segkit.errors import SegkitError, VolumeError
from segkit.io.atomic import whole
from segkit.io.dicom import arranged
from segkit.io.dicom_listing import Series
from segkit.io.pictures import label_colour
from segkit.io.volume import Volume

PRIVATE = "99SEGKIT"
PRIVATE_NAME = "Names of labels in segkit's models"
PRIVATE_CATEGORY = CodeConfig(scheme=PRIVATE, value="LABEL", meaning="What a model tells apart")
MAY_LACK = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
"""Tags that highdicom needs, but that an anonymised series may lack; they are then empty."""
NEEDED_TAGS = ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
UNICODE = "ISO_IR 192"
LONGEST_NAME = 64
"""Largest number of characters of a DICOM long string."""


def write_dicom_segmentation(
    path: Path,
    labels: Volume,
    series: Series,
    labelling: Labelling,
    *,
    codes: Mapping[str, LabelCodeConfig],
    algorithm: str,
) -> None:
    """Write labels of a series as a DICOM segmentation, completely or not at all.

    Args:
        path: the file to write.
        labels: labels on the grid of the series.
        series: the series that was segmented.
        labelling: names and numbers of the labels.
        codes: coded concept of each label that has one.
        algorithm: name of the algorithm, such as that of a run.

    Raises:
        SegkitError: highdicom is not installed.
        VolumeError: the series has changed, or lacks tags to which a segmentation must refer.
    """
    try:
        import highdicom
        from highdicom.coding_schemes import CodingSchemeIdentificationItem
    except ImportError:
        raise SegkitError(
            "a DICOM segmentation needs highdicom, which is not installed; run pip install "
            "'segkit[dicom]'"
        ) from None
    slices, grid = arranged(series)
    if not labels.grid.agrees_with(grid):
        raise VolumeError(
            f"{series.folder}: expected the series that was segmented, found another grid; run "
            f"segkit predict again"
        )
    frames = segments(labels.data, labelling)
    if slices[0].frame is not None:  # an enhanced file, whose frames have an order of their own
        frames = frames[np.argsort([one.frame or 0 for one in slices])]
    sources = [_source(path) for path in dict.fromkeys(one.path for one in slices)]
    if slices[0].frame is not None and len(sources) > 1:
        raise VolumeError(
            f"{series.folder}: is a series of {len(sources)} enhanced files, for which segkit "
            "cannot write a DICOM segmentation; write NIfTI instead"
        )
    private = CodingSchemeIdentificationItem(
        PRIVATE, name=PRIVATE_NAME, responsible_organization="segkit"
    )
    try:
        segmentation = highdicom.seg.Segmentation(
            source_images=sources,
            pixel_array=frames,
            segmentation_type=highdicom.seg.SegmentationTypeValues.BINARY,
            segment_descriptions=_descriptions(labelling, codes, algorithm),
            series_instance_uid=highdicom.UID(),
            series_number=1000 + int(sources[0].get("SeriesNumber") or 0),
            sop_instance_uid=highdicom.UID(),
            instance_number=1,
            manufacturer="segkit",
            manufacturer_model_name="segkit",
            software_versions=version("segkit"),
            device_serial_number=algorithm[:LONGEST_NAME],
            series_description=f"Segmentation by {algorithm}"[:LONGEST_NAME],
            coding_schemes=[private],
            specific_character_set=UNICODE,
        )
    except ValueError as error:
        reason = " ".join(str(error).split())
        raise VolumeError(
            f"{series.folder}: the headers of this series do not allow a DICOM segmentation: "
            f"{reason}; write NIfTI instead"
        ) from None
    with whole(path) as partial:
        segmentation.save_as(partial)


def _source(path: Path) -> Any:
    """A slice's header for highdicom. Raises VolumeError if it lacks a tag that is needed."""
    from pydicom import dcmread

    source = dcmread(path, stop_before_pixels=True)
    if missing := [keyword for keyword in NEEDED_TAGS if not source.get(keyword)]:
        raise VolumeError(
            f"{path}: a DICOM segmentation needs the tag {missing[0]} of the series, found none; "
            "write NIfTI instead"
        )
    for keyword in MAY_LACK:
        if keyword not in source:
            setattr(source, keyword, "")
    return source


def _descriptions(
    labelling: Labelling, codes: Mapping[str, LabelCodeConfig], algorithm: str
) -> list[Any]:
    """Description of each segment, with the algorithm that made it."""
    import highdicom
    from pydicom.sr.codedict import codes as known

    made_by = highdicom.AlgorithmIdentificationSequence(
        name=algorithm[:LONGEST_NAME],
        family=known.DCM.ArtificialIntelligence,
        version=version("segkit"),
    )
    descriptions = []
    for number, name in enumerate(labelling.members, start=1):
        code = codes.get(name) or private_code(name)
        colour = label_colour(labelling.numbers_in_files[name])
        descriptions.append(
            highdicom.seg.SegmentDescription(
                segment_number=number,
                segment_label=name[:LONGEST_NAME],
                segmented_property_category=_concept(code.category),
                segmented_property_type=_concept(code),
                algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=made_by,
                display_color=highdicom.color.CIELabColor.from_string(colour),
            )
        )
    return descriptions


def segments(labels: ndarray, labelling: Labelling) -> ndarray:
    """Frames of a segmentation, (slice, row, column) or (slice, row, column, segment).

    Classes are numbered 1, 2, …. Regions may overlap, so each region has its own mask.
    """
    frames = within(labels, labelling).transpose(2, 1, 0)
    if labelling.regions:
        masks = [np.isin(frames, numbers) for numbers in labelling.members.values()]
        return np.stack(masks, axis=-1)
    highest = max(labelling.numbers.values())
    numbers = np.zeros(highest + 1, np.min_scalar_type(highest))
    for number, (value,) in enumerate(labelling.members.values(), start=1):
        numbers[value] = number
    return numbers[frames]


def private_code(name: str) -> LabelCodeConfig:
    """The coded concept of a label for which the model has no code."""
    value = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return LabelCodeConfig(
        scheme=PRIVATE, value=value, meaning=name[:LONGEST_NAME], category=PRIVATE_CATEGORY
    )


def _concept(code: CodeConfig) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)
