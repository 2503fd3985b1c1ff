"""Error rates of the rule in docs/verdicts.md, on gates with a known verdict.

    python benchmarks/verdicts.py OUT.json [--only NAME …] [--dims 2 3] [--seeds 20] [--table]

The gallery has small networks in 2D and 3D with planted gates: gates whose weights are set by hand.
A network uses its gate for the segmentation or ignores it. The images show a structure at random
places. For each of 20 seeds, the rule judges 1, 3, 8, 12 and 20 scans, each set within the next.
The evidence of a scan is measured once. Gates without random weights share a pool of scans, from
which each seed draws 20; so their seeds are not independent. Gates with random weights have new
scans for each seed. The mean map for deletion is that of up to eight earlier scans of the pool.

Results are written gate by gate. Run the command again to continue after a stop. `--table` prints
the content of OUT.json as Markdown.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from segkit.config.data import CtWindowConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.explain.verdicts.evidence import CaseEvidence, gather_evidence
from segkit.explain.verdicts.rule import GateVerdict, judge_evidence
from segkit.geometry.grid import Grid, Placement
from segkit.inference.predictor import Predictor
from segkit.io.atomic import write_json
from segkit.io.volume import Volume
from segkit.model.folder import Model
from segkit.nn.map_tap import MapTap
from segkit.nn.network import SegmentationNetwork
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet

COUNTS = (1, 3, 8, 12, 20)
POOL = 30
EARLIER = 8
SHAPES = {2: (24, 24, 4), 3: (16, 16, 16)}
PATCHES = {2: (24, 24, 1), 3: (16, 16, 16)}
AS_IT_IS = CtWindowConfig(lower=-1e6, upper=1e6, mean=0.0, std=1.0)
AVERAGE: dict[int, Callable[..., Tensor]] = {4: F.avg_pool2d, 5: F.avg_pool3d}
MAXIMUM: dict[int, Callable[..., Tensor]] = {4: F.max_pool2d, 5: F.max_pool3d}
CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
Segment = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""A function from an image and its gates, on the image's grid, to the logits of each structure."""
MakeCase = Callable[[np.random.Generator, tuple[int, ...]], tuple[list[ndarray], ndarray]]
"""A function from a generator and a shape to the channels of an image, and its labels."""


@dataclass(frozen=True)
class Gate:
    """Definition of a planted gate: the sigmoid of a convolution, or of its magnitude."""

    plant: Callable[[nn.Module], None] | None
    """Sets the weights; None leaves them random."""
    kernel: int = 2
    stride: int = 2
    maps: int = 1
    edges: bool = False
    """Whether the gate is the magnitude of several convolutions, such as a gradient."""
    placed: bool = False
    """Whether the gate has a fixed value for each cell of the window, for every image."""
    features: Callable[[Tensor], Tensor] | None = None
    """A fixed function from the image to features on its grid. The gate then comes from their means
    over a cell instead of from the image's channels."""
    num_features: int = 0


@dataclass(frozen=True)
class Planted:
    """A network with its images, and the correct verdicts on its gate."""

    name: str
    gates: Sequence[Gate]
    segment: Segment
    case: MakeCase
    channels: int
    right: tuple[str, ...]
    useful: bool = False
    target: int = 0
    """Index of the gate that is judged."""
    structure: str = "one"
    classes: int = 1
    random: bool = False
    """Whether each seed has a different gate."""
    directions: tuple[str, ...] = field(default=("lets through",))


class PlantedNet(UNet):
    """The network of a planted gate. If it is untrained, its gates have random weights."""

    def __init__(self, planted: Planted, dims: int, *, trained: bool) -> None:
        super().__init__(dims, planted.channels, out_channels=planted.classes + 1, channels=(2, 2))
        self.planted, self.dims = planted, dims
        self.looks, self.taps = nn.ModuleList(), nn.ModuleList()
        for level, gate in enumerate(planted.gates):
            look: nn.Module = Position(PATCHES[dims][:dims], gate.stride)
            if not gate.placed:
                look = CONV[dims](
                    gate.num_features or planted.channels,
                    dims if gate.edges else gate.maps,
                    kernel_size=gate.kernel,
                    stride=gate.stride,
                    padding=(gate.kernel - gate.stride) // 2,
                    padding_mode="replicate" if gate.kernel > gate.stride else "zeros",
                )
            if trained and gate.plant is not None:
                with torch.no_grad():
                    gate.plant(look)
            tap = MapTap("gate", stride=(gate.stride,) * dims)
            tap.place(f"skip.{level}", level, Placement.identity(dims))
            self.looks.append(look)
            self.taps.append(tap)

    def forward(self, image: Tensor) -> Tensor:
        """Background and foreground logits."""
        gates = []
        for gate, look, tap in zip(self.planted.gates, self.looks, self.taps, strict=True):
            raw = look(image if gate.features is None else gate.features(image))
            if gate.edges:
                raw = (raw**2).sum(dim=1, keepdim=True).sqrt() - 1
            gates.append(F.interpolate(tap(torch.sigmoid(raw)), size=image.shape[2:]))
        foreground = self.planted.segment(image, gates)
        return torch.cat([torch.zeros_like(foreground[:, :1]), foreground], dim=1)


class Position(nn.Module):
    """A fixed value for each cell of a window, for every image."""

    def __init__(self, patch: Sequence[int], stride: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.randn([size // stride for size in patch]))

    def forward(self, image: Tensor) -> Tensor:
        """The values for each image of the batch."""
        return self.values.expand(len(image), 1, *self.values.shape)


# Weights.


def of_channels(*weights: float, bias: float) -> Callable[[nn.Module], None]:
    """Weights of a gate that is a weighted sum of the channels' means over a cell."""

    def plant(look: nn.Module) -> None:
        assert isinstance(look, nn.Conv2d | nn.Conv3d)
        cells = look.weight[0, 0].numel()
        look.weight.zero_()
        for channel, weight in enumerate(weights):
            look.weight[0, channel] = weight / cells
        assert look.bias is not None
        look.bias.fill_(bias)

    return plant


def pair(look: nn.Module) -> None:
    """Weights of two gates; the second is 1 minus the first."""
    assert isinstance(look, nn.Conv2d | nn.Conv3d) and look.bias is not None
    of_channels(20.0, -20.0, bias=-10.0)(look)
    look.weight[1], look.bias[1] = -look.weight[0], -look.bias[0]


def blur(sigma: float) -> Callable[[nn.Module], None]:
    """Weights of a Gaussian filter of the image."""

    def plant(look: nn.Module) -> None:
        assert isinstance(look, nn.Conv2d | nn.Conv3d) and look.bias is not None
        size = look.kernel_size[0]
        line = torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / sigma) ** 2)
        kernel = line
        for _ in look.kernel_size[1:]:
            kernel = kernel[..., None] * line
        look.weight.copy_((10 * kernel / kernel.sum()).expand_as(look.weight))
        look.bias.fill_(-3.0)

    return plant


def slopes(look: nn.Module) -> None:
    """Weights of central differences along each axis."""
    assert isinstance(look, nn.Conv2d | nn.Conv3d) and look.bias is not None
    look.weight.zero_()
    look.bias.zero_()
    for axis in range(len(look.kernel_size)):
        middle = [look.kernel_size[0] // 2] * len(look.kernel_size)
        for step in (-1, 1):
            place = list(middle)
            place[axis] += step
            look.weight[(axis, 0, *place)] = step


def middle(look: nn.Module) -> None:
    """Values that are high in the middle of the window."""
    assert isinstance(look, Position)
    axes = [torch.linspace(-1, 1, size) for size in look.values.shape]
    squares = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))
    look.values.copy_(3 - 8 * torch.as_tensor(squares))


# Images.


def block(random: np.random.Generator, shape: tuple[int, ...], spread: int = 99) -> ndarray:
    """A block of whole cells of 4 voxels at a random place; in 2D it extends through all slices."""
    inside = np.zeros(shape, bool)
    dims = 3 if shape[2] > 4 else 2
    low = []
    for size in shape[:dims]:
        room, centre = size - 4 * 2, (size - 4) // 2
        first = random.integers(max(0, centre - spread), min(room, centre + spread) + 1)
        low.append(int(first) // 2 * 2)
    long = int(random.integers(0, dims))
    box = tuple(slice(first, first + (8 if axis == long else 4)) for axis, first in enumerate(low))
    inside[box] = True
    return inside


def hidden(
    random: np.random.Generator, inside: ndarray, noise: float = 0.05
) -> tuple[ndarray, ndarray]:
    """Two channels with the same strong noise, whose difference shows the structure."""
    shared = random.normal(0, 2, inside.shape)
    return inside + shared + random.normal(0, noise, inside.shape), shared


def hidden_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A structure in the difference of two channels, and a channel of noise."""
    inside = block(random, shape)
    return [*hidden(random, inside, 0.25), random.normal(0, 1, shape)], inside


def blurred_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """The same with more noise, so that Dice is below 1."""
    inside = block(random, shape)
    return [*hidden(random, inside, 0.5), random.normal(0, 1, shape)], inside


def middling_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A structure in the difference of two channels, never far from the middle."""
    inside = block(random, shape, spread=3)
    return [*hidden(random, inside, 0.5)], inside


def seen_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel with the structure and noise."""
    inside = block(random, shape)
    return [inside + random.normal(0, 0.4, shape)], inside


def two_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """Two structures, each in the difference of two channels."""
    first = block(random, shape)
    second = block(random, shape) & ~first
    return [*hidden(random, first), *hidden(random, second)], first + 2 * second


def twice_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One structure in the differences of two pairs of channels."""
    inside = block(random, shape)
    return [*hidden(random, inside), *hidden(random, inside)], inside


def half_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One structure in two pairs of channels in half of the scans, and in one pair in the rest."""
    inside = block(random, shape)
    again = inside if random.random() < 0.5 else np.zeros_like(inside)
    return [*hidden(random, inside), *hidden(random, again)], inside


def textured_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel, in which the structure differs only by the strength of noise."""
    inside = block(random, shape)
    return [random.normal(0, 1, shape) * (1 + inside)], inside


def sloping_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel with the structure on a strong slope of random direction."""
    inside = block(random, shape)
    direction = random.normal(0, 1, 3)
    places = np.indices(shape) / np.reshape(shape, (3, 1, 1, 1)) - 0.5
    slope = np.tensordot(direction / np.linalg.norm(direction), places, 1)
    return [inside + 6 * slope + random.normal(0, 0.3, shape)], inside


def spotted_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel, in which a third of the structure's voxels are bright."""
    inside = block(random, shape)
    return [3 * inside * (random.random(shape) < 0.3) + random.normal(0, 1, shape)], inside


def between_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel with the structure's intensity between those of two surroundings."""
    inside = block(random, shape)
    field_of_noise = gaussian_filter(random.normal(0, 1, shape), 2, mode="wrap")
    around = np.where(field_of_noise > 0, 2.0, 0.0)
    return [np.where(inside, 1.0, around) + random.normal(0, 0.3, shape)], inside


# Functions of the image that need no training.


def averaged(image: Tensor, width: int) -> Tensor:
    """The mean in a window around each voxel."""
    return AVERAGE[image.ndim](padded(image, width), width, stride=1)


def padded(image: Tensor, width: int) -> Tensor:
    """The image, continued at its borders."""
    return F.pad(image, [width // 2] * (2 * (image.ndim - 2)), mode="replicate")


def functions(image: Tensor) -> Tensor:
    """Local deviation, contrast with the surroundings, maximum, and distance from 1."""
    image = image[:, :1]
    variance = averaged(image**2, 3) - averaged(image, 3) ** 2
    return torch.cat(
        [
            variance.clamp(min=1e-6).sqrt(),
            averaged(image, 3) - averaged(image, 9),
            MAXIMUM[image.ndim](padded(image, 3), 3, stride=1),
            (image - 1).abs(),
        ],
        dim=1,
    )


def placed(image: Tensor) -> Tensor:
    """The image, and the image multiplied by a bump in the middle of the window."""
    axes = [torch.linspace(-1, 1, size) for size in image.shape[2:]]
    bump = torch.exp(-3 * torch.as_tensor(sum(a**2 for a in torch.meshgrid(*axes, indexing="ij"))))
    return torch.cat([image, image * bump], dim=1)


# Segmentations.


def by_gate(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the gate only."""
    return 10 * (gates[0] - 0.5)


def by_low_gate(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the gate's low values."""
    return 10 * (0.5 - gates[0])


def by_pair(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the difference of two gates."""
    return 10 * (gates[0][:, :1] - gates[0][:, 1:])


def by_second(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the second gate."""
    return 10 * (gates[1] - 0.5)


def difference(image: Tensor, first: int = 0) -> Tensor:
    """The difference of two channels, which is 0.5 in the structure and -0.5 elsewhere."""
    return image[:, first : first + 1] - image[:, first + 1 : first + 2] - 0.5


def beside(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the image; the gate changes no label."""
    return 10 * difference(image) * (1 + gates[0])


def jittered(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the image; the gate shifts the threshold slightly."""
    return 10 * difference(image) + 3 * (gates[0] - 0.5)


def of_two(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment one structure with the gate, the other with the image."""
    return torch.cat([10 * (gates[0] - 0.5), 10 * difference(image, 2)], dim=1)


def by_either(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the gate or two other channels, whichever is higher."""
    return 10 * torch.maximum(gates[0] - 0.5, difference(image, 2))


def without(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with other channels; their logits are so high that the gate changes no label."""
    return 10 * difference(image, 2) + 2 * (gates[0] - 0.5)


def damped(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the image multiplied by the gate."""
    return 10 * (difference(image) + 0.5) * gates[0] - 3


def for_the_other(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment one structure with the image. The gate, which shows it, must be low for the other."""
    return torch.cat([10 * difference(image), 10 * difference(image, 2) - 200 * gates[0]], dim=1)


def above(threshold: float) -> Segment:
    """Segment with the gate above a threshold."""
    return lambda image, gates: 10 * (gates[0] - threshold)


MASK = Gate(of_channels(20.0, -20.0, bias=-10.0))
FUNCTIONS: dict[str, Any] = {"features": functions, "num_features": 4}
SURE, NO = ("informative",), ("uninformative", "cannot tell")
GALLERY = [
    Planted("mask", [MASK], by_gate, hidden_case, 3, SURE, useful=True),
    Planted(
        "inverted mask",
        [Gate(of_channels(-20.0, 20.0, bias=10.0))],
        by_low_gate,
        hidden_case,
        3,
        SURE,
        useful=True,
        directions=("shuts out",),
    ),
    Planted(
        "complementary pair",
        [Gate(pair, maps=2)],
        by_pair,
        hidden_case,
        3,
        SURE,
        useful=True,
        directions=("lets through", "shuts out"),
    ),
    Planted("one structure of two", [MASK], of_two, two_case, 4, SURE, useful=True, classes=2),
    Planted(
        "one of two levels",
        [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0)), MASK],
        by_second,
        hidden_case,
        3,
        SURE,
        useful=True,
        target=1,
    ),
    Planted(
        "matters in half of scans",
        [MASK],
        by_either,
        half_case,
        4,
        ("informative", "cannot tell"),
        useful=True,
    ),
    Planted(
        "mask that is done without", [MASK], without, twice_case, 4, ("redundant",), useful=True
    ),
    Planted("noise", [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0))], beside, hidden_case, 3, NO),
    Planted("jitter", [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0))], jittered, blurred_case, 3, NO),
    Planted("constant", [Gate(of_channels(bias=1.0))], beside, hidden_case, 3, NO),
    Planted(
        "intensity, stride 1",
        [Gate(of_channels(5.0, bias=-2.5), kernel=1, stride=1)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "intensity, stride 4",
        [Gate(of_channels(8.0, bias=-4.0), kernel=4, stride=4)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "inverted intensity", [Gate(of_channels(-8.0, bias=4.0))], by_low_gate, seen_case, 1, NO
    ),
    Planted(
        "blur of 1.2 voxels", [Gate(blur(1.2), kernel=7, stride=1)], above(0.5), seen_case, 1, NO
    ),
    Planted(
        "blur of 2.5 voxels", [Gate(blur(2.5), kernel=13, stride=1)], above(0.3), seen_case, 1, NO
    ),
    Planted(
        "gradient",
        [Gate(slopes, kernel=3, stride=1, edges=True)],
        above(0.5),
        seen_case,
        1,
        NO,
    ),
    Planted(
        "local deviation",
        [Gate(of_channels(5.0, bias=-7.0), **FUNCTIONS)],
        by_gate,
        textured_case,
        1,
        NO,
    ),
    Planted(
        "contrast",
        [Gate(of_channels(0.0, 10.0, bias=-4.0), kernel=1, stride=1, **FUNCTIONS)],
        by_gate,
        sloping_case,
        1,
        NO,
    ),
    Planted(
        "maximum",
        [Gate(of_channels(0.0, 0.0, 4.0, bias=-11.0), **FUNCTIONS)],
        by_gate,
        spotted_case,
        1,
        NO,
    ),
    Planted(
        "band of intensities",
        [Gate(of_channels(0.0, 0.0, 0.0, -10.0, bias=5.0), **FUNCTIONS)],
        by_gate,
        between_case,
        1,
        NO,
    ),
    Planted(
        "place times intensity",
        [Gate(of_channels(0.0, 12.0, bias=-6.0), features=placed, num_features=2)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "mask of another structure",
        [MASK],
        for_the_other,
        two_case,
        4,
        ("redundant", "cannot tell"),
        classes=2,
    ),
    Planted("always the middle", [Gate(middle, placed=True)], damped, middling_case, 2, NO),
    Planted("untrained", [Gate(None)], jittered, blurred_case, 3, NO, random=True),
]


def predictor_of(planted: Planted, dims: int, seed: int) -> Predictor:
    """A predictor with the planted network."""
    names = ["background", "one", "two"][: planted.classes + 1]
    described = ModelDescription(
        segkit="benchmark",
        run=planted.name,
        channels=[f"channel {number}" for number in range(planted.channels)],
        labels={name: number for number, name in enumerate(names)},
        network=NetworkConfig(channels=[2, 2], spatial_dims=dims),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[AS_IT_IS] * planted.channels,
        slices="axial",
        patch_size=list(PATCHES[dims][:dims]),
    )
    network = network_of(planted.name, dims, seed, trained=True)
    return Predictor(Model(described, network), device="cpu", engine="torch")


@lru_cache(maxsize=64)
def network_of(name: str, dims: int, seed: int, *, trained: bool) -> SegmentationNetwork:
    """The planted network, or the same architecture with random gates."""
    (planted,) = [one for one in GALLERY if one.name == name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlantedNet(planted, dims, trained=trained).eval()
    return network if dims == 3 else SlicewiseNetwork(network, axis=2).eval()


def evidence_of(planted: Planted, dims: int, count: int, seed: int) -> list[CaseEvidence]:
    """The evidence of `count` scans with the network of a seed."""
    predictor = predictor_of(planted, dims, 1000 + seed)
    found: list[CaseEvidence] = []
    for number in range(count):
        random = np.random.default_rng((seed, number, dims))
        channels, labels = planted.case(random, SHAPES[dims])
        volume = Volume(
            np.stack(channels, axis=-1).astype(np.float32), Grid(SHAPES[dims], np.eye(4))
        )
        if planted.channels == 1:
            volume = volume.like(volume.data[..., 0])
        prediction = predictor(volume, maps=True)
        found.append(
            gather_evidence(
                predictor,
                volume,
                volume.like(labels.astype(np.uint8)),
                prediction.maps,
                labels=prediction.labels,
                case=f"{number}",
                earlier=found[:EARLIER],
                untrained=lambda draw: network_of(planted.name, dims, draw, trained=False),
            )
        )
    return found


def word_of(planted: Planted, verdicts: Sequence[GateVerdict]) -> str:
    """The verdict on the gate; marked if it is for the wrong structure or direction."""
    verdict = next(one for one in verdicts if one.map == f"skip.{planted.target}/gate")
    word = str(verdict.word)
    right = verdict.structure in (planted.structure, "foreground")
    if planted.useful and word in SURE and not (right and verdict.direction in planted.directions):
        return f"{word} of something else"
    return word


def judged(planted: Planted, dims: int, seeds: int) -> dict[str, dict[str, int]]:
    """For each number of scans, the number of seeds with each verdict."""
    most = max(COUNTS)
    words: dict[int, Counter[str]] = {count: Counter() for count in COUNTS}
    pool = [] if planted.random else evidence_of(planted, dims, POOL, 0)
    for seed in range(seeds):
        drawn = evidence_of(planted, dims, most, seed) if planted.random else pool
        order = np.random.default_rng((seed, dims, 7)).permutation(len(drawn))[:most]
        for count in COUNTS:
            verdicts = judge_evidence([drawn[place] for place in order[:count]])
            words[count][word_of(planted, verdicts)] += 1
    return {str(count): dict(found) for count, found in words.items()}


def table(results: dict[str, Any]) -> list[str]:
    """A Markdown table with the number of seeds for each verdict."""
    columns = ["gate", "dims", "right", *(f"{count} scans" for count in COUNTS)]
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    for planted in GALLERY:
        for dims in (2, 3):
            found = results.get(f"{planted.name}, {dims}D")
            if found is None:
                continue
            cells = [
                ", ".join(
                    f"{short(word)} {number}"
                    for word, number in sorted(found["words"][str(count)].items())
                )
                for count in COUNTS
            ]
            right = " or ".join(short(word) for word in planted.right)
            lines.append(f"| {planted.name} | {dims} | {right} | {' | '.join(cells)} |")
    return lines


def short(word: str) -> str:
    """A letter for each verdict."""
    return {"informative": "I", "redundant": "R", "uninformative": "U", "cannot tell": "?"}.get(
        word, word
    )


def main() -> None:
    """Judge the gallery gate by gate, and write each result at once."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--only", nargs="+", default=[one.name for one in GALLERY])
    parser.add_argument("--dims", nargs="+", type=int, default=[2, 3])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    results = json.loads(options.out.read_text()) if options.out.exists() else {}
    if options.table:
        print("\n".join(table(results)))
        return
    for planted in GALLERY:
        for dims in options.dims:
            name = f"{planted.name}, {dims}D"
            if planted.name not in options.only or name in results:
                continue
            started = time.perf_counter()
            words = judged(planted, dims, options.seeds)
            seconds = round(time.perf_counter() - started, 1)
            # Another run may have written results in the meantime.
            results = json.loads(options.out.read_text()) if options.out.exists() else {}
            results[name] = {"words": words, "seeds": options.seeds, "seconds": seconds}
            write_json(options.out, results)
            print(name, words, f"{seconds} s", flush=True)


if __name__ == "__main__":
    main()
