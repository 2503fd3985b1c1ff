import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segkit import ConfigError, compare
from segkit.evaluation.compare import Difference, holm, read_strata
from tests.cli.command import run

Scores = Mapping[str, Mapping[str, float | None]]


def summary(folder: Path, dice: Scores) -> Path:
    """The folder of a run that held these cases out."""
    folder.mkdir(parents=True)
    content = {"validation": {"dice_of_cases": dice}}
    (folder / "summary.json").write_text(json.dumps(content))
    return folder


def evaluation(path: Path, rows: Sequence[tuple[str, str, float | None, float | None]]) -> Path:
    """As `segkit evaluate --out` writes: case, class, Dice and HD95."""
    cases = [
        {"case": case, "label": 1, "name": name, "dice": dice, "hd95_mm": far}
        for case, name, dice, far in rows
    ]
    path.write_text(json.dumps({"cases": cases}))
    return path


def of_one_class(folder: Path, values: Sequence[float | None]) -> Path:
    return summary(folder, {f"case_{n}": {"liver": value} for n, value in enumerate(values)})


def differences(tmp_path: Path, a: Sequence[float | None], b: Sequence[float | None]) -> Difference:
    both = of_one_class(tmp_path / "a", a), of_one_class(tmp_path / "b", b)
    return compare(*both).differences[0]


def test_the_same_gain_in_every_case_has_an_interval_of_width_0_and_the_smallest_p(
    tmp_path: Path,
) -> None:
    a = [0.5, 0.6, 0.7, 0.2, 0.3, 0.4]
    found = differences(tmp_path, a, [value + 0.125 for value in a])
    assert (found.difference, found.low, found.high) == pytest.approx((0.125,) * 3)
    # Of 64 ways to give six signs, all plus and all minus are as far from 0.
    assert found.p == found.p_holm == pytest.approx(2 / 64)
    assert (found.better, found.worse, found.cases) == (6, 0, 6)
    assert found.mean_b - found.mean_a == pytest.approx(found.difference)


def test_the_p_value_is_the_share_of_sign_patterns_with_as_large_a_mean(tmp_path: Path) -> None:
    change = np.array([0.08, -0.02, 0.05, 0.01, -0.04, 0.03, 0.06])
    found = differences(tmp_path, [0.5] * 7, list(0.5 + change))
    signs = np.array(np.meshgrid(*[[-1, 1]] * 7)).reshape(7, -1)
    means = np.abs((signs * change[:, None]).mean(0))
    assert found.p == pytest.approx(np.mean(means >= abs(change.mean()) - 1e-12))


def test_a_model_is_no_better_than_itself(tmp_path: Path) -> None:
    found = differences(tmp_path, [0.1, 0.5, 0.9], [0.1, 0.5, 0.9])
    assert (found.difference, found.low, found.high, found.p) == (0, 0, 0, 1)
    assert (found.better, found.worse) == (0, 0)


@pytest.mark.slow
def test_a_95_percent_interval_contains_the_truth_about_that_often(tmp_path: Path) -> None:
    random, held = np.random.default_rng(0), 0
    for trial in range(60):
        change = random.normal(0.02, 0.05, 40)
        found = differences(tmp_path / str(trial), [0.5] * 40, list(0.5 + change))
        held += found.low <= 0.02 <= found.high
    assert 51 <= held <= 60


def test_in_strata_cases_are_drawn_from_their_own_group(tmp_path: Path) -> None:
    a = of_one_class(tmp_path / "a", [0.5] * 6)
    b = of_one_class(tmp_path / "b", [0.6] * 2 + [0.3] * 4)
    strata = {f"case_{n}": "near" if n < 2 else "far" for n in range(6)}
    apart = compare(a, b, strata=strata).differences[0]
    together = compare(a, b).differences[0]
    assert apart.low == apart.high == pytest.approx(apart.difference)
    assert together.low < together.difference < together.high
    with pytest.raises(ConfigError, match="found none for case_5"):
        compare(a, b, strata={name: "x" for name in list(strata)[:-1]})


def test_cases_that_only_one_model_has_are_left_out_and_counted(tmp_path: Path) -> None:
    found = differences(tmp_path, [None, 0.5, 0.5, None], [0.0, None, 0.75, None])
    assert (found.cases, found.only_a, found.only_b) == (1, 1, 1)
    assert (found.mean_a, found.mean_b, found.difference) == (0.5, 0.75, 0.25)
    a, b = of_one_class(tmp_path / "c", [0.5, 0.5]), of_one_class(tmp_path / "d", [0.5] * 3)
    both = compare(a, b)
    assert both.only_in_b == ("case_2",) and both.num_cases == 2 and not both.only_in_a


def test_a_smaller_distance_is_better(tmp_path: Path) -> None:
    a = evaluation(tmp_path / "a.json", [("x", "liver", 0.5, 4.0), ("y", "liver", 0.5, 2.0)])
    b = evaluation(tmp_path / "b.json", [("x", "liver", 0.6, 3.0), ("y", "liver", 0.4, 1.0)])
    of_dice, _, of_distance, _ = compare(a, b, metrics=["dice", "hd95_mm"]).differences
    assert (of_dice.better, of_dice.worse, of_dice.difference) == (1, 1, pytest.approx(0))
    assert (of_distance.better, of_distance.worse, of_distance.difference) == (2, 0, -1)


def test_classes_are_corrected_for_each_other_and_the_overall_is_their_mean(tmp_path: Path) -> None:
    a = summary(tmp_path / "a", {f"c{n}": {"one": 0.5, "two": 0.5} for n in range(8)})
    change = [0.1, 0.2, 0.1, 0.2, 0.1, -0.3, 0.1, 0.2]
    b = summary(
        tmp_path / "b",
        {f"c{n}": {"one": 0.6, "two": 0.5 + more} for n, more in enumerate(change)},
    )
    one, two, overall = compare(a, b).differences
    assert (one.p_holm, two.p_holm) == (pytest.approx(2 * one.p), pytest.approx(two.p))
    assert overall.name == "overall" and overall.p_holm == overall.p
    assert overall.difference == pytest.approx((one.difference + two.difference) / 2)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_corrected_p_values_are_larger_and_in_the_same_order(p_values: list[float]) -> None:
    corrected = holm(p_values)
    assert all(
        p <= more <= min(1, len(p_values) * max(p_values)) + 1e-12
        for p, more in zip(p_values, corrected, strict=True)
    )
    order = np.argsort(p_values, kind="stable")
    assert np.all(np.diff(np.array(corrected)[order]) >= 0)


def test_scores_that_cannot_be_compared_are_refused_in_a_sentence(tmp_path: Path) -> None:
    a = of_one_class(tmp_path / "a", [0.5, 0.5])
    other = summary(tmp_path / "o", {"zz": {"liver": 0.5}})
    kidney = summary(tmp_path / "k", {"case_0": {"kidney": 0.5}})
    for paths, told in [
        ((a, other), "no case in common: A has case_0, case_1, B has zz"),
        ((a, kidney), "scores of liver, .* of kidney"),
        ((a, tmp_path / "nowhere"), "no such file"),
    ]:
        with pytest.raises(ConfigError, match=told):
            compare(*paths)
    with pytest.raises(ConfigError, match="unknown metric 'auc'; choose from dice"):
        compare(a, a, metrics=["auc"])
    with pytest.raises(ConfigError, match="has no scores of nsd; write them with"):
        compare(a, a, metrics=["nsd"])
    (tmp_path / "list.json").write_text('{"cases": []}')
    (tmp_path / "half.json").write_text('{"cases": [')
    for name, told in (("list", "contains no scores of cases"), ("half", "cannot be read as JSON")):
        with pytest.raises(ConfigError, match=told):
            compare(a, tmp_path / f"{name}.json")
    (tmp_path / "table.csv").write_text("\ufeffcase,site\nx,1\nx,2\n")
    with pytest.raises(ConfigError, match="has several lines for a case"):
        read_strata(tmp_path / "table.csv", "site")
    with pytest.raises(ConfigError, match="has no column 'age'"):
        read_strata(tmp_path / "table.csv", "age")


def test_the_command_prints_the_same_numbers_as_python(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = of_one_class(tmp_path / "a", [0.5, 0.4, 0.3]), of_one_class(tmp_path / "b", [0.75] * 3)
    (tmp_path / "sites.csv").write_text("case,site\ncase_0,u\ncase_1,u\ncase_2,v\n")
    out = tmp_path / "comparison.json"
    code, printed, err = run(
        "compare", a, b, "--strata", tmp_path / "sites.csv", "site", "--out", out, "--json",
        capsys=capsys,
    )  # fmt: skip
    assert (code, err) == (0, "") and printed == out.read_text()
    strata = {"case_0": "u", "case_1": "u", "case_2": "v"}
    assert json.loads(printed) == json.loads(json.dumps(compare(a, b, strata=strata).to_json()))
    code, printed, _ = run("compare", a, b, capsys=capsys)
    assert code == 0 and "+0.350" in printed and "liver" in printed


def test_lengths_of_pictures_are_compared_in_their_unit(tmp_path: Path) -> None:
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path, name, far in zip(paths, ["hd95_um", "hd95_mm"], [3.0, 0.002], strict=True):
        rows = [{"case": "x", "label": 1, "name": "cell", "dice": 0.5, name: far}]
        path.write_text(json.dumps({"cases": rows}))
    for asked in ("hd95_mm", "hd95_um"):
        found = compare(*paths, metrics=[asked])
        row = found.differences[0]
        assert (row.metric, found.unit) == ("hd95_um", "µm")
        # 0.002 mm are 2 µm, 1 µm less than in A.
        assert (row.mean_a, row.mean_b, row.difference) == pytest.approx((3, 2, -1))
        assert (row.better, row.worse) == (1, 0)
    other = compare(*reversed(paths), metrics=["hd95_mm"])
    assert other.differences[0].metric == "hd95_mm"
    assert other.differences[0].difference == pytest.approx(0.001)


def test_pixels_are_not_compared_with_millimetres(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mm = evaluation(tmp_path / "a.json", [("x", "liver", 0.5, 4.0)])
    pixels = tmp_path / "b.json"
    row = {"case": "x", "label": 1, "name": "liver", "dice": 0.75, "hd95_px": 3.0}
    pixels.write_text(json.dumps({"cases": [row]}))
    with pytest.raises(ConfigError, match=r"has lengths in mm, .*b\.json in pixel; evaluate both"):
        compare(mm, pixels, metrics=["hd95_mm"])
    assert compare(mm, pixels).differences[0].difference == 0.25
    code, out, _ = run("compare", pixels, pixels, "--metric", "hd95_px", capsys=capsys)
    assert code == 0 and "HD95 (pixels)" in out


def with_tolerance(path: Path, tolerances: Mapping[str, float], name: str = "tolerance_mm") -> Path:
    scores = {"label": 1, "name": "liver", "dice": 0.5, "nsd": 0.75}
    far = name.replace("tolerance", "hd95")
    rows = [{"case": case, **scores, far: 3, name: mine} for case, mine in tolerances.items()]
    path.write_text(json.dumps({"cases": rows}))
    return path


def test_surface_dice_is_compared_only_within_the_same_tolerance(tmp_path: Path) -> None:
    a = with_tolerance(tmp_path / "a.json", {"x": 1.0, "y": 2.0})
    b = with_tolerance(tmp_path / "b.json", {"x": 1.0, "y": 3.0})
    in_pixels = with_tolerance(tmp_path / "c.json", {"x": 1.0}, "tolerance_px")
    same = with_tolerance(tmp_path / "d.json", {"x": 1.0, "y": 2.0, "z": 9.0})
    with pytest.raises(
        ConfigError, match=r"^y: .*a\.json has the NSD within 2 mm, .*b\.json within 3 mm; eval"
    ):
        compare(a, b, metrics=["dice", "nsd"])
    with pytest.raises(ConfigError, match=r"^x: .* within 1 mm, .*c\.json within 1 pixel; eval"):
        compare(a, in_pixels, metrics=["nsd"])
    assert compare(a, b).differences[0].difference == 0
    assert compare(a, same, metrics=["nsd"]).num_cases == 2


def test_tolerances_of_other_units_are_the_same_length(tmp_path: Path) -> None:
    a = with_tolerance(tmp_path / "a.json", {"x": 0.0005})
    b = with_tolerance(tmp_path / "b.json", {"x": 0.5}, "tolerance_um")
    assert compare(a, b, metrics=["nsd"]).differences[0].difference == 0


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"metrics": []}, r"expected a metric, found none; choose from dice, iou"),
        ({"num_resamples": 0}, r"num_resamples: expected at least 1, found 0; raise it"),
        ({"num_resamples": -1}, r"num_resamples: expected at least 1, found -1; raise it"),
        ({"seed": -1}, r"seed: expected 0 or a larger number, found -1; choose another"),
    ],
)
def test_settings_of_a_comparison_out_of_range_are_refused(
    settings: dict[str, Any], told: str, tmp_path: Path
) -> None:
    a = of_one_class(tmp_path / "a", [0.5, 0.5])
    with pytest.raises(ConfigError, match=told):
        compare(a, a, **settings)
