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
"""

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

MIXING = re.compile(r"(?!upsample).*(conv|mm|mv|matmul|linear|attention|multi_head|einsum).*")
"""Names of operations with weights: convolutions and matrix products."""
KEEPS_ONE = re.compile(
    r"_?(unsafe_)?(view|reshape)(_alias|_copy)?|permute|transpose|t|expand|(un)?squeeze|slice"
    r"|select|split(_with_sizes)?|unbind|clone|detach|alias|lift_fresh|_to_copy|repeat|flip|roll"
    r"|upsample_.*|_?adaptive_avg_pool.*|mean|amax|amin|dropout"
)
"""Names of operations that change the place of values, or their number, but neither 0 nor 1."""
KEEPS_ZERO = re.compile(
    r"(mul|div|neg|abs|relu|leaky_relu|elu|gelu|silu|tanh|hardtanh|sum|constant_pad_nd)_?"
    r"|(avg|max)_pool.*|native_dropout"
)
"""Names of operations that keep 0 as it is."""
Kept = Literal["one", "zero", "nothing"]
"""The value of an output that is the same in what is made of it: 0 and 1, only 0, or none."""


@dataclass(frozen=True)
class Use:
    """How a tensor holds the output of a call of a module."""

    keeps: Kept
    weighed: frozenset[int] | None = None
    """The sources of the features by which the output was multiplied; None if it was not."""
    alone: bool = True
    """Whether the tensor is 0 if the output is, so that nothing was added to it."""

    def after(self, name: str) -> "Use":
        """The use in the result of an operation of this name."""
        if self.keeps == "nothing" or KEEPS_ONE.fullmatch(name):
            return self
        return replace(self, keeps="zero" if KEEPS_ZERO.fullmatch(name) else "nothing")


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
        """The calls whose output is a factor of features from which it is computed."""
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
        self.uses[tensor] = {**self.uses_of(tensor), call: Use("one")}

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
            uses = {call: use.after(name) for call, use in self.uses_of(data[0]).items()}
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
                uses[call] = replace(use.after("sum"), alone=False)
                if call in theirs:
                    continue
                if use.weighed is None:
                    around = bool(self.features[call] & self.of(second))
                else:  # x + x * map(x), but neither y + x * map(x) nor x * a(x) + x * b(x)
                    around = use.weighed <= self.of(second) and not any(
                        other.alone and other.weighed is not None for other in theirs.values()
                    )
                if around:
                    (self.changed if use.keeps == "nothing" else self.added).add(call)
        return uses

    def _multiplied(self, data: Sequence[Tensor]) -> dict[int, Use]:
        """The uses of outputs in a product."""
        uses: dict[int, Use] = {}
        for first, second in itertools.permutations(data, 2):
            for call, use in self.uses_of(first).items():
                uses[call] = use.after("mul")
                if self.features[call] & self.of(second):
                    (self.weighing if use.keeps == "one" else self.changed).add(call)
                    uses[call] = replace(uses[call], weighed=self.of(second))
        return uses


def tensors_in(values: object) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    return [part for part in tree_leaves(values) if isinstance(part, Tensor)]
