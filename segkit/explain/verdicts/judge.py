"""Verdicts on a model's gates over several scans, from Python."""

from collections.abc import Iterable

from segkit.explain.verdicts.ablation import check_gates
from segkit.explain.verdicts.evidence import CaseEvidence, gather_evidence
from segkit.explain.verdicts.rule import GateVerdict, judge_evidence
from segkit.explain.verdicts.untrained import MakeUntrained
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.system.progress import Track, untracked


def judge_gates(
    predictor: Predictor,
    cases: Iterable[tuple[Volume, Volume | None]],
    *,
    seed: int = 0,
    untrained: MakeUntrained | None = None,
    track: Track = untracked,
) -> list[GateVerdict]:
    """A word for each gate channel and structure of a model, over scans with references.

    docs/verdicts.md says by which rule. One to five scans cannot decide: ask of a dozen. It takes
    minutes a scan.

    Args:
        predictor: of the model; the first of several is edited and asked.
        cases: pairs of a scan and its labels on the same grid (None if there are none); they may
            come one after the other from disk. Pairs without labels count only if none has labels,
            and then no verdict has a word.
        seed: of untrained networks and of the order of ties.
        untrained: from a seed to an untrained network of the model's form; built of the model's
            description if None.
        track: may show the progress.

    Returns:
        A verdict for each gate, channel and structure; of each gate the best word comes first.

    Raises:
        ModelError: if the model has no gates.
        VolumeError: if labels lie on another grid than their scan, or hold labels that the model
            does not know.

    Example:
        predictor = segkit.Predictor.load("runs/mine")
        pairs = [(segkit.read_volume(a), segkit.read_labels(b)) for a, b in files]
        for verdict in segkit.judge_gates(predictor, pairs):
            print(verdict.map, verdict.structure, verdict.word, verdict.reason)
    """
    check_gates(predictor)
    found: list[CaseEvidence] = []
    for number, (volume, reference) in enumerate(cases):
        name = f"case {number}"
        prediction = predictor(volume, maps=True)
        found.append(
            gather_evidence(
                predictor,
                volume,
                reference,
                prediction.maps,
                labels=prediction.labels,
                case=name,
                earlier=found,
                seed=seed,
                untrained=untrained,
                track=track,
            )
        )
    return judge_evidence(found)
