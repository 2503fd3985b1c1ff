"""A network of the user's own, in the form that training and prediction need."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from segkit.errors import ModelError, printable
from segkit.geometry.grid import Placement
from segkit.nn.map_tap import MapInfo, maps_of
from segkit.nn.unet import Supervised


class ExternalNetwork(nn.Module):
    """Logits of every class at every voxel, from any PyTorch module that computes them.

    Such a network has no deep supervision and no presence head. It has attention maps only if the
    module contains attention of segkit and has called `place_taps` on it.

    Args:
        module: maps (batch, channel, *space) to logits (batch, out_channel, *space).
        out_channels: the number of channels that the logits must have.
        multiple: along each axis, the size of the input must be a multiple of this.

    Raises:
        ModelError: the module's state holds anything but tensors.
    """

    def __init__(self, module: nn.Module, *, out_channels: int, multiple: Sequence[int]) -> None:
        super().__init__()
        if odd := [name for name, part in module.state_dict().items() if not _is_tensor(part)]:
            raise ModelError(
                f"{type(module).__name__} keeps {odd[0]} in its state, which is not a tensor and "
                f"cannot be saved; pass a module whose state holds only tensors"
            )
        self.module = module
        self.out_channels = out_channels
        self.total_stride = tuple(multiple)

    def maps(self) -> dict[str, MapInfo]:
        """Kind and position of each attention map, by key; most modules have no maps."""
        return maps_of(self)

    def forward(
        self, image: Float[Tensor, "batch in_channel *space"]
    ) -> Float[Tensor, "batch out_channel *space"]:
        """Logits on the image's grid. Raises ModelError if the module returns anything else."""
        logits = self.module(image)
        if not _is_tensor(logits):
            raise ModelError(
                f"expected a tensor of logits from {type(self.module).__name__}, found a "
                f"{type(logits).__name__}; pass a module that returns only the logits of its "
                f"finest level"
            )
        # While torch traces, sizes are tensors.
        found = tuple(int(size) for size in logits.shape[1:])
        expected = (self.out_channels, *(int(size) for size in image.shape[2:]))
        if found != expected:
            raise ModelError(
                f"expected logits {expected} from {type(self.module).__name__} for a window of "
                f"{tuple(int(size) for size in image.shape[1:])}, found {found}; pass a module "
                f"that returns one channel for each class, on the window's own grid"
            )
        checked: Tensor = logits
        return checked

    def classified(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Raises ValueError, because there is no presence head."""
        raise ValueError("the network has no presence head; use a U-Net that has one")

    def supervised(self, image: Float[Tensor, "batch in_channel *space"]) -> Supervised:
        """The outputs that are trained: only the logits."""
        return Supervised((self(image),), None)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Position of the input's grid, the only one that is known."""
        return (Placement.identity(len(self.total_stride)),)

    @property
    def presence(self) -> nn.Module | None:
        """None, because there is no presence head."""
        return None


def try_out(network: nn.Module, image: Tensor, *, in_bfloat16: bool = False) -> None:
    """Run a network once, and raise ModelError if it does not compute logits of the image.

    Args:
        network: a network; it does not change, and neither do the running means of its
            normalisation.
        image: an input (batch, channel, *space).
        in_bfloat16: whether it is also run in mixed precision, as in training.
    """
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: a module may keep tensors that it computes
            network(image)
            if in_bfloat16:
                _try_in_bfloat16(network, image)
    finally:
        for part, mode in modes.items():
            part.training = mode


def _try_in_bfloat16(network: nn.Module, image: Tensor) -> None:
    """Run a network once in mixed precision. Raises ModelError if it cannot."""
    try:
        with torch.autocast(image.device.type, dtype=torch.bfloat16):
            network(image)
    except RuntimeError as error:
        name = type(getattr(network, "module", network)).__name__
        raise ModelError(
            f"{name} computes logits in single precision, but in bfloat16, in which this device "
            f"trains faster, it fails ({printable(str(error))}); set trainer.precision=32-true"
        ) from error


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)
