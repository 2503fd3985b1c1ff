"""Verdicts on a model's gates over several scans."""

from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

from segkit.errors import ModelError
from segkit.explain.measures.pairs import cases_to_judge
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
    unlabelled: Mapping[int, Collection[str]] = MappingProxyType({}),
    track: Track = untracked,
) -> list[GateVerdict]:
    """A verdict on each gate channel and structure of a model, over scans with references.

    docs/verdicts.md states the rule. One to five scans are too few for a verdict; use about twelve.
    Each scan takes minutes.

    Args:
        predictor: runs the model. In an ensemble, only the first model is edited and tested.
        cases: pairs of a scan and its reference labels on the same grid, or None without a
            reference. An iterator may read them from disk one by one. Pairs without a reference are
            used only if no pair has one; then `word` is None in every verdict.
        seed: seed of the untrained networks and the random order of equal values.
        untrained: a function from a seed to an untrained network with the model's architecture. If
            None, networks are built from the model's description.
        unlabelled: for the index of a pair, the classes or regions that nobody labelled in its
            reference; they do not count there.
        track: reports the progress.

    Returns:
        A verdict for each gate, channel and structure. The best verdict on each gate comes first.

    Raises:
        ModelError: if the model has no gates, or if an untrained network does not have its
            architecture, or if the seed is negative.
        VolumeError: if a reference lies on another grid than its scan, or has labels that the model
            does not know, if `unlabelled` names an unknown class or pair, or if there are no pairs
            or other values than pairs.

    Example:
        predictor = segkit.Predictor.load("runs/mine")
        pairs = [(segkit.read_volume(a), segkit.read_labels(b)) for a, b in files]
        for verdict in segkit.judge_gates(predictor, pairs):
            print(verdict.map, verdict.structure, verdict.word, verdict.reason)
    """
    if seed < 0:
        raise ModelError(f"expected a seed of 0 or more, found {seed}; use another seed")
    check_gates(predictor)
    labelling = predictor.model.description.labelling
    found: list[CaseEvidence] = []
    for name, volume, reference, lacking in cases_to_judge(cases, unlabelled, labelling):
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
                unlabelled=lacking,
                track=track,
            )
        )
    return judge_evidence(found)
