"""Networks converted for a faster runtime, once, and kept in the user's cache.

    network ─▶ exported for one window, every map an output ─▶ the runtime's own files, in
                                                              ~/.cache/segkit/engines/NAME-DIGEST/

The digest covers everything on which the files depend: other weights, another window size or
another version have other files. The files are kept only in the user's own cache, never beside a
model. Otherwise a model from someone else could come with files that were not made from its
weights, or with a graph that reads any file.
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
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, TorchEngine, run
from segkit.io.folder_cache import cached_folder, user_cache
from segkit.model.folder import Model
from segkit.nn.map_tap import edited
from segkit.nn.network import SegmentationNetwork, unet_of

ENGINES_FOLDER = "engines"
INPUT = "image"
"""Name of the input, in formats with names."""
FREE_AXIS = "batch"
"""Name of the batch axis, which may have any length."""

logger = logging.getLogger(__name__)

RunGraph = Callable[[Tensor, tuple[str, ...]], list[Tensor]]
"""A function from a batch of windows and names to the outputs of these names. They are valid until
the same thread calls it again."""


class ConversionError(ModelError):
    """A runtime cannot run a network."""


@runtime_checkable
class Runtime(Protocol):
    """Converts a network and runs it."""

    name: str
    version: str

    def convert(self, network: "Traced", window: Tensor, folder: Path) -> None:
        """Write the files of a network for windows of this shape."""

    def load(self, folder: Path, names: Sequence[str]) -> RunGraph:
        """Function that runs the network of these files; its outputs have these names, in order."""


class Traced(nn.Module):
    """A network that returns all its outputs: logits, each map by its key, presence."""

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
    """Within this context, PyTorch does not warn about deprecated parts of its own export."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".isinstance\(treespec, LeafSpec\). is deprecated")
        yield


def exported_program(network: nn.Module, windows: Tensor, *, any_number: bool) -> ExportedProgram:
    """A network as a graph of `torch.export`, which depends only on the shape of the windows.

    Args:
        network: takes (batch, channel, x, y, z); in evaluation mode.
        windows: an example on the CPU. If its batch has one window, the graph takes only one.
        any_number: True if the graph must take batches of any size, not only of that of `windows`.
    """
    # New tensors, because `windows` may be inference tensors, which cannot be exported.
    with torch.inference_mode(False), torch.no_grad(), export_quietly():
        example = torch.zeros(windows.shape)
        axes = ({0: torch.export.Dim(FREE_AXIS)},) if any_number else None
        return torch.export.export(network, (example,), dynamic_shapes=axes, strict=False)


class ConvertedEngine:
    """Runs a network on the CPU in another runtime than PyTorch.

    The first window of a shape converts the network for windows of this shape, which then run one
    by one. Outputs that are not requested cost no time. The outputs of a batch of one window are
    not copied, so they are valid until the same thread calls the engine again. While maps are
    edited, the network runs in PyTorch, because a converted network cannot be edited. If the model
    was not read from a folder, the conversion is used only by this engine and then deleted.
    Denormal numbers are not flushed to zero, because both runtimes would leave this setting on in
    the calling thread.

    Raises:
        ConversionError: the runtime cannot run the network.
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
        """Logits of the windows and the maps of these keys, in float32 on the CPU."""
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

    def _load(self, window: Tensor) -> RunGraph:
        name = self._name(tuple(window.shape[1:]))
        temporary = tempfile.mkdtemp(prefix="segkit-")
        weakref.finalize(self, shutil.rmtree, temporary, ignore_errors=True)
        folders = [*self._folders(), Path(temporary)]

        def convert(folder: Path) -> None:
            logger.info("converting the network for %s, once for this model", self.runtime.name)
            self.runtime.convert(self.traced, window, folder)

        try:
            return self.runtime.load(cached_folder(name, folders, convert), self.traced.names)
        except Exception as error:  # the errors of runtimes have no common base class
            reason = " ".join(str(error).split())[:300]
            raise ConversionError(
                f"{self.runtime.name} cannot run this network: {reason}; use --engine torch"
            ) from error

    def _folders(self) -> list[Path]:
        lasting = conversion_folder(self.model)
        return [] if lasting is None else [lasting]

    def _name(self, shape: tuple[int, ...]) -> str:
        return f"{self.runtime.name}-{digest(self.model, shape, self.runtime.version)[:32]}"


def conversion_folder(model: Model) -> Path | None:
    """Folder in the user's cache that holds the conversions of a model.

    None if the model was not read from a folder, or if its network is the user's own module: two
    modules with the same weights may compute different outputs, and the digest cannot see this.
    """
    if model.folder is None or model.description.network.given is not None:
        return None
    return user_cache() / ENGINES_FOLDER


def digest(model: Model, shape: tuple[int, ...], runtime: str) -> str:
    """SHA-256 of everything on which a converted network depends, the code of `nn` included.

    Args:
        model: the model.
        shape: shape of a window.
        runtime: version of the runtime.
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
