"""How far an exported network is from the one that it was made of."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.inference.engines.converted import RunGraph, Traced
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.model_walk import layout_of
from segkit.inference.source_rows import labels_of
from segkit.inference.windows import slide
from segkit.model.folder import Model

DIFFERENCE = 1e-3
"""The most by which maps may differ, and logits, where the largest of these is 1 or less."""
SAME_LABELS = 0.9999
"""The least share of voxels with the same label."""


@dataclass(frozen=True)
class Agreement:
    """What an exported network and its origin say of the same windows."""

    differences: Mapping[str, float]
    """Of each output by its name, the largest."""
    largest_logit: float
    same_labels: float
    """Share of voxels that both give one label, once windows are blended."""

    @property
    def holds(self) -> bool:
        """Whether the two may be taken for one another. Logits differ as they are large."""
        allowed = {LOGITS: DIFFERENCE * max(self.largest_logit, 1.0)}
        close = all(
            difference <= allowed.get(name, DIFFERENCE)
            for name, difference in self.differences.items()
        )
        return close and self.same_labels >= SAME_LABELS

    def lines(self) -> list[str]:
        """The same in words."""
        maps = {name: value for name, value in self.differences.items() if name != LOGITS}
        told = [
            f"largest difference of logits: {self.differences[LOGITS]:.2g} "
            f"(the largest logit is {self.largest_logit:.3g})"
        ]
        if maps:
            name, value = max(maps.items(), key=lambda item: item[1])
            told.append(f"largest difference of {len(maps)} maps: {value:.2g}, of {name}")
        return [*told, f"same label: {self.same_labels:.4%} of voxels"]


def compare_outputs(
    model: Model,
    exported: RunGraph,
    image: Float[Tensor, "channel x y z"],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 2,
) -> Agreement:
    """How far `exported` is from PyTorch on the windows of a prepared image, and blended.

    `names` are the outputs that it has, logits first; all that the network has where not given.
    Windows come by twos, which an export that forgot about batches would not survive.
    """
    names = names or Traced(model.network).names
    eager = TorchEngine(model.network, device=torch.device("cpu"))
    differences = dict.fromkeys(names, 0.0)
    largest = 0.0

    def both(windows: Tensor) -> dict[str, Tensor]:
        nonlocal largest
        expected = eager(windows, names[1:])
        found = dict(zip(names, exported(windows.contiguous(), tuple(names)), strict=True))
        for name in names:
            # Not Python's own `max`, to which no number is small.
            off = (found[name] - expected[name]).abs().max()
            differences[name] = float(torch.maximum(off, torch.tensor(differences[name])))
        largest = max(largest, float(expected[LOGITS].abs().max()))
        return {"eager": expected[LOGITS], "exported": found[LOGITS]}

    blended = slide(image, both, layout_of(model), batch_size=batch_size)
    written = model.description.labelling.written
    same = labels_of(blended["eager"], written) == labels_of(blended["exported"], written)
    return Agreement(differences, largest, float(same.double().mean()))


def noise_for(model: Model) -> Float[Tensor, "channel x y z"]:
    """An image of noise with several windows, for a model to be compared on without a scan."""
    description = model.description
    size = [length * 3 // 2 for length in layout_of(model).patch_size]
    image = torch.randn(
        len(description.channels), *size, generator=torch.Generator().manual_seed(0)
    )
    if description.first_stage is None:
        return image
    return torch.cat([image, torch.zeros(1, *size)])
