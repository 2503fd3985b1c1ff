"""Trains by the config.yaml of runs, and predicts by their models, with other defaults in the code.

python -m tests.training.changed_defaults SCAN RUNS OUT
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from segkit.config.base import Section
from segkit.config.load import load_config
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_volume, write_volume
from segkit.training import resolve
from segkit.training.fit import train

KEPT = ("kind", "format")
"""Fields that have one legal value alone."""


class Another(str):
    """A default that is none of those before, and that no training survives using."""


def sections(base: type[Section] = Section) -> Iterator[type[Section]]:
    """Every group of settings, in the order of their definitions."""
    for section in base.__subclasses__():
        yield section
        yield from sections(section)


def change_every_default() -> None:
    """Have every setting without a value come out as `Another`, and the tables of rates absurd."""
    for section in sections():
        for name, setting in section.model_fields.items():
            if not setting.is_required() and name not in KEPT:
                setting.default = Another("another")
        section.model_rebuild(force=True)
    for table in (resolve.LEARNING_RATE, resolve.WEIGHT_DECAY):
        table.update(dict.fromkeys(table, 1e9))


def module() -> nn.Module:
    """A network that Python gives."""
    torch.manual_seed(0)
    return nn.Conv3d(1, 2, 3, padding=1)


def main(scan: Path, runs: Path, out: Path) -> None:
    """Train each run again into `out`, and label the scan by the model of the first training."""
    change_every_default()
    for config in sorted(runs.glob("*/config.yaml")):
        settings = load_config(config)
        given = module() if settings.network.given else None
        labels = Predictor.load(config.parent, network=given, device="cpu")(
            read_volume(scan)
        ).labels
        run = train(settings, runs=out, network=module() if given else None)
        write_volume(run.folder / "labels.nii.gz", labels)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
