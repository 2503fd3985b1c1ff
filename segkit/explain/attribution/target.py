"""The number that an attribution explains: a structure's output, summed over a region.

    f(image) = Σ output(v)        over the voxels v of the region, on the network's grid

A segmentation has an output at each voxel, but an attribution explains one number, so the outputs
are summed, as in Seg-Grad-CAM (Vinogradova et al. 2020, arXiv:2002.11434).

The logits of windows are blended by a weighted mean. So the summed logit is a sum over windows, and
a window without a voxel of the region has no part in it: it is never run. If a part of the image
changes, only the windows that contain this part change, and the parts of all others are kept.
A probability is not a sum over windows, because the softmax comes after the blending. So the
blended logits are kept at the voxels of the region, and the changed windows are exchanged there.
"""

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float, Integer
from numpy import ndarray
from torch import Tensor

from segkit.inference.model_walk import ModelWalk
from segkit.inference.windows import WindowPlace, cut_window, window_weight
from segkit.system.progress import Track, untracked

Quantity = Literal["logit", "probability"]
"""The output that is summed. The probability is the softmax of logits, or the sigmoid if the
outputs are regions."""
NetworkInput = Float[Tensor, "channel x y z"]
SMALL_WINDOW = 2**18
"""Windows of at most so many voxels run together."""
WINDOWS_TOGETHER = 2
"""Small windows in each call: on a CPU, PyTorch (2.13) is several times slower with only one."""
StructureSums = Float[ndarray, " structures"]


@dataclass(frozen=True, eq=False)
class WindowShare:
    """The part of one window in the blended outputs of the region."""

    place: WindowPlace
    voxels: Integer[Tensor, " inside"]
    """Flat indices, in the window, of its voxels in the region."""
    positions: Integer[Tensor, " inside"]
    """Positions of these voxels in the list of all voxels of the region."""
    weights: Float[Tensor, " inside"]
    """The window's weight at these voxels, divided by the sum of all windows' weights."""


class SummedOutput:
    """Sums of outputs over regions, as functions of an image.

    Args:
        member: runs the network; mirror images are not used.
        size: shape of the image, without channels.
        regions: the voxels over which each structure's output is summed, by structure.
        outputs: the index of each structure's output.
        quantity: the output that is summed.
        skip: windows that the network does not process.
    """

    def __init__(
        self,
        member: ModelWalk,
        size: Sequence[int],
        regions: Mapping[str, Bool[Tensor, "x y z"]],
        *,
        outputs: Mapping[str, int],
        quantity: Quantity = "logit",
        skip: Collection[WindowPlace] = (),
    ) -> None:
        self.member = member
        self.quantity = quantity
        layout = member.layout_for(size)
        self.patch_size = layout.patch_size
        self.batch_size = member.batch_size
        if math.prod(self.patch_size) <= SMALL_WINDOW:
            self.batch_size = max(self.batch_size, WINDOWS_TOGETHER)
        self.softmax = member.model.description.labelling.written is None
        places = itertools.product(*layout.starts(size))
        seen = [place for place in places if place not in skip]
        kernel = torch.ones(())
        for patch in self.patch_size:
            kernel = kernel[..., None] * window_weight(patch)
        total = torch.zeros(*size)
        for place in seen:
            box = self.box(place, size)
            total[box] += _corner(kernel, total[box].shape)
        self.computed: Bool[Tensor, "x y z"] = total > 0
        """The voxels that the network processes."""
        held = {name: mask & self.computed for name, mask in regions.items()}
        self.structures = tuple(name for name, mask in held.items() if bool(mask.any()))
        """The structures that have a voxel in their region; the others have no sum."""
        self.outputs = [outputs[name] for name in self.structures]
        masks = torch.zeros(len(self.structures), *size, dtype=torch.bool)
        for number, name in enumerate(self.structures):
            masks[number] = held[name]
        union = masks.any(dim=0)
        self.inside: Bool[Tensor, "structure region"] = masks[:, union]
        """Whether each voxel of the union of all regions belongs to each structure's region."""
        position = torch.full(tuple(size), -1, dtype=torch.int32)
        position[union] = torch.arange(int(union.sum()), dtype=torch.int32)
        self.windows: list[WindowShare] = []
        for place in seen:
            box = self.box(place, size)
            there = union[box]
            if not bool(there.any()):
                continue
            weights = (_corner(kernel, there.shape) / total[box])[there]
            whole = torch.zeros(self.patch_size, dtype=torch.bool)
            _corner(whole, there.shape).copy_(there)
            voxels = whole.flatten().nonzero()[:, 0].int()
            self.windows.append(WindowShare(place, voxels, position[box][there], weights))

    def box(self, place: WindowPlace, size: Sequence[int]) -> tuple[slice, ...]:
        """The voxels of the image inside a window."""
        return tuple(
            slice(first, min(first + patch, whole))
            for first, patch, whole in zip(place, self.patch_size, size, strict=True)
        )

    def cut(self, image: Float[Tensor, "channel *space"], number: int) -> Tensor:
        """The voxels of an image inside a window, as a view."""
        return image[(slice(None), *self.box(self.windows[number].place, image.shape[1:]))]

    def run(self, jobs: Iterable[tuple[int, Float[Tensor, "channel *space"]]]) -> Iterator[Tensor]:
        """The part of a window for each job: its sums, or its logits for probabilities.

        Args:
            jobs: the number of a window, and the voxels of an image inside this window.

        Yields:
            For logits, the sum of each structure over the window's voxels in the region, with the
            window's weights. For probabilities, the weighted logits at these voxels.
        """
        waiting = iter(jobs)
        while batch := list(itertools.islice(waiting, self.batch_size)):
            windows = torch.stack(
                [cut_window(voxels, (0, 0, 0), self.patch_size) for _, voxels in batch]
            )
            outputs = self.member.logits(windows)
            for (number, _), output in zip(batch, outputs, strict=True):
                share = self.windows[number]
                chosen = output.flatten(1)[:, share.voxels.to(output.device).long()].cpu()
                yield self._part(number, chosen.float() * share.weights)

    def _part(self, number: int, logits: Float[Tensor, "output inside"]) -> Tensor:
        if self.quantity == "probability":
            return logits
        inside = self.inside[:, self.windows[number].positions.long()]
        return torch.stack(
            [
                logits[output].double() @ one.double()
                for output, one in zip(self.outputs, inside, strict=True)
            ]
        )

    def hold(self, image: Float[Tensor, "channel x y z"]) -> "Held":
        """The parts of all windows of an image, which are used again if an image changes."""
        numbers = range(len(self.windows))
        return Held(self, list(self.run((number, self.cut(image, number)) for number in numbers)))

    def value(self, image: Float[Tensor, "channel x y z"]) -> StructureSums:
        """The sum of each structure, with every window computed."""
        return self.hold(image).value()

    def of_blended(self, blended: Float[Tensor, "output region"]) -> StructureSums:
        """The sum of each structure from the blended logits in the region."""
        shares = blended.softmax(dim=0) if self.softmax else blended.sigmoid()
        chosen = blended if self.quantity == "logit" else shares
        sums: StructureSums = (chosen[self.outputs].double() * self.inside).sum(dim=1).numpy()
        return sums

    def gradient(
        self,
        images: Iterable[Float[Tensor, "channel x y z"]],
        weights: Sequence[float],
        *,
        what: str,
        track: Track = untracked,
    ) -> Float[Tensor, "structure channel x y z"]:
        """The weighted sum of the gradients of each structure's sum at several images.

        Memory: the forward and backward pass of one window, an image, and the result.

        Args:
            images: the images, which are made one after the other.
            weights: the weight of each image.
            what: name of the work, for `track`.
            track: reports the progress, window by window.
        """
        numbers = range(len(self.windows))
        batches = [
            numbers[first : first + self.batch_size] for first in numbers[:: self.batch_size]
        ]
        total: Tensor | None = None
        shares: Tensor | None = None
        image: Tensor | None = None
        source = iter(images)
        steps = itertools.product(range(len(weights)), batches)
        for step, batch in track(steps, what, len(weights) * len(batches)):
            if batch[0] == 0:
                image = next(source)
                shares = self._shares(image)
            assert image is not None
            if total is None:
                total = torch.zeros(len(self.structures), *image.shape)
            for structure, number, gradient in self._gradients(image, batch, shares):
                self.cut(total[structure], number).add_(gradient, alpha=weights[step])
        assert total is not None, "there is a window"
        return total

    def _shares(self, image: Tensor) -> Tensor | None:
        """The probabilities in the region; None if logits are summed, which do not need them."""
        if self.quantity == "logit":
            return None
        blended = self.hold(image).blended()
        return blended.softmax(dim=0) if self.softmax else blended.sigmoid()

    def _slope(
        self, structure: int, share: WindowShare, shares: Tensor | None
    ) -> Float[Tensor, "output inside"]:
        """The derivative of a structure's sum with respect to the logits of a window.

        For logits, it has a row only for the structure's output.

        Args:
            structure: index of the structure.
            share: the part of the window in the blended outputs.
            shares: the probabilities in the region, from `_shares`; None if logits are summed.
        """
        positions, output = share.positions.long(), self.outputs[structure]
        weights = share.weights * self.inside[structure, positions]
        if shares is None:
            return weights[None]
        here = shares[:, positions]
        if self.softmax:
            slope = -here * here[output]
            slope[output] += here[output]
        else:
            slope = torch.zeros_like(here)
            slope[output] = here[output] * (1 - here[output])
        return slope * weights

    def _gradients(
        self, image: Tensor, numbers: Sequence[int], shares: Tensor | None
    ) -> Iterator[tuple[int, int, Tensor]]:
        """The structure, the window, and the gradient on the window's voxels, for some windows.

        Args:
            image: the image as the network receives it.
            numbers: numbers of the windows.
            shares: the probabilities in the region, from `_shares`; None if logits are summed.
        """
        network = self.member.model.network
        device = next((each.device for each in network.parameters()), torch.device("cpu"))
        own = [self.windows[number] for number in numbers]
        inside = [self.inside[:, share.positions.long()].any(dim=1) for share in own]
        wanted = torch.stack(inside).any(dim=0).nonzero()[:, 0].tolist()
        with self.member.lock, torch.enable_grad():
            parts = [
                self.cut(image, number).to(device, copy=True).requires_grad_() for number in numbers
            ]
            windows = [cut_window(part, (0, 0, 0), self.patch_size) for part in parts]
            logits = network(torch.stack(windows)).float().flatten(2)
            for structure in wanted:
                total = torch.zeros((), device=device)
                for share, output in zip(own, logits, strict=True):
                    along = self._slope(structure, share, shares)
                    rows = output[self.outputs[structure]][None] if shares is None else output
                    chosen = rows[:, share.voxels.to(device).long()]
                    total = total + (chosen * along.to(device)).sum()
                found = torch.autograd.grad(total, parts, retain_graph=structure != wanted[-1])
                for number, gradient in zip(numbers, found, strict=True):
                    yield structure, number, gradient.cpu()


@dataclass(frozen=True, eq=False)
class Held:
    """The parts of all windows of an image."""

    target: SummedOutput
    parts: list[Tensor]

    def value(self, changed: Mapping[int, Tensor] | None = None) -> StructureSums:
        """The sum of each structure, if the parts of some windows are exchanged for others."""
        parts = [(changed or {}).get(number, part) for number, part in enumerate(self.parts)]
        if self.target.quantity == "logit":
            sums: StructureSums = torch.stack(parts).sum(dim=0).numpy()
            return sums
        return self.target.of_blended(self._blend(parts))

    def blended(self) -> Float[Tensor, "output region"]:
        """The blended logits; only for probabilities."""
        return self._blend(self.parts)

    def _blend(self, parts: Sequence[Tensor]) -> Tensor:
        blended = torch.zeros(len(parts[0]), self.target.inside.shape[1])
        for share, part in zip(self.target.windows, parts, strict=True):
            blended.index_add_(1, share.positions.long(), part)
        return blended


def _corner(values: Tensor, shape: Sequence[int]) -> Tensor:
    """The first voxels of a window along each axis, as a view."""
    return values[tuple(slice(0, size) for size in shape)]
