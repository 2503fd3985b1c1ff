"""`segkit explain`: write attention maps, measures, verdicts and a page."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from segkit.cli.models import find_models
from segkit.cli.options import (
    CheckpointOption,
    Device,
    Inputs,
    ModelPlace,
    OverlapOption,
    Overwrite,
    PixelSizeOption,
    SeriesOption,
)
from segkit.cli.terminal import complain, console, raise_failures, say
from segkit.errors import VolumeError, counted, first_few

if TYPE_CHECKING:
    from segkit.explain.display import Verdict
    from segkit.explain.explain_files import Explained
    from segkit.explain.verdicts.identity import AttentionStudy


def explain_command(
    inputs: Inputs,
    out: Annotated[Path, Option(help="The folder for maps, tables and the page.")],
    model: ModelPlace = None,
    reference: Annotated[
        Path | None,
        Option(help="Labels to compare with: a file, a folder or a dataset, paired by name."),
    ] = None,
    heads: Annotated[
        bool, Option("--heads", help="Test if several attention heads are better than one.")
    ] = False,
    verdicts: Annotated[
        bool,
        Option("--verdicts", help="Test if gates and attributions are informative; takes minutes."),
    ] = False,
    attribution: Annotated[
        list[str] | None,
        Option(
            "--attribution",
            metavar="METHOD",
            help="Also write how much each part of the image contributes to each structure: "
            "integrated_gradients, smoothgrad, occlusion or kernel_shap. Repeat it for each "
            "method.",
        ),
    ] = None,
    cell: Annotated[
        float | None,
        Option(
            min=0,
            help="Edge length in mm of the boxes of occlusion and kernel_shap; in pixels for "
            "pictures without a pixel size.",
        ),
    ] = None,
    identity: Annotated[
        bool,
        Option("--identity", help="Test if the network needs each of its attention blocks."),
    ] = False,
    tolerance: Annotated[
        str | None,
        Option(
            metavar="LENGTH",
            help="Largest distance at which a map still points at a structure, such as 5 (mm), "
            "'0.5 µm' or '2 pixels'. The default is 5 mm, and 5 pixels for pictures.",
        ),
    ] = None,
    series: SeriesOption = None,
    checkpoint: CheckpointOption = None,
    pixel_size: PixelSizeOption = None,
    device: Device = "auto",
    overlap: OverlapOption = 0.5,
    overwrite: Overwrite = False,
) -> None:
    """Write attention maps, how well they show structures, and a page.

    Maps are compared with the reference, or with the predicted labels if there is none. If there
    are several volumes, each has its own folder, and a table and a page summarise all; with
    --reference, all that have one. A volume that fails does not stop the others.
    """
    import torch

    from segkit.data.case_inputs import inputs_in
    from segkit.explain.attribution.attribute import AttributionSettings, chosen_methods
    from segkit.explain.explain_files import check_targets, explain_files
    from segkit.explain.explain_heads import explain_heads, remove_heads
    from segkit.explain.verdicts.ablation import check_gates
    from segkit.explain.verdicts.identity import check_blocks
    from segkit.inference.predictor import Predictor
    from segkit.io.picture_summary import picture_lines
    from segkit.io.series_rules import parse_series
    from segkit.model.folder import picture_rules_of
    from segkit.system.progress import Tracker

    if heads and reference is None:
        raise VolumeError("--heads needs --reference; give a label file or a folder of labels")
    if cell is not None and not {"occlusion", "kernel_shap"} & {*(attribution or ())}:
        raise VolumeError("--cell needs --attribution occlusion or kernel_shap; add it")
    methods = chosen_methods(attribution or ())
    settings = AttributionSettings(cell_mm=cell)
    named = find_models(model and [model], checkpoint)[0][0]
    loaded = named.load()
    rules = picture_rules_of(loaded.description, pixel_size)
    found = inputs_in(
        inputs,
        loaded.description.channels,
        series=parse_series(series),
        rules=rules,
        sized=bool(pixel_size),
        but=out,
    )
    say(f"model: {named}")
    for line in picture_lines((source.files[0], source.rules) for source in found):
        say(line)
    # In float32 also on a GPU, because the values of maps are measured.
    predictor = Predictor(loaded, device=device, overlap=overlap, precision=torch.float32)
    track = Tracker(console)
    check_targets(found, out, overwrite=overwrite)
    if verdicts and not methods:
        check_gates(predictor)
    if identity:
        check_blocks(predictor)
    if heads and reference is not None:
        figures = explain_heads(predictor, found, reference, out, overwrite=overwrite, track=track)
        for studied in figures:
            say(studied.answer())
        say(f"wrote {out / 'heads.csv'} and {out / 'heads.json'}")
    elif overwrite:
        remove_heads(out)
    over_all: list[Verdict] = []
    studies: list[AttentionStudy] = []
    explanations = explain_files(
        predictor,
        found,
        out,
        references=reference,
        tolerance=tolerance,
        verdicts=verdicts,
        attributions=methods,
        attribution_settings=settings,
        identity=identity,
        overwrite=overwrite,
        conclude=over_all.extend,
        conclude_attention=studies.append,
        track=track,
    )
    failures = []
    unpaired = []
    for explained in explanations:
        if explained.error is None:
            _tell(explained, alone=len(found) == 1)
            if reference is not None and explained.against == "prediction":
                unpaired.append(explained.name)
        else:
            failures.append(explained.error)
    _conclude(over_all, studies)
    if unpaired:
        say(
            "compared with the predicted labels, and left out of the results over all volumes, "
            f"because there is no reference: {first_few(unpaired)}"
        )
    if len(failures) + len(unpaired) < len(found):
        say(f"next: open {out / 'index.html'}")
    if len(found) > 1:
        for error in failures:
            complain(error)
    raise_failures(failures, len(found), alone=len(found) == 1)


def _conclude(verdicts: "list[Verdict]", studies: "list[AttentionStudy]") -> None:
    """Print the results over all volumes."""
    from segkit.explain.page.terminal_table import plain_table, verdict_table
    from segkit.explain.verdicts.identity import identity_tables

    if verdicts:
        console.print(verdict_table(verdicts))
        for verdict in verdicts:
            say(f"{verdict.map}: {verdict.verdict}. {verdict.reason}")
    for study in studies:
        console.print(plain_table(identity_tables(study)[0]))
        say(study.said())


def _tell(explained: "Explained", *, alone: bool) -> None:
    """Print the files and results of one volume, with its verdicts only if it is `alone`.

    Over several volumes there is one verdict for each map. Pages have those of single volumes.
    """
    from segkit.io.picture_rules import length_in_words

    say(f"wrote {explained.written[0]} and {counted(len(explained.written) - 1, 'more file')}")
    for position, reach in explained.reach.items():
        for number, head in enumerate(reach):
            say(
                f"{explained.name} {position} head {number}: mean distance "
                f"{length_in_words(float(f'{head.distance_mm:.3g}'), explained.unit)} "
                f"({head.distance_ratio:.2f} of uniform attention), "
                f"entropy {head.entropy:.2f} (uniform: {head.uniform_entropy:.2f})"
            )
    for sentence in explained.attributed:
        say(f"{explained.name} {sentence}")
    for verdict in explained.verdicts if alone else ():
        say(f"{explained.name} {verdict.map}: {verdict.verdict}. {verdict.reason}")
