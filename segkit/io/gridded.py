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
    """Voxel values and their grid.

    `data` is (x, y, z) or (x, y, z, channel) in the file's own axis order; `grid` gives the
    position of its first three axes, in mm. `header` is the NIfTI header of the file, if it had
    one: results on the same grid get its codes and units. `picture` holds the facts about a
    picture, such as its unit.

    Raises:
        ValueError: the shape of the data is not that of the grid.

    Example:
        scan = segkit.read_volume("scan.nii.gz")
        brighter = scan.like(2 * scan.data)  # on the same grid
        segkit.write_volume("brighter.nii.gz", brighter)
    """

    data: ndarray
    grid: Grid
    header: Nifti1Header | None = None
    picture: PictureFacts | None = None

    def __post_init__(self) -> None:
        if self.data.shape[:3] != self.grid.shape:
            raise ValueError(
                f"expected data of the grid's shape {self.grid.shape}, found {self.data.shape}"
            )

    def like(self, data: ndarray) -> "Volume":
        """A volume of other values on the same grid, with the same codes and units.

        Args:
            data: (x, y, z) or (x, y, z, channel), with the grid's shape.
        """
        return replace(self, data=data)

    def on(self, grid: Grid, data: ndarray) -> "Volume":
        """A volume of values on another grid in the same world, such as a coarser one.

        Args:
            grid: the other grid.
            data: (x, y, z) or (x, y, z, channel), with the shape of that grid.
        """
        return Volume(data, grid, self.header, self.picture)

    def sized_as(self, other: "Volume") -> "Volume":
        """The same volume; it takes the pixel size of another picture if only that is known.

        Args:
            other: the other volume.
        """
        known = other.picture is not None and other.picture.sized
        return self.measured_as(other) if known else self

    def measured_as(self, other: "Volume") -> "Volume":
        """The same volume, measured as another picture: both in pixels, or both in mm.

        If only the other has a pixel size, the volume takes it. If only this volume has one, it is
        dropped. Programs write a resolution into labels that their images do not have.

        Args:
            other: the other volume.
        """
        grid, facts = with_size_of(self.grid, self.picture, other.grid, other.picture)
        return replace(self, grid=grid, picture=facts)

    @property
    def unit(self) -> Unit:
        """The unit in which its lengths are printed: 'mm', 'µm' or 'pixel'."""
        return self.picture.unit if self.picture else "mm"

    @property
    def is_flat(self) -> bool:
        """Whether it is a picture of one slice, which has an area instead of a volume."""
        return self.picture is not None and self.grid.shape[2] == 1

    def onto(self, grid: Grid, *, what: str, whose: str) -> "Volume":
        """The same voxels in the axis order of another grid that has the same voxels.

        Two files may store the axes of a scan in different orders or directions, and their headers
        may differ by rounding (`Grid.agrees_with`). No voxel is interpolated.

        Args:
            grid: grid of the other volume.
            what: name of this volume, for the error.
            whose: name of the other volume, for the error.

        Raises:
            VolumeError: the grids have different voxels; the error names the differences.
        """
        return self.on(grid, turn_onto(self.grid, grid, what=what, whose=whose).turn(self.data))


def turn_onto(one: Grid, other: Grid, *, what: str, whose: str) -> Orientation:
    """The orientation that turns one grid into the other; see `Volume.onto`.

    Raises VolumeError if the grids have different voxels.
    """
    turn = Orientation.between(one, other)
    if difference := turn.turn_grid(one).difference_from(other):
        raise VolumeError(
            f"{what} lies on another grid than {whose}: {difference}; resample one onto the other"
        )
    return turn
