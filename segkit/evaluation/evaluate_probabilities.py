"""Probabilities beside predictions, held against references: `segkit evaluate --probabilities`."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from segkit.config.labels import Labelling
from segkit.data.label_numbers import within
from segkit.errors import ConfigError, VolumeError
from segkit.evaluation.calibration import Calibration
from segkit.io.picture_rules import PictureRules
from segkit.io.volume import AS_IT_SAYS, SUFFIXES, is_picture, read_labels, read_volume, stem_of
from segkit.system.progress import Track, untracked


def calibrate_pairs(
    pairs: Iterable[tuple[str, Path | None, Path]],
    labelling: Labelling | None,
    *,
    rules: PictureRules = AS_IT_SAYS,
    unlabelled: Mapping[str, Collection[str]] = MappingProxyType({}),
    track: Track = untracked,
) -> Calibration:
    """How well probabilities hold what they say, over all cases that have a prediction.

    Args:
        pairs: of each case its name, its prediction and its reference.
        labelling: what the probabilities are of, in their order.
        rules: how labels in pictures are read.
        unlabelled: by the name of a case, the classes that nobody labelled in it.
        track: may show the progress over cases.

    Raises:
        ConfigError: nothing says what the probabilities are of.
        VolumeError: a file of probabilities is missing, lies on another grid, or has not as many
            probabilities as there are classes or regions.
    """
    if labelling is None:
        raise ConfigError(
            "probabilities need the names of labels, in their order; give a dataset, or a "
            "dataset.json by --labels"
        )
    members = labelling.members
    if not labelling.regions:
        members = {next(iter(labelling.numbers)): (0,), **members}
    calibration = Calibration(members, bool(labelling.regions), labelling.ignore)
    pairs = [(name, path, reference) for name, path, reference in pairs if path is not None]
    for name, prediction, reference_path in track(pairs, "calibration", len(pairs)):
        path, reference = find_probabilities(prediction), read_labels(reference_path, rules=rules)
        found = read_volume(path, rules=rules if is_picture(path) else AS_IT_SAYS)
        found = found.onto(reference.grid, what=f"{path}:", whose=str(reference_path))
        data = found.data if found.data.ndim > reference.data.ndim else found.data[..., None]
        try:
            calibration.add(name, data, within(reference.data, labelling), unlabelled.get(name, ()))
        except ValueError as error:
            raise VolumeError(f"{path}: {error}") from None
    return calibration


def find_probabilities(prediction: Path) -> Path:
    """The file of probabilities beside a prediction: `a_prob.nii.gz` beside `a_seg.nii.gz`.

    Raises VolumeError if there is none.
    """
    whole = stem_of(prediction)
    stem = whole.removesuffix("_seg")
    for name in dict.fromkeys((whole, stem)):
        for suffix in SUFFIXES:
            path = prediction.with_name(f"{name}_prob{suffix}")
            if path.is_file():
                return path
    raise VolumeError(
        f"{prediction}: has no {stem}_prob beside it; predict with --probabilities, or evaluate "
        f"without"
    )
