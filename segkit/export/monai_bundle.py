"""A MONAI bundle: a folder that `python -m monai.bundle run` segments scans with.

    configs/metadata.json     what the model is, what goes in and what comes out
    configs/inference.json    from a folder of scans to a folder of segmentations
    models/model.ts           the network as TorchScript
    models/segkit/            the same weights as safetensors, with segkit's description
    scripts/                  whole scans through the network, in plain PyTorch
    docs/README.md  LICENSE

It needs MONAI with PyTorch Ignite, NiBabel and Fire, and SciPy; it does not need segkit. What MONAI
does as segkit does it, MONAI does: reading, turning, cutting to the body's box, and all of it back.
Resampling and windows are segkit's own, in `scripts/whole_volume.py`, for MONAI's lie elsewhere by
up to half a voxel and a window, and labels would differ.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import Distribution, distribution, version
from pathlib import Path
from typing import Any

import numpy as np

from segkit.config.labels import Labelling
from segkit.config.model import ModelDescription
from segkit.errors import ModelError
from segkit.export import whole_volume
from segkit.export.deployment import deployment
from segkit.export.torchscript import export_torchscript
from segkit.io.atomic import whole_folder, write_json, write_text
from segkit.model.folder import Model, save_model

MONAI = "1.6.1"
"""The version that bundles are tested with."""
NEEDS = ("nibabel", "scipy")
CODE = "scripts.whole_volume"
NETWORK = Path("models", "model.ts")


BEFORE: list[dict[str, Any]] = [
    {"_target_": "LoadImaged", "keys": "image", "ensure_channel_first": True},
    {
        "_target_": "Orientationd",
        "keys": "image",
        "axcodes": "RAS",
        "labels": [["L", "R"], ["P", "A"], ["I", "S"]],
    },
    {
        "_target_": "CropForegroundd",
        "keys": "image",
        "source_key": "image",
        # All of a scan that holds nothing.
        "select_fn": "$lambda values: (values != 0) | ~(values != 0).any()",
        "allow_smaller": True,
    },
]
"""From files to what the network's inferer is given, as MONAI does it."""
LICENSE = """\
scripts/whole_volume.py is part of segkit and is licensed under the Apache License, Version 2.0,
which follows. Whoever trained the model decides on what terms its weights, under models/, may be
used: until they say so here, no licence to these is given.

"""
ELSEWHERE = "The licence is at https://www.apache.org/licenses/LICENSE-2.0\n"


def export_bundle(
    model: Model, folder: Path, *, overlap: float = 0.5, overwrite: bool = False
) -> None:
    """Write a model as a bundle.

    Raises ModelError for a model that takes a first stage's labels, where TorchScript cannot hold
    the network, and where what may be overwritten is something else than a bundle.
    """
    if model.first:
        raise ModelError(
            "a bundle holds one network, and this model takes the labels of a first stage; export "
            "it as onnx or openvino and bring the two together, or use `segkit predict`"
        )
    if folder.exists() and not (folder / "configs" / "metadata.json").is_file():
        raise ModelError(f"{folder}: is no bundle, and is left alone; name another --out")
    told = deployment(model, overlap=overlap)
    metadata = metadata_of(model, told)
    with whole_folder(folder, overwrite=overwrite) as partial:
        export_torchscript(model, partial / NETWORK, metadata)
        save_model(partial / "models" / "segkit", model)
        write_json(partial / "configs" / "inference.json", inference_of(told, model.description))
        source = Path(whole_volume.__file__).read_text(encoding="utf-8")
        write_text(partial / "scripts" / "whole_volume.py", source)
        write_text(partial / "scripts" / "__init__.py", "")
        write_text(partial / "docs" / "README.md", readme_of(told))
        write_text(partial / "LICENSE", license_of(distribution("segkit")))
        # Last, as it is what tells a bundle.
        write_json(partial / "configs" / "metadata.json", metadata)


def metadata_of(model: Model, told: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata.json` by MONAI's schema, with all that `deployment` tells under 'segkit'."""
    channels, logits = told["input"]["channels"], told["outputs"]["logits"]

    def tensor(form: str, names: Sequence[str], **more: str) -> dict[str, Any]:
        return {
            "type": "image",
            "format": form,
            **more,
            "num_channels": len(names),
            "spatial_shape": told["windows"]["patch"],
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": True,
            "channel_def": {str(at): name for at, name in enumerate(names)},
        }

    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by {told['made_by']}"},
        "monai_version": MONAI,
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            "pytorch-ignite": "0.5.5",
            "fire": "0.7.1",
            **{name: version(name) for name in NEEDS},
        },
        "name": told["run"],
        "task": f"segmentation of {', '.join(list(told['labels'])[1:])}",
        "description": f"A network trained by {told['made_by']}; docs/README.md says more.",
        "authors": "not stated",
        "copyright": "not stated",
        "network_data_format": {
            "inputs": {"image": tensor("magnitude", channels, modality=", ".join(channels))},
            "outputs": {"pred": tensor("segmentation", logits)},
        },
        "labels": {str(number): name for name, number in told["labels"].items()},
        "segkit": dict(told),
    }


def inference_of(told: Mapping[str, Any], description: ModelDescription) -> dict[str, Any]:
    """`inference.json`: the steps that MONAI puts together, in its own words."""
    windows = told["windows"]
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": _datalist(len(told["input"]["channels"])),
        "network_def": (
            f"$torch.jit.load(@bundle_root + '/{NETWORK.as_posix()}', map_location=@device)"
        ),
        "preprocessing": {"_target_": "Compose", "transforms": _before(told)},
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "dataloader": {
            "_target_": "DataLoader",
            "dataset": "@dataset",
            "batch_size": 1,
            "shuffle": False,
            "num_workers": 0,
        },
        "inferer": {
            "_target_": f"{CODE}.WholeVolume",
            "spacing": told["spacing"],
            "normalisation": told["normalisation"],
            "interpolation": told["interpolation"],
            "patch_size": windows["patch"],
            "overlap": windows["overlap"],
            "multiple": windows["multiple"],
            "regions": bool(told["regions"]),
            "batch_size": 1,
            "skip_empty": True,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _after(told, description)},
        "evaluator": {
            "_target_": "SupervisedEvaluator",
            "device": "@device",
            "val_data_loader": "@dataloader",
            "network": "@network_def",
            "inferer": "@inferer",
            "postprocessing": "@postprocessing",
            "amp": False,
        },
        "run": ["$@evaluator.run()"],
    }


def _datalist(num_channels: int) -> str:
    """An expression for the cases of a folder: a file each, or one for each channel."""
    if num_channels == 1:
        return "$[{'image': f} for f in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))]"
    return (
        "$[{'image': [f.replace('_0000.nii.gz', f'_{c:04d}.nii.gz') "
        f"for c in range({num_channels})]}} "
        "for f in sorted(glob.glob(os.path.join(@dataset_dir, '*_0000.nii.gz')))]"
    )


def _before(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    if told["nan"] != "background":
        return BEFORE
    zero = "$lambda values: torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)"
    load, *others = BEFORE
    return [load, {"_target_": "Lambdad", "keys": "image", "func": zero}, *others]


def _after(told: Mapping[str, Any], description: ModelDescription) -> list[dict[str, Any]]:
    """From logits to files of labels."""
    labelling, adopted = description.labelling, description.postprocessing
    steps: list[dict[str, Any]] = [{"_target_": "EnsureTyped", "keys": "pred", "track_meta": True}]
    if labelling.written is not None:
        written = {"_target_": f"{CODE}.WrittenRegions", "numbers": list(labelling.written)}
        steps.append({"_target_": "Lambdad", "keys": "pred", "func": written})
    else:
        steps.append({"_target_": "AsDiscreted", "keys": "pred", "argmax": True})
    if adopted.largest_foreground or adopted.largest_of:
        largest = {
            "_target_": f"{CODE}.LargestComponents",
            "of_foreground": adopted.largest_foreground,
            "of_labels": list(adopted.largest_of),
        }
        steps.append({"_target_": "Lambdad", "keys": "pred", "func": largest})
    return [
        *steps,
        {
            "_target_": "Invertd",
            "keys": "pred",
            "transform": "@preprocessing",
            "orig_keys": "image",
            "nearest_interp": True,
            "to_tensor": True,
        },
        *_renumbered(labelling),
        {
            "_target_": "SaveImaged",
            "keys": "pred",
            "output_dir": "@output_dir",
            "output_postfix": "seg",
            "output_dtype": str(np.min_scalar_type(max(told["labels"].values()))),
            "resample": False,
            "separate_folder": False,
        },
    ]


def _renumbered(labelling: Labelling) -> list[dict[str, Any]]:
    """From the numbers 0, 1, 2, … of the outputs to those of files, if they differ."""
    if not labelling.in_files:
        return []
    numbers = list(labelling.numbers.values())
    return [
        {
            "_target_": "MapLabelValued",
            "keys": "pred",
            "orig_labels": numbers,
            "target_labels": [labelling.in_file(number) for number in numbers],
        }
    ]


def readme_of(told: Mapping[str, Any]) -> str:
    """The README, of what `deployment` tells."""
    channels = told["input"]["channels"]
    windows = told["windows"]
    inputs = "The scans are files `CASE.nii.gz`."
    if len(channels) > 1:
        files = ", ".join(f"`CASE_{at:04d}.nii.gz` ({name})" for at, name in enumerate(channels))
        inputs = f"A case is the files {files}."
    template = Path(__file__).with_name("bundle_readme.md").read_text(encoding="utf-8")
    return template.format(
        run=told["run"],
        names=", ".join(list(told["labels"])[1:]),
        made_by=told["made_by"],
        inputs=inputs,
        labels="\n".join(f"- {number}: {name}" for name, number in told["labels"].items()),
        spacing=_times(told["spacing"]),
        interpolation=told["interpolation"],
        patch=_times(windows["patch"]),
        overlap=_times(windows["overlap"]),
        num_outputs=len(told["outputs"]["logits"]),
        num_channels=len(channels),
        shape=", ".join(str(size) for size in windows["patch"]),
    )


def license_of(segkit: Distribution) -> str:
    """The terms of what is carried along, in full where segkit was installed with them."""
    return LICENSE + (segkit.read_text("licenses/LICENSE") or ELSEWHERE)


def _times(numbers: list[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
