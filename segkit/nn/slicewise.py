"""A 2D network that takes volumes: each slice on its own, all slices of a patch as one batch."""

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from segkit.geometry.grid import Placement
from segkit.nn.external import Given
from segkit.nn.map_tap import MapInfo
from segkit.nn.unet import Supervised, UNet


class SlicewiseNetwork(nn.Module):
    """Logits of every class at every voxel, from a network that sees one plane at a time.

    `axis` is the spatial axis across the planes (0, 1 or 2).
    """

    def __init__(self, network: UNet | Given, *, axis: int) -> None:
        super().__init__()
        self.network = network
        self.axis = axis
        stride = list(network.total_stride)
        stride.insert(axis, 1)
        self.total_stride = tuple(stride)

    def maps(self) -> dict[str, MapInfo]:
        """The network's maps; across the planes, cells are voxels."""
        return {
            key: replace(info, placement=info.placement and self._in_volume(info.placement))
            for key, info in self.network.maps().items()
        }

    def forward(self, image: Float[Tensor, "batch in_channel x y z"]) -> Tensor:
        """Logits on the image's grid."""
        return self.stack(self.network(self.planes(image)), image.shape[0])

    def classified(
        self, image: Float[Tensor, "batch in_channel x y z"]
    ) -> tuple[Float[Tensor, "batch out_channel x y z"], Float[Tensor, "batch classes"]]:
        """Logits, and logits of each class's presence: what any plane holds, the volume holds."""
        logits, presence = self.network.classified(self.planes(image))
        return self.stack(logits, image.shape[0]), self._any_plane(presence, image.shape[0])

    def supervised(self, image: Float[Tensor, "batch in_channel x y z"]) -> Supervised:
        """What is trained, of volumes."""
        levels, presence = self.network.supervised(self.planes(image))
        return Supervised(
            tuple(self.stack(level, image.shape[0]) for level in levels),
            None if presence is None else self._any_plane(presence, image.shape[0]),
        )

    def planes(self, image: Float[Tensor, "batch channel x y z"]) -> Tensor:
        """All planes of a batch of volumes, one after another: (planes, channel, rows, columns)."""
        return image.movedim(self.axis + 2, 1).flatten(0, 1)

    def stack(
        self, planes: Float[Tensor, "planes channel *cells"], batch_size: int
    ) -> Float[Tensor, "batch channel ..."]:
        """Outputs of the planes of each of `batch_size` volumes, put back beside one another."""
        # Not `unflatten`, and above no `len`: while torch traces, the batch must stay a variable.
        volumes = planes.reshape(batch_size, -1, *planes.shape[1:])
        return volumes.movedim(1, self.axis + 2)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where the features of each level lie; across the planes, cells are voxels."""
        return tuple(self._in_volume(placement) for placement in self.network.placements)

    @property
    def presence(self) -> nn.Module | None:
        """The network's presence head, if it has one."""
        return self.network.presence

    def _any_plane(self, presence: Tensor, batch_size: int) -> Tensor:
        return presence.reshape(batch_size, -1, presence.shape[1]).amax(dim=1)

    def _in_volume(self, placement: Placement) -> Placement:
        stride, offset = list(placement.stride), list(placement.offset)
        stride.insert(self.axis, 1.0)
        offset.insert(self.axis, 0.0)
        return Placement(tuple(stride), tuple(offset))
