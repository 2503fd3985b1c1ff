"""`segkit plan`: write a config for a dataset."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from segkit.cli.options import MINUTES, Device, Overrides, Overwrite
from segkit.cli.terminal import JsonOption, console, hush, say, say_json
from segkit.errors import ConfigError
from segkit.system.allocator import keep_freed_memory


def plan_command(
    dataset: Annotated[
        Path,
        Argument(
            metavar="DATASET",
            help="A folder with a dataset.json, a BIDS folder, a table, or a YAML file with "
            "data.files.",
        ),
    ],
    overrides: Overrides = None,
    out: Annotated[
        Path | None,
        Option(
            help="The config to write. The default is NAME.yaml, or NAME_plan.yaml if NAME.yaml is "
            "the dataset."
        ),
    ] = None,
    memory: Annotated[
        float | None,
        Option(
            min=0.5,
            help="Memory in GB to plan for. The default is nine tenths of the GPU's free memory, "
            "or 8 without a GPU.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        Option(
            min=0.1,
            help="Duration of training in minutes to plan for. The default is 20; not with "
            "--preset nnunet.",
        ),
    ] = None,
    dims: Annotated[
        int | None,
        Option(min=2, max=3, help="2 for slices, 3 for volumes. By default, segkit chooses."),
    ] = None,
    preset: Annotated[
        Literal["auto", "nnunet"],
        Option(
            help="auto plans for the machine and the time; nnunet plans and trains as nnU-Net does."
        ),
    ] = "auto",
    device: Device = "auto",
    runs: Annotated[
        Path, Option(help="The folder of runs; its cache stores the measurements.")
    ] = Path("runs"),
    no_race: Annotated[
        bool, Option("--no-race", help="Plan by rules only, without short trainings of candidates.")
    ] = False,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a dataset and write a config that gives a reason for each value.

    If two stages are better, it writes a config for each.
    """
    from segkit.config.load import dataset_in, is_of_dataset
    from segkit.io.atomic import refuse_existing, write_text
    from segkit.planning.make_plan import plan_dataset
    from segkit.racing import plan_by_race
    from segkit.system.progress import Tracker

    if minutes is not None and preset == "nnunet":
        raise ConfigError(
            "--preset nnunet plans nnU-Net's 250,000 steps, however long they take; leave out "
            "--minutes or the preset"
        )
    keep_freed_memory()
    for override in overrides or ():
        if not is_of_dataset(override):
            raise ConfigError(
                f"segkit plan takes settings of the dataset and its folds, such as data.labels, "
                f"found {override!r}; give it to segkit train, or change it in the planned config"
            )
    source = dataset_in(dataset, overrides or (), minimal=True)
    if source is None:
        raise ConfigError(
            f"{dataset}: expected a dataset (YAML with only its data and split), found a "
            f"config; "
            f"train with it, or remove its other settings"
        )
    target = out or _new_config(source.folder.resolve().name, dataset)
    refuse_existing([target], overwrite=overwrite)
    hush()  # Lightning set up its logging when it was imported
    make = plan_dataset if no_race else plan_by_race
    planned = make(
        source,
        cache=runs / ".cache",
        device=device,
        spatial_dims=dims,
        gigabytes=memory,
        minutes=MINUTES if minutes is None else minutes,
        preset=preset,
        runs=runs,
        track=Tracker(console),
    )
    stages = [(target, planned)]
    if planned.low is not None:
        low = target.with_name(f"{target.stem}_low{target.suffix}")
        refuse_existing([low], overwrite=overwrite)
        stages.insert(0, (low, planned.low))
    for file, stage in stages:
        write_text(file, stage.text)
        say(stage.text.rstrip())
        say(f"wrote {file}")
    say("next: " + ", then ".join(f"segkit train {file}" for file, _ in stages))
    if json:
        files = [
            {"file": str(file), "config": stage.config.model_dump(mode="json")}
            for file, stage in stages
        ]
        say_json({"plans": files})


def _new_config(name: str, dataset: Path) -> Path:
    """The config to write by default. It is never the file that describes the dataset."""
    target = Path(f"{name}.yaml")
    return Path(f"{name}_plan.yaml") if target.resolve() == dataset.resolve() else target
