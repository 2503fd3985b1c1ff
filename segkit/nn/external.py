"""A network that somebody else made, in the form that training and prediction ask for."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError
from segkit.geometry.grid import Placement
from segkit.nn.map_tap import MapInfo, maps_of
from segkit.nn.unet import Supervised


class Given(nn.Module):
    """Logits of every class at every voxel, from any module that gives them.

    There is no deep supervision and no presence head. Of attention there are the maps of whatever
    segkit's own gates the module may hold, if it has placed them (`place_taps`).

    Args:
        module: from (batch, channel, cells …) to logits (batch, out_channel, cells …).
        out_channels: what it must give.
        multiple: what the sizes of its input must be multiples of, along each axis.
    """

    def __init__(self, module: nn.Module, *, out_channels: int, multiple: Sequence[int]) -> None:
        super().__init__()
        if odd := [name for name, part in module.state_dict().items() if not _is_tensor(part)]:
            raise ModelError(
                f"{type(module).__name__} keeps {odd[0]} in its state, which is no tensor and "
                f"cannot be saved; give a module whose state is tensors alone"
            )
        self.module = module
        self.out_channels = out_channels
        self.total_stride = tuple(multiple)

    def maps(self) -> dict[str, MapInfo]:
        """What each attention map is and where it lies, by key; most modules have none."""
        return maps_of(self)

    def forward(
        self, image: Float[Tensor, "batch in_channel *space"]
    ) -> Float[Tensor, "batch out_channel *space"]:
        """Logits on the image's grid. Raises ModelError where the module gives something else."""
        logits = self.module(image)
        if not _is_tensor(logits):
            raise ModelError(
                f"{type(self.module).__name__} gives a {type(logits).__name__}, expected a tensor "
                f"of logits; give a module that returns those of its finest level alone"
            )
        # While torch traces, sizes are tensors.
        found = tuple(int(size) for size in logits.shape[1:])
        expected = (self.out_channels, *(int(size) for size in image.shape[2:]))
        if found != expected:
            raise ModelError(
                f"{type(self.module).__name__} makes {found} of a window of "
                f"{tuple(int(size) for size in image.shape[1:])}, expected logits {expected}: one "
                f"channel for each class on the window's own grid; give a module that makes these"
            )
        checked: Tensor = logits
        return checked

    def classified(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """There is no presence head: raises ValueError."""
        raise ValueError("the network has no presence head")

    def supervised(self, image: Float[Tensor, "batch in_channel *space"]) -> Supervised:
        """What is trained: the logits."""
        return Supervised((self(image),), None)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where features lie that are known of: the input's own."""
        return (Placement.identity(len(self.total_stride)),)

    @property
    def presence(self) -> nn.Module | None:
        """None."""
        return None


def try_out(network: nn.Module, image: Tensor) -> None:
    """Raise ModelError where a module that was given makes no logits of an image.

    The module stays as it is, running means of its normalisation included.
    """
    modes = {part: part.training for part in network.modules()}
    network.eval()
    with torch.no_grad():  # not inference_mode: a module may keep what it makes
        network(image)
    for part, mode in modes.items():
        part.training = mode


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
