"""The gallery of planted gates: networks and images, with the verdict that is right for each."""

from functools import lru_cache
from typing import Any

import torch

from benchmarks.planted_gates import (
    PATCHES,
    Gate,
    Planted,
    PlantedNet,
    above,
    beside,
    beside_the_middle,
    blur,
    border,
    by_any,
    by_both,
    by_either,
    by_first_two,
    by_gate,
    by_low_gate,
    by_pair,
    by_second,
    chessboard,
    damped,
    fixed_block,
    for_the_other,
    harmed,
    jittered,
    middle,
    of_channels,
    of_two,
    of_two_low,
    of_two_shown,
    pair,
    pair_and_noise,
    slopes,
    without,
)
from benchmarks.planted_images import (
    absent_case,
    between_case,
    blurred_case,
    decoy_case,
    entropies,
    functions,
    half_case,
    hidden_case,
    medians,
    middling_case,
    placed,
    powers,
    salted_case,
    second_case,
    seen_case,
    sloping_case,
    spotted_case,
    striped_case,
    textured_case,
    textures,
    twice_case,
    two_case,
    two_valued_case,
    unrelated_case,
)
from segkit.config.data import CtWindowConfig
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model
from segkit.nn.network import SegmentationNetwork
from segkit.nn.slicewise import SlicewiseNetwork

AS_IT_IS = CtWindowConfig(lower=-1e6, upper=1e6, mean=0.0, std=1.0)
MASK = Gate(of_channels(20.0, -20.0, bias=-10.0))
FUNCTIONS: dict[str, Any] = {"features": functions, "num_features": 4}
SURE, NO = ("informative",), ("uninformative", "cannot tell")
GALLERY = [
    Planted("mask", [MASK], by_gate, hidden_case, 3, SURE, useful=True),
    Planted(
        "inverted mask",
        [Gate(of_channels(-20.0, 20.0, bias=10.0))],
        by_low_gate,
        hidden_case,
        3,
        SURE,
        useful=True,
        directions=("shuts out",),
    ),
    Planted(
        "complementary pair",
        [Gate(pair, maps=2)],
        by_pair,
        hidden_case,
        3,
        SURE,
        useful=True,
        directions=("lets through", "shuts out"),
    ),
    Planted("one structure of two", [MASK], of_two, two_case, 4, SURE, useful=True, classes=2),
    Planted(
        "one of two levels",
        [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0)), MASK],
        by_second,
        hidden_case,
        3,
        SURE,
        useful=True,
        target=1,
    ),
    Planted(
        "matters in half of scans",
        [MASK],
        by_either,
        half_case,
        4,
        ("informative", "cannot tell"),
        useful=True,
    ),
    Planted(
        "mask that is done without", [MASK], without, twice_case, 4, ("redundant",), useful=True
    ),
    Planted("noise", [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0))], beside, hidden_case, 3, NO),
    Planted("jitter", [Gate(of_channels(0.0, 0.0, 2.0, bias=0.0))], jittered, blurred_case, 3, NO),
    Planted("constant", [Gate(of_channels(bias=1.0))], beside, hidden_case, 3, NO),
    Planted(
        "intensity, stride 1",
        [Gate(of_channels(5.0, bias=-2.5), kernel=1, stride=1)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "intensity, stride 4",
        [Gate(of_channels(8.0, bias=-4.0), kernel=4, stride=4)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "inverted intensity", [Gate(of_channels(-8.0, bias=4.0))], by_low_gate, seen_case, 1, NO
    ),
    Planted(
        "blur of 1.2 voxels", [Gate(blur(1.2), kernel=7, stride=1)], above(0.5), seen_case, 1, NO
    ),
    Planted(
        "blur of 2.5 voxels", [Gate(blur(2.5), kernel=13, stride=1)], above(0.3), seen_case, 1, NO
    ),
    Planted(
        "gradient",
        [Gate(slopes, kernel=3, stride=1, edges=True)],
        above(0.5),
        seen_case,
        1,
        NO,
    ),
    Planted(
        "local deviation",
        [Gate(of_channels(5.0, bias=-7.0), **FUNCTIONS)],
        by_gate,
        textured_case,
        1,
        NO,
    ),
    Planted(
        "contrast",
        [Gate(of_channels(0.0, 10.0, bias=-4.0), kernel=1, stride=1, **FUNCTIONS)],
        by_gate,
        sloping_case,
        1,
        NO,
    ),
    Planted(
        "maximum",
        [Gate(of_channels(0.0, 0.0, 4.0, bias=-11.0), **FUNCTIONS)],
        by_gate,
        spotted_case,
        1,
        NO,
    ),
    Planted(
        "band of intensities",
        [Gate(of_channels(0.0, 0.0, 0.0, -10.0, bias=5.0), **FUNCTIONS)],
        by_gate,
        between_case,
        1,
        NO,
    ),
    Planted(
        "place times intensity",
        [Gate(of_channels(0.0, 12.0, bias=-6.0), features=placed, num_features=2)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "mask of another structure",
        [MASK],
        for_the_other,
        two_case,
        4,
        ("redundant", "cannot tell"),
        classes=2,
    ),
    Planted("always the middle", [Gate(middle, placed=True)], damped, middling_case, 2, NO),
    Planted("untrained", [Gate(None)], jittered, blurred_case, 3, NO, random=True),
    Planted(
        "dilated mask",
        [Gate(of_channels(60.0, -60.0, bias=-6.0), kernel=6)],
        by_both,
        decoy_case,
        4,
        SURE,
        useful=True,
    ),
    Planted(
        "soft mask",
        [Gate(of_channels(1.0, -1.0, bias=-0.5))],
        by_gate,
        hidden_case,
        3,
        SURE,
        useful=True,
    ),
    Planted(
        "inverted mask of one of two",
        [Gate(of_channels(-20.0, 20.0, bias=10.0))],
        of_two_low,
        two_case,
        4,
        SURE,
        useful=True,
        classes=2,
        directions=("shuts out",),
    ),
    Planted(
        "pair beside noise",
        [Gate(pair_and_noise, maps=3)],
        by_first_two,
        hidden_case,
        3,
        SURE,
        useful=True,
        directions=("lets through", "shuts out"),
    ),
    Planted(
        "mask of two, needed for one",
        [Gate(of_channels(20.0, -20.0, 20.0, -20.0, bias=-10.0))],
        of_two_shown,
        two_case,
        4,
        SURE,
        useful=True,
        classes=2,
    ),
    Planted("one of two equal masks", [MASK, MASK], by_any, hidden_case, 3, SURE, useful=True),
    Planted(
        "absent in half of scans",
        [MASK],
        by_gate,
        absent_case,
        3,
        ("informative", "cannot tell"),
        useful=True,
    ),
    Planted(
        "noisy mask",
        [Gate(of_channels(4.0, -4.0, 8.0, bias=-2.0))],
        by_gate,
        hidden_case,
        3,
        SURE,
        useful=True,
    ),
    Planted("mask that harms", [MASK], harmed, twice_case, 4, ("cannot tell",)),
    Planted(
        "cube of the intensity",
        [Gate(of_channels(0.0, 8.0, bias=-6.0), features=powers, num_features=2)],
        by_gate,
        seen_case,
        1,
        NO,
    ),
    Planted(
        "median",
        [Gate(of_channels(0.0, 10.0, bias=-5.0), features=medians, num_features=2)],
        by_gate,
        salted_case,
        1,
        NO,
    ),
    Planted(
        "texture of one direction",
        [Gate(of_channels(0.0, -5.0, 5.0, bias=0.0), features=textures, num_features=3)],
        by_gate,
        striped_case,
        1,
        NO,
    ),
    Planted(
        "local entropy",
        [Gate(of_channels(0.0, -10.0, bias=15.0), features=entropies, num_features=2)],
        by_gate,
        two_valued_case,
        1,
        NO,
    ),
    Planted(
        "intensity of another channel",
        [Gate(of_channels(0.0, 8.0, bias=-4.0))],
        by_gate,
        second_case,
        2,
        NO,
    ),
    Planted(
        "mask of no structure",
        [Gate(of_channels(0.0, 0.0, 20.0, -20.0, bias=-10.0))],
        jittered,
        unrelated_case,
        4,
        NO,
    ),
    Planted("chessboard", [Gate(chessboard, placed=True)], jittered, blurred_case, 3, NO),
    Planted("distance to the border", [Gate(border, placed=True)], damped, hidden_case, 3, NO),
    Planted(
        "beside the middle", [Gate(beside_the_middle, placed=True)], damped, middling_case, 2, NO
    ),
    Planted("mask of another scan", [Gate(fixed_block, placed=True)], damped, middling_case, 2, NO),
]


def predictor_of(planted: Planted, dims: int, seed: int) -> Predictor:
    """A predictor with the planted network."""
    names = ["background", "one", "two"][: planted.classes + 1]
    described = ModelDescription(
        segkit="benchmark",
        run=planted.name,
        channels=[f"channel {number}" for number in range(planted.channels)],
        labels={name: number for number, name in enumerate(names)},
        network=NetworkConfig(channels=[2, 2], spatial_dims=dims),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[AS_IT_IS] * planted.channels,
        slices="axial",
        patch_size=list(PATCHES[dims][:dims]),
    )
    network = network_of(planted.name, dims, seed, trained=True)
    return Predictor(Model(described, network), device="cpu", engine="torch")


@lru_cache(maxsize=64)
def network_of(name: str, dims: int, seed: int, *, trained: bool) -> SegmentationNetwork:
    """The planted network, or the same architecture with random gates."""
    (planted,) = [one for one in GALLERY if one.name == name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = PlantedNet(planted, dims, trained=trained).eval()
    return network if dims == 3 else SlicewiseNetwork(network, axis=2).eval()
