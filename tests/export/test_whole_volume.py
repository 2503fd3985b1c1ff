"""The sheet that bundles carry does, in plain PyTorch, what prediction does in slabs."""

import ast
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from segkit.config.model import ModelDescription
from segkit.export import whole_volume
from segkit.export.deployment import deployment
from segkit.export.monai_bundle import inference_of
from segkit.export.whole_volume import (
    FAR_BELOW,
    SLICES_APART,
    LargestComponents,
    WholeVolume,
    WrittenRegions,
    slice_axis,
)
from segkit.geometry.grid import ANISOTROPY as OWN_ANISOTROPY
from segkit.geometry.grid import Grid
from segkit.geometry.grid import separate_axis as own_separate_axis
from segkit.inference import model_walk as member
from segkit.inference import postprocess as components
from segkit.inference import windows
from segkit.inference.predictor import Predictor
from segkit.inference.source_rows import written_regions
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model
from tests.helpers import affine_of

EVEN = (1.0, 1.0, 1.0)
CT = {"kind": "ct", "lower": -1.0, "upper": 1.5, "mean": 0.2, "std": 0.7}
VARIANTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "cubic": {"interpolation": "cubic"},
    "separate slices": {"interpolation": "cubic", "spacing": (1.1, 1.0, 4.0)},
    "separate slices, linear": {"spacing": (0.9, 1.0, 1.0), "own": (0.7, 0.8, 3.9)},
    "the scan's own spacing": {"interpolation": "cubic", "spacing": (0.7, 0.8, 1.9)},
    "half of it": {"interpolation": "cubic", "spacing": (1.4, 1.6, 1.9)},
    "CT": {"normalisation": [CT, {"kind": "zscore", "nonzero": True}]},
    "regions": {
        "labels": {"background": 0, "whole": 1, "core": 2},
        "regions": {"whole": [1, 2], "core": [2]},
    },
    "slices": {"network": {"spatial_dims": 2, "channels": [4, 8]}, "patch_size": [8, 8]},
    "smaller than a window": {"patch_size": [24, 24, 24]},
}


def model_of(**changes: Any) -> Model:
    torch.manual_seed(3)
    told = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "test",
            "channels": ["a", "b"],
            "labels": {"background": 0, "one": 1, "two": 2},
            "network": {"channels": [4, 8, 8], "attention": {"skip": "additive_grid"}},
            "spacing": (1.0, 1.2, 2.0),
            "normalisation": ["zscore", "zscore"],
            "slices": "axial",
            "patch_size": [12, 8, 8],
            **changes,
        }
    )
    return Model(told, build_network(told).eval())


def scan_of(own: tuple[float, float, float] = (0.7, 0.8, 1.9), seed: int = 0) -> Volume:
    """Noise in a ball, so that the corners are empty and the box is smaller than the scan."""
    shape = (26, 23, 14)
    values = np.random.default_rng(seed).standard_normal((*shape, 2))
    grid = Grid(shape, affine_of("RAS", own))
    inside = np.linalg.norm(grid.centres() - grid.world(np.array(shape) * 0.4), axis=-1) < 8
    return Volume((values * inside[..., None]).astype(np.float32), grid)


def sheet_for(model: Model) -> WholeVolume:
    settings = inference_of(deployment(model), model.description)["inferer"]
    assert settings.pop("_target_") == "scripts.whole_volume.WholeVolume"
    return WholeVolume(**settings)


def logits_of(model: Model, scan: Volume) -> tuple[torch.Tensor, Predictor]:
    """Logits of the box, and the predictor to compare with."""
    predictor = Predictor(model, device="cpu", engine="torch")
    prepared = predictor.prepare(scan)
    box = np.moveaxis(scan.data[prepared.box], 3, 0).copy()
    found = sheet_for(model).logits(
        torch.from_numpy(box), prepared.source.spacing, lambda images: model.network(images)
    )
    return found, predictor


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_sheet_gives_the_labels_and_probabilities_of_prediction(variant: str) -> None:
    changes = dict(VARIANTS[variant])
    scan = scan_of(changes.pop("own", (0.7, 0.8, 1.9)))
    model = model_of(**changes)
    logits, predictor = logits_of(model, scan)
    expected = predictor(scan, probabilities=True)
    box = predictor.prepare(scan).box
    written = model.description.labelling.written
    if written is None:
        labels, shares = logits.argmax(dim=0), logits.softmax(dim=0)
    else:
        labels, shares = WrittenRegions(written)(logits)[0], logits.sigmoid()
    same = labels.numpy() == expected.labels.data[box]
    assert same.mean() >= 0.9999
    assert len(np.unique(labels)) > 1
    assert expected.probabilities is not None
    told = np.moveaxis(expected.probabilities.data[box], 3, 0).astype(np.float32)
    np.testing.assert_allclose(shares.numpy(), told, atol=1e-3)


@pytest.mark.parametrize("thickness", [0.1, 20.0])
def test_a_single_slice_is_resampled_as_prediction_resamples_it(thickness: float) -> None:
    model = model_of(interpolation="cubic", network={"spatial_dims": 2, "channels": [4, 8]},
                     patch_size=[8, 8])  # fmt: skip
    values = np.random.default_rng(0).standard_normal((26, 23, 1, 2)).astype(np.float32)
    scan = Volume(values, Grid((26, 23, 1), affine_of("RAS", (0.7, 0.8, thickness))))
    logits, predictor = logits_of(model, scan)
    assert (logits.argmax(dim=0).numpy() == predictor(scan).labels.data).mean() >= 0.999


@settings(max_examples=4)
@example(spacing=(1.5, 0.5, 1.0), interpolation="linear", seed=0)  # exactly at the limit
@given(
    st.tuples(*[st.floats(0.5, 3.0)] * 3), st.sampled_from(["linear", "cubic"]), st.integers(0, 99)
)
def test_any_spacing_is_resampled_as_prediction_resamples_it(
    spacing: tuple[float, float, float], interpolation: str, seed: int
) -> None:
    model = model_of(spacing=spacing, interpolation=interpolation)
    scan = scan_of(seed=seed)
    logits, predictor = logits_of(model, scan)
    expected = predictor(scan)
    labels = logits.argmax(dim=0).numpy()
    assert (labels == expected.labels.data[predictor.prepare(scan).box]).mean() >= 0.999


def test_a_scan_of_nothing_is_background() -> None:
    model = model_of()
    empty = torch.zeros(2, 9, 8, 7)
    found = sheet_for(model).logits(empty, (1.0, 1.0, 1.0), lambda images: model.network(images))
    assert found.argmax(dim=0).sum() == 0
    torch.testing.assert_close(found[1:], torch.full((2, 9, 8, 7), FAR_BELOW))


def test_both_files_agree_in_their_common_entries() -> None:
    assert SLICES_APART == OWN_ANISOTROPY and FAR_BELOW == member.UNLIKELY
    for size, patch, overlap, multiple in ((45, 16, 0.4, 8), (7, 16, 0.5, 4), (100, 32, 0.9, 2)):
        own = windows.window_starts(size, patch, overlap, multiple)
        assert whole_volume.starts_of_windows(size, patch, overlap, multiple) == own
    assert torch.equal(whole_volume.window_profile(13), windows.window_weight(13))
    for spacings in (((1.0, 1.0, 3.1), EVEN), (EVEN, (4.0, 1.0, 1.0)), ((4.0, 1.0, 4.0), EVEN)):
        for axes in ((0, 1, 2), (0, 1), (2,), ()):
            assert slice_axis(*spacings, axes) == own_separate_axis(*spacings, axes)


def test_regions_and_components_are_those_of_prediction() -> None:
    random = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 9, 8, 7, generator=random)
    own = written_regions(logits, (2, 1, 3))
    assert torch.equal(WrittenRegions((2, 1, 3))(logits)[0].long(), own)
    sparse = torch.where(torch.rand(9, 8, 7, generator=random) < 0.2, own, 0)
    for of_foreground in (False, True):
        for of_labels in ((), (1,), (3, 1)):
            found = LargestComponents(of_foreground=of_foreground, of_labels=of_labels)
            expected = components.apply(sparse.numpy(), of_foreground, of_labels)
            assert np.array_equal(found(sparse[None].float())[0].numpy(), expected)


def test_the_sheet_needs_neither_segkit_nor_monai() -> None:
    tree = ast.parse(Path(whole_volume.__file__).read_text(encoding="utf-8"))
    roots = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            roots |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.module is not None
            roots.add(node.module.split(".")[0])
    assert roots - sys.stdlib_module_names == {"numpy", "scipy", "torch"}
