"""A 2D network that takes volumes. All slices of a patch form one batch."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.grid import Placement
from segkit.nn.external import ExternalNetwork
from segkit.nn.map_tap import MapInfo
from segkit.nn.unet import Supervised, UNet


class SlicewiseNetwork(nn.Module):
    """Logits of every class at every voxel, from a 2D network that sees one slice at a time.

    Args:
        network: a 2D network.
        axis: the spatial axis across the slices (0, 1 or 2).
    """

    def __init__(self, network: UNet | ExternalNetwork, *, axis: int) -> None:
        super().__init__()
        self.network = network
        self.axis = axis
        stride = list(network.total_stride)
        stride.insert(axis, 1)
        self.total_stride = tuple(stride)

    def maps(self) -> dict[str, MapInfo]:
        """The network's maps by key. Across the slices, each cell is one voxel."""
        return {
            key: replace(info, placement=info.placement and self._in_volume(info.placement))
            for key, info in self.network.maps().items()
        }

    def forward(self, image: Float[Tensor, "batch in_channel x y z"]) -> Tensor:
        """Logits on the image's grid."""
        return self.stack_slices(self.network(self.split_slices(image)), image.shape[0])

    def classified(
        self, image: Float[Tensor, "batch in_channel x y z"]
    ) -> tuple[Float[Tensor, "batch out_channel x y z"], Float[Tensor, "batch classes"]]:
        """Logits, and logits of each class's presence, the maximum over slices."""
        logits, presence = self.network.classified(self.split_slices(image))
        batch_size = image.shape[0]
        return self.stack_slices(logits, batch_size), self._any_slice(presence, batch_size)

    def supervised(self, image: Float[Tensor, "batch in_channel x y z"]) -> Supervised:
        """The outputs that are trained, for volumes."""
        levels, presence = self.network.supervised(self.split_slices(image))
        return Supervised(
            tuple(self.stack_slices(level, image.shape[0]) for level in levels),
            None if presence is None else self._any_slice(presence, image.shape[0]),
        )

    def split_slices(self, image: Float[Tensor, "batch channel x y z"]) -> Tensor:
        """All slices of a batch of volumes, one after another: (slices, channel, rows, columns)."""
        return image.movedim(self.axis + 2, 1).flatten(0, 1)

    def stack_slices(
        self, slices: Float[Tensor, "slices channel *cells"], batch_size: int
    ) -> Float[Tensor, "batch channel ..."]:
        """Outputs of all slices of `batch_size` volumes, put together as volumes again."""
        # Neither `unflatten` here nor `len` above: while torch traces, the batch must stay a
        # variable.
        volumes = slices.reshape(batch_size, -1, *slices.shape[1:])
        return volumes.movedim(1, self.axis + 2)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Position of the features of each level. Across the slices, each cell is one voxel."""
        return tuple(self._in_volume(placement) for placement in self.network.placements)

    @property
    def presence(self) -> nn.Module | None:
        """The network's presence head, if it has one."""
        return self.network.presence

    def _any_slice(self, presence: Tensor, batch_size: int) -> Tensor:
        return presence.reshape(batch_size, -1, presence.shape[1]).amax(dim=1)

    def _in_volume(self, placement: Placement) -> Placement:
        stride, offset = list(placement.stride), list(placement.offset)
        stride.insert(self.axis, 1.0)
        offset.insert(self.axis, 0.0)
        return Placement(tuple(stride), tuple(offset))
