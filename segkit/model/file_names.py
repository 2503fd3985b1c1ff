"""Names of the files in model folders, runs and cross-validations.

runs/<name>/config.yaml   split.json   summary.json   model/model.json   model/weights.safetensors
"""

DESCRIPTION = "model.json"
WEIGHTS = "weights.safetensors"
FIRST = "first"
"""The folder in a model folder with the models of its first stage."""
CONFIG = "config.yaml"
SPLIT = "split.json"
"""The file with the names of the training cases and the held-out cases."""
SUMMARY = "summary.json"
"""The file of a finished run, or of a finished cross-validation, beside its models."""
FOLD = "fold_"
"""Prefix of the name of each fold's run in the folder of a cross-validation."""
FOLDS = "cross_validation.json"
"""The file from which a stopped cross-validation continues."""
SUMS = "SHA256SUMS"
"""The list of the SHA-256 of each file of a model that was shared, as `sha256sum` prints it."""
