"""`segkit plan`: a config that suits a dataset."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from segkit.cli.options import Device, Overwrite
from segkit.cli.terminal import JsonOption, console, hush, say, say_json
from segkit.errors import ConfigError
from segkit.system.allocator import keep_freed_memory


def plan_command(
    dataset: Annotated[
        Path, Argument(help="A folder with a dataset.json, or YAML with data.files.")
    ],
    out: Annotated[
        Path | None, Option(help="The config to write; NAME.yaml where not given.")
    ] = None,
    memory: Annotated[
        float | None,
        Option(min=0.5, help="GB to plan for; what a GPU has free where not given, or 8."),
    ] = None,
    minutes: Annotated[float, Option(min=0.1, help="Of training to plan for.")] = 20.0,
    dims: Annotated[
        int | None,
        Option(min=2, max=3, help="2 for slices, 3 for volumes; what the cases are by default."),
    ] = None,
    preset: Annotated[
        Literal["auto", "nnunet"],
        Option(help="nnunet: its own plan and schedule, wherever it runs."),
    ] = "auto",
    device: Device = "auto",
    runs: Annotated[Path, Option(help="The folder whose cache keeps measurements.")] = Path("runs"),
    no_race: Annotated[
        bool, Option("--no-race", help="Plan by the rule, without trying candidates.")
    ] = False,
    json: JsonOption = False,
    overwrite: Overwrite = False,
) -> None:
    """Measure a dataset and write a config, or two in turn, that says why each value was chosen."""
    from segkit.config.load import dataset_in
    from segkit.io.atomic import refuse_existing, write_text
    from segkit.planning.make_plan import plan_dataset
    from segkit.racing import plan_by_race
    from segkit.system.progress import Tracker

    keep_freed_memory()
    source = dataset_in(dataset)
    if source is None:
        raise ConfigError(f"{dataset}: says how to train already; plan from data.files alone")
    target = out or Path(f"{source.folder.resolve().name}.yaml")
    refuse_existing([target], overwrite=overwrite)
    hush()  # Lightning has set up its logging as it was imported
    make = plan_dataset if no_race else plan_by_race
    planned = make(
        source,
        cache=runs / ".cache",
        device=device,
        spatial_dims=dims,
        gigabytes=memory,
        minutes=minutes,
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
    say("next: " + ", and then ".join(f"segkit train {file}" for file, _ in stages))
    if json:
        files = [
            {"file": str(file), "config": stage.config.model_dump(mode="json")}
            for file, stage in stages
        ]
        say_json({"plans": files})
