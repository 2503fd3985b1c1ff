"""Networks with planted gates: gates whose weights are set by hand.

The networks are tiny, in 2D and 3D. A network uses its gate for the segmentation or ignores it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.planted_images import MakeCase
from segkit.geometry.grid import Placement
from segkit.nn.map_tap import MapTap
from segkit.nn.unet import UNet

SHAPES = {2: (24, 24, 4), 3: (16, 16, 16)}
PATCHES = {2: (24, 24, 1), 3: (16, 16, 16)}
CONV: dict[int, type[nn.Conv2d] | type[nn.Conv3d]] = {2: nn.Conv2d, 3: nn.Conv3d}
Segment = Callable[[Tensor, Sequence[Tensor]], Tensor]
"""A function from an image and its gates, on the image's grid, to the logits of each structure."""


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


def _hill(shape: Sequence[int], first: float, last: float) -> torch.Tensor:
    """Values that fall with the squared distance from the origin of axes from `first` to `last`."""
    axes = [torch.linspace(first, last, size) for size in shape]
    squares = sum(axis**2 for axis in torch.meshgrid(*axes, indexing="ij"))
    return 3 - 8 * torch.as_tensor(squares)


def middle(look: nn.Module) -> None:
    """Values that are high in the middle of the window."""
    assert isinstance(look, Position)
    look.values.copy_(_hill(look.values.shape, -1, 1))


def chessboard(look: nn.Module) -> None:
    """Values that alternate from cell to cell."""
    assert isinstance(look, Position)
    places = torch.meshgrid(*[torch.arange(size) for size in look.values.shape], indexing="ij")
    look.values.copy_(torch.where(torch.stack(places).sum(dim=0) % 2 == 0, 3.0, -3.0))


def border(look: nn.Module) -> None:
    """Values that rise with the distance from the border of the window."""
    assert isinstance(look, Position)
    axes = [torch.linspace(-1, 1, size) for size in look.values.shape]
    away = [1 - axis.abs() for axis in torch.meshgrid(*axes, indexing="ij")]
    look.values.copy_(8 * torch.stack(away).amin(dim=0) - 1)


def beside_the_middle(look: nn.Module) -> None:
    """Values that are high beside the middle of the window."""
    assert isinstance(look, Position)
    look.values.copy_(_hill(look.values.shape, -1.35, 0.65))


def fixed_block(look: nn.Module) -> None:
    """Values that are high in the block of another scan."""
    assert isinstance(look, Position)
    look.values.fill_(-4.0)
    look.values[tuple(slice(3, 6) for _ in look.values.shape)] = 4.0


def pair_and_noise(look: nn.Module) -> None:
    """Weights of two complementary gates, and of a gate that copies the third channel."""
    assert isinstance(look, nn.Conv2d | nn.Conv3d) and look.bias is not None
    of_channels(20.0, -20.0, bias=-10.0)(look)
    look.weight[1], look.bias[1] = -look.weight[0], -look.bias[0]
    look.weight[2] = 0.0
    look.weight[2, 2], look.bias[2] = 2.0 / look.weight[0, 0].numel(), 0.0


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


def by_first_two(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the difference of the first two channels of the gate."""
    return 10 * (gates[0][:, :1] - gates[0][:, 1:2])


def by_both(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with the gate and two other channels, whichever is lower."""
    return 10 * torch.minimum(gates[0] - 0.5, difference(image, 2))


def by_any(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with two gates, whichever is higher."""
    return 10 * (torch.maximum(gates[0], gates[1]) - 0.5)


def of_two_low(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment one structure with the gate's low values, the other with the image."""
    return torch.cat([10 * (0.5 - gates[0]), 10 * difference(image, 2)], dim=1)


def of_two_shown(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment one structure with a gate that shows both, the other with the image."""
    other = difference(image, 2)
    return torch.cat([10 * (gates[0] - 0.5) - 40 * (other + 0.3).clamp(min=0), 10 * other], dim=1)


def harmed(image: Tensor, gates: Sequence[Tensor]) -> Tensor:
    """Segment with other channels; the gate hides a part of the structure."""
    return 10 * difference(image, 2) - 4 * gates[0]
