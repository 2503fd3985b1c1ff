"""DICOM segmentations written with highdicom."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import highdicom
import numpy as np
from numpy import ndarray
from pydicom import dcmread
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from segkit.io.dicom_listing import choose_series


def write_segments(
    path: Path, series: Path, values: ndarray, names: Mapping[int, str], kind: str, **options: Any
) -> None:
    """A segmentation by highdicom, of the type BINARY, FRACTIONAL or LABELMAP.

    Args:
        path: the file.
        series: the folder of the series, as `write_series` makes it.
        values: labels (column, row, slice), or masks or shares with the segment last.
        names: the label of each segment by its number.
        kind: the type.
        options: further arguments of highdicom.
    """
    sources = [dcmread(one.path) for one in choose_series(series).slices]
    sources.sort(key=lambda one: one.InstanceNumber)
    made_by = highdicom.AlgorithmIdentificationSequence(
        name="test", family=codes.DCM.ArtificialIntelligence, version="1"
    )
    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.MorphologicallyAbnormalStructure,
            segmented_property_type=codes.SCT.Lesion,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.AUTOMATIC,
            algorithm_identification=made_by,
        )
        for number, name in names.items()
    ]
    made = highdicom.seg.Segmentation(
        source_images=sources,
        pixel_array=np.moveaxis(values, (2, 1, 0), (0, 1, 2)),
        segmentation_type=kind,
        segment_descriptions=described,
        series_instance_uid=generate_uid(),
        series_number=2,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="test",
        manufacturer_model_name="test",
        software_versions="1",
        device_serial_number="1",
        **options,
    )
    made.save_as(path)
