"""`segkit push`: share a model."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from segkit.cli.options import Overwrite
from segkit.cli.terminal import JsonOption, say, say_json


def push_command(
    model: Annotated[
        str, Argument(metavar="RUN|MODEL", help="A finished run, cross-validation or model folder.")
    ],
    to: Annotated[
        str,
        Argument(
            metavar="hf:OWNER/NAME|FOLDER",
            help="A repository of a model hub, or a new folder in which you can check the files.",
        ),
    ],
    licence: Annotated[
        str | None, Option(metavar="NAME", help="Licence of the weights, such as cc-by-4.0.")
    ] = None,
    data: Annotated[
        str | None,
        Option(metavar="TEXT", help="For the card: the source of the training data."),
    ] = None,
    intended_use: Annotated[
        str | None, Option(metavar="TEXT", help="For the card: the intended use of the model.")
    ] = None,
    limits: Annotated[
        str | None, Option(metavar="TEXT", help="For the card: cases in which the model fails.")
    ] = None,
    scores: Annotated[
        Path | None,
        Option(help="A JSON file from segkit evaluate --out, with scores of other cases."),
    ] = None,
    verdicts: Annotated[
        Path | None,
        Option(
            help="A folder from segkit explain --verdicts. The default is such a folder in the run."
        ),
    ] = None,
    picture: Annotated[
        Path | None, Option(help="A picture for the card. Without it, no image is shared.")
    ] = None,
    private: Annotated[
        bool, Option("--private", help="If the repository is new, make it private.")
    ] = False,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Share a model with its card: weights, settings, scores, verdicts, licence, use and limits.

    Paths, names of cases and images are not shared. The card is README.md: read it before you make
    it public.
    """
    from segkit.export.push import push_model

    pushed = push_model(
        model,
        to,
        licence=licence,
        data=data,
        intended_use=intended_use,
        limits=limits,
        scores=scores,
        verdicts=verdicts,
        picture=picture,
        private=private,
        overwrite=overwrite,
    )
    for file in pushed.files:
        say(f"wrote {file}")
    if pushed.commit is None:
        say(f"next: read {pushed.place}/README.md, then segkit push {model} hf:OWNER/NAME")
    else:
        say(f"pushed to {pushed.place}, commit {pushed.commit}")
        say(f"next: segkit predict scan.nii.gz --model {to}")
    if licence is None:
        say("no licence was given, so nobody but you may use the weights; pass --licence")
    if json:
        say_json({"place": pushed.place, "files": list(pushed.files), "commit": pushed.commit})
