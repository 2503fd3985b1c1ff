"""Laws of the evidence of a scan, on gates whose worth is known."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.planted_gallery import GALLERY
from benchmarks.verdicts import evidence_of as evidence_on_planted
from segkit.config.labels import Labelling
from segkit.errors import ModelError, VolumeError
from segkit.explain.heads.study import ScoredVolume
from segkit.explain.measures.measure_maps import measured_structures, name_of_all
from segkit.explain.measures.ranks import Ranked, spearman
from segkit.explain.verdicts.evidence import (
    BEST_IMAGE,
    EARLIER,
    HIGH_FIRST,
    LOW_FIRST,
    CaseEvidence,
    ChannelEvidence,
    gather_evidence,
    with_foreground,
)
from segkit.explain.verdicts.gains import MEAN_MAP, auroc_pairs, scores_beside_means
from segkit.explain.verdicts.hypothesis import Hypothesis
from segkit.explain.verdicts.judge import judge_gates
from segkit.explain.verdicts.mean_maps import (
    ThinnedMap,
    boxed,
    kept_cells,
    mean_maps,
    mean_maps_of_others,
)
from segkit.explain.verdicts.sides import Sides
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import Model
from tests.planted import KEY, Kind, Planted, moved_case, planted, untrained_planted


def evidence_in(
    predictor: Predictor,
    case: ScoredVolume,
    untrained: Callable[[int], nn.Module] = untrained_planted,
    **given: Any,
) -> CaseEvidence:
    prediction = predictor(case.volume, maps=True)
    return gather_evidence(
        predictor,
        case.volume,
        case.reference,
        prediction.maps,
        labels=prediction.labels,
        case=case.name,
        untrained=untrained,
        **given,
    )


def evidence_of(
    predictor: Predictor, seed: int, earlier: Sequence[CaseEvidence] = ()
) -> CaseEvidence:
    return evidence_in(predictor, moved_case(seed), earlier=earlier)


@pytest.fixture(scope="module")
def mask() -> CaseEvidence:
    return evidence_of(planted("mask"), 0)


def channel_of(evidence: CaseEvidence, channel: int = 0) -> ChannelEvidence:
    return evidence.channels[KEY, channel]


def test_without_a_gate_equal_to_the_mask_dice_is_lost_and_the_gate_was_learned(
    mask: CaseEvidence,
) -> None:
    found = channel_of(mask)
    assert found.drops == {"label 1": (1.0,)}
    scores = found.aurocs["label 1"]
    assert scores["map"] == 1 and max(score for of, score in scores.items() if of != "map") < 1
    assert sum(of.startswith("untrained network") for of in scores) == 8
    assert len(found.correlations) == 8 and np.mean(found.correlations) < 0.9
    areas = found.areas("label 1")
    assert areas[HIGH_FIRST] < 0.2 < areas[LOW_FIRST] and EARLIER not in areas
    assert min(area for order, area in areas.items() if order != HIGH_FIRST) > areas[HIGH_FIRST]


class Unknown(Planted):
    """A gate that is NaN everywhere, and a network that takes it as 0."""

    def forward(self, image: Tensor) -> Tensor:
        gate = self.tap(torch.full_like(image[:, :1], torch.nan))
        logit = 10 * (image[:, :1] - image[:, 1:2] - 0.5) + torch.nan_to_num(gate)
        return torch.cat([-logit / 2, logit / 2], dim=1)


def test_a_gate_of_nan_has_no_measures() -> None:
    predictor, case = planted("mask"), moved_case(0)
    predictor.model.network.__class__ = Unknown
    (verdict,) = judge_gates(
        predictor, [(case.volume, case.reference)], untrained=untrained_planted
    )
    assert verdict.word == "cannot tell"
    assert np.isnan(verdict.figures["AUROC"]) and np.isnan(verdict.figures["least"])  # type: ignore[arg-type]


def test_deletion_is_compared_with_the_best_function_of_the_image(mask: CaseEvidence) -> None:
    found = channel_of(mask)
    areas = found.areas("label 1")
    scores = {name: abs(score - 0.5) for name, score in found.aurocs["label 1"].items()}
    of_image = {n: s for n, s in scores.items() if n != "map" and "untrained" not in n}
    assert len(of_image) > 100 and max(of_image.values()) < scores["map"]
    assert areas[HIGH_FIRST] < areas[BEST_IMAGE]
    assert areas[BEST_IMAGE] <= max(area for of, area in areas.items() if of.startswith("gradient"))


def test_a_constant_gate_loses_no_dice_and_has_no_correlation() -> None:
    found = channel_of(evidence_of(planted("constant"), 0))
    assert found.drops == {"label 1": (0.0,)} and found.aurocs["label 1"]["map"] == 0.5
    assert np.isnan(found.correlations).all()


def test_a_gate_is_not_like_the_constant_gates_of_untrained_networks() -> None:
    """As hard gates are, which begin fully open."""

    def evidence(kind: Kind) -> ChannelEvidence:
        return channel_of(
            evidence_in(planted(kind), moved_case(0), lambda _: Planted("constant").eval())
        )

    mask = evidence("mask")
    assert mask.correlations == (0.0,) * 8
    scores = [mask.aurocs["label 1"][f"untrained network {draw}"] for draw in range(8)]
    assert scores == [0.5] * 8
    hypothesis = Hypothesis((KEY, 0), "label 1", "lets through", [mask] * 12, {}, "foreground")
    assert hypothesis.learned_p() == 2**-12 and hypothesis.same_p() == 1


def test_constant_air_does_not_count_in_the_correlation_with_untrained_networks() -> None:
    case, predictor = moved_case(0), planted("noise")
    x, y, _ = np.indices((8, 8, 8))
    air = (np.abs(x - 3.5) > 1) & (np.abs(y - 3.5) > 1)
    volume = case.volume.like(np.where(air[..., None], 0, case.volume.data + 3).astype(np.float32))
    found = evidence_in(predictor, replace(case, volume=volume))
    untrained = Predictor(
        Model(predictor.model.description, untrained_planted(0)), device="cpu", engine="torch"
    )
    own, other = (one(volume, maps=True).maps[KEY].volume for one in (predictor, untrained))
    assert own is not None and other is not None
    rho, with_air = (
        abs(spearman(Ranked.of(own.data[cells]), Ranked.of(other.data[cells])))
        for cells in (~air, np.ones_like(air))
    )
    assert channel_of(found).correlations[0] == pytest.approx(rho, abs=2e-3)
    assert abs(with_air - rho) > 0.1


def test_the_map_of_earlier_scans_is_one_more_order_of_deletion(mask: CaseEvidence) -> None:
    found = channel_of(evidence_of(planted("mask"), 1, [mask])).areas("label 1")
    assert found[EARLIER] > found[HIGH_FIRST]


class Pair(Planted):
    """Two gates, of which the second is 1 less the first; either will do."""

    def forward(self, image: Tensor) -> Tensor:
        gate = torch.sigmoid(self.look(image))
        both = self.tap(torch.cat([gate, 1 - gate], dim=1))
        logit = 10 * (both[:, :1] - both[:, 1:])
        return torch.cat([-logit / 2, logit / 2], dim=1)


def test_dice_falls_only_if_both_of_two_substitute_gates_are_removed() -> None:
    predictor = planted("mask")
    predictor.model.network.__class__ = Pair

    def untrained(seed: int) -> Planted:
        network = untrained_planted(seed)
        network.__class__ = Pair
        return network

    found = evidence_in(predictor, moved_case(0), untrained)
    for channel, auroc in ((0, 1.0), (1, 0.0)):
        one = channel_of(found, channel)
        assert one.drops == {"label 1": (0.0, 1.0)}
        assert one.aurocs["label 1"]["map"] == auroc


def test_arguments_that_would_be_ignored_are_refused() -> None:
    predictor, case = planted("mask"), moved_case(0)
    pairs = [(case.volume, case.reference)]
    with pytest.raises(VolumeError, match=r"^expected pairs of a scan .* found none"):
        judge_gates(predictor, [])
    with pytest.raises(VolumeError, match=r"unlabelled has the index 7, .* only 1 pair;"):
        judge_gates(predictor, pairs, unlabelled={7: ["label 1"]})
    with pytest.raises(
        VolumeError, match=r"expected a list .* string 'label 1'; use \['label 1'\]"
    ):
        judge_gates(predictor, pairs, unlabelled={0: "label 1"})
    with pytest.raises(ModelError, match="expected a seed of 0 or more, found -1"):
        judge_gates(predictor, pairs, seed=-1)


def test_an_unlabelled_structure_has_no_deletion_curves() -> None:
    found = evidence_in(planted("mask"), moved_case(0), unlabelled=["label 1"])
    assert channel_of(found).areas("label 1") == {} == channel_of(found).drops


def test_a_class_called_foreground_keeps_its_name_beside_all_structures() -> None:
    labelling = Labelling({"background": 0, "foreground": 1, "two": 2})
    assert measured_structures(labelling) == {
        "foreground": (1,),
        "two": (2,),
        "all structures": (1, 2),
    }
    assert with_foreground({"foreground": 0.2, "two": 0.6}, labelling) == pytest.approx(
        {"foreground": 0.2, "two": 0.6, "all structures": 0.4}
    )
    both = Labelling({"background": 0, "foreground": 1, "all structures": 2})
    assert name_of_all(both) == "all structures 2"
    assert name_of_all(Labelling({"background": 0, "one": 1})) == "foreground"


def test_a_reference_that_does_not_fit_is_refused() -> None:
    predictor, case = planted("mask"), moved_case(0)
    wrong = case.reference.like(np.where(case.reference.data, 7, 1).astype(np.uint8))
    with pytest.raises(VolumeError, match=r"case 0: expected a reference with the model's labels"):
        judge_gates(predictor, [(case.volume, wrong)], untrained=untrained_planted)
    grid = case.reference.grid.placed((8, 8, 8), (1,) * 3, (1,) * 3)
    elsewhere = Volume(case.reference.data, grid)
    with pytest.raises(VolumeError, match="case 0: its reference lies on another grid"):
        judge_gates(predictor, [(case.volume, elsewhere)], untrained=untrained_planted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("mask", {"informative"}),
        ("noise", {"uninformative", "cannot tell"}),
        ("constant", {"uninformative", "cannot tell"}),
    ],
)
def test_over_a_dozen_scans_the_verdict_is_right(kind: Kind, words: set[str]) -> None:
    cases = [(case.volume, case.reference) for case in map(moved_case, range(12))]
    found = judge_gates(planted(kind), cases, untrained=untrained_planted)
    assert [(one.map, one.channel, one.structure) for one in found] == [(KEY, 0, "label 1")]
    assert found[0].word in words


def test_an_auroc_of_drawn_cells_is_near_that_of_all() -> None:
    random = np.random.default_rng(0)
    inside = random.random((80, 80, 50)) < 0.5
    values = inside + random.normal(0, 1, inside.shape)
    sides = Sides(inside, np.ones(inside.shape, bool))
    assert sides.cells.size == 2 * 2**17
    few = Sides(inside[:20], np.ones((20, 80, 50), bool)).auroc(values[:20])
    assert sides.auroc(values) == pytest.approx(few, abs=0.01)


def whole(*shape: int) -> list[np.ndarray]:
    """All cells of a map."""
    return [np.arange(size) for size in shape]


def thinned(values: np.ndarray) -> ThinnedMap:
    return ThinnedMap(boxed(values), values.shape)


def test_mean_maps_leave_out_nan_and_fit_boxes_of_other_shapes() -> None:
    first, second = np.zeros((2, 2, 2)), np.ones((2, 2, 2))
    second[0, 0, 0] = np.nan
    (mean,) = mean_maps([thinned(first), thinned(second)], (2, 2, 2), whole(2, 2, 2)).values()
    assert mean[0, 0, 0] == 0 and mean[1, 1, 1] == 0.5
    unknown = thinned(np.full((2, 2, 2), np.nan))
    assert np.isnan(mean_maps([unknown], (2, 2, 2), whole(2, 2, 2))[""]).all()
    ramp = np.broadcast_to(np.arange(8.0)[:, None, None], (8, 2, 2))
    lines = {
        name: mean[:, 0, 0].tolist()
        for name, mean in mean_maps([thinned(ramp)], (4, 2, 2), whole(4, 2, 2)).items()
    }
    assert lines == {
        "": [0.5, 2.5, 4.5, 6.5],
        "from the low corner": [0, 1, 2, 3],
        "from the high corner": [4, 5, 6, 7],
        "from the centre": [2, 3, 4, 5],
    }
    assert boxed(np.zeros((100, 5, 32))).shape == (32, 5, 32)


def test_the_mean_maps_of_others_are_those_of_each_scan_by_itself() -> None:
    """Maps of two shapes, with unknown cells, and a cell that only one map knows."""
    random = np.random.default_rng(3)
    maps = []
    for shape in [(5, 4, 3), (5, 4, 3), (7, 4, 2), (5, 4, 3), (7, 4, 2), (40, 4, 3)]:
        values = random.normal(0, 1, shape)
        values[random.random(shape) < 0.2] = np.nan
        values[0, 0, 0] = np.nan if len(maps) else 1e6
        maps.append(thinned(values))
    found = {(number, name): mean for number, name, mean in mean_maps_of_others(maps)}
    expected = {
        (number, name): mean
        for number, one in enumerate(maps)
        for name, mean in mean_maps(
            maps[:number] + maps[number + 1 :], one.shape, list(map(kept_cells, one.shape))
        ).items()
    }
    assert found.keys() == expected.keys() and len(found) == 24
    for key, mean in expected.items():
        np.testing.assert_allclose(found[key], mean, rtol=1e-12, atol=1e-15)
    same = list(mean_maps_of_others(maps[:2]))
    assert sorted((number, name) for number, name, _ in same) == [(0, ""), (1, "")]
    assert not list(mean_maps_of_others(maps[:1]))


def test_the_mean_map_of_a_thinned_map_keeps_its_distance_from_each_corner() -> None:
    """Beyond the end of a map, its outermost cell counts only if no other map has the cell."""
    long, short = (np.arange(float(size)).reshape(size, 1, 1) for size in (100, 70))
    means = mean_maps([thinned(long)], (70, 1, 1), whole(70, 1, 1))
    np.testing.assert_allclose(means["from the low corner"][2:, 0, 0], np.arange(2, 70))
    np.testing.assert_allclose(means["from the high corner"][:-2, 0, 0], np.arange(30, 98))
    np.testing.assert_allclose(means["from the centre"][:, 0, 0], np.arange(15, 85))
    both = mean_maps([thinned(long + 100), thinned(short)], (110, 1, 1), whole(110, 1, 1))
    line = both["from the low corner"][:, 0, 0]
    np.testing.assert_allclose(line[2:66], np.arange(2, 66) + 50)
    np.testing.assert_allclose(line[71:97], np.arange(71, 97) + 100, atol=1e-3)
    assert line[109] == pytest.approx((198 + 68) / 2)


@pytest.mark.parametrize("corner", ["low corner", "high corner", "centre"])
def test_a_gate_of_one_fixed_place_shows_no_more_than_the_mean_map_aligned_there(
    corner: str,
) -> None:
    """Scans of other shapes; the gate falls with the distance from a voxel near a corner."""
    random = np.random.default_rng(8)

    def case() -> ChannelEvidence:
        shape = tuple(int(size) for size in random.integers(10, 17, 3))
        starts = {"low corner": (0, 0, 0), "high corner": shape, "centre": np.divide(shape, 2)}
        sign = -1 if corner == "high corner" else 1
        away = np.indices(shape).T - starts[corner] - sign * np.array([4.2, 2.8, 3.6])
        inside = np.zeros(shape, bool)
        middle = np.round(starts[corner] + sign * random.uniform(2.5, 4.5, 3)).astype(int)
        inside[tuple(slice(max(0, one - 2), one + 2) for one in middle)] = True
        gate = np.exp(-np.linalg.norm(away, axis=-1).T)
        own = Sides(inside, np.ones(shape, bool)).auroc(gate)
        aurocs = {"one": {"map": own}}
        return ChannelEvidence({}, aurocs, {}, (), thinned(gate), {"one": inside})

    evidence = [case() for _ in range(8)]
    pairs = auroc_pairs(evidence, "one", scores_beside_means(evidence))
    assert len(pairs) == 4 and {len(scans) for scans in pairs.values()} == {8}
    gains = {name: np.mean([own - mean for own, mean in scans]) for name, scans in pairs.items()}
    assert gains[f"{MEAN_MAP} from the {corner}"] < 0.002
    assert gains[MEAN_MAP] > 0.005
    same = [replace(one, box=evidence[0].box, inside=evidence[0].inside) for one in evidence]
    assert list(auroc_pairs(same, "one", scores_beside_means(same))) == [MEAN_MAP]


def test_the_gate_of_a_2d_network_is_compared_within_slices() -> None:
    """It is a blur in the plane of slices that show the structure at other places."""
    (blur,) = [one for one in GALLERY if one.name == "blur of 2.5 voxels"]
    (found,) = evidence_on_planted(blur, dims=2, count=1, seed=0)
    scores = dict(channel_of(found).aurocs["one"])
    own = scores.pop("map")
    assert "texture along y" in scores and "texture along z" not in scores
    of_image = [score for name, score in scores.items() if "untrained" not in name]
    assert max(of_image) > own - 0.005
