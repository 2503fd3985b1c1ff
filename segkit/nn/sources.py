"""Where features of a network go without weights, and how the outputs of its modules are used.

The network runs once. Each tensor has sources: the tensors from which it is made without weights,
that is by normalisation, rearrangement, sums and products of elements, but not by a convolution or
a matrix product. Three questions follow from the sources:

    x * sigmoid(conv(x))     do features pass?     yes: a module that weighs them, or has a shortcut
    x + attention(norm(x))   is it added?          yes: the sources of norm(x) include x
    x + gate(conv(x))        is it added?          no: only the convolution is a source
    x * map(x)               are features weighed? yes: the output is the factor of its own features

An output that is added can become 0, and a factor can become 1, if nothing changed the 0 or the 1
on its way: x + norm(attention(x)) is not x if the attention is 0, because the norm may add a bias.
So the values that 0 and 1 become are followed too: in x * (1 + map(x)) the output can become 0.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakTensorKeyDictionary

MIXING = re.compile(r"(?!upsample).*(conv|mm|mv|matmul|linear|attention|multi_head|einsum).*")
"""Names of operations with weights: convolutions and matrix products."""
KEEPS_VALUE = re.compile(
    r"_?(unsafe_)?(view|reshape)(_alias|_copy)?|permute|transpose|t|expand|(un)?squeeze|slice"
    r"|select|split(_with_sizes)?|unbind|clone|detach|alias|lift_fresh|_to_copy|repeat|flip|roll"
    r"|upsample_.*|_?adaptive_avg_pool.*|mean|amax|amin|dropout"
)
"""Names of operations that change the place of values, or their number, but not a value that is the
same everywhere."""
ON_EACH_VALUE = re.compile(
    r"(add|sub|rsub|mul|div|pow|neg|abs|exp|sqrt|clamp|clamp_min|clamp_max|sigmoid|hardsigmoid"
    r"|tanh|hardtanh|relu|leaky_relu|elu|gelu|silu|softplus)_?"
)
"""Names of operations that change each value in the same way."""
KEEPS_ZERO = re.compile(
    r"(mul|div)_?|_prelu_kernel|sum|constant_pad_nd|(avg|max)_pool.*|native_dropout"
)
"""Names of other operations that keep 0 as it is; of products, those with weights."""


@dataclass(frozen=True)
class Use:
    """How a tensor holds the output of a call of a module."""

    zero: float | None = 0.0
    """The value of the tensor if the output were 0; None if there is no such value."""
    one: float | None = 1.0
    """The same if the output were 1."""
    scaled: bool = False
    """Whether the values are only factors, because another tensor was multiplied by the output."""
    weighed: frozenset[int] | None = None
    """The sources of the features by which the output was multiplied; None if it was not."""
    alone: bool = True
    """Whether nothing was added to the output. If not, a value is that of its part of the sum, and
    only 0 is known."""

    def after(self, name: str, change: Callable[[float], float | None]) -> "Use":
        """The use in the result of an operation without other features.

        Args:
            name: name of the operation.
            change: what the operation makes of a value; None if that is not known.
        """
        if KEEPS_VALUE.fullmatch(name):
            return self
        zero, one = (
            None if value is None or (value and self.scaled) else change(value)
            for value in (self.zero, self.one)
        )
        changed = replace(self, zero=zero, one=one, scaled=False)
        return changed if self.alone else changed.beside()

    def beside(self) -> "Use":
        """The use in a sum with other features."""
        zero, one = (0.0 if value == 0 else None for value in (self.zero, self.one))
        return replace(self, zero=zero, one=one, alone=False)


class Sources(TorchDispatchMode):
    """A context that follows the sources of all tensors, and how the outputs of calls are used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sources = WeakTensorKeyDictionary()
        """Numbers of the tensors from which each tensor is made without weights. Weights have
        none."""
        self.uses = WeakTensorKeyDictionary()
        """The uses of outputs in each tensor, by the number of the call."""
        self.numbers = itertools.count()
        self.features: dict[int, frozenset[int]] = {}
        """The sources of all arguments of each call."""
        self.added: set[int] = set()
        """The calls whose output is added to features from which it is computed."""
        self.weighing: set[int] = set()
        """The calls whose output is a factor of features from which it is computed. It may be 1."""
        self.opening: set[int] = set()
        """The calls whose output changes such a factor, which is 1 if the output is 0."""
        self.changed: set[int] = set()
        """The calls of which neither 0 nor 1 would leave such features as they are."""

    def of(self, tensor: Tensor) -> frozenset[int]:
        """The sources of a tensor."""
        found: frozenset[int] = self.sources.get(tensor, frozenset())
        return found

    def uses_of(self, tensor: Tensor) -> Mapping[int, Use]:
        """The outputs that a tensor holds."""
        found: Mapping[int, Use] = self.uses.get(tensor, {})
        return found

    def argument(self, tensor: Tensor) -> int:
        """Marks a tensor as the argument of a call, and returns the number of this source."""
        number = next(self.numbers)
        self.sources[tensor] = self.of(tensor) | {number}
        return number

    def call(self, arguments: Sequence[Tensor]) -> int:
        """Notes a call with these tensors, and returns its number."""
        number = next(self.numbers)
        self.features[number] = frozenset().union(*map(self.of, arguments))
        return number

    def output(self, tensor: Tensor, call: int) -> None:
        """Marks a tensor as the output of a call."""
        self.uses[tensor] = {**self.uses_of(tensor), call: Use()}

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
        data = [part for part in tensors_in((args, named)) if self.of(part)]
        sources: frozenset[int] = frozenset().union(*map(self.of, data))
        uses: Mapping[int, Use] = {}
        if MIXING.fullmatch(name):
            sources = frozenset([next(self.numbers)])
        elif len(data) == 1:
            change = partial(_changed, func, args, named)
            uses = {call: use.after(name, change) for call, use in self.uses_of(data[0]).items()}
        elif name.startswith(("add", "sub")):
            uses = self._summed(data)
        elif name.startswith("mul"):
            uses = self._multiplied(data)
        result = func(*args, **named)
        for part in tensors_in(result):
            self.sources[part], self.uses[part] = sources, uses
        return result

    def _summed(self, data: Sequence[Tensor]) -> dict[int, Use]:
        """The uses of outputs in a sum."""
        uses: dict[int, Use] = {}
        for first, second in itertools.permutations(data, 2):
            theirs = self.uses_of(second)
            for call, use in self.uses_of(first).items():
                uses[call] = use.beside()
                if call in theirs:
                    continue
                if use.weighed is None:
                    around = bool(self.features[call] & self.of(second))
                else:  # x + x * map(x), but neither y + x * map(x) nor x * a(x) + x * b(x)
                    around = use.weighed <= self.of(second) and not any(
                        other.alone and other.weighed is not None for other in theirs.values()
                    )
                if around:
                    neutral = {use.zero: self.added, use.one: self.weighing}
                    neutral.get(0, self.changed).add(call)
        return uses

    def _multiplied(self, data: Sequence[Tensor]) -> dict[int, Use]:
        """The uses of outputs in a product."""
        uses: dict[int, Use] = {}
        for first, second in itertools.permutations(data, 2):
            for call, use in self.uses_of(first).items():
                uses[call] = replace(use, scaled=True)
                if self.features[call] & self.of(second):
                    neutral = {use.zero: self.opening, use.one: self.weighing}
                    neutral.get(1, self.changed).add(call)
                    uses[call] = replace(uses[call], weighed=self.of(second))
                    if use.zero == 1:  # whatever comes next, the features are as they were
                        del uses[call]
        return uses


def tensors_in(values: object) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [part for part in tree_leaves(values) if isinstance(part, Tensor)]


def _changed(
    func: Any, args: tuple[Any, ...], named: Mapping[str, Any], value: float
) -> float | None:
    """What an operation makes of a value; None if that is not known.

    Args:
        func: the operation.
        args: its arguments.
        named: its named arguments.
        value: a value that its only tensor would have everywhere.
    """
    name = func.overloadpacket.__name__
    tensors = tensors_in((args, dict(named)))
    if len(tensors) == 1 and tensors[0].is_floating_point() and ON_EACH_VALUE.fullmatch(name):
        constant = tensors[0].new_full((), value)
        given, others = tree_map(
            lambda part: constant if isinstance(part, Tensor) else part, (args, dict(named))
        )
        return float(func(*given, **others))
    return 0.0 if value == 0 and KEEPS_ZERO.fullmatch(name) else None
