"""`segkit check`: describe a config, a dataset or a volume as segkit reads it."""

from collections.abc import Sequence
from pathlib import Path

from segkit.checking.check_config import check_config
from segkit.checking.check_dataset import check_dataset
from segkit.checking.describe_series import describe_series, describe_tree
from segkit.checking.describe_volume import describe_volume
from segkit.checking.understood import Understood
from segkit.config.dataset_files import TABLE_SUFFIXES
from segkit.config.load import dataset_in
from segkit.evaluation.evaluate import with_pixel_size
from segkit.io.dicom_listing import find_folders, holds_series
from segkit.io.inputs import refuse_volumes_beside_series
from segkit.io.series_rules import SeriesRule
from segkit.io.volume import AS_IT_SAYS, read_volume
from segkit.system.progress import Track, untracked


def check(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    series: str | SeriesRule | None = None,
    pixel_size: Sequence[str] | None = None,
    cache: str | Path | None = None,
    track: Track = untracked,
) -> Understood:
    """Description of a config (.yaml), a dataset folder, DICOM series or a volume.

    Args:
        path: the file or folder to describe.
        overrides: changes to a config, such as "train.steps=500".
        series: the UID of a DICOM series in the folder, or a rule for the series in the folder and
            below it. If None, the only series of the folder is described; several are listed.
        pixel_size: pixel size of a picture, such as ["4 nm"]; it replaces the file's own.
        cache: the folder in which the facts of a large dataset's cases are stored, so that a check
            that was stopped can continue. If None, nothing is stored.
        track: shows the progress over cases.

    Returns:
        The description, as text and as plain data.

    Raises:
        SegkitError: the config, the dataset or the file is wrong; the error names the place.

    Example:
        print(segkit.check("my_dataset"))
    """
    path = Path(path)
    if isinstance(series, str):
        return describe_series(path, series)
    if series is not None or (path.is_dir() and not _is_dataset(path) and _has_series(path)):
        if series is None and holds_series(path):
            refuse_volumes_beside_series(path)
            return describe_series(path, None)
        return describe_tree(path, series or SeriesRule())
    if path.is_dir() or path.suffix.lower() in (".yaml", ".yml", *TABLE_SUFFIXES):
        dataset = dataset_in(path, overrides)
        if dataset is None:
            return check_config(path, overrides, track)
        return check_dataset(dataset, track, cache=None if cache is None else Path(cache))
    rules = with_pixel_size(AS_IT_SAYS, pixel_size)
    return describe_volume(path, read_volume(path, rules=rules))


def _is_dataset(folder: Path) -> bool:
    return (folder / "dataset.json").exists()


def _has_series(folder: Path) -> bool:
    """Whether DICOM images lie in a folder, to any depth."""
    return any(holds_series(inner) for inner in find_folders(folder))
