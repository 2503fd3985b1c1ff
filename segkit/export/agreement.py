"""Compare the outputs of an exported network with those of the original in PyTorch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from segkit.errors import counted
from segkit.inference.engines.converted import RunGraph, Traced
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from segkit.inference.model_walk import layout_of
from segkit.inference.source_rows import labels_of
from segkit.inference.windows import WindowLayout, slide
from segkit.model.folder import Model

DIFFERENCE = 1e-3
"""Largest difference of maps, and of logits if these are at most 1."""
SAME_LABELS = 0.9999
"""Smallest share of voxels with the same label."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of an exported network with the original network on the same windows."""

    differences: Mapping[str, float]
    """Largest absolute difference of each output, by name."""
    largest_logit: float
    """Largest absolute logit of the original network."""
    same_labels: float
    """Share of voxels with the same label, after windows are blended."""

    @property
    def holds(self) -> bool:
        """True if all differences are within the limits. Large logits may differ more."""
        allowed = {LOGITS: DIFFERENCE * max(self.largest_logit, 1.0)}
        close = all(
            difference <= allowed.get(name, DIFFERENCE)
            for name, difference in self.differences.items()
        )
        return close and self.same_labels >= SAME_LABELS

    def lines(self) -> list[str]:
        """The agreement as lines of text."""
        maps = {name: value for name, value in self.differences.items() if name != LOGITS}
        lines = [
            f"largest difference of logits: {self.differences[LOGITS]:.2g} "
            f"(the largest logit is {self.largest_logit:.3g})"
        ]
        if maps:
            name, value = max(maps.items(), key=lambda item: item[1])
            lines.append(
                f"largest difference of {counted(len(maps), 'map')}: {value:.2g}, of {name}"
            )
        return [*lines, f"same label: {self.same_labels:.4%} of voxels"]


def compare_outputs(
    model: Model,
    exported: RunGraph,
    image: Float[Tensor, "channel x y z"],
    *,
    names: Sequence[str] | None = None,
    batch_size: int = 2,
    layout: WindowLayout | None = None,
) -> Agreement:
    """Compare an exported network with PyTorch on the windows of a prepared image.

    Args:
        model: the model that was exported.
        exported: function that runs the exported network.
        image: a prepared image.
        names: the outputs of the exported network, logits first; all outputs if not given.
        batch_size: number of windows in each call. With two, a network that was exported for a
            batch of one fails.
        layout: the windows over the image; those of the model if not given.
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
            # Python's own `max` would ignore NaN.
            difference = (found[name] - expected[name]).abs().max()
            differences[name] = float(torch.maximum(difference, torch.tensor(differences[name])))
        largest = max(largest, float(expected[LOGITS].abs().max()))
        return {"eager": expected[LOGITS], "exported": found[LOGITS]}

    blended = slide(image, both, layout or layout_of(model), batch_size=batch_size)
    written = model.description.labelling.written
    same = labels_of(blended["eager"], written) == labels_of(blended["exported"], written)
    return Agreement(differences, largest, float(same.double().mean()))


def noise_for(model: Model) -> Float[Tensor, "channel x y z"]:
    """An image of noise with several windows, to compare a model without a scan."""
    description = model.description
    size = [length * 3 // 2 for length in layout_of(model).patch_size]
    image = torch.randn(
        len(description.channels), *size, generator=torch.Generator().manual_seed(0)
    )
    if description.first_stage is None:
        return image
    return torch.cat([image, torch.zeros(1, *size)])
