"""Explain the segmentation of one scan: maps, measures and verdicts as an `Explanation`.

explanation = explain_volume(Predictor.load("runs/mine"), read_volume(path), reference)
explanation.maps["skip.1/gate"].volume.data      # the map on its own grid
explanation.measures                              # a list of dataclasses, one for each measure
explanation                                       # in a notebook: pictures and tables
"""

from collections.abc import Collection, Iterable, Sequence
from importlib.metadata import version

import numpy as np
import torch

from segkit.config.labels import Labelling
from segkit.data.label_numbers import within
from segkit.errors import VolumeError, counted
from segkit.explain.attribution.attribute import (
    Attribution,
    AttributionSettings,
    Method,
    attribute,
    chosen_methods,
)
from segkit.explain.attribution.examine import AttributionTest, examine_attributions
from segkit.explain.explanation import Explanation
from segkit.explain.heads.reach import watching
from segkit.explain.measures.fuse import with_fused
from segkit.explain.measures.measure_maps import TOLERANCE_MM, measure_maps, measured_structures
from segkit.explain.measures.pairs import check_unlabelled
from segkit.explain.verdicts.ablation import ablated_maps
from segkit.explain.verdicts.evidence import CaseEvidence
from segkit.explain.verdicts.identity import check_blocks, study_of, without_blocks
from segkit.explain.verdicts.study import study_gates
from segkit.explain.verdicts.untrained import MakeUntrained
from segkit.inference.predictor import Predictor
from segkit.io.picture_rules import size_in_words
from segkit.io.volume import Volume
from segkit.nn.cost import count_parameters
from segkit.system.progress import Track, untracked


def explain_volume(
    predictor: Predictor,
    volume: Volume,
    reference: Volume | None = None,
    *,
    name: str = "scan",
    tolerance_mm: float = TOLERANCE_MM,
    verdicts: bool = False,
    identity: bool = False,
    blocks: Collection[str] | None = None,
    untrained: MakeUntrained | None = None,
    unlabelled: Collection[str] = (),
    earlier: Sequence[CaseEvidence] = (),
    attributions: Sequence[Method] = (),
    attribution_settings: AttributionSettings | None = None,
    track: Track = untracked,
) -> Explanation:
    """Segment a scan, record the attention maps, and compare them with labels.

    Args:
        predictor: runs the model. Map cells of windows that it skips are NaN and are not measured.
        volume: the scan.
        reference: labels on the scan's grid; its axes may be stored in another order. If None, the
            maps are compared with the predicted labels.
        name: name of the scan on the page and in files.
        tolerance_mm: largest distance from a structure, in mm, at which a map's highest value still
            counts as pointing at it; 5 mm by default.
        verdicts: whether to judge if each gate matters. This takes minutes. One scan gives
            evidence, but the verdict is nearly always 'cannot tell'; `judge_gates` takes several.
            If there are attributions, each is tested by deletion and randomisation too, and a
            model without gates is allowed.
        identity: whether to segment the scan again with each attention block replaced by the
            identity. `judge_attention` does so for several scans, and gives a verdict.
        blocks: the blocks for `identity`, by names as for `as_identity`; all if None.
        untrained: only for verdicts on your own network: a function from a seed to an untrained
            network with the same architecture.
        unlabelled: classes or regions that nobody labelled in the reference, as in `data.labelled`.
            They do not count in Dice, measures and verdicts. Ignored without a reference.
        earlier: only for verdicts: evidence of other scans (`Explanation.worth.evidence`). Their
            mean map is one of the comparators for deletion.
        attributions: methods of `attribute` that are applied to every predicted structure. Each
            takes minutes.
        attribution_settings: their settings.
        track: reports the progress.

    Returns:
        Labels, maps and measures of the scan. Its method `write` writes them to files.

    Raises:
        VolumeError: if the reference lies on another grid or has labels that the model does not
            know, the volume does not fit the model, or `unlabelled` names an unknown class.
        ModelError: if verdicts but no attributions are wanted and the model has no gates; if
            `identity` is set and it has no such attention block; or if an attribution is unknown.

    Example:
        predictor = segkit.Predictor.load("runs/mine")
        explanation = segkit.explain_volume(predictor, segkit.read_volume("scan.nii.gz"))
        explanation.write("explained")
    """
    description = predictor.model.description
    labelling = description.labelling
    chosen_methods(attributions)
    chosen = check_blocks(predictor, blocks) if identity else ()
    volume = predictor.with_numbers(volume)
    check_unlabelled(name, unlabelled, labelling)
    lacking = () if reference is None else tuple(unlabelled)
    if reference is not None:
        reference = _reference_on(volume, reference, labelling, name)
    with watching(predictor) as watchers:
        prediction = predictor(
            volume,
            maps=True,
            disagreement=True,
            track=lambda slabs, count: track(slabs, "explaining", count),
        )
    reach = {position: watcher.result() for position, watcher in watchers.items()}
    maps = with_fused(prediction.maps)
    attributed, tests = _attributed(
        predictor, volume, prediction.labels, attributions, attribution_settings, verdicts, track
    )
    shown = {**maps, **{key: one.map for key, one in attributed.items()}}
    measures = measure_maps(
        shown,
        volume,
        prediction.labels if reference is None else reference,
        labelling,
        channels=description.channels,
        tolerance_mm=tolerance_mm,
        unlabelled=lacking,
    )
    dice = {} if reference is None else _dice_of(prediction.labels, reference, labelling, lacking)
    worth = None
    if verdicts and (ablated_maps(predictor) or not attributions):
        worth = study_gates(
            predictor,
            volume,
            reference,
            maps,
            labels=prediction.labels,
            case=name,
            earlier=earlier,
            untrained=untrained,
            unlabelled=lacking,
            track=track,
        )
    attention = None
    if identity:
        rows = without_blocks(
            predictor,
            volume,
            reference,
            case=name,
            blocks=chosen,
            unlabelled=lacking,
            track=track,
        )
        attention = study_of(predictor, chosen, rows)
    facts = facts_of(predictor)
    if lacking:
        facts["not labelled in the reference"] = ", ".join(lacking)
    return Explanation(
        name,
        volume,
        prediction.labels,
        reference,
        shown,
        measures,
        tolerance_mm,
        dice,
        reach,
        worth,
        attention,
        {number: label for label, number in labelling.numbers_in_files.items()},
        facts,
        labelling,
        lacking,
        attributed,
        tests,
    )


def _reference_on(volume: Volume, reference: Volume, labelling: Labelling, name: str) -> Volume:
    """A reference on the scan's grid. Raises VolumeError if it does not fit scan or model."""
    reference = reference.measured_as(volume).onto(
        volume.grid, what=f"{name}: the reference", whose="the scan"
    )
    try:
        within(reference.data, labelling)
    except ValueError as error:
        raise VolumeError(f"{name}: the reference {error}") from None
    return reference


def _dice_of(
    labels: Volume, reference: Volume, labelling: Labelling, unlabelled: Collection[str]
) -> dict[str, float]:
    """Dice of each structure; NaN if nobody labelled it, or if neither volume contains it."""
    found, right = (within(each.data, labelling) for each in (labels, reference))
    counted = np.ones(right.shape, bool) if labelling.ignore is None else right != labelling.ignore
    known = measured_structures(labelling, unlabelled)
    return {
        structure: _dice(found[counted], right[counted], numbers)
        if structure in known
        else float("nan")
        for structure, numbers in measured_structures(labelling).items()
    }


def facts_of(predictor: Predictor) -> dict[str, str]:
    """The model and the settings of a predictor, in words."""
    description = predictor.model.description
    overlap = predictor.layout.overlap
    patch = " × ".join(map(str, description.patch_size))
    network, unit = description.network, description.unit
    across = None if unit == "mm" else description.axis_across  # a picture has no slice distance
    spacing = [step for axis, step in enumerate(description.spacing) if axis != across]
    return {
        "model": description.run,
        **_network_facts(predictor),
        "image channels": ", ".join(description.channels),
        "spacing": size_in_words(spacing, unit),
        "windows": f"{patch} voxels{' of a slice' * (network.spatial_dims == 2)}, "
        f"overlap {max(overlap):g}",
        "measured": "on each map's own grid; a cell is in a structure if at least half of it is",
        "versions": f"segkit {version('segkit')} (model: {description.segkit}), "
        f"torch {torch.__version__}, numpy {np.__version__}",
    }


def _network_facts(predictor: Predictor) -> dict[str, str]:
    """The network and its attention, in words."""
    module, network = predictor.model.network, predictor.model.description.network
    if network.given is not None:
        return {
            "network": f"{network.given.name or type(module).__name__}, {network.spatial_dims}D, "
            f"{counted(count_parameters(module), 'parameter')}",
            "maps": ", ".join(module.maps()) or "none",
        }
    return {
        "network": f"{network.spatial_dims}D U-Net, channels {network.channels}",
        "attention": ", ".join(
            f"{place}: {setting.kind}"
            for place in ("skip", "encoder", "decoder", "bottleneck", "head")
            if (setting := getattr(network.attention, place)) is not None
        )
        or "none",
    }


def _attributed(
    predictor: Predictor,
    volume: Volume,
    labels: Volume,
    methods: Sequence[Method],
    settings: AttributionSettings | None,
    verdicts: bool,
    track: Track,
) -> tuple[dict[str, Attribution], dict[str, AttributionTest]]:
    """Attributions of all predicted structures by all methods, by key, and tests if wanted.

    Args:
        predictor: runs the model.
        volume: the scan.
        labels: the predicted labels, which are the regions.
        methods: the methods.
        settings: settings of the methods.
        verdicts: whether each attribution is tested.
        track: reports the progress.
    """
    found = {
        one.key: one
        for method in methods
        for one in attribute(
            predictor, volume, method, region=labels, settings=settings, track=track
        ).values()
    }
    examined = found if verdicts else {}
    return found, examine_attributions(predictor, volume, labels, examined, track=track)


def _dice(labels: np.ndarray, reference: np.ndarray, numbers: Iterable[int]) -> float:
    wanted = list(numbers)
    found, right = np.isin(labels, wanted), np.isin(reference, wanted)
    total = int(found.sum()) + int(right.sum())
    return 2 * int((found & right).sum()) / total if total else float("nan")
