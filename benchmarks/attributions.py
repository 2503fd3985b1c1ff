"""Attributions and their measures beside Captum's and Quantus's, and what kept windows save.

    pip install --no-deps --target PEERS captum==0.9.0 quantus==0.6.0 scikit-image pandas \
        opencv-python-headless cachetools imageio lazy_loader tifffile
    python benchmarks/attributions.py agreement --peers PEERS [--out FILE.json]
    python benchmarks/attributions.py time [--naive-boxes 6] [--out FILE.json]

agreement  a smooth network of two layers and one window: each attribution of segkit and of Captum,
           each measure of segkit and of Captum or Quantus, on the same images and noise
time       occlusion of a gated 3D U-Net with and without kept windows, and the number of windows
           that the network computes; without, a few boxes are timed and the others are counted

All on the CPU. Times are processor time, which other programs on the machine change little.
"""

import argparse
import itertools
import json
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray
from rich.console import Console
from torch import Tensor, nn

import segkit
from segkit.config.attention import AdditiveGridGateConfig, AttentionConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.explain.attribution.attribute import Method, baseline_image
from segkit.explain.attribution.parameter_tests import rank_similarity
from segkit.explain.attribution.perturbations import occlusion
from segkit.explain.attribution.road import impute
from segkit.explain.attribution.supervoxels import Supervoxels
from segkit.explain.attribution.target import SummedOutput
from segkit.model.build import build_network

SHAPE = (8, 8, 8)
REGION = (slice(2, 6), slice(3, 7), slice(1, 5))
NAMES = {"background": 0, "one": 1, "two": 2}
Figures = dict[str, Any]


class Smooth(nn.Module):
    """Logits of three classes from two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv3d(1, 4, kernel_size=3, padding=1)
        self.last = nn.Conv3d(4, 3, kernel_size=3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(image)))


class Summed(nn.Module):
    """The logits of a segmentation network, summed over the region: a classifier for the peers."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)[(slice(None), slice(None), *REGION)].flatten(2).sum(dim=2)


def described(network: NetworkConfig, patch_size: tuple[int, int, int]) -> ModelDescription:
    return ModelDescription(
        segkit="benchmark",
        run="benchmark",
        channels=["image"],
        labels=NAMES,
        network=network,
        spacing=(1.0, 1.0, 1.0),
        normalisation=[{"kind": "ct", "lower": -1e6, "upper": 1e6, "mean": 0, "std": 1}],
        slices="axial",
        patch_size=list(patch_size),
    )


def scan_of(shape: tuple[int, int, int]) -> segkit.Volume:
    values = np.random.default_rng(1).normal(1, 1, shape).astype(np.float32)
    return segkit.Volume(values, segkit.Grid(shape, np.eye(4)))


def agreement() -> Figures:
    """The largest difference of each attribution, relative to its largest value, and each measure
    beside the peer's."""
    given = NetworkConfig.model_validate({"given": {"name": "smooth", "multiple": [1, 1, 1]}})
    module, scan = Smooth(), scan_of(SHAPE)
    predictor = segkit.Predictor(
        segkit.described_model(described(given, SHAPE), module), device="cpu", engine="torch"
    )
    labels = np.zeros(SHAPE, np.uint8)
    labels[REGION] = 1
    region = scan.like(labels)

    def ours(
        method: Method,
        image: ndarray | None = None,
        output: str | None = None,
        parts: ndarray | None = None,
        **settings: Any,
    ) -> ndarray:
        found = segkit.attribute(
            predictor,
            scan if image is None else scan.like(image),
            method,
            region=region,
            output=output,
            supervoxels=None if parts is None else scan.like(parts),
            settings=segkit.AttributionSettings(**settings),
        )
        return found["one"].values.data

    classifier = Summed(module).eval()
    image = torch.from_numpy(scan.data)[None, None]
    return {
        "attributions, largest relative difference": of_captum(classifier, image, ours),
        "measures, segkit and peer": of_measures(classifier, image, ours),
    }


def of_captum(classifier: nn.Module, image: Tensor, ours: Callable[..., ndarray]) -> Figures:
    from captum.attr import IntegratedGradients, Occlusion, Saliency, ShapleyValues

    base = baseline_image(image[0], 1, "mean", patch_size=SHAPE)[None]
    blurred = baseline_image(image[0], 1, "blurred", patch_size=SHAPE)[None]
    quarters = np.zeros(SHAPE, np.uint8)
    for number, (x, y) in enumerate(itertools.product((0, 4), repeat=2), start=1):
        quarters[x : x + 4, y : y + 4] = number
    ig = IntegratedGradients(classifier).attribute(
        image, blurred, target=1, n_steps=16, method="gausslegendre"
    )
    gradient = Saliency(classifier).attribute(image, target=1, abs=False)
    boxes = Occlusion(classifier).attribute(
        image, (1, 4, 4, 4), strides=(1, 4, 4, 4), baselines=base, target=1
    )
    shapley = ShapleyValues(classifier).attribute(
        image, baselines=base, target=1, feature_mask=torch.from_numpy(quarters).long() - 1
    )
    cells = ours("occlusion", cell_mm=4.0)
    pairs = {
        "integrated gradients, 16 points": (ours("integrated_gradients", steps=16), ig),
        "gradient (SmoothGrad without noise)": (ours("smoothgrad", draws=1, noise=0.0), gradient),
        "occlusion, boxes of 4": (cells.repeat(4, 0).repeat(4, 1).repeat(4, 2), boxes),
        "Shapley values of 4 parts": (ours("kernel_shap", parts=quarters, samples=16), shapley),
    }
    return {
        name: float(np.abs(own - peer.detach().numpy()[0, 0]).max() / np.abs(own).max())
        for name, (own, peer) in pairs.items()
    }


def of_measures(classifier: nn.Module, image: Tensor, ours: Callable[..., ndarray]) -> Figures:
    """Each measure of the gradient, by segkit and by the peer, on the same noise."""
    import quantus
    from captum.attr import Saliency
    from captum.metrics import sensitivity_max

    own = image.numpy()[0, 0]
    changed = next(segkit.noisy_copies(own, radius=0.1, draws=1, seed=5))

    def gradient(at: ndarray) -> ndarray:
        return ours("smoothgrad", at, draws=1, noise=0.0)

    def total(at: ndarray) -> ndarray:
        with torch.no_grad():
            return classifier(torch.from_numpy(at)[None, None]).numpy()

    def captum_gradient(inputs: Any) -> Any:
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        with torch.enable_grad():
            return (Saliency(classifier).attribute(inputs, target=1, abs=False),)

    # Quantus reads 2D images, so the slices of the volume are its rows.
    flat = (1, 1, SHAPE[0], SHAPE[1] * SHAPE[2])

    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = classifier

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x.reshape(-1, 1, *SHAPE))

    def explained(model: nn.Module, inputs: ndarray, targets: ndarray, **_: Any) -> ndarray:
        at = torch.as_tensor(np.asarray(inputs, np.float32)).requires_grad_()
        chosen = model(at)[torch.arange(len(at)), torch.as_tensor(targets)].sum()
        (found,) = torch.autograd.grad(chosen, at)
        return found.numpy()

    def same_noise(arr: ndarray, indices: Any, **_: Any) -> ndarray:
        return changed.reshape(arr.shape).copy()

    settings: Any = {"abs": False, "normalise": False, "disable_warnings": True}
    draw = {"perturb_func": same_noise, "nr_samples": 1, "return_aggregate": False, **settings}
    batch: Any = {
        "model": Flat().eval(),
        "x_batch": own.reshape(flat),
        "y_batch": np.array([1]),
        "a_batch": gradient(own).reshape(flat),
        "explain_func": explained,
        "device": "cpu",
    }
    ranks: Any = {"similarity_func": quantus.similarity_func.correlation_spearman}

    def quantus_of(metric: Any) -> float:
        return float(np.ravel(metric(**batch))[0])

    def of_output(name: str) -> ndarray:
        return ours("smoothgrad", output=name, draws=1, noise=0.0)

    def by_network(network: nn.Module, at: ndarray) -> ndarray:
        return explained(network, at.reshape(flat), np.array([1])).reshape(SHAPE)

    layers = segkit.smooth_mprt(Flat().eval(), by_network, own, draws=1, seed=43)
    smooth = quantus.SmoothMPRT(nr_samples=1, layer_order="top_down", seed=42, **ranks, **settings)(
        **batch
    )
    picture = np.random.default_rng(2).random((2, 9, 8))
    deleted = np.random.default_rng(3).random((9, 8)) < 0.4
    filled = quantus.functions.perturb_func.noisy_linear_imputation(
        picture, np.flatnonzero(deleted), noise=0.0
    )
    sensitivity = segkit.max_sensitivity(gradient, own, [changed])
    stability = segkit.relative_input_stability(gradient, own, [changed])
    output = segkit.relative_output_stability(gradient, total, own, [changed])
    other = np.mean(
        [rank_similarity(of_output("one"), of_output(name)) for name in ("background",)]
    )
    copy = torch.from_numpy(changed)[None, None]
    captum = float(
        sensitivity_max(
            captum_gradient, image, perturb_func=lambda inputs: copy, n_perturb_samples=1,
            norm_ord=2,
        )
    )  # fmt: skip
    names = list(layers)
    return {
        "max-sensitivity, Captum": [sensitivity, captum],
        "max-sensitivity, Quantus": [sensitivity, quantus_of(quantus.MaxSensitivity(**draw))],
        "relative input stability": [
            stability,
            quantus_of(quantus.RelativeInputStability(**draw)),
        ],
        "relative output stability": [
            output,
            quantus_of(quantus.RelativeOutputStability(**draw)),
        ],
        "ROAD's imputation, largest difference": [
            float(np.abs(impute(picture, deleted, noise=0) - filled).max()),
            0.0,
        ],
        "random logit": [
            float(other),
            quantus_of(quantus.RandomLogit(num_classes=2, seed=42, **ranks, **settings)),
        ],
        **{
            f"smooth MPRT, layer {number}": [layers[name], float(np.ravel(smooth[key])[0])]
            for number, (name, key) in enumerate(
                zip(names, [key for key in smooth if not key.startswith("orig")], strict=True)
            )
        },
    }


def kept(naive_boxes: int) -> Figures:
    """Occlusion of a gated 3D U-Net with windows of 32, in a scan of 96 x 64 x 48 voxels."""
    torch.manual_seed(0)
    network = NetworkConfig(
        channels=[8, 16, 32], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    told = described(network, (32, 32, 32))
    model = segkit.Model(told, build_network(told).eval())
    predictor = segkit.Predictor(model, device="cpu", engine="torch")
    scan = scan_of((96, 64, 48))
    image = predictor.prepare(scan).image
    region = torch.zeros(scan.grid.shape, dtype=torch.bool)
    region[26:38, 26:38, 18:30] = True
    member = predictor.members[0]
    target = SummedOutput(member, scan.grid.shape, {"one": region}, outputs={"one": 1})
    computed = 0
    engine = member.engine

    def counted(windows: Tensor, keys: Any) -> dict[str, Tensor]:
        nonlocal computed
        computed += len(windows)
        return engine(windows, keys)

    member.engine = counted
    base = baseline_image(image, 1, "mean", patch_size=target.patch_size)
    parts = Supervoxels.boxes_of(scan.grid, (16, 16, 16))
    start = time.process_time()
    falls = occlusion(target, image, base, parts)[0]
    seconds, windows = time.process_time() - start, computed
    boxes = np.linspace(0, len(parts) - 1, naive_boxes).astype(int)
    computed, start = 0, time.process_time()
    whole = target.value(image)[0]
    naive = [whole - target.value(parts.replaced(image, base, np.array([box])))[0] for box in boxes]
    per_value = (time.process_time() - start) / (len(boxes) + 1)
    in_scan = len(list(itertools.product(*member.layout.starts(scan.grid.shape))))
    values = len(parts) + 1
    return {
        "boxes": len(parts),
        "windows of the scan": in_scan,
        "windows with a voxel of the region": len(target.windows),
        "windows computed: kept, all of the region's each time, all of the scan's each time": [
            windows,
            values * len(target.windows),
            values * in_scan,
        ],
        "seconds with kept windows": seconds,
        "seconds without, for the region's windows": per_value * values,
        "seconds without, for the scan's windows": per_value
        * values
        / len(target.windows)
        * in_scan,
        "boxes timed without": len(boxes),
        "largest difference relative to the largest fall": float(
            np.abs(falls[boxes] - naive).max() / np.abs(falls).max()
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["agreement", "time"])
    parser.add_argument("--peers", type=Path, help="the folder with captum and quantus")
    parser.add_argument("--naive-boxes", type=int, default=6)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.peers:
        sys.path.append(str(asked.peers))
    warnings.simplefilter("ignore")
    found = agreement() if asked.what == "agreement" else kept(asked.naive_boxes)
    Console().print_json(json.dumps(found))
    if asked.out:
        asked.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
