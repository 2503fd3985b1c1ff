"""Run as a program: segments a volume of SLICES with CLASSES classes, and prints its peak memory.

python tests/peak_memory.py FOLDER CLASSES SLICES

Pages of mapped files do not count: the system takes them back when it needs memory. Some kernels
map 2 MB around each page that is touched, so that these pages say little about the program.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event, Thread

import numpy as np
import torch
from torch import Tensor

from segkit.config.data import CtWindowConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.geometry.grid import Grid
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import Volume, write_volume
from segkit.model.folder import Model
from segkit.nn.unet import UNet

SIDE = 48


class NearestClass(UNet):
    """Logits that are largest for the class whose number is nearest to the voxel's value."""

    def forward(self, image: Tensor) -> Tensor:
        classes = torch.arange(self.heads[0].out_channels, device=image.device)
        return (image - classes.view(1, -1, 1, 1, 1)).abs().neg()


def own_memory() -> int:
    """Bytes of this process that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


@contextmanager
def watched(every: float = 0.002) -> Iterator[list[int]]:
    """A list that gets the largest own memory seen, in bytes, when the block ends."""
    found, peak, ended = list[int](), [0], Event()

    def watch() -> None:
        while not ended.wait(every):
            peak[0] = max(peak[0], own_memory())

    thread = Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()
        found.append(peak[0])


def main(folder: Path, classes: int, slices: int) -> None:
    grid = Grid((SIDE, SIDE, slices), np.eye(4))
    rows = np.arange(slices, dtype=np.int16) % classes
    values = np.broadcast_to(rows, grid.shape)
    write_volume(folder / "scan.nii", Volume(values, grid))
    told = ModelDescription(
        segkit="test",
        run="test",
        channels=["CT"],
        labels={f"label {number}": number for number in range(classes)},
        network=NetworkConfig(channels=[2, 2, 2]),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[CtWindowConfig(lower=-1e6, upper=1e6, mean=0.0, std=1.0)],
        slices="axial",
        patch_size=[16, 16, 16],
    )
    network = NearestClass(3, 1, out_channels=classes, channels=(2, 2, 2))
    predictor = Predictor(Model(told, network), device="cpu", overlap=0.25)
    with watched() as peak:
        (outcome,) = predict_files(
            predictor, find_inputs([folder / "scan.nii"], 1), probabilities=True, uncertainty=True
        )
    assert outcome.error is None, outcome.error
    print(*peak)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
