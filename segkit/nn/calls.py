"""How a network calls its modules: shapes, and where features go around a module.

The network runs once. Each tensor has sources: the tensors from which it is made without weights,
that is by normalisation, rearrangement, sums and products of elements, but not by a convolution or
a matrix product. Two questions follow from the sources:

    x * sigmoid(conv(x))     do features pass?  yes: a module that weighs them, or has a shortcut
    x + attention(norm(x))   is it added?       yes: the sources of norm(x) include x
    x + gate(conv(x))        is it added?       no: only the convolution is a source of the features
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from segkit.nn.map_tap import argument_names, features_argument

MIXING = re.compile(r"(?!upsample).*(conv|mm|mv|matmul|linear|attention|multi_head|einsum).*")
"""Names of operations with weights: convolutions and matrix products."""
FEATURES = re.compile(r"x|x[_\d].*|skip.*")
"""Names of the argument that holds features, if others have their shape too."""


@dataclass(frozen=True)
class Call:
    """One call of a module."""

    features: tuple[int, ...] | None
    """Shape of the argument that the identity would return; None if it is not a tensor."""
    output: tuple[int, ...] | None
    """Shape of the output; None if it is not a tensor."""
    argument: tuple[int, str]
    """Position and name of the argument that the identity would return."""
    rivals: tuple[str, ...] = ()
    """Names of the arguments that may be the features, if the call does not tell which are."""
    passes: bool = False
    """Whether the features reach the output without weights, as in a gate or by a shortcut."""
    added: bool = False
    """Whether the output is added to features from which it is computed."""

    @property
    def keeps_shape(self) -> bool:
        """Whether the output has the shape of the features."""
        return self.output is not None and self.features == self.output

    @property
    def is_branch(self) -> bool:
        """Whether the shortcut is outside the module, so that 0 leaves the features unchanged."""
        return self.added and not self.passes


@contextmanager
def in_prediction(network: nn.Module) -> Iterator[None]:
    """Inside `with`, a network is in evaluation mode without gradients; then it is restored."""
    modes = {part: part.training for part in network.modules()}
    network.eval()
    try:
        with torch.no_grad():  # not inference_mode: a module may keep tensors that it computes
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


def calls_of(network: nn.Module, run: Callable[[], object]) -> dict[str, Call]:
    """Runs a network by `run`, and returns the last call of each module by the module's name."""
    watch = _Watch()
    handles = []
    for name, module in network.named_modules():
        enter, leave = partial(watch.enter, name), partial(watch.leave, name)
        handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(module.register_forward_hook(leave, with_kwargs=True))
    try:
        with in_prediction(network), watch:
            run()
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: Call(**vars(call) | {"added": name in watch.added})
        for name, call in watch.calls.items()
    }


@dataclass(frozen=True)
class _Argument:
    """A tensor that a module is given."""

    place: int
    name: str
    tensor: Tensor
    source: int
    """The number of this argument, among the sources of all that is made from it."""


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


class _Watch(TorchDispatchMode):
    """Follows the sources of all tensors, and notes the calls of modules."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = WeakTensorKeyDictionary()
        """Numbers of the tensors from which each tensor is made without weights. Weights have
        none."""
        self.outputs = WeakTensorKeyDictionary()
        """Names of the modules whose output each tensor is, if nothing was added to it."""
        self.numbers = itertools.count()
        self.running: list[list[_Argument]] = []
        self.features: dict[str, frozenset[int]] = {}
        """The sources of all arguments of each module."""
        self.calls: dict[str, Call] = {}
        self.added: set[str] = set()

    def of(self, tensor: Tensor) -> frozenset[int]:
        found: frozenset[int] = self.sources.get(tensor, frozenset())
        return found

    def output_of(self, tensor: Tensor) -> frozenset[str]:
        found: frozenset[str] = self.outputs.get(tensor, frozenset())
        return found

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        name = func.overloadpacket.__name__
        # Looked up before the call, because a call in place changes its argument.
        data = [part for part in _tensors((args, named)) if self.of(part)]
        sources: frozenset[int] = frozenset().union(*map(self.of, data))
        outputs = self.output_of(data[0]) if len(data) == 1 else frozenset()
        if MIXING.fullmatch(name):
            sources, outputs = frozenset([next(self.numbers)]), frozenset()
        elif name.startswith("add"):
            for first, second in itertools.permutations(data, 2):
                others = self.output_of(first) - self.output_of(second)
                self.added |= {one for one in others if self.features[one] & self.of(second)}
        result = func(*args, **named)
        for part in _tensors(result):
            self.sources[part], self.outputs[part] = sources, outputs
        return result

    def enter(
        self,
        name: str,
        module: nn.Module,
        given: tuple[object, ...],
        named: Mapping[str, object],
    ) -> None:
        """A module is called with these arguments."""
        arguments = _arguments(module, given, named)
        entered = [_Argument(*argument, next(self.numbers)) for argument in arguments]
        for argument in entered:
            self.sources[argument.tensor] = self.of(argument.tensor) | {argument.source}
        self.features[name] = frozenset().union(*(self.of(one.tensor) for one in entered))
        self.running.append(entered)

    def leave(
        self,
        name: str,
        module: nn.Module,
        given: tuple[object, ...],
        named: Mapping[str, object],
        output: object,
    ) -> None:
        """A module that was called with these arguments returns this output."""
        default = features_argument(module)
        entered = self.running.pop()
        shape = tuple(output.shape) if isinstance(output, Tensor) else None
        sources = self.of(output) if isinstance(output, Tensor) else frozenset()
        if isinstance(output, Tensor):
            self.outputs[output] = self.output_of(output) | {name}
        fitting = [one for one in entered if tuple(one.tensor.shape) == shape]
        passing = [one for one in fitting if one.source in sources]
        called = [one for one in fitting if FEATURES.fullmatch(one.name)]
        same = fitting[:1] if len({id(one.tensor) for one in fitting}) == 1 else []
        # What reaches the output is proof; names come second.
        chosen = next((one[0] for one in (same, passing, called) if len(one) == 1), None)
        rivals = tuple(one.name for one in fitting) if chosen is None else ()
        chosen = chosen or next((one for one in entered if one.name == default[1]), None)
        self.calls[name] = Call(
            tuple(chosen.tensor.shape) if chosen else None,
            shape,
            (chosen.place, chosen.name) if chosen else default,
            rivals,
            bool(passing),
        )


def _tensors(values: object) -> list[Tensor]:
    return [part for part in tree_leaves(values) if isinstance(part, Tensor)]
