"""Settings of a split that other settings of the split turn off."""

from segkit.config.data import SplitDatasetConfig
from segkit.config.load import OF_SPLITS

SPLITS_FILE = "splits_final.json"
"""nnU-Net's file of folds, beside a dataset.json."""


def changed_split_settings(data: SplitDatasetConfig) -> list[str]:
    """Names of the settings of a split whose values are not the defaults."""
    fields = type(data).model_fields
    return [name for name in OF_SPLITS if getattr(data, name) != fields[name].default]


def unused_split_settings(data: SplitDatasetConfig) -> list[str]:
    """A sentence for each setting of a split, and for a splits_final.json, that is not used.

    Settings with their default values are left out, because the config of a run holds all settings.
    """
    beside = data.folder / SPLITS_FILE
    drawn_here = data.group_by is not None or data.stratify_by is not None
    reasons: dict[str, str] = {}
    sentences = []
    if data.splits is not None:
        reasons = dict.fromkeys(("validation", "num_folds", "stratify_by"), "data.splits has folds")
    elif data.fold is not None:
        reasons["validation"] = f"data.fold={data.fold} chooses the cases that are held out"
        if beside.is_file() and drawn_here:
            why = "data.group_by or data.stratify_by draws new folds"
            sentences.append(f"{beside} is not used, because {why}")
        elif beside.is_file():
            reasons["num_folds"] = f"{beside} has folds"
    else:
        reasons["num_folds"] = "only data.fold and --folds use folds"
        if isinstance(data.validation, list):
            reasons["stratify_by"] = "data.validation names the cases that are held out"
        elif not data.validation:
            reasons["stratify_by"] = "data.validation is 0"
        if beside.is_file():
            why = "only data.fold and --folds use its folds"
            sentences.append(f"{beside} is not used, because {why}")
    unused = [name for name in changed_split_settings(data) if name in reasons]
    return [*sentences, *(f"data.{name} is not used, because {reasons[name]}" for name in unused)]
