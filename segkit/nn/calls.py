"""How a network calls its modules, and which output of a module leaves its features unchanged.

x = attention(x)               the features themselves
x = x + attention(norm(x))     0, because the shortcut is outside the module
x = x * attention(x)           1, because the module only computes a map
x = x * (1 + attention(x))     0, for the same reason
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from segkit.nn.map_tap import argument_names, features_argument
from segkit.nn.running import Given, Named, in_prediction, observing
from segkit.nn.sources import Sources

FEATURES = re.compile(r"x|x[_\d].*|skip.*|query")
"""Names of the argument that holds features, if others have their shape too."""
Neutral = Literal["features", "zero", "one"]


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    features: tuple[int, ...] | None
    """Shape of the argument that the identity would return; None if it is not a tensor."""
    output: tuple[int, ...] | None
    """Shape of the output, or of its first part if it is a tuple; None if that is no tensor."""
    argument: tuple[int, str]
    """Position and name of the argument that the identity would return."""
    rest: tuple[tuple[int, ...] | None, ...] | None = None
    """Shapes of the other parts of an output that is a tuple; None for each that is None."""
    rivals: tuple[str, ...] = ()
    """Names of the arguments that may be the features, if the call does not tell which are."""
    passes: bool = False
    """Whether the features reach the output without weights, as in a gate or by a shortcut."""
    added: bool = False
    """Whether the output is added to features from which it is computed."""
    weighs: bool = False
    """Whether such features are multiplied by the output."""
    opens: bool = False
    """Whether such features are multiplied by a factor that is 1 if the output is 0."""
    changed: bool = False
    """Whether the output reaches such features only changed, so that neither 0 nor 1 keeps them."""

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the features."""
        return self.output is not None and self.features == self.output

    @property
    def neutral(self) -> Neutral | None:
        """The output that leaves the features unchanged; None if there is none."""
        if self.passes and self.keeps_shape:
            return "features"
        if self.changed or self.output is None or self.features is None:
            return None
        if self.opens and self.weighs:  # in two places
            return None
        if self.added or self.opens:
            return "zero"
        if self.weighs:
            return "one"
        return "features" if self.keeps_shape else None

    def unchanged(self, features: Tensor) -> Any:
        """The neutral output for these features. In a tuple, parts that are tensors become NaN."""
        output = features
        if self.neutral != "features":
            assert self.output is not None and self.features is not None
            # The sizes of features, which may differ from those of this call, where they agree.
            sizes = [
                features.shape[axis] if self.features[axis : axis + 1] == (size,) else size
                for axis, size in enumerate(self.output)
            ]
            output = features.new_full(sizes, 1.0 if self.neutral == "one" else 0.0)
        if self.rest is None:
            return output
        unknown = [
            None if shape is None else features.new_full(shape, torch.nan) for shape in self.rest
        ]
        return (output, *unknown)


def calls_of(network: nn.Module, run: Callable[[], object]) -> dict[str, Call]:
    """Runs a network by `run`, and returns how each module is called, by the module's name.

    Of several calls of a module this is the last. If different outputs would leave the features of
    these calls unchanged, it is marked as changed.
    """
    watch = _Watch(network)
    with (
        observing(network, enter=watch.enter, leave=watch.leave),
        in_prediction(network),
        watch.sources,
    ):
        run()
    return {name: watch.call_of(name) for name in watch.calls}


@dataclass(frozen=True)
class _Argument:
    """A tensor that a module is given."""

    place: int
    name: str
    tensor: Tensor
    source: int
    """The number of this argument, among the sources of all that is made from it."""


class _Watch:
    """Notes the calls of a network's modules."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = dict(network.named_modules())
        self.sources = Sources()
        self.running: list[tuple[int, list[_Argument]]] = []
        self.calls: dict[str, dict[int, Call]] = {}
        """The calls of each module, by their numbers."""

    def call_of(self, name: str) -> Call:
        """The last call of a module, with the use of its output."""
        calls = [
            replace(
                call,
                added=number in self.sources.added,
                weighs=number in self.sources.weighing,
                opens=number in self.sources.opening,
                changed=number in self.sources.changed,
            )
            for number, call in self.calls[name].items()
        ]
        differ = len({(call.neutral, call.argument, call.rivals) for call in calls}) > 1
        return replace(calls[-1], passes=False, changed=True) if differ else calls[-1]

    def enter(self, name: str, given: Given, named: Named) -> None:
        """A module is called with these arguments."""
        entered = [
            _Argument(*argument, self.sources.argument(argument[2]))
            for argument in _arguments(self.modules[name], given, named)
        ]
        call = self.sources.call([one.tensor for one in entered])
        self.running.append((call, entered))

    def leave(self, name: str, given: Given, named: Named, output: object) -> None:
        """A module returns this output."""
        number, entered = self.running.pop()
        parts = output if isinstance(output, tuple) and output else (output,)
        arguments = {one.source for one in entered}
        if not all(part is None or isinstance(part, Tensor) for part in parts) or any(
            arguments & self.sources.of(part) for part in parts[1:] if part is not None
        ):  # the other parts are more than weights of attention
            parts = (None,)
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        sources: frozenset[int] = frozenset()
        if parts[0] is not None:
            sources = self.sources.of(parts[0])
            self.sources.output(parts[0], number)
        fitting = [one for one in entered if tuple(one.tensor.shape) == shapes[0]]
        passing = [one for one in fitting if one.source in sources]
        called = [one for one in fitting if FEATURES.fullmatch(one.name)]
        same = fitting[:1] if len({id(one.tensor) for one in fitting}) == 1 else []
        # What reaches the output is proof; names come second.
        chosen = next((one[0] for one in (same, passing, called) if len(one) == 1), None)
        rivals = tuple(one.name for one in fitting) if chosen is None else ()
        default = features_argument(self.modules[name])
        if chosen is None and entered:
            chosen = max(
                entered, key=lambda one: (_agreement(one, shapes[0]), one.name == default[1])
            )
        self.calls.setdefault(name, {})[number] = Call(
            tuple(chosen.tensor.shape) if chosen else None,
            shapes[0],
            (chosen.place, chosen.name) if chosen else default,
            tuple(shapes[1:]) if isinstance(output, tuple) else None,
            rivals,
            bool(passing),
        )


def _agreement(argument: _Argument, shape: tuple[int, ...] | None) -> int:
    """The number of axes of a shape along which an argument has as many values."""
    return sum(one == other for one, other in zip(argument.tensor.shape, shape or (), strict=False))


def _arguments(
    module: nn.Module, given: Sequence[object], named: Mapping[str, object]
) -> list[tuple[int, str, Tensor]]:
    """Position, name and value of each tensor that a module is given."""
    names = argument_names(module)
    names += [""] * (len(given) - len(names))
    pairs = [*zip(names, given, strict=False), *named.items()]
    return [
        (names.index(name) if name in names else place, name, value)
        for place, (name, value) in enumerate(pairs)
        if isinstance(value, Tensor)
    ]
