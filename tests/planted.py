"""Networks of which it is known what their gate is worth, and scans for them."""

from typing import Literal

import numpy as np
import torch
from numpy import ndarray
from torch import Tensor, nn

from segkit.explain.heads.study import ScoredVolume
from segkit.geometry.grid import Grid, Placement
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import Model
from segkit.nn.map_tap import MapTap
from segkit.nn.unet import UNet
from tests.models import description

Kind = Literal["mask", "noise", "constant", "untrained"]
KEY = "skip.0/gate"
# A ball is the first channel less the second; the third is noise that nothing else knows of.
GATES: dict[Kind, tuple[list[float], float]] = {
    "mask": ([20.0, -20.0, 0.0], -10.0),
    "noise": ([0.0, 0.0, 1.0], 0.0),
    "constant": ([0.0, 0.0, 0.0], 1.0),
}


class Planted(UNet):
    """A gate that is the mask and is all that the network segments by, or one that is noise or
    constant, and changes no label."""

    def __init__(self, kind: Kind) -> None:
        super().__init__(3, 3, out_channels=2, channels=(2, 2))
        self.kind = kind
        self.look = nn.Conv3d(3, 1, kernel_size=1)
        if kind in GATES:
            weights, bias = GATES[kind]
            with torch.no_grad():
                self.look.weight.copy_(torch.tensor(weights).view_as(self.look.weight))
                self.look.bias.fill_(bias)
        self.tap = MapTap("gate")
        self.tap.place("skip.0", 0, Placement.identity(3))

    def forward(self, image: Tensor) -> Tensor:
        gate = self.tap(torch.sigmoid(self.look(image)))
        if self.kind == "mask":
            logit = 10 * (gate - 0.5)
        else:
            logit = 10 * (image[:, :1] - image[:, 1:2] - 0.5) * (1 + gate)
        return torch.cat([-logit / 2, logit / 2], dim=1)


def planted(kind: Kind) -> Predictor:
    told = description(channels=3, classes=2, spacing=(1.0, 1.0, 1.0))
    return Predictor(Model(told, Planted(kind).eval()), device="cpu", engine="torch")


def ball(size: int = 8, radius: float = 2.6) -> ndarray:
    grid = Grid((size, size, size), np.eye(4))
    return np.linalg.norm(grid.centres() - (size - 1) / 2, axis=-1) < radius


def planted_case(seed: int = 0) -> ScoredVolume:
    """A ball that cannot be seen in one channel alone, but faintly in the first."""
    random = np.random.default_rng(seed)
    inside = ball()
    noise = random.normal(0, 2, inside.shape)
    channels = [inside + noise, noise, random.normal(0, 1, inside.shape)]
    volume = Volume(np.stack(channels, axis=-1).astype(np.float32), Grid((8, 8, 8), np.eye(4)))
    return ScoredVolume(f"case {seed}", volume, volume.like(inside.astype(np.uint8)))


def moved_case(seed: int = 0) -> ScoredVolume:
    """The same with a ball that lies elsewhere in each case, so that no other case shows it."""
    random = np.random.default_rng((seed, 1))
    centre = random.integers(2, 6, 3)
    inside = np.linalg.norm(np.indices((8, 8, 8)).T - centre, axis=-1).T < 2.1
    noise = random.normal(0, 2, inside.shape)
    channels = [inside + noise, noise, random.normal(0, 1, inside.shape)]
    volume = Volume(np.stack(channels, axis=-1).astype(np.float32), Grid((8, 8, 8), np.eye(4)))
    return ScoredVolume(f"case {seed}", volume, volume.like(inside.astype(np.uint8)))


def untrained_planted(seed: int) -> Planted:
    """The network with random gates."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Planted("untrained").eval()
