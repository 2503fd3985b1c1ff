"""Laws of verdicts: the written rule, and networks of which a gate's worth is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy import ndarray
from scipy.stats import mannwhitneyu

from segkit.explain.display import Verdict
from segkit.explain.measures.ranks import settled
from segkit.explain.verdicts.ablation import ablate, ablation_effects
from segkit.explain.verdicts.perturbation import perturb
from segkit.explain.verdicts.randomisation import randomise
from segkit.explain.verdicts.rule import MapFigures, gather_figures, judge
from tests.planted import KEY, Kind, Planted, planted, planted_case

GOOD = MapFigures(
    "skip.1/gate",
    cases=12,
    mean_change=-0.02,
    mean_p=0.01,
    permuted_change=-0.001,
    permuted_p=0.9,
    testable=True,
    auroc=0.9,
    baseline="intensity",
    baseline_auroc=0.7,
    deletion_gain=0.0,
    deletion_spread=0.01,
    randomised=0.1,
)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "informative"),
        # The network needs it: by either operation, beyond chance and by enough.
        ({"mean_p": 0.06}, "redundant"),
        ({"mean_change": -0.004}, "redundant"),
        ({"mean_change": 0.02}, "redundant"),
        ({"mean_change": 0.0, "permuted_change": -0.006, "permuted_p": 0.04}, "informative"),
        # Too few cases for a test: twice the change is asked for.
        ({"testable": False, "mean_change": -0.009, "mean_p": None}, "redundant"),
        ({"testable": False, "mean_change": -0.011, "mean_p": None}, "informative"),
        # It shows more than the image, in one way or the other.
        ({"baseline_auroc": 0.89}, "redundant"),
        ({"baseline_auroc": 0.89, "deletion_gain": 0.03}, "informative"),
        ({"baseline_auroc": 0.89, "deletion_gain": 0.03, "deletion_spread": 0.02}, "redundant"),
        # It was learned.
        ({"randomised": 0.95}, "redundant"),
        ({"randomised": -0.95}, "informative"),
        ({"randomised": None}, "informative"),
        # It does not even show its class.
        ({"auroc": 0.59, "mean_p": 0.5}, "uninformative"),
        ({"auroc": None, "baseline_auroc": None, "mean_p": 0.5}, "uninformative"),
        ({"auroc": 0.1, "baseline_auroc": 0.7}, "uninformative"),
    ],
)
def test_the_rule(changes: dict[str, float | None], expected: str) -> None:
    verdict = judge(replace(GOOD, **changes))
    assert verdict is not None
    assert verdict.verdict == expected and verdict.map == "skip.1/gate"


@pytest.mark.parametrize(
    "changes",
    [
        {"mean_change": None, "permuted_change": None},
        {"auroc": None, "deletion_gain": None},
    ],
)
def test_what_nobody_measured_has_no_verdict(changes: dict[str, None]) -> None:
    assert judge(replace(GOOD, **changes)) is None


def test_a_verdict_is_one_sentence_with_its_numbers() -> None:
    verdict = judge(GOOD)
    assert verdict is not None
    assert verdict.reason == (
        "the network needs it: Dice changes by -0.0200 (p = 0.01) with it evened out and by "
        "-0.0010 (p = 0.9) with it shuffled; it shows more than the image: AUROC 0.90 beside 0.70 "
        "of intensity and deletion +0.000 over random; it was learned: 0.10 with itself under "
        "random weights."
    )
    assert verdict.numbers["AUROC"] == 0.9 and verdict.numbers["enough for a test"] == "yes"
    untested = judge(replace(GOOD, testable=False, against="prediction", randomised=None))
    assert untested is not None
    assert ": Dice with the model's own prediction changes by" in untested.reason
    assert "with it shuffled, of too few cases for a test; " in untested.reason
    assert untested.reason.endswith("whether it was learned cannot be told.")


def auroc(inside: ndarray, values: ndarray) -> float:
    """The share of pairs, of a voxel inside and one outside, of which the first is higher."""
    values = settled(values)
    first, second = values[inside == 1], values[inside == 0]
    return float(mannwhitneyu(first, second).statistic / (len(first) * len(second)))


def verdict_of(kind: Kind, cases: int) -> tuple[MapFigures, Verdict]:
    predictor = planted(kind)
    ablations, curves, redrawn, aurocs, intensity = [], [], [], [], []
    torch.manual_seed(0)
    fresh = Planted("untrained")
    for seed in range(cases):
        case = planted_case(seed)
        maps = predictor(case.volume, maps=True).maps
        ablations += ablate(predictor, case.volume, case.reference, case=case.name)
        if seed == 0:
            curves += perturb(predictor, case.volume, maps, case=case.name)
            redrawn += randomise(predictor, case.volume, case=case.name, fresh=fresh)
        inside = case.reference.data.ravel()
        aurocs.append(auroc(inside, maps[KEY].volume.data.ravel()))
        intensity.append(auroc(inside, case.volume.data[..., 0].ravel()))
    figures = gather_figures(
        KEY,
        effects=ablation_effects(ablations),
        curves=curves,
        randomisations=redrawn,
        aurocs=aurocs,
        baselines={"intensity": intensity},
    )
    verdict = judge(figures)
    assert verdict is not None and figures.cases == cases
    assert figures.downstream_change == 0
    return figures, verdict


@pytest.mark.parametrize("cases", [1, 8])
def test_a_gate_that_is_the_mask_is_informative(cases: int) -> None:
    figures, verdict = verdict_of("mask", cases)
    assert figures.auroc == 1 and figures.testable == (cases == 8)
    assert verdict.verdict == "informative", verdict.reason
    if cases == 8:
        assert figures.mean_p == pytest.approx(4 * 2**-7)


@pytest.mark.parametrize("kind", ["noise", "constant"])
def test_a_gate_of_noise_or_of_one_value_is_uninformative(kind: Kind) -> None:
    figures, verdict = verdict_of(kind, 2)
    assert figures.auroc == pytest.approx(0.5, abs=0.1 if kind == "noise" else 0)
    assert figures.mean_change == 0
    assert verdict.verdict == "uninformative", verdict.reason


def test_figures_are_means_over_cases_of_one_map() -> None:
    figures = gather_figures(
        "a", aurocs=[0.6, 0.8], baselines={"x": [0.5, 0.6], "y": [0.9], "z": []}
    )
    assert (figures.auroc, figures.baseline, figures.baseline_auroc) == (
        pytest.approx(0.7),
        "y",
        0.9,
    )
    assert figures.mean_change is None and figures.cases == 2
    dark = gather_figures("a", aurocs=[0.6], baselines={"intensity": [0.1, 0.2], "gradient": [0.7]})
    assert (dark.baseline, dark.baseline_auroc) == ("intensity turned over", pytest.approx(0.85))
    assert np.isclose(gather_figures("a", aurocs=[0.6]).auroc, 0.6) and judge(figures) is None
