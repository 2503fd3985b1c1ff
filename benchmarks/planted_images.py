"""Synthetic images with a structure, and functions of them, for benchmarks/planted_gates.py."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy import ndarray
from scipy.ndimage import gaussian_filter, gaussian_filter1d
from torch import Tensor

AVERAGE: dict[int, Callable[..., Tensor]] = {4: F.avg_pool2d, 5: F.avg_pool3d}
MAXIMUM: dict[int, Callable[..., Tensor]] = {4: F.max_pool2d, 5: F.max_pool3d}
MakeCase = Callable[[np.random.Generator, tuple[int, ...]], tuple[list[ndarray], ndarray]]
"""A function from a generator and a shape to the channels of an image, and its labels."""


def block(random: np.random.Generator, shape: tuple[int, ...], spread: int = 99) -> ndarray:
    """A block of whole cells of 4 voxels at a random place; in 2D, another one in each slice."""
    if shape[2] <= 4:
        slices = [_block(random, shape[:2], spread) for _ in range(shape[2])]
        return np.stack(slices, axis=2)
    return _block(random, shape, spread)


def _block(random: np.random.Generator, shape: tuple[int, ...], spread: int) -> ndarray:
    """A block at a random place of an image, at most `spread` voxels from its middle."""
    inside = np.zeros(shape, bool)
    low = []
    for size in shape:
        room, centre = size - 4 * 2, (size - 4) // 2
        first = random.integers(max(0, centre - spread), min(room, centre + spread) + 1)
        low.append(int(first) // 2 * 2)
    long = int(random.integers(0, len(shape)))
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


def striped_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel of stripes: along the first axis in the structure, else along the second."""
    inside = block(random, shape)
    stripes = []
    for axis in (0, 1):
        smooth = gaussian_filter1d(random.normal(0, 1, shape), 1.5, axis=axis, mode="wrap")
        stripes.append(smooth / smooth.std())
    return [np.where(inside, *stripes)], inside


def two_valued_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel of noise of the same strength everywhere, with two values in the structure."""
    inside = block(random, shape)
    two = np.sign(random.normal(0, 1, shape)) + random.normal(0, 0.1, shape)
    return [np.where(inside, two, random.normal(0, 1, shape))], inside


def salted_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """One channel with the structure, in which a third of the voxels is far too bright or dark."""
    inside = block(random, shape)
    image = inside + random.normal(0, 0.3, shape)
    return [np.where(random.random(shape) < 0.3, random.choice([-8.0, 8.0], shape), image)], inside


def second_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A channel of noise, and a channel with the structure."""
    inside = block(random, shape)
    return [random.normal(0, 1, shape), inside + random.normal(0, 0.4, shape)], inside


def unrelated_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A structure in one pair of channels, and a block that is no structure in another pair."""
    inside = block(random, shape)
    return [*hidden(random, inside, 0.5), *hidden(random, block(random, shape))], inside


def decoy_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A structure in one pair of channels; another pair also has a block that is no structure."""
    inside = block(random, shape)
    return [*hidden(random, inside), *hidden(random, inside | block(random, shape))], inside


def absent_case(random: np.random.Generator, shape: tuple[int, ...]) -> Any:
    """A structure in the difference of two channels, in half of the scans."""
    inside = block(random, shape) & (random.random() < 0.5)
    return [*hidden(random, inside, 0.25), random.normal(0, 1, shape)], inside


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


def powers(image: Tensor) -> Tensor:
    """The image and its cube."""
    return torch.cat([image, image**3], dim=1)


def textures(image: Tensor) -> Tensor:
    """The image, and its squared differences along the first two axes of the window."""
    steps = [(image - torch.roll(image, 1, dims=axis)) ** 2 for axis in (2, 3)]
    return torch.cat([image, *(averaged(step, 3) for step in steps)], dim=1)


def entropies(image: Tensor) -> Tensor:
    """The image, and the entropy of a histogram of nine bins around each voxel."""
    near = [(1 - 2 * (image - centre).abs()).clamp(min=0) for centre in np.linspace(-2, 2, 9)]
    shares = averaged(torch.cat(near, dim=1), 5)
    shares = shares / shares.sum(dim=1, keepdim=True).clamp(min=1e-6)
    return torch.cat([image, torch.special.entr(shares).sum(dim=1, keepdim=True)], dim=1)


def medians(image: Tensor) -> Tensor:
    """The image, and its median in windows of three voxels."""
    windows = padded(image, 3)
    for axis in range(2, image.ndim):
        windows = windows.unfold(axis, 3, 1)
    return torch.cat([image, windows.flatten(image.ndim).median(dim=-1).values], dim=1)
