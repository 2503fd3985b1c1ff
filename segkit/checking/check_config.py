"""Description of a config as segkit reads it: every value that training uses."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel

from segkit.checking.understood import Understood, listed
from segkit.config.labels import Labelling
from segkit.config.load import dump_yaml, load_config
from segkit.data.dataset import dataset_of
from segkit.data.split import split_of
from segkit.errors import counted
from segkit.model.build import build_network
from segkit.nn.cost import count_parameters
from segkit.system.progress import Track
from segkit.training.cascade import described, first_models
from segkit.training.resolve import check_images, describe, resolve


def check_config(path: Path, overrides: Sequence[str], track: Track) -> Understood:
    """Description of a config: every value that training uses, the network and the dataset."""
    config = load_config(path, overrides)
    dataset = dataset_of(config.data)
    split = train, held_out = split_of(dataset, config)
    check_images(config, dataset, train, held_out)
    first_stage = first_models(config.data.first_stage or (), dataset)
    resolved = resolve(config, dataset, split, track=track)
    description = described(describe(resolved, dataset), first_stage)
    network = build_network(description)
    parameters = count_parameters(network)
    maps = list(network.maps())
    text = (
        f"{dump_yaml(resolved)}"
        f"# values that come from the dataset, this machine or other settings: "
        f"{listed(_changes(config, resolved)) or 'none'}\n"
        f"# {counted(len(train), 'case')} to train on, {len(held_out)} held out"
        f"{f', {len(dataset.test)} kept for a test' if dataset.test else ''}\n"
        f"# {_classes_in_words(dataset.labelling)}\n"
        f"# spacing {description.spacing} mm; normalisation "
        f"{[setting.model_dump() for setting in description.normalisation]}\n"
        f"# network: {parameters:,} parameters; attention maps: "
        f"{listed(maps) or 'none'}"
    )
    facts = {
        "config": resolved.model_dump(mode="json"),
        "settled": _changes(config, resolved),
        "training_cases": [case.name for case in train],
        "held_out_cases": [case.name for case in held_out],
        "test_cases": [case.name for case in dataset.test],
        "spacing_mm": list(description.spacing),
        "normalisation": [setting.model_dump() for setting in description.normalisation],
        "parameters": parameters,
        "maps": maps,
    }
    return Understood("config", text, facts)


def _changes(before: BaseModel, after: BaseModel) -> list[str]:
    """Dotted names of the settings whose values differ."""
    found = []
    for name in type(after).model_fields:
        old, new = getattr(before, name), getattr(after, name)
        if isinstance(old, BaseModel) and type(old) is type(new):
            found += [f"{name}.{inner}" for inner in _changes(old, new)]
        elif old != new:
            found.append(name)
    return found


def _classes_in_words(labelling: Labelling) -> str:
    if labelling.regions:
        return f"regions: {listed(labelling.regions)}"
    return f"labels: {listed(labelling.numbers)}"
