"""The network converted once for a faster runtime, and kept in the user's cache.

    network ─▶ exported for one window, every map an output ─▶ the runtime's own files, in
                                                              ~/.cache/segkit/engines/NAME-DIGEST/

The digest covers all that they depend on, so that other weights, another window or another version
make files of their own. They are kept in the user's own cache alone: beside a model that comes from
elsewhere could lie what was never made of its weights, or a graph that reads files of its choice.
"""

import hashlib
import logging
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.export import ExportedProgram

import segkit.nn
from segkit.errors import ModelError
from segkit.inference.engines.conversion_cache import artefact, find, user_cache
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, TorchEngine, run
from segkit.model.folder import Model
from segkit.nn.map_tap import edited
from segkit.nn.network import SegmentationNetwork, unet_of

ENGINES_FOLDER = "engines"
INPUT = "image"
"""The name of the input in files that have names."""
FREE_AXIS = "batch"
"""The name of an axis that may have any length."""

logger = logging.getLogger(__name__)

RunGraph = Callable[[Tensor, tuple[str, ...]], list[Tensor]]
"""The outputs of these names for a batch of windows, until the same thread asks again."""


class ConversionError(ModelError):
    """A network that a runtime cannot run."""


@runtime_checkable
class Runtime(Protocol):
    """What converts a network and runs it."""

    name: str
    version: str

    def convert(self, network: "Traced", window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows like this one."""

    def load(self, folder: Path, names: Sequence[str]) -> RunGraph:
        """What runs the network of these files, whose outputs have these names, in order."""


class Traced(nn.Module):
    """A network with every output it can have: logits, each map by its key, presence."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network
        self.keys = sorted(network.maps())
        if network.presence is not None:
            self.keys.append(PRESENCE)
        self.names = [LOGITS, *self.keys]

    def forward(self, windows: Float[Tensor, "batch channel x y z"]) -> tuple[Tensor, ...]:
        """The outputs in the order of `names`."""
        outputs = run(self.network, windows, self.keys)
        return tuple(outputs[name] for name in self.names)


@contextmanager
def export_quietly() -> Iterator[None]:
    """Within it, PyTorch does not warn of what its own export and copies of programs call."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\). is deprecated")
        yield


def exported_program(network: nn.Module, windows: Tensor, *, any_number: bool) -> ExportedProgram:
    """A network as a graph of `torch.export`, which depends on the windows' shape only.

    Args:
        network: takes (batch, channel, x, y, z); in evaluation mode.
        windows: an example, on the CPU. A batch of one stays one.
        any_number: whether the graph takes any number of windows, and not just so many.
    """
    # Made anew, as the given ones may be inference tensors, which cannot be exported.
    with torch.inference_mode(False), torch.no_grad(), export_quietly():
        example = torch.zeros(windows.shape)
        axes = ({0: torch.export.Dim(FREE_AXIS)},) if any_number else None
        return torch.export.export(network, (example,), dynamic_shapes=axes, strict=False)


class ConvertedEngine:
    """Runs a network on the CPU in another runtime than PyTorch's.

    It is converted when the first window comes, for windows of that shape, which go through one by
    one; outputs that are not asked for cost nothing, and those of a batch of one are not copied:
    they hold until the same thread asks again. A network whose maps are being edited runs in
    PyTorch, for what was converted knows no edits. A model that was not read from a folder is
    converted for this engine alone. Both runtimes could flush numbers too small to be normal to
    zero, but would leave the caller's thread doing so for good: they are not asked to.

    Raises ConversionError where the runtime cannot run the network.
    """

    def __init__(self, model: Model, runtime: Runtime) -> None:
        self.model = model
        self.runtime = runtime
        self.eager = TorchEngine(model.network, device=torch.device("cpu"))
        self.traced = Traced(model.network).eval()
        self.runs: dict[tuple[int, ...], RunGraph] = {}

    def __call__(
        self, windows: Float[Tensor, "batch channel x y z"], keys: Collection[str]
    ) -> dict[str, Tensor]:
        """The logits of windows, and the maps of these keys, in float32 on the CPU."""
        if edited(self.model.network):
            return self.eager(windows, keys)
        windows = windows.cpu().contiguous()
        shape = tuple(windows.shape[1:])
        if shape not in self.runs:
            self.runs[shape] = self._load(windows[:1])
        names = (LOGITS, *sorted(keys))
        if len(windows) == 1:
            return dict(zip(names, self.runs[shape](windows, names), strict=True))
        each = [
            [output.clone() for output in self.runs[shape](window, names)]
            for window in windows.split(1)
        ]
        return {name: torch.cat([outputs[n] for outputs in each]) for n, name in enumerate(names)}

    def is_ready(self, windows: Float[Tensor, "batch channel x y z"]) -> bool:
        """Whether the network has been converted for such windows already."""
        shape = tuple(windows.shape[1:])
        return shape in self.runs or find(self._name(shape), self._folders()) is not None

    def _load(self, window: Tensor) -> RunGraph:
        name = self._name(tuple(window.shape[1:]))
        temporary = tempfile.mkdtemp(prefix="segkit-")
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        folders = [*self._folders(), Path(temporary)]

        def convert(folder: Path) -> None:
            logger.info("converting the network for %s, once for this model", self.runtime.name)
            self.runtime.convert(self.traced, window, folder)

        try:
            return self.runtime.load(artefact(name, folders, convert), self.traced.names)
        except Exception as error:  # what runtimes raise has nothing in common
            reason = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"{self.runtime.name} cannot run this network: {reason}; use --engine torch"
            ) from error

    def _folders(self) -> list[Path]:
        lasting = lasting_folder(self.model)
        return [] if lasting is None else [lasting]

    def _name(self, shape: tuple[int, ...]) -> str:
        return f"{self.runtime.name}-{digest(self.model, shape, self.runtime.version)[:32]}"


def lasting_folder(model: Model) -> Path | None:
    """Where what a model is converted to lies for the next time: in the user's own cache.

    None where it was not read from a folder, and for a module that was given: another of the same
    weights may compute something else, and nothing here would tell.
    """
    if model.folder is None or model.description.network.given is not None:
        return None
    return user_cache() / ENGINES_FOLDER


def digest(model: Model, shape: tuple[int, ...], runtime: str) -> str:
    """Stands for all that a converted network depends on, code that networks are made of included.

    `runtime` is the version of what it is converted for.
    """
    total = hashlib.sha256()
    sources = sorted(Path(segkit.nn.__file__).parent.glob("*.py"))
    for part in (
        *(version("segkit"), version("torch"), runtime),
        str(shape),
        model.description.model_dump_json(exclude={"segkit", "run"}),
        *(file.read_text(encoding="utf-8") for file in sources),
    ):
        total.update(f"{len(part)} {part}".encode())
    for key, weight in unet_of(model.network).state_dict().items():
        total.update(f"{key} {tuple(weight.shape)} {weight.dtype}".encode())
        total.update(weight.detach().cpu().contiguous().numpy().tobytes())
    return total.hexdigest()
