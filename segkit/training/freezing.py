"""Weights that are not trained, by patterns of their names, until a step or to the end."""

import math
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from segkit.errors import ConfigError, first_few

NORMALISATIONS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
"""Layers that keep means of their inputs; if their weights are frozen, these stay fixed too."""


class Freezing:
    """Freezes weights of a network, and unfreezes them when their step has come.

    Args:
        weights: the module whose weights the patterns name.
        patterns: patterns such as `encoder.*`, and the step from which on these weights are
            trained; None if they never are. If several fit a weight, the last one counts.

    Raises:
        ConfigError: a pattern fits no weight, or no weight is left to train.

    Example:
        >>> freezing = Freezing(network, {"encoder.*": 500})
    """

    def __init__(self, weights: nn.Module, patterns: Mapping[str, int | None]) -> None:
        self.patterns = dict(patterns)
        self.parameters = dict(weights.named_parameters())
        names = list(self.parameters)
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ConfigError(
                    f"train.freeze: {pattern!r} matches no weight of the network, which has "
                    f"weights such as {first_few(names[:: max(len(names) // 4, 1)], 4)}; give a "
                    "pattern such as 'encoder.*'"
                )
        self.until: dict[str, float] = {}
        for pattern, step in patterns.items():
            fitting = [name for name in names if fnmatchcase(name, pattern)]
            self.until |= dict.fromkeys(fitting, math.inf if step is None else step)
        if names and len(self.until) == len(names):
            raise ConfigError(
                f"train.freeze: {', '.join(map(repr, patterns))} matches all weights, so no weight "
                "is left to train; leave out the weights of the heads"
            )
        self.normalisations = [
            layer
            for name, layer in weights.named_modules()
            if isinstance(layer, NORMALISATIONS) and f"{name}.weight" in self.until
        ]
        self.frozen: set[str] = set()
        self.set_step(0)

    @property
    def unfreezes(self) -> bool:
        """Whether any weight is frozen at first and trained later."""
        return any(step < math.inf for step in self.until.values())

    def set_step(self, step: int) -> bool:
        """Freeze the weights that are not trained at a step; return whether the set has changed."""
        frozen = {name for name, until in self.until.items() if step < until}
        changed = frozen != self.frozen
        self.frozen = frozen
        for name in self.until:
            self.parameters[name].requires_grad_(name not in frozen)
            if name in frozen:
                self.parameters[name].grad = None
        return changed

    def set_modes(self) -> None:
        """Make frozen batch normalisations keep their running means; others update theirs."""
        for layer in self.normalisations:
            layer.train(layer.weight.requires_grad)

    @property
    def told(self) -> str:
        """One line with the number of frozen weights, and the step at which they are trained."""
        numbers = sum(self.parameters[name].numel() for name in self.until)
        total = sum(each.numel() for each in self.parameters.values())
        steps = [
            f"{pattern} {'to the end' if step is None else f'until step {step}'}"
            for pattern, step in self.patterns.items()
        ]
        return (
            f"{len(self.until)} of {len(self.parameters)} weights ({numbers:,} of {total:,} "
            f"numbers) are frozen: {first_few(steps, 4)}"
        )

    def as_json(self) -> dict[str, Any]:
        """The same for a summary."""
        return {
            "patterns": self.patterns,
            "weights": len(self.until),
            "of": len(self.parameters),
            "told": self.told,
        }
