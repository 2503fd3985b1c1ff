"""A volume: voxel values and the grid that they lie on, whatever file they came from."""

from dataclasses import dataclass, replace

from nibabel.nifti1 import Nifti1Header
from numpy import ndarray

from segkit.errors import VolumeError
from segkit.geometry.grid import Grid, Orientation
from segkit.io.picture_rules import PictureFacts, Unit
from segkit.io.raster import with_size_of


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxel values and where they lie.

    `data` is (x, y, z) or (x, y, z, channel) in the file's own axis order; `grid` places its first
    three axes. `header` is the NIfTI header it was read with, which keeps codes and units for
    whatever is written on the same grid; `picture` is what is known of a picture beside its pixels.
    """

    data: ndarray
    grid: Grid
    header: Nifti1Header | None = None
    picture: PictureFacts | None = None

    def __post_init__(self) -> None:
        if self.data.shape[:3] != self.grid.shape:
            raise ValueError(f"data of shape {self.data.shape} on a grid of {self.grid.shape}")

    def like(self, data: ndarray) -> "Volume":
        """Other values on the same grid, with the same codes and units."""
        return replace(self, data=data)

    def on(self, grid: Grid, data: ndarray) -> "Volume":
        """Values on another grid of the same world, such as a coarser one."""
        return Volume(data, grid, self.header, self.picture)

    def sized_as(self, other: "Volume") -> "Volume":
        """The same pixels, at the pixel size of another picture if only that one's is known."""
        grid, facts = with_size_of(self.grid, self.picture, other.grid, other.picture)
        return replace(self, grid=grid, picture=facts)

    @property
    def unit(self) -> Unit:
        """The unit that lengths on its grid, in mm, are told in: 'mm', 'µm', or 'pixel'."""
        return self.picture.unit if self.picture else "mm"

    @property
    def is_flat(self) -> bool:
        """Whether it is a picture of one slice, which has an area and no volume."""
        return self.picture is not None and self.grid.shape[2] == 1

    def onto(self, grid: Grid, *, what: str, whose: str) -> "Volume":
        """The same voxels on a grid that holds them too, in the order that it has them in.

        A file may store the axes of a scan in another order or direction than another, and their
        headers may differ by rounding (`Grid.agrees_with`). No voxel is interpolated.

        Args:
            grid: of another volume.
            what: this volume, for the error.
            whose: the other volume, for the error.

        Raises:
            VolumeError: the grids hold different voxels; it says in what they differ.
        """
        return self.on(grid, turn_onto(self.grid, grid, what=what, whose=whose).turn(self.data))


def turn_onto(one: Grid, other: Grid, *, what: str, whose: str) -> Orientation:
    """The order and directions of one grid's axes in which it is the other; see `Volume.onto`.

    Raises VolumeError if it is none.
    """
    turn = Orientation.between(one, other)
    if difference := turn.turn_grid(one).difference_from(other):
        raise VolumeError(
            f"{what} lies on another grid than {whose}: {difference}; resample one onto the other"
        )
    return turn
