"""A page over scans sums up those that have a figure."""

from segkit.explain.measures.measure_maps import Measure
from segkit.explain.page.cohort_page import CaseFigures, cohort_text


def test_a_cohort_page_averages_over_the_scans_that_have_a_value() -> None:
    def case(name: str, value: float) -> CaseFigures:
        auroc = Measure("skip.1/gate", "map", "<left>", "auroc", value, 0.5)
        return CaseFigures(name, [auroc], {"<left>": value})

    text = cohort_text([case("a b", 0.6), case("<c>", 0.8), case("d", float("nan"))], {"<x>": "y"})
    assert "0.700 ± 0.100 (0.500) of 2" in text.replace("\N{NO-BREAK SPACE}", " ")
    assert 'href="a%20b/index.html"' in text and 'href="-c-/index.html"' in text
    assert "<left>" not in text and "<x>" not in text and "&lt;left&gt;" in text
    assert "<td>0.800</td>" in text and "<td>–</td>" in text
