"""Files of the results of a prediction: their paths, and which may be written or are kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segkit.errors import SegkitError, VolumeError
from segkit.io.atomic import refuse_existing, remove_leftovers, unfinished_files
from segkit.io.dicom_headers import DICOM_SUFFIX
from segkit.io.file_names import tell_changed_names
from segkit.io.inputs import Input, failure
from segkit.io.volume_names import SUFFIXES, check_writable, stem_of, suffix_of
from segkit.provenance import check_asked, check_made_of


@dataclass(frozen=True)
class Outcome:
    """Result of one input: the files that were written, and an error if a result is missing."""

    input: Input
    written: tuple[Path, ...]
    error: str | None = None
    presence: Mapping[str, float] | None = None
    """Probability that the volume contains each class; None without a presence head."""
    kept: Path | None = None
    """The labels, if all results existed already and nothing was written."""

    def to_json(self) -> dict[str, Any]:
        """The result as plain dicts, lists and strings; the labels are first in `written`."""
        return {
            "input": [str(file) for file in self.input.files],
            "written": [str(file) for file in self.written],
            "kept": None if self.kept is None else str(self.kept),
            "error": self.error,
            "presence": None if self.presence is None else dict(self.presence),
        }


@dataclass(frozen=True)
class Targets:
    """Paths of the results of one input; None for each result that is not requested."""

    labels: Path
    probabilities: Path | None = None
    entropy: Path | None = None
    variance: Path | None = None
    presence: Path | None = None
    figures: Path | None = None
    """The JSON file of the attention maps; the maps are written beside it."""
    statistics: Path | None = None
    preview: Path | None = None

    @property
    def all(self) -> list[Path]:
        """The requested results, the labels first, and the sidecar files of the volumes."""
        requested = [path for path in vars(self).values() if path is not None]
        volumes = (self.labels, self.probabilities, self.entropy, self.variance)
        return [*requested, *(sidecar_of(path) for path in volumes if path is not None)]

    @property
    def sidecars(self) -> list[Path]:
        """The JSON files; each holds the provenance of itself or of the volume beside it."""
        return [path for path in self.all if path.suffix == ".json"]


def sidecar_of(volume: Path) -> Path:
    """The JSON file beside a result volume, which holds its provenance."""
    return volume.with_name(f"{_stem(volume)}.json")


def _stem(path: Path) -> str:
    return path.name[: -len(DICOM_SUFFIX)] if is_dicom_name(path) else stem_of(path)


def output_path(source: Input, *, out: Path | None, single: bool, as_dicom: bool = False) -> Path:
    """The path of the labels of an input.

    Args:
        source: the input.
        out: a file for the labels, or a folder, in which the labels get the name of the input, so
            that predictions pair with references. If not given, the labels go beside the input as
            `NAME_seg`.
        single: True if there is only one input.
        as_dicom: write a DICOM segmentation, which is possible only for a DICOM series. A name in
            .dcm means the same.

    Raises:
        VolumeError: the name does not fit.
    """
    suffix = DICOM_SUFFIX if as_dicom else source.suffix
    if out is None:
        path = source.folder / f"{source.file_name}_seg{suffix}"
    elif out.name.lower().endswith((*SUFFIXES, DICOM_SUFFIX)):
        if not single:
            raise VolumeError(
                f"{out}: one file cannot hold several predictions; pass a folder as --out"
            )
        path = out
    else:
        path = out / f"{source.file_name}{suffix}"
    if as_dicom and not is_dicom_name(path):
        raise VolumeError(
            f"{path}: expected a name ending in {DICOM_SUFFIX} for a DICOM segmentation; choose "
            "another --out, or a folder"
        )
    if is_dicom_name(path) and not source.is_series:
        raise VolumeError(
            f"{source.files[0]}: a DICOM segmentation needs a DICOM series as input, found another "
            "format; choose a NIfTI file or a folder as --out"
        )
    if not is_dicom_name(path):
        check_writable(path)
    return path


def is_dicom_name(path: Path) -> bool:
    """Whether a result with this name is a DICOM segmentation."""
    return path.name.lower().endswith(DICOM_SUFFIX)


def planned_results(
    inputs: Sequence[Input], targets_of: Callable[[Input], Targets]
) -> list[tuple[Input, Targets | Outcome]]:
    """Each input with the paths of its results, or with an error if two inputs share a path."""
    tell_changed_names(source.name for source in inputs)
    planned: list[tuple[Input, Targets | Outcome]] = []
    owners: dict[Path, Input] = {}
    for source in inputs:
        try:
            targets = targets_of(source)
            owner = owners.setdefault(sidecar_of(targets.labels.resolve()), source)
            if owner is not source:
                raise VolumeError(
                    f"{targets.labels}: would also be the prediction of {owner.files[0]}; give "
                    f"one of them another --out"
                )
            planned.append((source, targets))
        except VolumeError as error:
            planned.append((source, failed_outcome(source, error)))
    for folder in {plan.labels.parent for _, plan in planned if isinstance(plan, Targets)}:
        remove_leftovers(folder)
    return planned


def checked_results(
    source: Input,
    targets: Targets,
    inputs: set[Path],
    asked: Mapping[str, Any],
    *,
    out: Path | None,
    overwrite: bool,
) -> Targets | Outcome:
    """The targets; or the outcome, if the results exist already or must not be written.

    Args:
        source: the input.
        targets: the paths of its results.
        inputs: all input files, which must not be overwritten.
        asked: the models and the settings, from `models_and_settings`.
        out: the file or folder that the user named.
        overwrite: whether existing results are replaced.
    """
    stopped = targets.labels.absolute() in unfinished_files(targets.labels)
    kept = source.of_folder or targets.labels != out
    there = kept and not (overwrite or stopped) and all(path.exists() for path in targets.all)
    try:
        _refuse(source, targets, inputs, overwrite=overwrite or there)
        for sidecar in targets.sidecars if there else ():
            check_asked(targets.labels, sidecar, asked_for(source, asked))
        if there:
            check_made_of(targets.labels, targets.sidecars, source.files)
    except VolumeError as error:
        return failed_outcome(source, error)
    return Outcome(source, (), kept=targets.labels) if there else targets


def asked_for(source: Input, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Models and settings for one input, with the DICOM series, if one was named."""
    return {**asked, "series": source.series} if source.series else dict(asked)


def name_beside(source: Input, labels: Path) -> tuple[str, str]:
    """Stem and suffix of the other results, which are named after the labels."""
    stem, suffix = _stem(labels), source.suffix if is_dicom_name(labels) else suffix_of(labels)
    return stem if stem == source.file_name else stem.removesuffix("_seg"), suffix


def _refuse(source: Input, targets: Targets, inputs: set[Path], *, overwrite: bool) -> None:
    """Raise VolumeError if a result would overwrite a file that must stay."""
    for path in targets.all:
        if path.resolve() in inputs:
            which = "the" if path in source.files else "an"
            raise VolumeError(
                f"{path}: the prediction would overwrite {which} input; choose another --out"
            )
    left = unfinished_files(targets.labels)
    if not source.of_folder:
        refuse_existing(targets.all, overwrite=overwrite, left=left)
    elif targets.labels.absolute() in left:
        return
    elif targets.labels.exists() and not all(path.exists() for path in targets.all):
        refuse_existing([targets.labels], overwrite=overwrite)


def failed_outcome(source: Input, error: SegkitError | OSError) -> Outcome:
    """The outcome of an input of which nothing could be written."""
    return Outcome(source, (), failure(source, error))
