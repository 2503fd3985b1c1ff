"""DICOM segmentations: labels of a series as an object that points back at its slices.

One segment for each class or region, of voxels that are in it or not (BINARY), which viewers and
archives read. Patient, study and frame of reference are the series', and every frame names the
slice that it lies on. A segment has its label's name, and as its concept that of the model's
`codes`; a label without one has its name as a concept of the private scheme 99SEGKIT, whose values
are the first digits of the SHA-256 of the name, so that one name has one value everywhere.
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
from segkit.io.dicom import Series, arranged
from segkit.io.pictures import label_colour
from segkit.io.volume import Volume

PRIVATE = "99SEGKIT"
PRIVATE_NAME = "Names of labels in segkit's models"
PRIVATE_CATEGORY = CodeConfig(scheme=PRIVATE, value="LABEL", meaning="What a model tells apart")
MAY_LACK = (
    *("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber"),
    *("StudyID", "StudyDate", "StudyTime"),
)
"""What highdicom asks of a source that may have been made anonymous."""
NEEDED_TAGS = ("StudyInstanceUID", "SOPInstanceUID", "SOPClassUID", "FrameOfReferenceUID")
UNICODE = "ISO_IR 192"
LONGEST_NAME = 64
"""Characters of a DICOM long string."""


def write_dicom_segmentation(
    path: Path,
    labels: Volume,
    series: Series,
    labelling: Labelling,
    *,
    codes: Mapping[str, LabelCodeConfig],
    algorithm: str,
) -> None:
    """Write labels of a series, on its grid, as a DICOM segmentation, whole or not at all.

    `algorithm` is what made them, such as the name of a run. Raises SegkitError where highdicom is
    not installed, and VolumeError where the series lacks what a segmentation must refer to.
    """
    try:
        import highdicom
        from highdicom.coding_schemes import CodingSchemeIdentificationItem
    except ImportError:
        raise SegkitError(
            "a DICOM segmentation needs highdicom; run pip install 'segkit[dicom]'"
        ) from None
    slices, grid = arranged(series)
    if not labels.grid.agrees_with(grid):
        raise VolumeError(f"{series.folder}: is no longer the series that was segmented; try again")
    frames = segments(labels.data, labelling)
    if slices[0].frame is not None:  # an enhanced file, whose frames have an order of their own
        frames = frames[np.argsort([one.frame or 0 for one in slices])]
    sources = [_source(path) for path in dict.fromkeys(one.path for one in slices)]
    if slices[0].frame is not None and len(sources) > 1:
        raise VolumeError(
            f"{series.folder}: is a series of {len(sources)} enhanced files, to which a DICOM "
            f"segmentation cannot refer here; write NIfTI instead"
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
            f"{series.folder}: its headers do not allow for a DICOM segmentation: {reason}"
        ) from None
    with whole(path) as partial:
        segmentation.save_as(partial)


def _source(path: Path) -> Any:
    """A slice's header, as highdicom asks for it. Raises VolumeError if it lacks what is needed."""
    from pydicom import dcmread

    source = dcmread(path, stop_before_pixels=True)
    if missing := [keyword for keyword in NEEDED_TAGS if not source.get(keyword)]:
        raise VolumeError(
            f"{path}: lacks {missing[0]}, to which a DICOM segmentation must refer; write NIfTI "
            f"instead"
        )
    for keyword in MAY_LACK:
        if keyword not in source:
            setattr(source, keyword, "")
    return source


def _descriptions(
    labelling: Labelling, codes: Mapping[str, LabelCodeConfig], algorithm: str
) -> list[Any]:
    """What each segment is, and what made it."""
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
    """Frames (slice, row, column) of numbers 1, 2, … of classes, or (…, segment) of regions.

    Of regions, which may overlap, each has a mask of its own: all numbers that belong to it.
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
    """The concept of a label that the model gives none."""
    value = hashlib.sha256(name.encode()).hexdigest()[:12].upper()
    return LabelCodeConfig(
        scheme=PRIVATE, value=value, meaning=name[:LONGEST_NAME], category=PRIVATE_CATEGORY
    )


def _concept(code: CodeConfig) -> Any:
    from highdicom.sr import CodedConcept

    return CodedConcept(code.value, code.scheme, code.meaning)
