"""What a study of a model's maps hands over, to be shown and kept beside the measures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from segkit.explain.measures.measure_maps import Measure
from segkit.explain.page.page import Bars, Curve, Table, Verdict
from segkit.inference.attention_maps import AttentionMap
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume


@dataclass(frozen=True)
class Findings:
    """Parts of a page, and the figures behind them."""

    name: str
    """Under which `figures` stand in measures.json."""
    tables: tuple[Table, ...] = ()
    curves: tuple[Curve, ...] = ()
    bars: tuple[Bars, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """Plain JSON."""
    rows: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    """Tables for files of their own, by the name of the file."""


class Study(Protocol):
    """Anything that asks more of a model about one scan than its measures say."""

    def __call__(
        self,
        predictor: Predictor,
        name: str,
        volume: Volume,
        reference: Volume | None,
        maps: Mapping[str, AttentionMap],
        measures: Sequence[Measure],
    ) -> Findings:
        """What it found; `maps` are those of the scan, the fused one with them, as measured."""
