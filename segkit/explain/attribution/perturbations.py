"""Attributions from images with replaced parts: occlusion and KernelSHAP.

Only the windows that contain a replaced part are computed again; `target.Held` keeps the others.
"""

from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Float, Integer
from numpy import ndarray
from torch import Tensor

from segkit.explain.attribution.shapley import Coalitions, coalitions, fit_shapley
from segkit.explain.attribution.supervoxels import Supervoxels
from segkit.explain.attribution.target import Held, NetworkInput, SummedOutput
from segkit.system.progress import Track, untracked

PartValues = Float[ndarray, "structure part"]
MORE_COALITIONS = 64
"""Coalitions that are sampled by default, besides each part alone and all parts but one."""


def occlusion(
    target: SummedOutput,
    image: NetworkInput,
    replacement: NetworkInput,
    parts: Supervoxels,
    *,
    track: Track = untracked,
) -> PartValues:
    """The fall of each structure's sum if one part of the image is replaced.

    Zeiler & Fergus (2014, arXiv:1311.2901), with parts that do not overlap. It is exactly 0 for a
    part that is in no window with a voxel of the region.

    Args:
        target: the sums.
        image: the image as the network receives it.
        replacement: the image from which replaced parts come.
        parts: the parts.
        track: reports the progress, part by part.
    """
    held = target.hold(image)
    whole = held.value()
    touched: dict[int, list[int]] = {}
    for number, inside in enumerate(parts.in_windows(target)):
        for part in inside.tolist():
            touched.setdefault(part, []).append(number)
    falls = np.zeros((len(target.structures), len(parts)))
    changed = image.clone()
    for part in track(sorted(touched), "occlusion", len(touched)):
        box = parts.boxes[part]
        assert box is not None
        place = (slice(None), *box)
        changed[place] = parts.replaced(image, replacement, np.array([part]), box)
        numbers = touched[part]
        found = target.run((number, target.cut(changed, number)) for number in numbers)
        falls[:, part] = whole - held.value(dict(zip(numbers, found, strict=True)))
        changed[place] = image[place]
    return falls


def kernel_shap(
    target: SummedOutput,
    image: NetworkInput,
    replacement: NetworkInput,
    parts: Supervoxels,
    *,
    samples: int | None = None,
    seed: int = 0,
    track: Track = untracked,
) -> PartValues:
    """The Shapley value of each part for each structure's sum, by KernelSHAP (`shapley`).

    A part that is not in a coalition is replaced. A sum of logits is a sum over windows, and
    Shapley values of a sum are sums of Shapley values. So each window is a game of its own, among
    the few parts that it contains: a coalition costs one window instead of all windows, and fewer
    players need fewer coalitions. Probabilities need one game of all parts.

    Args:
        target: the sums.
        image: the image as the network receives it.
        replacement: the image from which replaced parts come.
        parts: the parts.
        samples: the largest number of coalitions in a game, raised to twice the number of its parts
            if it is lower; if None, twice the number of parts and `MORE_COALITIONS`.
        seed: seed of the coalitions that are sampled.
        track: reports the progress.
    """
    held = target.hold(image)
    gone = target.hold(torch.where(parts.numbers >= 0, replacement, image))
    players = parts.in_windows(target)
    known: dict[int, Coalitions] = {}

    def chosen(inside: Integer[ndarray, " players"]) -> Coalitions:
        count = len(inside)
        if count not in known:
            asked = 2 * count + MORE_COALITIONS if samples is None else max(samples, 2 * count)
            known[count] = coalitions(count, asked, seed=seed)
        return known[count]

    found = np.zeros((len(target.structures), len(parts)))
    if target.quantity == "probability":
        joined = np.unique(np.concatenate(players))
        if not joined.size:
            return found
        game = chosen(joined)
        rows = [
            _exchanged(target, held, gone, parts, image, replacement, players, joined[~members])
            for members in track(game.members, "KernelSHAP", len(game.members))
        ]
        found[:, joined] = fit_shapley(game, np.array(rows), gone.value(), held.value()).T
        return found

    def jobs() -> Iterator[tuple[int, Tensor]]:
        for number, inside in enumerate(players):
            if not inside.size:
                continue
            box = target.box(target.windows[number].place, image.shape[1:])
            for members in chosen(inside).members:
                yield number, parts.replaced(image, replacement, inside[~members], box)

    total = sum(len(chosen(inside).members) for inside in players if inside.size)
    rows = [sums.numpy() for sums in target.run(track(jobs(), "KernelSHAP", total))]
    first = 0
    for inside, none, every in zip(players, gone.parts, held.parts, strict=True):
        if not inside.size:
            continue
        game = chosen(inside)
        own = np.array(rows[first : first + len(game.members)])
        found[:, inside] += fit_shapley(game, own, none.numpy(), every.numpy()).T
        first += len(game.members)
    return found


def _exchanged(
    target: SummedOutput,
    held: Held,
    gone: Held,
    parts: Supervoxels,
    image: NetworkInput,
    replacement: NetworkInput,
    players: list[Integer[ndarray, " players"]],
    removed: Integer[ndarray, " removed"],
) -> Float[ndarray, " structures"]:
    """The sums of an image without some parts. Windows with all or with none are known.

    Args:
        target: the sums.
        held: the parts of all windows of the image.
        gone: the parts of all windows of the replacement.
        parts: the partition of the image.
        image: the image as the network receives it.
        replacement: the image from which replaced parts come.
        players: the parts in each window.
        removed: the parts that are replaced.
    """
    changed: dict[int, Tensor] = {}
    numbers = []
    for number, inside in enumerate(players):
        missing = np.isin(inside, removed)
        if missing.all():
            changed[number] = gone.parts[number]
        elif missing.any():
            numbers.append(number)
    without = parts.replaced(image, replacement, removed)
    found = target.run((number, target.cut(without, number)) for number in numbers)
    changed |= dict(zip(numbers, found, strict=True))
    return held.value(changed)
