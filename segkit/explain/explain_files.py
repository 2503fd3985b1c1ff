"""`segkit explain`: what a model attends to, measured, and what its heads are worth."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from segkit.errors import SegkitError, VolumeError
from segkit.evaluation.pairing import called, pair_by_name, references_in
from segkit.explain.display import Verdict
from segkit.explain.explain_scan import ENDINGS, FIGURES, PAGE, TABLE, explain_volume, facts_of
from segkit.explain.heads.reach import HeadReach
from segkit.explain.heads.study import CaseOnDisk, PositionFigures, head_table, study_heads
from segkit.explain.measures.measure_maps import TOLERANCE_MM
from segkit.explain.page.cohort_page import CaseFigures, cohort_text
from segkit.explain.page.parts import rows_as_csv
from segkit.explain.verdicts.study import ABLATIONS, Worth, cohort_figures, shown_verdicts
from segkit.inference.made_by import asked_of, made_by
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
from segkit.io.inputs import Input, check_name, failure, read_input
from segkit.io.volume import read_labels
from segkit.provenance import PROVENANCE
from segkit.system.progress import Track, untracked

HEADS = ("heads.csv", "heads.json")
COHORT = "cohort.csv"
COHORT_FIGURES = "cohort.json"
Conclude = Callable[[Sequence[Verdict]], None]


@dataclass(frozen=True)
class Explained:
    """What was written of one volume, or why nothing was."""

    name: str
    written: tuple[Path, ...] = ()
    reach: dict[str, list[HeadReach]] = field(default_factory=dict)
    """How far each head reached in it, by position."""
    verdicts: tuple[Verdict, ...] = ()
    """The best of each map, by this volume only."""
    error: str | None = None


def explain_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    folder: str | Path,
    *,
    references: str | Path | None = None,
    tolerance_mm: float = TOLERANCE_MM,
    verdicts: bool = False,
    overwrite: bool = False,
    conclude: Conclude = lambda verdicts: None,
    track: Track = untracked,
) -> Iterator[Explained]:
    """Write each volume's labels, maps, measures and page; of several, each in its own folder.

    `NAME_seg`, the maps of `write_maps` with how far heads reach, `measures.json`, `measures.csv`
    and `index.html`. Over several, `cohort.csv` has the rows of all and `index.html` sums them up.
    With verdicts, `ablation.csv` has a row for each map that is taken out and each class, and over
    several volumes `cohort.json` has the verdicts over all.

    One bad volume does not stop the others, and is left out of the figures over all. If results may
    be overwritten, files of earlier results that the new ones do not have are removed.

    Args:
        predictor: of the model.
        inputs: the volumes.
        folder: where to write.
        references: the label of the only volume; or a folder of labels, or a dataset, which pair
            with the volumes as `find_pairs` has it; the model's own labels stand in if None.
        tolerance_mm: how far (mm) a map's highest value may lie from a structure and still point
            at it.
        verdicts: whether to ask if each gate matters, which takes minutes a volume.
        overwrite: whether files that exist may be replaced.
        conclude: takes the verdicts over several volumes.
        track: may show the progress.

    Raises:
        VolumeError: if a file exists already, is an input, or a volume has no reference.
        ModelError: if verdicts are asked for and the model has no gates.
    """
    folder = Path(folder)
    targets = check_targets(inputs, folder, overwrite=overwrite)
    for place in {folder, *(case_folder(source, inputs, folder) for source in inputs)}:
        remove_leftovers(place)
    labels = {} if references is None else find_references(inputs, Path(references))
    cases: list[CaseFigures] = []
    worths: list[Worth] = []
    sources: list[Input] = []
    left_out: list[str] = []
    torn = False  # whether some of a volume's files were left without the others
    asked = {**asked_of(predictor), "tolerance_mm": tolerance_mm}
    for source in inputs:
        path = labels.get(source.name)
        place = case_folder(source, inputs, folder)
        try:
            explanation = explain_volume(
                predictor,
                read_input(source),
                None if path is None else read_labels(path, rules=source.rules),
                name=source.name,
                tolerance_mm=tolerance_mm,
                verdicts=verdicts,
                earlier=[worth.evidence for worth in worths],
                track=track,
            )
            made = made_by(predictor, asked, source.files)
            if path is not None:
                made["reference"] = checksums([path])
            mark_unfinished(folder / PAGE, targets)
            written = explanation.write(place, made=made)
        except (SegkitError, OSError) as error:
            left_out.append(failure(source, error))
            torn |= isinstance(error, OSError)
            yield Explained(source.name, error=left_out[-1])
            continue
        _remove((*_of_volume(source.name, place), *_maps_of(source.name, place)), but=written)
        shown = tuple(shown_verdicts(explanation.verdicts))
        yield Explained(source.name, written, explanation.reach, shown)
        sources.append(source)
        cases.append(CaseFigures(source.name, explanation.measures, explanation.dice))
        worths += [explanation.worth] if explanation.worth else []
    if len(inputs) > 1 and cases:
        made = made_by(predictor, asked, (file for source in sources for file in source.files))
        _write_cohort(folder, cases, worths, facts_of(predictor), left_out, made, conclude)
    if not torn:
        mark_finished(folder / PAGE)


def _write_cohort(
    folder: Path,
    cases: Sequence[CaseFigures],
    worths: Sequence[Worth],
    facts: dict[str, str],
    left_out: Sequence[str],
    made: Mapping[str, Any],
    conclude: Conclude,
) -> None:
    """Write what several volumes say together, and remove what earlier ones said beyond it."""
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
    about = {"scans": len(cases), "made": facts, PROVENANCE: made}
    write_json(folder / COHORT_FIGURES, {**about, **figures})
    write_text(folder / PAGE, cohort_text(cases, facts, pooled))
    _remove(_of_cohort(folder), but=written)


def case_folder(source: Input, inputs: Sequence[Input], folder: Path) -> Path:
    """Where the files of one volume go: the folder itself if it is the only one."""
    return folder if len(inputs) == 1 else folder / source.name


def explain_heads(
    predictor: Predictor,
    inputs: Sequence[Input],
    references: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    track: Track = untracked,
) -> list[PositionFigures]:
    """Study the heads on volumes with references, and write `heads.csv` and `heads.json`."""
    table, whole = (folder / each for each in HEADS)
    refuse_existing([table, whole], overwrite=overwrite)
    paths = find_references(inputs, references)
    cases = [CaseOnDisk(source, paths[source.name]) for source in inputs]
    figures = study_heads(predictor, cases, track=track)
    write_text(table, rows_as_csv(head_table(figures)))
    write_json(
        whole,
        {
            "cases": [case.name for case in cases],
            PROVENANCE: {
                **made_by(
                    predictor,
                    asked_of(predictor),
                    (file for source in inputs for file in source.files),
                ),
                "reference": checksums(paths.values()),
            },
            "positions": [
                {
                    "position": position.position,
                    "answer": position.answer(),
                    "p_value": position.p_value,
                    "dice": position.dice,
                    "dice_without_any": position.dice_without_any,
                    "dice_least_important_masked_first": position.least_first,
                    "dice_most_important_masked_first": position.most_first,
                    "heads": [vars(head) for head in position.heads],
                }
                for position in figures
            ],
        },
    )
    return figures


def remove_heads(folder: Path) -> None:
    """Remove what an earlier study of heads wrote, which the results to come will not be of."""
    _remove((folder / each for each in HEADS), but=())


def check_targets(inputs: Sequence[Input], folder: Path, *, overwrite: bool) -> list[Path]:
    """What `explain_files` would write, but for the maps.

    Raises VolumeError where some of it is there already, unless a run that was stopped left it, or
    is an input, or where two volumes of one name would share their files.
    """
    files = {file.resolve() for source in inputs for file in source.files}
    names: set[str] = set()
    targets: list[Path] = []
    maps: list[Path] = []
    for source in inputs:
        check_name(source.name, source.files[0])
        if source.name in names:
            raise VolumeError(
                f"{source.files[0]}: another volume is called {source.name} too; rename one"
            )
        names.add(source.name)
        place = case_folder(source, inputs, folder)
        targets += _of_volume(source.name, place)
        maps += _maps_of(source.name, place)
    if len(inputs) > 1:
        targets += _of_cohort(folder)
    for target in (*targets, *maps):
        if target.resolve() in files:
            raise VolumeError(f"{target}: is an input itself; name another --out")
    left = unfinished_files(folder / PAGE)
    refuse_existing(targets, overwrite=overwrite, left=left)
    if not left:
        refuse_existing(maps, overwrite=overwrite)
    return targets


def _of_volume(name: str, folder: Path) -> list[Path]:
    """What may be written of one volume, but for maps."""
    return [
        *(folder / f"{name}{ending}" for ending in ENDINGS),
        *(folder / each for each in (TABLE, FIGURES, ABLATIONS, PAGE)),
    ]


def _maps_of(name: str, folder: Path) -> list[Path]:
    """The maps that are there of one volume; a model sets their names."""
    return [
        *folder.glob(f"{name}_map-*.nii.gz"),
        *folder.glob(f"{name}_map-*.tif"),
        *folder.glob(f"native/{name}_map-*.nii.gz"),
    ]


def _of_cohort(folder: Path) -> list[Path]:
    return [folder / each for each in (COHORT, COHORT_FIGURES, ABLATIONS, PAGE)]


def _remove(paths: Iterable[Path], *, but: Collection[Path]) -> None:
    for path in paths:
        if path not in but:
            path.unlink(missing_ok=True)


def find_references(inputs: Sequence[Input], references: Path) -> dict[str, Path]:
    """The reference of each input, by its name: the file itself, or by the rule of `find_pairs`.

    Args:
        inputs: the volumes, which are no references if they lie among these.
        references: the label of the only volume; or a folder of labels, or a dataset.

    Raises:
        VolumeError: one has no reference, or references cannot be told apart.
    """
    known = references_in(references)
    if references.is_file() and known.source is None:
        if len(inputs) > 1:
            raise VolumeError(
                f"{references}: one reference cannot be that of {len(inputs)} volumes; name a "
                f"folder"
            )
        return {source.name: references for source in inputs}
    scans = {file.resolve() for source in inputs for file in source.files}
    labels = [volume for volume in known.volumes if volume.path.resolve() not in scans]
    named = {source.files[0]: source.name for source in inputs}
    pairing = pair_by_name([called(file, name) for file, name in named.items()], labels)
    found = {named[scan]: label for _, scan, label in pairing.pairs}
    for source in inputs:
        if source.name not in found:
            raise VolumeError(f"{references}: holds no volume called {source.name}")
    return found
