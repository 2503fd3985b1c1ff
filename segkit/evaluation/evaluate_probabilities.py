"""`segkit evaluate --probabilities`: compare predicted probabilities with references."""

import itertools
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from segkit.config.labels import Labelling
from segkit.data.label_numbers import within
from segkit.errors import ConfigError, VolumeError
from segkit.evaluation.calibration import Calibration
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import AS_IT_SAYS, read_labels, read_volume
from segkit.io.volume_names import SUFFIXES, is_picture, numbers_suffix, stem_of, suffix_of
from segkit.system.progress import Track, untracked


def calibrate_pairs(
    pairs: Iterable[tuple[str, Path | None, Path]],
    labelling: Labelling | None,
    *,
    rules: PictureRules = AS_IT_SAYS,
    images: Mapping[str, Path] = MappingProxyType({}),
    unlabelled: Mapping[str, Collection[str]] = MappingProxyType({}),
    track: Track = untracked,
) -> Calibration:
    """The calibration of probabilities, over all cases that have a prediction.

    Args:
        pairs: name, prediction and reference of each case.
        labelling: the classes or regions, in the order of the probabilities.
        rules: how labels in pictures are read.
        images: for the name of a case, the image on whose grid its DICOM structures are painted.
        unlabelled: for the name of a case, the classes that nobody labelled in it.
        track: reports the progress over cases.

    Raises:
        ConfigError: if `labelling` is None.
        VolumeError: if a file of probabilities is missing, lies on another grid, or has more or
            fewer probabilities than there are classes or regions.
    """
    if labelling is None:
        raise ConfigError(
            "probabilities need the names of the labels in order, but no file has them; give a "
            "dataset, or a dataset.json with --labels"
        )
    members = labelling.members
    if not labelling.regions:
        members = {next(iter(labelling.numbers)): (0,), **members}
    calibration = Calibration(members, bool(labelling.regions), labelling.ignore)
    pairs = [(name, path, reference) for name, path, reference in pairs if path is not None]
    for name, prediction, reference_path in track(pairs, "calibration", len(pairs)):
        path = find_probabilities(prediction)
        reference = read_labels(reference_path, rules=rules.painting_on(images.get(name)))
        found = read_volume(path, rules=rules if is_picture(path) else AS_IT_SAYS)
        # Only one of two pictures may state the pixel size that both have.
        reference = reference.sized_as(found)
        found = found.sized_as(reference).onto(
            reference.grid, what=f"{path}:", whose=str(reference_path)
        )
        data = found.data if found.data.ndim > reference.data.ndim else found.data[..., None]
        try:
            calibration.add(name, data, within(reference.data, labelling), unlabelled.get(name, ()))
        except ValueError as error:
            raise VolumeError(f"{path}: {error}") from None
    return calibration


def find_probabilities(prediction: Path) -> Path:
    """The file of probabilities beside a prediction, such as `a_prob.nii.gz` for `a_seg.nii.gz`.

    In BIDS derivatives it is `…_probseg.nii.gz` for `…_dseg.nii.gz`.

    Raises:
        VolumeError: if there is none.
    """
    whole = stem_of(prediction)
    stem = whole.removesuffix("_seg")
    names = [f"{whole}_prob", f"{stem}_prob"]
    if whole.endswith("_dseg"):
        names.append(f"{whole.removesuffix('_dseg')}_probseg")
    # The prediction's own suffix may be in upper case.
    suffixes = (numbers_suffix(suffix_of(prediction)), *SUFFIXES)
    for name, suffix in itertools.product(dict.fromkeys(names), dict.fromkeys(suffixes)):
        path = prediction.with_name(f"{name}{suffix}")
        if path.is_file():
            return path
    raise VolumeError(
        f"{prediction}: expected a file {stem}_prob beside it, found none; predict with "
        f"--probabilities, or evaluate without"
    )
