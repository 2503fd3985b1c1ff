"""What a training step is said to take is what one takes."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from segkit.config.data import ZScoreConfig
from segkit.config.load import validated
from segkit.config.model import FirstStageConfig, ModelDescription
from segkit.config.network import NetworkConfig
from segkit.model.build import build_network, volume_patch
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.nn.network import SegmentationNetwork
from segkit.nn.normalisation import channels_last
from segkit.nn.unet import UNet
from segkit.system.estimates import memory_of_step
from segkit.training.memory import Counting, StepMemory, in_words, step_memory
from tests.small import small_config

GATES = {"skip": "additive_grid"}
NETWORKS = {
    "3d": ({"channels": [8, 16, 32]}, [24, 32, 16], 2),
    "3d, batch normalisation, one level supervised": (
        {"channels": [8, 16, 32], "normalisation": "batch", "deep_supervision": False},
        [24, 16, 16],
        2,
    ),
    "3d, gates": ({"channels": [8, 16, 32], "attention": GATES}, [16, 24, 32], 1),
    "3d, everything else": (
        {
            "channels": [8, 16, 32],
            "attention": {
                "skip": {"kind": "cross_attention", "levels": [1]},
                "encoder": "cbam",
                "decoder": "scse",
                "bottleneck": {"kind": "self_attention", "positions": "relative"},
                "head": "gated",
            },
        },
        [16, 16, 16],
        2,
    ),
    "2d, gates": ({"spatial_dims": 2, "channels": [16, 32, 64], "attention": GATES}, [64, 48], 4),
}


def description(network: dict[str, object], patch_size: list[int]) -> ModelDescription:
    return ModelDescription(
        segkit="test",
        run="test",
        channels=["MRI"],
        labels={"background": 0, "one": 1, "two": 2},
        network=validated(NetworkConfig, network, "test"),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[ZScoreConfig()],
        slices="axial",
        patch_size=patch_size,
    )


def loss_of(network: SegmentationNetwork, image: Tensor) -> Tensor:
    label = torch.zeros(len(image), *image.shape[2:], dtype=torch.uint8)
    return deep_dice_cross_entropy(network.supervised(image).levels, label, pool_batch=False)


def kept_for_the_way_back(network: SegmentationNetwork, image: Tensor) -> int:
    """Bytes of what autograd saves, each block once, without the weights."""
    weights = {id(p.untyped_storage()) for p in (*network.parameters(), *network.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_of(network, image)
    return sum(storage.nbytes() for key, storage in saved.items() if key not in weights)


@pytest.mark.parametrize("name", NETWORKS)
def test_activations_are_what_autograd_keeps(name: str) -> None:
    settings, patch_size, batch_size = NETWORKS[name]
    described = description(settings, patch_size)
    patch = volume_patch(described)
    network = build_network(described)
    before = [parameter.clone() for parameter in network.parameters()]
    estimate = step_memory(
        network,
        in_channels=1,
        patch_size=patch,
        batch_size=batch_size,
        moments=2,
    )
    assert all(map(torch.equal, network.parameters(), before))
    channels_last(network)
    image = torch.rand(batch_size, 1, *patch)
    assert estimate.activations == pytest.approx(kept_for_the_way_back(network, image), rel=0.05)

    # A real step, counted in the same way, peaks at the same height.
    with Counting() as counted:
        loss_of(network, image).backward()
    # There, too, gradients come while activations go; the estimate holds room for them all along.
    found = estimate.activations + estimate.passing
    assert counted.peak == pytest.approx(found, rel=0.1)


def test_labels_of_a_first_stage_are_one_channel_of_patches_and_several_of_the_network() -> None:
    alone = description({"channels": [8, 16]}, [16, 16, 16])
    second = alone.model_copy(
        update={"first_stage": FirstStageConfig(models=1, classes=["a", "b", "c"])}
    )
    config = small_config(Path("data"), data={"augment": False})
    without, beside = (memory_of_step(config, each, half=False) for each in (alone, second))
    voxels = 2 * 16**3
    assert beside.patches - without.patches == 4 * voxels
    assert beside.gradients - without.gradients == 4 * 3 * 8 * 27  # of the first convolution
    assert beside.activations - without.activations >= 4 * 3 * voxels


def plain(*, batch_size: int, half: bool = False, averaged: bool = False) -> StepMemory:
    return step_memory(
        UNet(2, 1, out_channels=2, channels=(8, 16)),
        in_channels=1,
        patch_size=(32, 32),
        margin=(4, 4),
        batch_size=batch_size,
        moments=1,
        half=half,
        averaged=averaged,
    )


def test_each_part_is_what_its_name_says() -> None:
    network = UNet(2, 1, out_channels=2, channels=(8, 16))
    weights = 4 * sum(parameter.numel() for parameter in network.parameters())
    one, two = plain(batch_size=2), plain(batch_size=4)
    assert one.weights == one.gradients == one.moments == weights
    assert one.patches == 2 * 40 * 40 * (4 + 1)  # a float and a label
    assert two.activations == pytest.approx(2 * one.activations, rel=0.02)
    assert replace(two, patches=0, activations=0, passing=0) == replace(
        one, patches=0, activations=0, passing=0
    )
    assert one.total == 3 * weights + one.patches + one.activations + one.passing
    assert plain(batch_size=2, averaged=True).weights == 2 * weights


def test_half_precision_keeps_half_but_for_the_loss() -> None:
    whole, half = plain(batch_size=4), plain(batch_size=4, half=True)
    assert half.weights == whole.weights
    assert 0.5 < half.activations / whole.activations < 0.7


@pytest.mark.parametrize(
    ("count", "words"), [(1.234e9, "1.23 GB"), (56_789_000, "56.8 MB"), (1e9, "1.00 GB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert in_words(count) == words


MEASURED = """
import sys, torch
sys.path.insert(0, {root!r})
from segkit.system.resources import peak_of_process
from tests.training.test_step_memory import large, loss_of
network = large()
optimiser = torch.optim.AdamW(network.parameters())
image = torch.rand(2, 1, 64, 64, 64)
loss_of(large(), torch.rand(1, 1, 8, 8, 8)).backward()
before = peak_of_process()
for _ in range(2):
    optimiser.zero_grad()
    loss_of(network, image).backward()
    optimiser.step()
print(peak_of_process() - before)
"""


def large() -> UNet:
    return UNet(3, 1, out_channels=3, channels=(16, 32, 64), deep_supervision=True)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the process's peak as Linux counts it")
def test_a_process_grows_by_what_was_estimated() -> None:
    """Within a quarter less (what was there before) and twice as much (oneDNN's workspaces)."""
    estimate = step_memory(
        large(), in_channels=1, patch_size=(64, 64, 64), batch_size=2, moments=2
    ).total
    script = MEASURED.format(root=str(Path(__file__).parents[2]))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 0.75 * estimate < int(done.stdout) < 2 * estimate
