"""Laws of the rule, on evidence whose truth is known."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import pytest

from segkit.explain.measures.measure_maps import FOREGROUND
from segkit.explain.verdicts.deletion import DeletionCurve
from segkit.explain.verdicts.evidence import (
    EARLIER,
    HIGH_FIRST,
    LOW_FIRST,
    CaseEvidence,
    ChannelEvidence,
)
from segkit.explain.verdicts.falls import DICE_MARGIN
from segkit.explain.verdicts.further_scans import further_scans
from segkit.explain.verdicts.gains import DIRECTIONS, auroc_pairs, scores_beside_means
from segkit.explain.verdicts.hypothesis import Hypothesis
from segkit.explain.verdicts.mean_maps import ThinnedMap
from segkit.explain.verdicts.rule import GateVerdict, best_of_maps, judge_evidence

KEY = "skip.1/gate"
UNTRAINED = {f"untrained network {n}": 0.5 + 0.01 * (-1) ** n * (n % 3) for n in range(8)}
COMPARED = {"intensity": 0.7, **UNTRAINED}
FRACTIONS = (0.0, 1.0)


def channel(
    auroc: float = 0.95,
    drop: float = 0.1,
    *,
    compared: dict[str, float] | None = None,
    areas: dict[str, float] | None = None,
    correlations: Sequence[float] = (0.1, 0.2, 0.15),
    seed: int = 0,
) -> ChannelEvidence:
    """One structure, 'a', somewhere among 200 cells, which the box shows with the AUROC's sign."""
    random = np.random.default_rng(seed)
    inside = np.zeros(200, bool)
    inside[random.permutation(200)[:20]] = True
    box = np.where(inside, auroc - 0.5, 0.5 - auroc) + random.normal(0, 0.01, 200)
    curves = {
        order: [DeletionCurve("a", FRACTIONS, (1.0, 2 * area - 1))]
        for order, area in (areas or {}).items()
    }
    return ChannelEvidence(
        {"a": (drop,)},
        {"a": {"map": auroc, **(COMPARED if compared is None else compared)}},
        curves,
        tuple(correlations),
        ThinnedMap(box.reshape(10, 20, 1), (10, 20, 1)),
        {"a": inside.reshape(10, 20, 1)},
    )


def scans(
    count: int,
    make: Callable[[int], ChannelEvidence] = lambda number: channel(seed=number),
    *,
    against: Literal["reference", "prediction"] = "reference",
) -> list[CaseEvidence]:
    return [CaseEvidence(f"{number}", against, {(KEY, 0): make(number)}) for number in range(count)]


def judged(found: list[CaseEvidence]) -> GateVerdict:
    (verdict,) = judge_evidence(found)
    return verdict


@pytest.mark.parametrize("count", [6, 8, 12, 20])
def test_a_gate_that_is_needed_shows_more_and_was_learned_is_informative(count: int) -> None:
    verdict = judged(scans(count))
    assert (verdict.word, verdict.direction) == ("informative", "lets through")
    assert verdict.claim == "lets a through" and "the gate lets a through" in verdict.reason
    assert verdict.figures["scans"] == count
    assert verdict.figures["AUROC: best comparator"] == "intensity"
    assert verdict.figures["AUROC: more than the best comparator"] == pytest.approx(0.25)


def test_a_gate_that_shuts_the_structure_out_is_also_informative() -> None:
    verdict = judged(scans(12, lambda number: channel(0.05, seed=number)))
    assert (verdict.word, verdict.direction) == ("informative", "shuts out")
    assert verdict.claim == "shuts a out" and verdict.figures["AUROC"] == pytest.approx(0.05)


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("auroc", [0.5, 0.7, 1.0])
def test_one_to_five_scans_cannot_tell_whatever_they_show(auroc: float, drop: float) -> None:
    for count in range(1, 6):
        verdict = judged(scans(count, lambda number: channel(auroc, drop, seed=number)))
        assert verdict.word == "cannot tell", count
        assert "the evidence cannot tell" in verdict.reason
    further = judged(scans(3)).figures["further scans"]
    assert isinstance(further, int) and judged(scans(3 + further)).word == "informative"


@pytest.mark.parametrize("count", [3, 12, 24])
def test_more_scans_are_not_promised_if_untrained_networks_are_too_near(count: int) -> None:
    """0.95 lies 4 deviations above 8 untrained networks: p = 0.003, times 40 tests above 0.05."""
    near = {f"untrained network {n}": 0.6 + 0.08 * (-1) ** n for n in range(8)}

    def case(number: int, channels: int) -> CaseEvidence:
        useful = channel(compared={"intensity": 0.7, **near}, seed=number)
        others = {(KEY, n): channel(0.5, 0.0, seed=number) for n in range(1, channels)}
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): useful, **others})

    def found(count: int, channels: int) -> GateVerdict:
        verdicts = judge_evidence([case(number, channels) for number in range(count)])
        return next(one for one in verdicts if one.channel == 0)

    many = found(count, 20)
    assert (many.word, many.figures["further scans"]) == ("cannot tell", None)
    assert "more untrained networks or fewer channels would be needed, not more scans" in (
        many.reason
    )
    further = found(3, 1).figures["further scans"]
    assert isinstance(further, int) and found(3 + further, 1).word == "informative"


def test_no_scans_are_promised_for_a_verdict_that_the_other_direction_rules_out() -> None:
    """It lets the structure through (0.95), so that "shuts out" shows no more; it is needed in
    every second scan. With any number of scans, p for "uninformative" is that of "lets through".
    """
    parts = [
        channel(drop=0.02 * (n % 2) - 0.002, compared={"intensity": 0.7}, seed=n) for n in range(12)
    ]
    pairs = auroc_pairs(parts, "a", scores_beside_means(parts))
    through, out = both = [
        Hypothesis((KEY, 0), "a", direction, parts, pairs, FOREGROUND) for direction in DIRECTIONS
    ]
    assert through.no_more_p() == 1 and out.no_more_p() < 0.001
    assert further_scans(out, [out], 1).scans == 1
    assert further_scans(out, both, 1).scans is None
    assert further_scans(through, both, 1).scans is None


def test_the_estimate_takes_the_share_of_the_error_that_deletion_has() -> None:
    """0.2 of 0.05, for two directions: 2^-8 is below 0.005, and 2^-7 is not."""
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}
    beaten = {**COMPARED, "intensity": 0.97}

    def found(count: int) -> GateVerdict:
        return judged(scans(count, lambda i: channel(compared=beaten, areas=areas, seed=i)))

    assert found(3).figures["further scans"] == 5
    assert [found(count).word for count in (7, 8)] == ["cannot tell", "informative"]


def test_the_estimate_divides_the_error_by_the_contexts_in_which_a_channel_is_needed() -> None:
    """0.05 for two directions and two contexts: 2^-7 is below 0.0125, and 2^-6 is not."""

    def found(count: int) -> GateVerdict:
        return judged(scans(count, lambda i: replace(channel(seed=i), drops={"a": (0.1, 0.1)})))

    assert found(3).figures["further scans"] == 4
    assert [found(count).word for count in (6, 7)] == ["cannot tell", "informative"]


def test_the_estimate_for_redundant_counts_the_scans_in_which_dice_falls() -> None:
    """It falls a little in a sixth of scans. That this is less than a third needs many scans."""

    def found(count: int) -> GateVerdict:
        return judged(scans(count, lambda i: channel(drop=0.011 * (i % 6 == 5), seed=i)))

    further = found(12).figures["further scans"]
    assert isinstance(further, int) and 30 < further < 60
    words = [found(count).word for count in (12, 18, 12 + further)]
    assert words == ["cannot tell", "cannot tell", "redundant"]


def test_the_estimate_counts_the_comparison_with_untrained_networks() -> None:
    """|ρ| varies much about 0.85, so that this test needs more scans than all others."""

    def found(count: int) -> GateVerdict:
        rho = [0.85 + 0.08 * (-1) ** number for number in range(count)]
        return judged(scans(count, lambda i: channel(correlations=[rho[i]] * 3, seed=i)))

    further = found(4).figures["further scans"]
    assert isinstance(further, int) and further > 15
    words = [found(count).word for count in (4, 12, 4 + further)]
    assert words == ["cannot tell", "cannot tell", "informative"]


def test_without_a_reference_there_are_figures_and_no_verdict() -> None:
    verdict = judged(scans(12, against="prediction"))
    assert verdict.word is None and verdict.figures["AUROC"] == pytest.approx(0.95)
    assert "no verdict without a reference" in verdict.reason
    # Scans without a reference do not count beside those that have one.
    mixed = [*scans(3), *scans(9, against="prediction")]
    assert judged(mixed).figures["scans"] == 3


def test_a_gate_that_is_not_needed_is_redundant_with_enough_scans() -> None:
    words = {n: judged(scans(n, lambda i: channel(drop=0.0, seed=i))).word for n in (6, 8, 12, 20)}
    assert words == {6: "cannot tell", 8: "cannot tell", 12: "redundant", 20: "redundant"}


def test_a_gate_without_significant_need_is_not_therefore_redundant() -> None:
    """A fall of a tenth in one scan of six, on average too small to be needed or to be nothing."""

    def some(number: int) -> ChannelEvidence:
        return channel(drop=0.05 if number % 6 == 0 else -0.001 * (number % 2), seed=number)

    assert judged(scans(12, some)).word == "cannot tell"


@pytest.mark.parametrize("some", [0.1, 1.0])
def test_a_gate_without_which_a_tenth_of_scans_are_lost_is_not_redundant(some: float) -> None:
    """In 2 of 20 scans Dice falls, so that the mean fall is at or above the margin."""

    def rare(number: int) -> ChannelEvidence:
        return channel(drop=some if number in (3, 13) else 0.0, seed=number)

    assert judged(scans(20, rare)).word == "cannot tell"
    # A fall in a tenth of all scans that leaves the mean well within the margin is allowed.
    assert judged(scans(20, lambda i: channel(drop=0.02 * (i in (3, 13)), seed=i))).word == (
        "redundant"
    )


@pytest.mark.parametrize("first", [0, 1])
def test_a_gate_that_matters_in_half_of_scans_is_never_redundant(first: int) -> None:
    def half(number: int) -> ChannelEvidence:
        return channel(drop=0.4 * ((number + first) % 2), seed=number)

    words = [judged(scans(count, half)).word for count in (1, 3, 8, 12, 20, 30)]
    assert words[:2] == ["cannot tell"] * 2 and words[-2:] == ["informative"] * 2
    assert set(words) == {"cannot tell", "informative"}


@pytest.mark.parametrize("count", [6, 12])
def test_a_useless_gate_that_jitters_dice_is_seldom_needed(count: int) -> None:
    """Of 40 draws of a deviation of 0.02 about 0, at most one in twenty, give or take chance."""
    random = np.random.default_rng(count)

    def word() -> str | None:
        drops = random.normal(0, 0.02, count)
        return judged(scans(count, lambda i: channel(drop=drops[i], seed=i))).word

    found = sum(word() == "informative" for _ in range(40))
    assert found <= 4


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("auroc", [0.7, 0.3])
def test_a_gate_no_better_than_intensity_is_uninformative_even_if_needed(
    auroc: float, drop: float
) -> None:
    verdict = judged(scans(12, lambda i: channel(auroc, drop, seed=i)))
    assert verdict.word == "uninformative"
    assert "shows a no better than" in verdict.reason


def test_the_margin_shrinks_as_the_auroc_of_a_comparator_approaches_one() -> None:
    """Beside 0.998, a map that is the structure shows more; one of 0.9984 does not."""
    near = {**COMPARED, "intensity": 0.998}
    assert judged(scans(12, lambda i: channel(1.0, compared=near, seed=i))).word == "informative"
    assert judged(scans(12, lambda i: channel(0.9984, compared=near, seed=i))).word != "informative"


def test_every_comparator_must_be_beaten_in_either_direction() -> None:
    dark = {**COMPARED, "intensity": 0.04}
    assert judged(scans(12, lambda i: channel(compared=dark, seed=i))).word == "uninformative"


def test_a_gate_that_always_points_at_the_same_place_shows_no_more_than_the_mean_map() -> None:
    def same(number: int) -> ChannelEvidence:
        return channel(seed=0)

    verdict = judged(scans(12, same))
    assert verdict.word != "informative"
    assert verdict.figures["AUROC: best comparator"] == "mean map of the other scans"
    assert "because there is none" in judged(scans(1)).reason


def test_a_map_like_that_of_an_untrained_network_is_not_informative() -> None:
    """By its ranks, of either sign; or because untrained networks vary so much that one may."""
    near = {f"untrained network {n}": 0.5 + 0.45 * (-1) ** n for n in range(8)}
    alike = [1.0, 0.99, 1.0]
    same = judged(scans(12, lambda i: channel(correlations=alike, compared=near, seed=i)))
    assert same.word == "uninformative"
    assert "orders the cells as untrained networks do" in same.reason
    mixed = judged(scans(12, lambda i: channel(correlations=[1.0, 0.2, 1.0], seed=i)))
    assert mixed.word == "cannot tell"
    wild = {f"untrained network {number}": 0.5 + 0.14 * (number - 2.5) for number in range(6)}
    found = judged(scans(12, lambda i: channel(0.92, compared=wild, seed=i)))
    assert found.word == "cannot tell"


def test_a_gate_that_orders_cells_as_untrained_networks_do_but_better_is_not_uninformative() -> (
    None
):
    """As in a scan with much air, which every network tells from the body."""
    near = {"intensity": 0.7, **{f"untrained network {n}": 0.98 + n / 1000 for n in range(8)}}

    def found(auroc: float) -> GateVerdict:
        rho = [0.96, 0.97, 0.96]
        return judged(scans(12, lambda i: channel(auroc, correlations=rho, compared=near, seed=i)))

    assert found(0.999).word == "cannot tell"
    assert found(0.001).word == "cannot tell"
    worse = found(0.984)
    assert worse.word == "uninformative" and "than they do" in worse.reason


def test_a_gate_within_the_margin_of_a_comparator_is_called_hardly_better() -> None:
    near = {**COMPARED, "intensity": 0.945}
    verdict = judged(scans(12, lambda i: channel(compared=near, seed=i)))
    assert verdict.word == "uninformative"
    assert "shows a hardly better than a map" in verdict.reason
    assert "0.005 better than intensity" in verdict.reason


def test_deletion_is_another_way_of_showing_more() -> None:
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}
    beaten = {**COMPARED, "intensity": 0.97}

    def found(**changed: float) -> str | None:
        told = {**areas, **changed}
        return judged(scans(12, lambda i: channel(compared=beaten, areas=told, seed=i))).word

    assert found() == "informative"
    assert found(intensity=0.31) != "informative"
    no_earlier = {name: area for name, area in areas.items() if name != EARLIER}
    verdict = judged(scans(12, lambda i: channel(compared=beaten, areas=no_earlier, seed=i)))
    assert verdict.word != "informative"


@pytest.mark.parametrize("drop", [0.0, 0.1])
@pytest.mark.parametrize("auroc", [0.88, 0.12])
def test_deletion_does_not_count_in_the_direction_against_the_auroc(
    auroc: float, drop: float
) -> None:
    """The map is high in the structure, but its lowest values change the prediction first."""
    early, late = (HIGH_FIRST, LOW_FIRST) if auroc < 0.5 else (LOW_FIRST, HIGH_FIRST)
    areas = {early: 0.2, late: 0.8, "intensity": 0.5, EARLIER: 0.5}
    beaten = {**COMPARED, "intensity": 0.97}

    def found(number: int) -> ChannelEvidence:
        return channel(auroc, drop, compared=beaten, areas=areas, seed=number)

    verdict = judged(scans(12, found))
    assert verdict.word == "uninformative"
    assert verdict.direction == ("shuts out" if auroc < 0.5 else "lets through")
    assert (verdict.figures["p, informative"], verdict.figures["p, redundant"]) == (1.0, 1.0)


def test_deletion_counts_only_if_the_auroc_is_above_one_half_over_scans() -> None:
    """Its p value is the larger one; here that of an AUROC of 0.6 in all scans but some."""
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}
    beaten = {"intensity": 0.97, **dict.fromkeys(UNTRAINED, 0.5)}

    def p_value(num_below: int) -> float:
        found = [
            channel(0.4 if number < num_below else 0.6, compared=beaten, areas=areas, seed=number)
            for number in range(12)
        ]
        p = judged(scans(12, lambda number: found[number])).figures["p, informative"]
        assert isinstance(p, float)
        return p

    # 12 equal sizes: each of the 12 choose k signs has the same chance. Two directions, share 0.2.
    signs = [math.comb(12, k) for k in range(13)]
    for num_below in range(4):
        expected = 2 * sum(signs[: num_below + 1]) / 2**12 / 0.2
        assert p_value(num_below) == pytest.approx(min(1, expected))


def test_without_an_auroc_deletion_proves_no_direction() -> None:
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}
    nowhere = {"a": np.zeros((10, 20, 1), bool)}

    def found(number: int) -> ChannelEvidence:
        return replace(channel(areas=areas, seed=number), aurocs={}, inside=nowhere)

    verdict = judged(scans(12, found))
    assert (verdict.word, verdict.figures["further scans"]) == ("cannot tell", None)
    assert "in deletion 0.200 better than" in verdict.reason
    assert "no AUROC, because no cell that counts lies inside, or none outside" in verdict.reason
    assert "because there is none" not in verdict.reason


def test_deletion_leaves_out_scans_without_the_structure_where_the_network_predicts_it() -> None:
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}
    nowhere = {"a": np.zeros((10, 20, 1), bool)}
    beaten = {**COMPARED, "intensity": 0.97}

    def found(number: int) -> ChannelEvidence:
        told = channel(compared=beaten, areas=areas, seed=number)
        return told if number < 3 else replace(told, drops={}, aurocs={}, inside=nowhere)

    few, alone = judged(scans(12, found)), judged(scans(3, found))
    assert few.figures["scans"] == few.figures["scans with deletion"] == 3
    assert few.word == "cannot tell"
    assert (
        few.reason == alone.reason
        and few.figures["further scans"] == alone.figures["further scans"]
    )


def test_two_channels_that_substitute_for_each_other_are_needed() -> None:
    """Neither is missed, but one of the two is."""

    def case(number: int) -> CaseEvidence:
        first = replace(channel(seed=number), drops={"a": (0.0, 0.6)})
        second = replace(channel(0.05, seed=number), drops={"a": (0.0, 0.6)})
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): first, (KEY, 1): second})

    verdicts = judge_evidence([case(number) for number in range(12)])
    assert [(one.word, one.channel, one.direction) for one in verdicts] == [
        ("informative", 0, "lets through"),
        ("informative", 1, "shuts out"),
    ]
    assert "by 0.600 if all other gates are replaced" in verdicts[0].reason


def test_a_rise_of_dice_is_called_a_rise() -> None:
    def case(number: int) -> CaseEvidence:
        worse = replace(channel(seed=number), drops={"a": (-0.02 - 0.001 * number,)})
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): worse})

    (verdict,) = judge_evidence([case(number) for number in range(3)])
    assert "Dice rises by 0.021 (95 % interval +0.0" in verdict.reason
    assert verdict.figures["Dice lost without it"] == pytest.approx(-0.021)


def test_each_structure_has_a_verdict_and_the_best_comes_first() -> None:
    def case(number: int) -> CaseEvidence:
        seen = channel(seed=number)
        other = {"map": 0.5, **COMPARED}
        both = replace(
            seen,
            drops={"b": (0.0,), **seen.drops},
            aurocs={"b": other, **seen.aurocs},
            inside={"b": seen.inside["a"][::-1], **seen.inside},
        )
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): both})

    verdicts = judge_evidence([case(number) for number in range(12)])
    assert [(one.structure, one.word) for one in verdicts] == [
        ("a", "informative"),
        ("b", "uninformative"),
    ]
    assert best_of_maps(verdicts) == verdicts[:1]


def test_p_values_are_corrected_for_the_number_of_tests() -> None:
    """A map of twice as many channels has twice the p value."""

    def p_value(channels: int) -> float:
        found = [
            CaseEvidence(
                f"{number}",
                "reference",
                {
                    (KEY, one): channel(0.95 if one == 0 else 0.5, seed=number)
                    for one in range(channels)
                },
            )
            for number in range(12)
        ]
        p = judge_evidence(found)[0].figures["p, informative"]
        assert isinstance(p, float)
        return p

    assert p_value(1) == pytest.approx(2 * 2**-12 / 0.8)
    assert p_value(2) == pytest.approx(2 * p_value(1))


def test_one_useful_channel_of_forty_is_found_after_the_correction() -> None:
    def case(number: int) -> CaseEvidence:
        found = {
            (KEY, one): channel(0.95 if one == 7 else 0.5, 0.1 if one == 7 else 0.0, seed=number)
            for one in range(40)
        }
        return CaseEvidence(f"{number}", "reference", found)

    verdicts = judge_evidence([case(number) for number in range(12)])
    assert (verdicts[0].channel, verdicts[0].word) == (7, "informative")
    assert all(one.word != "informative" for one in verdicts[1:])
    p = verdicts[0].figures["p, informative"]
    assert isinstance(p, float) and p == pytest.approx(80 * 2**-12 / 0.8)


def test_a_gate_that_shows_one_structure_and_is_needed_for_another_is_not_informative() -> None:
    """Not even for all structures together, which it shows, and whose mean Dice falls."""

    def case(number: int) -> CaseEvidence:
        seen = channel(seed=number)
        hidden = {"map": 0.5, **COMPARED}
        told = replace(
            seen,
            drops={"a": (0.0,), "b": (0.6,), FOREGROUND: (0.3,)},
            aurocs={"a": seen.aurocs["a"], "b": hidden, FOREGROUND: seen.aurocs["a"]},
            inside={
                "a": seen.inside["a"],
                "b": seen.inside["a"][::-1],
                FOREGROUND: seen.inside["a"],
            },
        )
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): told})

    verdicts = judge_evidence([case(number) for number in range(12)])
    words = {one.structure: one.word for one in verdicts}
    assert words == {"a": "redundant", "b": "uninformative", FOREGROUND: "cannot tell"}


@pytest.mark.parametrize("drops", [(0.1, 0.2), (0.05, 0.6)])
def test_a_gate_that_all_structures_need_is_informative_for_all_together(
    drops: tuple[float, float],
) -> None:
    def case(number: int) -> CaseEvidence:
        seen = channel(seed=number)
        scores, inside = seen.aurocs["a"], seen.inside["a"]
        told = replace(
            seen,
            drops={"a": drops[:1], "b": drops[1:], FOREGROUND: (sum(drops) / 2,)},
            aurocs=dict.fromkeys(("a", "b", FOREGROUND), scores),
            inside=dict.fromkeys(("a", "b", FOREGROUND), inside),
        )
        return CaseEvidence(f"{number}", "reference", {(KEY, 0): told})

    verdicts = judge_evidence([case(number) for number in range(12)])
    assert {one.structure: one.word for one in verdicts}[FOREGROUND] == "informative"


def test_a_function_of_the_image_must_be_beaten_and_many_of_them_hide_no_other() -> None:
    def compared(number: int, shown: str) -> ChannelEvidence:
        others = {f"deviation smoothed over {width} cells": 0.6 for width in range(60)}
        return channel(compared={**COMPARED, **others, shown: 0.95}, seed=number)

    texture = judged(scans(12, lambda i: compared(i, "deviation")))
    assert texture.word == "cannot tell"
    assert texture.figures["AUROC: best comparator"] == "deviation"
    assert judged(scans(12, lambda i: compared(i, "intensity"))).word == "uninformative"
    assert judged(scans(20, lambda i: compared(i, "deviation"))).word == "uninformative"


def test_deletions_for_which_the_network_gives_nan_are_left_out() -> None:
    areas = {HIGH_FIRST: 0.3, LOW_FIRST: 0.8, "intensity": 0.5, EARLIER: 0.5}

    def found(number: int) -> ChannelEvidence:
        return channel(areas={**areas, "gradient": math.nan if number else 0.4}, seed=number)

    assert judged(scans(12, found)).word == "informative"
    nothing = dict.fromkeys(areas, math.nan)
    verdict = judged(scans(3, lambda i: channel(areas=nothing, seed=i)))
    gain = verdict.figures["deletion: more than the best comparator"]
    assert isinstance(gain, float) and math.isnan(gain) and "deletion" not in verdict.reason


def test_a_structure_that_a_scan_does_not_have_is_left_out_there() -> None:
    found = scans(12)
    nowhere = {"a": np.zeros((10, 20, 1), bool)}
    empty = replace(channel(), drops={}, aurocs={}, curves={}, inside=nowhere)
    found.append(CaseEvidence("without", "reference", {(KEY, 0): empty}))
    verdict = judged(found)
    assert verdict.word == "informative" and verdict.figures["scans"] == 12


def test_the_number_of_scans_of_each_measure_is_told_and_counts() -> None:
    """4 of 12 scans have an AUROC. A test needs 6 values or more, so at least 6 further scans."""

    def some(number: int) -> ChannelEvidence:
        found = channel(seed=number)
        if number < 4:
            return found
        nowhere = {"a": np.zeros((10, 20, 1), bool)}
        return replace(found, aurocs={}, curves={}, inside=nowhere)

    verdict = judged(scans(12, some))
    told = {name: verdict.figures[f"scans{name}"] for name in ("", " with Dice", " with AUROC")}
    assert told == {"": 12, " with Dice": 12, " with AUROC": 4}
    assert verdict.reason.startswith("Over 12 scans") and "AUROC 0.95 (over 4 scans)" in (
        verdict.reason
    )
    further = verdict.figures["further scans"]
    assert verdict.word == "cannot tell" and isinstance(further, int) and further >= 6
    assert "(over" not in judged(scans(12)).reason


def test_what_was_not_measured_is_nan() -> None:
    verdict = judged(scans(1))
    for name in (
        "from",
        "to",
        "Dice lost with the others gone",
        "deletion: more than the best comparator",
    ):
        value = verdict.figures[name]
        assert isinstance(value, float) and math.isnan(value), name
    assert DICE_MARGIN == 0.01
