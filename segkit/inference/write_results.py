"""Writing of the results of one volume, the labels first."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from segkit.config.model import ModelDescription
from segkit.data.label_numbers import within
from segkit.errors import SegkitError, counted
from segkit.inference.dicom_seg import write_dicom_segmentation
from segkit.inference.label_statistics import label_statistics
from segkit.inference.map_files import write_maps
from segkit.inference.predictor import Prediction
from segkit.inference.result_files import Outcome, Targets, is_dicom_name, sidecar_of
from segkit.io.atomic import mark_finished, mark_unfinished, write_json
from segkit.io.inputs import Input, failure, series_of
from segkit.io.pictures import PAGES, PLANES, label_colour, write_montage
from segkit.io.volume import Volume, write_volume


def write_results(
    source: Input,
    targets: Targets,
    prediction: Prediction,
    image: Volume,
    description: ModelDescription,
    made: Mapping[str, Any],
) -> Outcome:
    """Write the results of one volume. Raises an error only if the labels cannot be written.

    Args:
        source: the input.
        targets: the paths of the results.
        prediction: the results.
        image: the volume of the input.
        description: the description of the model.
        made: the provenance, for each JSON file.

    Returns:
        The files that were written, and an error if one that is not the labels was not.
    """
    mark_unfinished(targets.labels, targets.all)
    labels = prediction.labels
    # Labels are written first, so that they exist even if another result fails.
    write_json(sidecar_of(targets.labels), {**_told_of_labels(description), **made})
    if is_dicom_name(targets.labels):
        write_dicom_segmentation(
            targets.labels,
            labels,
            series_of(source),
            description.labelling,
            codes=description.codes,
            algorithm=description.run,
        )
    else:
        write_volume(targets.labels, labels)
    written = [targets.labels]
    failures = []
    for part in _others(source, targets, prediction, image, description, made):
        try:
            written += part()
        except (SegkitError, OSError) as error:
            failures.append(failure(source, error))
    written.append(sidecar_of(targets.labels))
    if failures:  # left marked as unfinished, so that the next run writes the rest
        more = f" (and {counted(len(failures) - 1, 'more result')})" if len(failures) > 1 else ""
        reason = f"{failures[0]}{more}; its labels are written: {targets.labels}"
        return Outcome(source, tuple(written), reason, prediction.presence)
    mark_finished(targets.labels)
    return Outcome(source, tuple(written), presence=prediction.presence)


def _told_of_labels(description: ModelDescription) -> dict[str, Any]:
    """Number in the file, colour and, if the model has one, coded concept of each label."""
    labelling = description.labelling
    numbers = labelling.numbers_in_files
    named = {name: description.codes[name] for name in numbers if name in description.codes}
    return {
        "labels": numbers,
        "colours": {name: label_colour(numbers[name]) for name in labelling.members},
        "codes": {name: code.model_dump(mode="json") for name, code in named.items()},
    }


def _others(
    source: Input,
    targets: Targets,
    prediction: Prediction,
    image: Volume,
    description: ModelDescription,
    made: Mapping[str, Any],
) -> list[Callable[[], Sequence[Path]]]:
    """Functions that write each requested result except the labels, and return its files.

    Args:
        source: the input.
        targets: the paths of its results.
        prediction: the prediction.
        image: the volume that was segmented.
        description: description of the first model.
        made: provenance.
    """
    labels, labelling = prediction.labels, description.labelling

    def write_values(path: Path, volume: Volume) -> Sequence[Path]:
        write_volume(path, volume)
        write_json(sidecar_of(path), made)
        return path, sidecar_of(path)

    def write_presence(path: Path) -> Sequence[Path]:
        write_json(path, {"presence": prediction.presence, **made})
        return (path,)

    def write_statistics(path: Path) -> Sequence[Path]:
        figures = label_statistics(labels, image, labelling, description.channels)
        write_json(path, {"case": source.name, **figures, **made})
        return (path,)

    def write_preview(path: Path) -> Sequence[Path]:
        shown = within(labels.data, labelling)  # numbered so that 0 is the background
        write_montage(
            path,
            image.data if image.data.ndim == 3 else image.data[..., 0],
            image.grid,
            [(source.name, None, "labels"), ("segmentation", shown, "labels")],
            label_names={
                number: name
                for name, number in labelling.numbers.items()
                if (shown == number).any()
            },
            through=shown,
            planes=PAGES if image.picture else PLANES,
        )
        return (path,)

    parts: list[Callable[[], Sequence[Path]]] = []
    for path, volume in (
        (targets.probabilities, prediction.probabilities),
        (targets.entropy, prediction.entropy),
        (targets.variance, prediction.variance),
    ):
        if path is not None and volume is not None:
            parts.append(partial(write_values, path, volume))
    if targets.presence is not None and prediction.presence is not None:
        parts.append(partial(write_presence, targets.presence))
    if targets.statistics is not None:
        parts.append(partial(write_statistics, targets.statistics))
    if targets.figures is not None:
        folder = targets.figures.parent
        parts.append(
            partial(write_maps, folder, source.file_name, prediction.maps, image, made=made)
        )
    if targets.preview is not None:
        parts.append(partial(write_preview, targets.preview))
    return parts
