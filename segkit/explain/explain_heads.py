"""The work of `segkit explain --heads`: the attention heads of a model, studied on volumes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from segkit.evaluation.references import references_in
from segkit.explain.heads.study import CaseOnDisk, PositionFigures, head_table, study_heads
from segkit.explain.page.parts import rows_as_csv
from segkit.explain.references import find_references
from segkit.inference.made_by import made_by, models_and_settings
from segkit.inference.predictor import Predictor
from segkit.io.atomic import refuse_existing, write_json, write_text
from segkit.io.checksums import checksums
from segkit.io.inputs import Input
from segkit.provenance import PROVENANCE
from segkit.system.progress import Track, untracked

HEADS = ("heads.csv", "heads.json")


def explain_heads(
    predictor: Predictor,
    inputs: Sequence[Input],
    references: Path,
    folder: Path,
    *,
    overwrite: bool = False,
    track: Track = untracked,
) -> list[PositionFigures]:
    """Study the attention heads on volumes with references; write `heads.csv` and `heads.json`.

    Args:
        predictor: runs the model.
        inputs: the volumes. Those without a reference are left out.
        references: their labels, as in `explain_files`.
        folder: the folder to write the two files to.
        overwrite: whether existing files may be replaced.
        track: reports the progress.

    Returns:
        The figures of each position in the network that has heads.

    Raises:
        VolumeError: if a file exists, no volume has a reference, or one does not fit its volume.
        ModelError: if the model has no attention heads.
    """
    table, whole = (folder / each for each in HEADS)
    refuse_existing([table, whole], overwrite=overwrite)
    found = find_references(inputs, references)
    inputs = [source for source in inputs if source.name in found]
    structures = references_in(references).rules.structures
    cases = []
    for source in inputs:
        reference = found[source.name]
        rules = replace(source.rules, structures=structures).painting_on(reference.image)
        own = replace(source, rules=rules)
        cases.append(CaseOnDisk(own, reference.path, reference.unlabelled))
    figures = study_heads(predictor, cases, track=track)
    write_text(table, rows_as_csv(head_table(figures)))
    write_json(
        whole,
        {
            "cases": [case.name for case in cases],
            PROVENANCE: {
                **made_by(
                    predictor,
                    models_and_settings(predictor),
                    (file for source in inputs for file in source.files),
                ),
                "reference": checksums(each.path for each in found.values()),
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
    """Remove the files of an earlier study of heads, which would not belong to the new results."""
    for each in HEADS:
        (folder / each).unlink(missing_ok=True)
