"""`segkit check`: what segkit understands of a config, a dataset or a volume."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from segkit.build import build_network
from segkit.cascade import described, first_models
from segkit.config_file import dump_yaml, load_config
from segkit.data.cases import read_case, read_dataset, split
from segkit.errors import SegkitError, VolumeError
from segkit.geometry import Orientation
from segkit.labelling import Labelling
from segkit.nifti import placement
from segkit.settle import Track, check_images, describe
from segkit.volume import Volume, read_volume, trouble_with


def check(
    path: Path, overrides: tuple[str, ...] = (), *, track: Track = lambda cases, what, count: cases
) -> str:
    """What was understood of a config (.yaml), a dataset folder or a volume, in lines.

    Raises SegkitError with what is wrong and where.
    """
    if path.suffix in (".yaml", ".yml"):
        return check_config(path, overrides, track)
    if path.is_dir():
        return check_dataset(path, track)
    return describe_volume(path, read_volume(path))


def check_config(path: Path, overrides: tuple[str, ...], track: Track) -> str:
    """The whole resolved config, and what its network and dataset come to."""
    config = load_config(path, overrides)
    dataset = read_dataset(config.data.folder)
    train, held_out = split(dataset, config.data.validation, config.train.seed)
    check_images(config, dataset, train, held_out)
    first_stage = first_models(config.data.first_stage or (), dataset)
    description = described(describe(config, dataset, train, track), first_stage)
    network = build_network(description)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    maps = ", ".join(network.maps()) or "none"
    return (
        f"{dump_yaml(config)}"
        f"# {len(train)} cases to train on, {len(held_out)} held out\n"
        f"# {_told_apart(dataset.labelling)}\n"
        f"# spacing {description.spacing} mm; normalisation "
        f"{[setting.model_dump() for setting in description.normalisation]}\n"
        f"# network: {parameters:,} parameters; attention maps: {maps}"
    )


def check_dataset(folder: Path, track: Track) -> str:
    """Every case read and held against dataset.json: sizes, spacings, voxels of each class.

    Raises DatasetError listing every case that is wrong.
    """
    dataset = read_dataset(folder)
    shapes, spacings, problems, orientations = [], [], [], set()
    labelling = dataset.labelling
    groups = _groups(labelling)
    voxels = np.zeros(len(groups), dtype=np.int64)
    present = np.zeros(len(groups), dtype=np.int64)
    total = 0
    for case in track(dataset.cases, "reading", len(dataset.cases)):
        try:
            image, label = read_case(case, dataset)
        except SegkitError as error:
            problems.append(error)
            continue
        orientation = Orientation.of(image.grid.affine)
        orientations.add(orientation.code)
        turned = orientation.turn_grid(image.grid)
        shapes.append(turned.shape)
        spacings.append(turned.spacing)
        held = np.bincount(label.data.ravel(order="K"), minlength=len(labelling.value_names))
        counts = np.array([held[list(numbers)].sum() for numbers in groups.values()])
        total += label.data.size
        voxels += counts
        present += counts > 0
    if problems:
        rest = f" (and {len(problems) - 1} more cases)" if len(problems) > 1 else ""
        raise type(problems[0])(f"{problems[0]}{rest}")
    lines = [
        f"{folder}: {len(dataset.cases)} cases, all readable and on their labels' grids",
        f"channels: {', '.join(dataset.channels)}",
        f"orientations: {', '.join(sorted(orientations))}",
        f"size in voxels (right-left, back-front, foot-head): {_range(shapes, 'd')}",
        f"voxel size in mm: {_range(spacings, '.3g')}",
    ]
    for what, cases, count in zip(groups, present, voxels, strict=True):
        lines.append(f"{what}: in {cases} cases, {count / total:.2%} of voxels")
    return "\n".join(lines)


def _groups(labelling: Labelling) -> dict[str, tuple[int, ...]]:
    """The numbers of each class, region, and of what is ignored, by what to call it."""
    groups: dict[str, tuple[int, ...]] = {}
    for name, number in labelling.numbers.items():
        if not labelling.regions:
            groups[f"label {number} {name}"] = (number,)
        elif name in labelling.regions:
            numbers = labelling.regions[name]
            groups[f"region {name} ({_listing(numbers)}, written as {number})"] = numbers
    if labelling.ignore is not None:
        groups[f"label {labelling.ignore} ignore, left out"] = (labelling.ignore,)
    return groups


def _listing(items: Iterable[object]) -> str:
    return ", ".join(str(item) for item in items)


def _told_apart(labelling: Labelling) -> str:
    if labelling.regions:
        return f"regions: {_listing(labelling.regions)}"
    return f"labels: {_listing(labelling.numbers)}"


def describe_volume(path: Path, volume: Volume) -> str:
    """Size, spacing, orientation, position, codes and intensities of a volume."""
    grid, data = volume.grid, volume.data
    if trouble := trouble_with(data):
        raise VolumeError(f"{path}: {trouble}")
    first = grid.affine[:3, 3]
    lines = [
        f"{path}: {' x '.join(str(size) for size in grid.shape)} voxels of "
        f"{' x '.join(f'{size:.3g}' for size in grid.spacing)} mm, {data.dtype}, "
        f"{data.shape[3] if data.ndim == 4 else 1} channel(s)",
        f"axes run to {Orientation.of(grid.affine).code}; the first voxel's centre lies at "
        f"({first[0]:.2f}, {first[1]:.2f}, {first[2]:.2f}) mm, RAS+",
    ]
    if volume.header is not None:
        lines.append(placement(volume.header))
    lines.append(f"values {data.min():g} to {data.max():g}, mean {data.mean(dtype=float):g}")
    return "\n".join(lines)


def _range(rows: list[tuple[int, int, int]] | list[tuple[float, float, float]], form: str) -> str:
    table = np.array(rows)
    low, middle, high = table.min(0), np.median(table, axis=0), table.max(0)
    return ", ".join(
        f"{low[axis].item():{form}} to {high[axis].item():{form}} (median {middle[axis]:.3g})"
        for axis in range(3)
    )
