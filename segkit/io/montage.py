"""A picture of volumes side by side: one column each, one row for each plane."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy import ndarray

from segkit.errors import SegkitError
from segkit.geometry.grid import Grid, Orientation
from segkit.io.atomic import whole
from segkit.io.colours import LABEL_COLOURS

PLANES = ("sagittal", "coronal", "axial")
Panel = tuple[str, ndarray | None, Literal["labels", "map"]]


def write_montage(
    path: Path,
    scan: ndarray,
    grid: Grid,
    panels: Sequence[Panel],
    *,
    label_names: Mapping[int, str],
    through: ndarray | None = None,
) -> None:
    """Draw the scan's three middle planes, under each panel's title and overlay.

    `through` is what they are the middle of, such as labels, if not of what the scan holds.

    An overlay is a label map, of which each label has a colour and 0 none, or an attention map,
    whose colours span percentiles 1 to 99 of what is not 0, as its scale says. Planes are shown to
    radiologists' custom: the patient's right is on the left.

    Raises SegkitError where matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
        from matplotlib.patheffects import withStroke
    except ImportError:
        raise SegkitError("a montage needs matplotlib; run pip install 'segkit[report]'") from None
    orientation = Orientation.of(grid.affine)
    turned_grid = orientation.turn_grid(grid)
    turned = orientation.turn(scan)
    middle = _middle(turned if through is None or not through.any() else orientation.turn(through))
    low, high = np.percentile(turned[turned != 0], [0.5, 99.5]) if turned.any() else (0.0, 1.0)
    width = 2.3 * len(panels)
    figure = Figure(figsize=(width, 7.4), facecolor="black", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, len(panels), squeeze=False)
    colours = ListedColormap(LABEL_COLOURS)
    edge = withStroke(linewidth=2, foreground="black")
    for column, (title, overlay, kind) in enumerate(panels):
        turned_overlay = None if overlay is None else orientation.turn(overlay)
        image: Any = None
        for row, plane in enumerate(PLANES):
            axis = axes[row][column]
            axis.set_axis_off()
            if row == 0:
                axis.set_title(title, color="white", fontsize=11)
            background, aspect = _slice(turned, turned_grid, row, middle[row])
            axis.imshow(background, cmap="gray", vmin=low, vmax=high, aspect=aspect)
            if turned_overlay is None:
                if column == 0:
                    name = axis.text(0.02, 0.94, plane, color="white", fontsize=8)
                    name.set(transform=axis.transAxes, path_effects=[edge])
                continue
            values, _ = _slice(turned_overlay, turned_grid, row, middle[row])
            if kind == "labels":
                shown = np.ma.masked_equal(values, 0)
                wrapped = (shown - 1) % len(LABEL_COLOURS)
                axis.imshow(
                    wrapped,
                    cmap=colours,
                    vmin=-0.5,
                    vmax=len(LABEL_COLOURS) - 0.5,
                    alpha=0.55,
                    interpolation="nearest",
                    aspect=aspect,
                )
            else:
                said = turned_overlay[turned_overlay != 0]
                lowest, highest = np.percentile(said, [1, 99]) if said.size else (0.0, 1.0)
                image = axis.imshow(
                    np.ma.masked_equal(values, 0),
                    cmap="inferno",
                    vmin=lowest,
                    vmax=highest,
                    alpha=0.8,
                    aspect=aspect,
                )
        if image is not None:
            bar = figure.colorbar(image, ax=axes[2][column], orientation="horizontal", shrink=0.8)
            bar.set_label("share let through", color="white", fontsize=8)
            bar.ax.tick_params(colors="white", labelsize=8)
    patches = [
        Patch(color=LABEL_COLOURS[(number - 1) % len(LABEL_COLOURS)], label=name)
        for number, name in label_names.items()
        if number
    ]
    figure.legend(
        handles=patches, loc="outside lower left", labelcolor="white", frameon=False, fontsize=9
    )
    with whole(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def _middle(scan: ndarray) -> list[int]:
    """The middle of what is not zero along each axis."""
    if not scan.any():
        return [size // 2 for size in scan.shape]
    found = np.nonzero(scan)
    return [int(indices.min() + indices.max()) // 2 for indices in found]


def _slice(values: ndarray, grid: Grid, axis: int, index: int) -> tuple[ndarray, float]:
    """A plane as on a light box, and its pixels' aspect."""
    across, up = [other for other in range(3) if other != axis]
    aspect = grid.spacing[up] / grid.spacing[across]
    return on_light_box(np.take(values, index, axis=axis)), aspect


def on_light_box(plane: ndarray) -> ndarray:
    """A plane of RAS+ axes as a picture: head or front up, the patient's right on the left."""
    return plane.T[::-1, ::-1]
