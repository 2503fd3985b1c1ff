"""A device that does not exist: its tensors lie on the CPU, and what a GPU would wait for is told.

    with pretended() as device:
        loss = network(device.put(image)) …
    assert device.waits == {} and device.mismatches == {}

Every operation is computed on the CPU. Tensors of the device say that they are elsewhere, so that a
tensor that was left on the host is a mismatch, and each answer that the host asks of the device (a
number, a shape that depends on values, a copy that blocks) is a wait. Both are counted by the line
of segkit that asked. A `HostCopy` is no wait; when its values are read is kept in `reads`.
"""

import contextlib
import traceback
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from segkit.system.host_copy import HostCopy

DEVICE = torch.device("meta")
ANSWERS = {
    "aten::_local_scalar_dense",
    "aten::_unique2",
    "aten::bincount",
    "aten::equal",
    "aten::histc",
    "aten::is_nonzero",
    "aten::item",
    "aten::masked_select",
    "aten::nonzero",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
"""What the host cannot go on without."""
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
MOVES = {"aten::to", "aten::_to_copy", "aten::copy_"}


class Held(Tensor):
    """A tensor that says it lies on the device, and holds the values."""

    values: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> "Held":
        held = Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device=DEVICE,
        )
        held.values = values
        return held

    def __deepcopy__(self, memo: Any) -> "Held":
        return Held(self.values.clone())

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} of the pretended device was called outside of `pretended`")


class Pretended(TorchDispatchMode):
    """Computes for the device, and counts."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.mismatches: Counter[str] = Counter()
        self.operations = 0
        self.reads: list[int] = []
        """The number of operations before each reading of a `HostCopy`."""

    def put(self, values: Tensor) -> Tensor:
        """A tensor's copy on the device."""
        return Held(values.clone())

    def put_module(self, module: nn.Module) -> nn.Module:
        """A module's parameters and buffers, moved to the device."""
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    held = Held(parameter.detach().clone())
                    held.requires_grad_(parameter.requires_grad)
                    part._parameters[name] = held  # type: ignore[assignment]
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = Held(buffer.detach().clone())
        return module

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, Held) for tensor in tensors)
        asked = kwargs.get("device")
        goes_to_device = on_device if asked is None else torch.device(asked).type == DEVICE.type
        if name == "aten::copy_":
            goes_to_device = isinstance(args[0], Held)
            self._count_move(isinstance(args[1], Held), goes_to_device, kwargs, args[2:])
        elif name in MOVES and asked is not None:
            self._count_move(on_device, goes_to_device, kwargs, ())
        elif on_device and name in INDEXING:
            for index in (each for each in args[1] if each is not None):
                if index.dtype in (torch.bool, torch.uint8) or not isinstance(index, Held):
                    self.waits[f"{name} {_asker()}"] += 1
        elif on_device and name in ANSWERS:
            self.waits[f"{name} {_asker()}"] += 1
        if on_device and name not in MOVES | INDEXING:
            for tensor in tensors:
                if not isinstance(tensor, Held) and tensor.dim() > 0:
                    self.mismatches[f"{name} {_asker()}"] += 1
        self.operations += on_device and not func.is_view
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        plain_args, plain = tree_map(
            lambda x: x.values if isinstance(x, Held) else x, (args, kwargs)
        )
        result = func(*plain_args, **plain)
        if not func._schema.returns:  # such as _foreach_lerp_, which changes a list in place
            return result
        if name.endswith("_") and tensors and isinstance(tensors[0], Held):
            return tensors[0]
        if isinstance(out := kwargs.get("out"), Held):
            return out
        if (name in ANSWERS and not isinstance(result, Tensor)) or not goes_to_device:
            return result
        return tree_map(lambda x: Held(x) if isinstance(x, Tensor) else x, result)

    def _count_move(self, was: bool, will_be: bool, kwargs: Any, positional: Any) -> None:
        """A copy from the device is waited for; one to it unless it says otherwise."""
        non_blocking = bool(kwargs.get("non_blocking", positional[0] if positional else False))
        if was != will_be and not (will_be and non_blocking):
            self.waits[f"copy {_asker()}"] += 1


def _asker() -> str:
    """The innermost line of segkit that is being run."""
    for frame in reversed(traceback.extract_stack()):
        if "/segkit/" in frame.filename and "/tests/" not in frame.filename:
            return f"{frame.filename.rpartition('/segkit/')[2]}:{frame.lineno} {frame.line}"
    return "elsewhere"


class _Autocast(contextlib.nullcontext[None]):
    """The device has no half precision: what is asked of it is computed as it is."""

    def __init__(self, device_type: str, *_: Any, **__: Any) -> None:
        super().__init__()


@contextlib.contextmanager
def pretended() -> Iterator[Pretended]:
    """Operations inside are computed for the device, and counted."""
    device = Pretended()
    host_generator = mock.patch(
        "segkit.data.augment_intensity.generator_on", lambda device, generator: generator
    )
    of_synthesis = mock.patch(
        "segkit.data.synthesis.generator_on", lambda device, generator: generator
    )

    def start(copy: HostCopy, tensor: Tensor) -> None:
        copy.event = None
        copy.held = tensor.values.clone() if isinstance(tensor, Held) else tensor

    def values(copy: HostCopy) -> Tensor:
        device.reads.append(device.operations)
        return copy.held

    late = mock.patch.multiple(HostCopy, __init__=start, values=values)
    with mock.patch("torch.autocast", _Autocast), host_generator, of_synthesis, late, device:
        yield device
