"""Where a network concatenates upsampled features and a skip, found by the values of one run.

    coarse ─ up ─ upsampled ─┐
                             cat ─ both ─ convolutions
    skip ────────────────────┘

The concatenation itself is no module. But the convolutions are, and the first or the last channels
of their input have the values of the upsampled features. `up` may be a module, or a call of
`torch.nn.functional.interpolate`.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from segkit.nn.follow import Follower
from segkit.nn.foreign_blocks import is_inside
from segkit.nn.placement_rules import Followed


@dataclass(frozen=True)
class Half:
    """The channels of a skip in features that were concatenated from it and from others."""

    channels: int
    first: bool
    """Whether they are the first; else they are the last."""

    def parted(self, both: Tensor) -> tuple[Tensor, Tensor]:
        """The skip, and the other channels."""
        if self.first:
            return both[:, : self.channels], both[:, self.channels :]
        other = both.shape[1] - self.channels
        return both[:, other:], both[:, :other]

    def joined(self, skip: Tensor, other: Tensor) -> Tensor:
        """The opposite of `parted`."""
        return torch.cat([skip, other] if self.first else [other, skip], dim=1)


def half_of(part: Tensor, both: Tensor) -> Half | None:
    """The channels of `both` that are `part`; None if these are neither the first nor the last."""
    if part.shape[2:] != both.shape[2:] or part.shape[1] >= both.shape[1]:
        return None
    for half in (Half(part.shape[1], first=True), Half(part.shape[1], first=False)):
        if torch.equal(half.parted(both)[0], part):
            return half
    return None


@dataclass(frozen=True)
class Concatenation:
    """Upsampled features and a skip, concatenated for one module."""

    module: str
    """Name of the module that receives both."""
    before: str
    """Name of the module that upsampled the coarse features; empty if none did."""
    half: Half
    """The channels of the skip."""
    both: Tensor
    coarse: Tensor
    followed: Followed | None
    """The position of both; None if it could not be followed."""


@dataclass(frozen=True)
class _Upsampled:
    """Features that come from an interpolation, or from a module that returns more cells."""

    value: Tensor
    before: str
    """Name of the module; empty if there is none."""
    coarse: Tensor


class Concatenations:
    """Watches the calls of a run, and then knows the concatenations in it.

    Args:
        modules: the network's modules, by name.
        ndim: number of axes of its features.
    """

    def __init__(self, modules: Mapping[str, nn.Module], ndim: int) -> None:
        self.modules, self.ndim = modules, ndim
        self.upsampled: list[_Upsampled] = []
        self.num_interpolated = 0
        """Number of the follower's interpolations that are in `upsampled`."""
        self.latest: dict[str, Tensor] = {}
        """The input of the last call of each upsampling module."""
        self.outputs = WeakTensorKeyDictionary()
        """Names of the modules that returned a tensor."""
        self.received: dict[int, list[Concatenation]] = defaultdict(list)
        """For each concatenated tensor, by its id, the modules that received it."""

    def watch(self, name: str, args: Sequence[Any], output: Any, follower: Follower) -> None:
        """Takes note of a call, after it; calls within it come first."""
        given = [part for part in args if isinstance(part, Tensor) and part.ndim == self.ndim]
        if len(given) != 1 or not isinstance(output, Tensor) or output.ndim != self.ndim:
            return
        (features,) = given
        if args[0] is not features:
            return  # the hooks of gates take the first argument
        for coarse, fine in follower.interpolated[self.num_interpolated :]:
            if coarse.ndim == self.ndim and _is_finer(fine.shape[2:], coarse.shape[2:]):
                self.upsampled.append(_Upsampled(fine, "", coarse))
        self.num_interpolated = len(follower.interpolated)
        self._look_for_both(name, features, follower)
        cells, found = features.shape[2:], output.shape[2:]
        known = self._upsampled_as(features)
        earlier = self._upsampled_as(output)
        if known is not None and found == cells:
            self.upsampled.append(_Upsampled(output, known.before, known.coarse))
        elif _is_finer(found, cells) and (earlier is None or not earlier.before):
            self.upsampled.append(_Upsampled(output, name, features))
            self.latest[name] = features
        self.outputs[output] = name

    def _look_for_both(self, name: str, both: Tensor, follower: Follower) -> None:
        if both in self.outputs:
            return  # a module concatenated these, if any did
        for one in reversed(self.upsampled):
            half = half_of(one.value, both)
            latest = not one.before or self.latest.get(one.before) is one.coarse
            if half is not None and latest:
                skip = Half(both.shape[1] - half.channels, not half.first)
                followed = follower.of(both)
                self.received[id(both)].append(
                    Concatenation(name, one.before, skip, both, one.coarse, followed)
                )
                return

    def _upsampled_as(self, features: Tensor) -> _Upsampled | None:
        return next((one for one in reversed(self.upsampled) if one.value is features), None)

    def found(self, within: Collection[str] = ()) -> list[Concatenation]:
        """The concatenations that exactly one module receives, directly or as its first layer.

        Args:
            within: names of modules whose own concatenations are left out.
        """
        found = []
        for calls in self.received.values():
            names = [call.module for call in calls]
            outermost = [
                call for call in calls if not any(is_inside(call.module, other) for other in names)
            ]
            if len(outermost) != 1 or any(is_inside(outermost[0].module, one) for one in within):
                continue
            # An nn.Sequential would call a gate as a layer, so its first layer gets the gate.
            inwards = sorted(calls, key=lambda call: call.module.count("."))
            found += [
                call for call in inwards if not isinstance(self.modules[call.module], nn.Sequential)
            ][:1]
        return found


def _is_finer(cells: Sequence[int], than: Sequence[int]) -> bool:
    return cells != than and all(new >= old for new, old in zip(cells, than, strict=True))
