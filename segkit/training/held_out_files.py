"""Predictions of held-out cases, kept in the run's folder if that is asked for."""

from pathlib import Path

from segkit.data.dataset import CaseFiles
from segkit.inference.predictor import Prediction
from segkit.io.disk_arrays import Allocate, OnDisk, in_memory
from segkit.io.volume import write_volume
from segkit.io.volume_names import WRITTEN_PICTURES, WRITTEN_SUFFIXES, numbers_suffix, result_suffix

HELD_OUT = "held_out"
"""The folder of a run with predictions of its held-out cases."""


class HeldOutFiles:
    """Writes `CASE_seg` and, if asked, `CASE_prob`, named and made as `segkit predict` does.

    Args:
        folder: the folder of the run.
        keep: `labels`, or `probabilities` to write both.
    """

    def __init__(self, folder: Path, keep: str) -> None:
        self.folder = folder / HELD_OUT
        self.probabilities = keep == "probabilities"

    @property
    def allocate(self) -> Allocate:
        """Makes the arrays of probabilities."""
        return OnDisk(self.folder) if self.probabilities else in_memory

    def write(self, case: CaseFiles, prediction: Prediction) -> None:
        """Write the results that are kept of a case."""
        suffix = result_suffix(case.images[0])
        if not suffix.lower().endswith((*WRITTEN_SUFFIXES, *WRITTEN_PICTURES)):
            suffix = ".nii.gz"
        write_volume(self.folder / f"{case.file_name}_seg{suffix}", prediction.labels)
        if self.probabilities and prediction.probabilities is not None:
            path = self.folder / f"{case.file_name}_prob{numbers_suffix(suffix)}"
            write_volume(path, prediction.probabilities)
