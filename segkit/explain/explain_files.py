"""The work of `segkit explain`: write maps, measures, verdicts and a page for each volume."""

import glob
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from segkit.errors import SegkitError, VolumeError, first_few
from segkit.evaluation.references import references_in
from segkit.evaluation.tolerance import Tolerance, tolerance_in
from segkit.explain.attribution.attribute import AttributionSettings, Method
from segkit.explain.display import Verdict
from segkit.explain.explain_scan import explain_volume, facts_of
from segkit.explain.explanation import ENDINGS, FIGURES, PAGE, TABLE, Explanation
from segkit.explain.heads.reach import HeadReach
from segkit.explain.measures.measure_maps import TOLERANCE_MM
from segkit.explain.page.cohort_page import CaseFigures, cohort_text
from segkit.explain.page.parts import rows_as_csv
from segkit.explain.references import find_references
from segkit.explain.verdicts.ablation import Ablation
from segkit.explain.verdicts.identity import (
    IDENTITY,
    AttentionStudy,
    block_cards,
    check_blocks,
    identity_tables,
    study_of,
)
from segkit.explain.verdicts.study import ABLATIONS, Worth, cohort_figures, shown_verdicts
from segkit.inference.made_by import made_by, models_and_settings
from segkit.inference.predictor import Predictor
from segkit.io.atomic import (
    mark_finished,
    mark_unfinished,
    refuse_existing,
    remove_leftovers,
    unfinished_files,
    write_json,
    write_text,
)
from segkit.io.checksums import checksums
from segkit.io.file_names import tell_changed_names
from segkit.io.inputs import Input, failure, read_input
from segkit.io.picture_rules import Unit
from segkit.io.volume import read_labels
from segkit.provenance import PROVENANCE
from segkit.system.progress import Track, untracked

DEFAULT_POINTING = Tolerance(mm=TOLERANCE_MM, pixels=5.0)
"""The default tolerance of pointing, for volumes in mm and for pictures in pixels."""

COHORT = "cohort.csv"
COHORT_FIGURES = "cohort.json"
Conclude = Callable[[Sequence[Verdict]], None]
ConcludeAttention = Callable[[AttentionStudy], None]


@dataclass(frozen=True)
class Explained:
    """The files written for one volume, or the reason why none was written."""

    name: str
    written: tuple[Path, ...] = ()
    reach: dict[str, list[HeadReach]] = field(default_factory=dict)
    """Attention distance of each head in this volume, by position in the network."""
    verdicts: tuple[Verdict, ...] = ()
    """The best verdict on each map, from this volume only."""
    attention: AttentionStudy | None = None
    """Dice of this volume with attention blocks as the identity; None if not wanted."""
    attributed: tuple[str, ...] = ()
    """A sentence about each attribution."""
    unit: Unit = "mm"
    """The unit of lengths in the volume, for people."""
    against: str = "prediction"
    """The labels that its maps are compared with: 'reference' or 'prediction'."""
    error: str | None = None
    """The reason as one sentence; None if the files were written."""


def explain_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    folder: str | Path,
    *,
    references: str | Path | None = None,
    tolerance: str | float | None = None,
    verdicts: bool = False,
    attributions: Sequence[Method] = (),
    attribution_settings: AttributionSettings | None = None,
    identity: bool = False,
    overwrite: bool = False,
    conclude: Conclude = lambda verdicts: None,
    conclude_attention: ConcludeAttention = lambda study: None,
    track: Track = untracked,
) -> Iterator[Explained]:
    """Write labels, maps, measures and a page for each volume, and yield a result for each.

    The files of a volume are its labels (`NAME_seg`), the maps of `write_maps` with the attention
    distances of heads, `measures.json`, `measures.csv` and `index.html`. A single volume is written
    to `folder` itself. If there are several, each has its own folder in it; `cohort.csv` then has
    the rows of all volumes, `cohort.json` describes them and `index.html` summarises them.
    With verdicts, `ablation.csv` has a row for each ablated map and class, and `cohort.json` also
    has the verdicts over all volumes. With `identity`, `identity.csv` has a row for each attention
    block and class, and `cohort.json` has the verdicts on blocks over all volumes.

    A volume that fails does not stop the others. It is left out of the summary. If results may be
    overwritten, old files that have no new counterpart are removed.

    Args:
        predictor: runs the model.
        inputs: the volumes.
        folder: the folder to write the files to.
        references: the label file of the only volume, a folder of labels, or a dataset. Files of a
            folder or dataset are paired with the volumes as in `pair_with`. Classes that a dataset
            calls unlabelled in a case (`data.labelled`) do not count there. If None, the model's
            own labels replace the reference. So they do for a volume without a reference, which is
            then left out of the results over all volumes, because they would not be comparable.
        tolerance: largest distance from a structure at which a map's highest value still counts as
            pointing at it: a number in mm, or a length such as '0.5 µm' or '2 pixels'. If None, 5
            mm, or 5 pixels for pictures.
        verdicts: whether to judge if each gate matters, and to test each attribution. This takes
            minutes for each volume.
        attributions: methods of `attribute` that are applied to every predicted structure. Their
            values are written and measured as maps are. Each takes minutes for each volume.
        attribution_settings: their settings.
        identity: whether to replace each attention block by the identity, one after another.
        overwrite: whether existing files may be replaced.
        conclude: is called with the verdicts over several volumes.
        conclude_attention: is called with the verdicts on blocks over all volumes, of which there
            may be one.
        track: reports the progress.

    Raises:
        VolumeError: if an output file exists or is also an input, or no volume has a reference.
        ModelError: if verdicts are wanted and the model has no gates, or `identity` and it has no
            attention block.
    """
    folder = Path(folder)
    targets = check_targets(inputs, folder, overwrite=overwrite)
    tell_changed_names(source.name for source in inputs)
    for place in {folder, *(case_folder(source, inputs, folder) for source in inputs)}:
        remove_leftovers(place)
    labels = {} if references is None else find_references(inputs, Path(references))
    known = None if references is None else references_in(Path(references))
    structures = None if known is None else known.rules.structures
    blocks = check_blocks(predictor) if identity else None
    cases: list[CaseFigures] = []
    worths: list[Worth] = []
    ablated: list[Ablation] = []
    sources: list[Input] = []
    left_out: list[str] = []
    unpaired: list[str] = []
    incomplete = False  # whether writing failed after some of a volume's files
    asked = models_and_settings(predictor)
    wanted = tolerance_in(tolerance, DEFAULT_POINTING)
    if attributions:
        settings = attribution_settings or AttributionSettings()
        asked["attributions"] = {"methods": list(attributions), **vars(settings)}
    for source in inputs:
        reference = labels.get(source.name)
        place = case_folder(source, inputs, folder)
        try:
            tolerance_mm, _ = wanted.of_case([source.files[0]], source.rules)
            asked = {**asked, "tolerance_mm": tolerance_mm}
            image = None if reference is None else reference.image
            rules = replace(source.rules, structures=structures).painting_on(image)
            explanation = explain_volume(
                predictor,
                read_input(source),
                None if reference is None else read_labels(reference.path, rules=rules),
                name=source.name,
                tolerance_mm=tolerance_mm,
                verdicts=verdicts,
                unlabelled=() if reference is None else reference.unlabelled,
                identity=identity,
                blocks=blocks,
                earlier=[worth.evidence for worth in worths],
                attributions=attributions,
                attribution_settings=attribution_settings,
                track=track,
            )
            made = made_by(predictor, asked, source.files)
            if reference is not None:
                made["reference"] = checksums([reference.path])
            mark_unfinished(folder / PAGE, targets)
            written = explanation.write(place, made=made, suffix=source.suffix)
        except (SegkitError, OSError) as error:
            left_out.append(failure(source, error))
            incomplete |= isinstance(error, OSError)
            yield Explained(source.name, error=left_out[-1])
            continue
        _remove(
            (*_of_volume(source.file_name, place), *_maps_of(source.file_name, place)), but=written
        )
        shown = tuple(shown_verdicts(explanation.verdicts))
        said = _said(explanation) if attributions else ()
        yield Explained(
            source.name,
            written,
            explanation.reach,
            shown,
            explanation.attention,
            attributed=said,
            unit=explanation.scan.unit,
            against=explanation.against,
        )
        if references is not None and reference is None:
            unpaired.append(source.name)
            continue
        sources.append(source)
        cases.append(CaseFigures(source.name, explanation.measures, explanation.dice))
        worths += [explanation.worth] if explanation.worth else []
        ablated += explanation.attention.ablations if explanation.attention else ()
    study = None if blocks is None or not cases else study_of(predictor, blocks, ablated)
    if study is not None:
        conclude_attention(study)
    if len(inputs) > 1 and cases:
        made = made_by(predictor, asked, (file for source in sources for file in source.files))
        facts = facts_of(predictor)
        if unpaired:
            facts["scans without a reference, left out"] = first_few(unpaired)
        _write_cohort(folder, cases, worths, study, facts, left_out, made, conclude)
    if not incomplete:
        mark_finished(folder / PAGE)


def _said(explanation: Explanation) -> tuple[str, ...]:
    """A sentence about each attribution, and about the structures that have none."""
    found = explanation.attributions.values()
    missing = sorted(set(explanation.labelling.members) - {one.structure for one in found})
    without = f"{', '.join(missing)}: not predicted, so nothing is attributed"
    return (*(one.sentence() for one in found), *([without] if missing else []))


def _write_cohort(
    folder: Path,
    cases: Sequence[CaseFigures],
    worths: Sequence[Worth],
    study: AttentionStudy | None,
    facts: dict[str, str],
    left_out: Sequence[str],
    made: Mapping[str, Any],
    conclude: Conclude,
) -> None:
    """Write the files that summarise several volumes; remove outdated ones.

    Args:
        folder: the folder to write to.
        cases: measures and Dice of each scan.
        worths: verdicts and evidence of each scan; empty if not wanted.
        study: results of `identity`, if wanted.
        facts: the model and the settings, in words.
        left_out: the reason for each scan that failed.
        made: provenance.
        conclude: is called with the verdicts over all scans.
    """
    if left_out:
        facts["scans left out"] = "; ".join(left_out)
    write_text(folder / COHORT, rows_as_csv(row for case in cases for row in case.rows()))
    written = [folder / COHORT, folder / COHORT_FIGURES, folder / PAGE]
    pooled: Sequence[Verdict] = ()
    figures: dict[str, Any] = {}
    if worths:
        judged, figures = cohort_figures([worth.evidence for worth in worths])
        pooled = shown_verdicts(judged)
        ablated = [vars(row) for worth in worths for row in worth.ablations]
        write_text(folder / ABLATIONS, rows_as_csv(ablated))
        written.append(folder / ABLATIONS)
        conclude(pooled)
    cards, tables = list(pooled), []
    if study is not None:
        figures["identity"] = study.to_json()
        cards, tables = [*pooled, *block_cards(study)], identity_tables(study)
        write_text(folder / IDENTITY, rows_as_csv(map(vars, study.ablations)))
        written.append(folder / IDENTITY)
    about = {"scans": len(cases), "made": facts, PROVENANCE: made}
    write_json(folder / COHORT_FIGURES, {**about, **figures})
    write_text(folder / PAGE, cohort_text(cases, facts, cards, tables))
    _remove(_of_cohort(folder), but=written)


def case_folder(source: Input, inputs: Sequence[Input], folder: Path) -> Path:
    """The folder for the files of one volume: `folder` itself if there is only one volume."""
    return folder if len(inputs) == 1 else folder / source.file_name


def check_targets(inputs: Sequence[Input], folder: Path, *, overwrite: bool) -> list[Path]:
    """The files that `explain_files` would write, except the maps.

    Raises:
        VolumeError: if one of them is also an input, if one exists and was not left by an
            interrupted run, or if two volumes have the same name.
    """
    files = {file.resolve() for source in inputs for file in source.files}
    names: set[str] = set()
    targets: list[Path] = []
    maps: list[Path] = []
    for source in inputs:
        name = source.file_name
        if name in names:
            raise VolumeError(
                f"{source.files[0]}: results of another volume are also called {name}; explain one "
                f"of them by itself with another --out"
            )
        names.add(name)
        place = case_folder(source, inputs, folder)
        targets += _of_volume(name, place)
        maps += _maps_of(name, place)
    if len(inputs) > 1:
        targets += _of_cohort(folder)
    for target in (*targets, *maps):
        if target.resolve() in files:
            raise VolumeError(f"{target}: this output file is also an input; give another --out")
    left = unfinished_files(folder / PAGE)
    refuse_existing(targets, overwrite=overwrite, left=left)
    if not left:
        refuse_existing(maps, overwrite=overwrite)
    return targets


def _of_volume(name: str, folder: Path) -> list[Path]:
    """All files that may be written for one volume, except maps."""
    return [
        *(folder / f"{name}{ending}" for ending in ENDINGS),
        *(folder / each for each in (TABLE, FIGURES, ABLATIONS, IDENTITY, PAGE)),
    ]


def _maps_of(name: str, folder: Path) -> list[Path]:
    """The existing map files of one volume. Their names depend on the model."""
    name = glob.escape(name)
    return [
        *folder.glob(f"{name}_map-*.nii.gz"),
        *folder.glob(f"{name}_map-*.tif"),
        *folder.glob(f"native/{name}_map-*.nii.gz"),
    ]


def _of_cohort(folder: Path) -> list[Path]:
    return [folder / each for each in (COHORT, COHORT_FIGURES, ABLATIONS, IDENTITY, PAGE)]


def _remove(paths: Iterable[Path], *, but: Collection[Path]) -> None:
    for path in paths:
        if path not in but:
            path.unlink(missing_ok=True)
