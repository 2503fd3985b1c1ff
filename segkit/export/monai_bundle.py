"""MONAI bundles: a folder with which `python -m monai.bundle run` segments scans.

    configs/metadata.json     the model, its inputs and its outputs
    configs/inference.json    from a folder of scans to a folder of segmentations
    models/model.ts           the network as TorchScript
    models/segkit/            the same weights as safetensors, with segkit's description
    scripts/                  runs the network on whole scans, in plain PyTorch
    docs/README.md  LICENSE

A bundle needs MONAI with PyTorch Ignite, NiBabel and Fire, and SciPy, but not segkit. MONAI does
the steps that it does like segkit: it reads a scan, reorients it, crops it to the body's box, and
undoes all this. `scripts/whole_volume.py` does the resampling and the windows, because MONAI's
positions differ by up to half a voxel and a window, so that labels would differ.
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
"""The version of MONAI with which bundles are tested."""
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
        # If all voxels of a scan are 0, the box is the whole scan.
        "select_fn": "$lambda values: (values != 0) | ~(values != 0).any()",
        "allow_smaller": True,
    },
]
"""MONAI's transforms from files to the input of the network's inferer."""
LICENSE = """\
scripts/whole_volume.py is part of segkit and is licensed under the Apache License, Version 2.0,
which follows. The people who trained the model decide under which licence its weights, in models/,
may be used. Until they state a licence here, there is none.

"""
ELSEWHERE = "The licence is at https://www.apache.org/licenses/LICENSE-2.0\n"


def export_bundle(
    model: Model, folder: Path, *, overlap: float = 0.5, overwrite: bool = False
) -> None:
    """Write a model as a bundle.

    Args:
        model: a trained model.
        folder: the folder of the bundle.
        overlap: share of a window that neighbours have in common.
        overwrite: whether an existing bundle may be replaced.

    Raises:
        ModelError: the model has a first stage, TorchScript cannot hold the network, or `folder`
            exists and is not a bundle.
    """
    if model.first:
        raise ModelError(
            f"{model.description.run}: a bundle holds one network, but this model also needs a "
            "first stage; export it as onnx or openvino, or use segkit predict"
        )
    if folder.exists() and not (folder / "configs" / "metadata.json").is_file():
        raise ModelError(
            f"{folder}: expected a bundle to overwrite, found something else; choose another --out"
        )
    deployed = deployment(model, overlap=overlap)
    metadata = metadata_of(model, deployed)
    with whole_folder(folder, overwrite=overwrite) as partial:
        export_torchscript(model, partial / NETWORK, metadata)
        save_model(partial / "models" / "segkit", model)
        write_json(
            partial / "configs" / "inference.json", inference_of(deployed, model.description)
        )
        source = Path(whole_volume.__file__).read_text(encoding="utf-8")
        write_text(partial / "scripts" / "whole_volume.py", source)
        write_text(partial / "scripts" / "__init__.py", "")
        write_text(partial / "docs" / "README.md", readme_of(deployed))
        write_text(partial / "LICENSE", license_of(distribution("segkit")))
        # Written last, because a folder with this file counts as a bundle.
        write_json(partial / "configs" / "metadata.json", metadata)


def metadata_of(model: Model, deployed: Mapping[str, Any]) -> dict[str, Any]:
    """Content of `metadata.json` in MONAI's schema, with the data of `deployment` as 'segkit'."""
    channels, logits = deployed["input"]["channels"], deployed["outputs"]["logits"]

    def tensor(form: str, names: Sequence[str], **more: str) -> dict[str, Any]:
        return {
            "type": "image",
            "format": form,
            **more,
            "num_channels": len(names),
            "spatial_shape": deployed["windows"]["patch"],
            "dtype": "float32",
            "value_range": [],
            "is_patch_data": True,
            "channel_def": {str(at): name for at, name in enumerate(names)},
        }

    return {
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported by {deployed['made_by']}"},
        "monai_version": MONAI,
        "pytorch_version": version("torch").split("+")[0],
        "numpy_version": np.__version__,
        "required_packages_version": {
            "pytorch-ignite": "0.5.5",
            "fire": "0.7.1",
            **{name: version(name) for name in NEEDS},
        },
        "name": deployed["run"],
        "task": f"segmentation of {', '.join(list(deployed['labels'])[1:])}",
        "description": f"A network trained by {deployed['made_by']}; see docs/README.md.",
        "authors": "not stated",
        "copyright": "not stated",
        "network_data_format": {
            "inputs": {"image": tensor("magnitude", channels, modality=", ".join(channels))},
            "outputs": {"pred": tensor("segmentation", logits)},
        },
        "labels": {str(number): name for name, number in deployed["labels"].items()},
        "segkit": dict(deployed),
    }


def inference_of(deployed: Mapping[str, Any], description: ModelDescription) -> dict[str, Any]:
    """Content of `inference.json`: the steps of prediction in MONAI's config language."""
    windows = deployed["windows"]
    return {
        "imports": ["$import glob", "$import os"],
        "bundle_root": ".",
        "dataset_dir": "$@bundle_root + '/input'",
        "output_dir": "$@bundle_root + '/output'",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "datalist": _datalist(len(deployed["input"]["channels"])),
        "network_def": (
            f"$torch.jit.load(@bundle_root + '/{NETWORK.as_posix()}', map_location=@device)"
        ),
        "preprocessing": {"_target_": "Compose", "transforms": _before(deployed)},
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
            "spacing": deployed["spacing"],
            "normalisation": deployed["normalisation"],
            "interpolation": deployed["interpolation"],
            "patch_size": windows["patch"],
            "overlap": windows["overlap"],
            "multiple": windows["multiple"],
            "regions": bool(deployed["regions"]),
            "batch_size": 1,
            "skip_empty": True,
        },
        "postprocessing": {"_target_": "Compose", "transforms": _after(deployed, description)},
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
    """Expression for the cases of a folder, with one file for each case or for each channel."""
    if num_channels == 1:
        return "$[{'image': f} for f in sorted(glob.glob(os.path.join(@dataset_dir, '*.nii.gz')))]"
    return (
        "$[{'image': [f.replace('_0000.nii.gz', f'_{c:04d}.nii.gz') "
        f"for c in range({num_channels})]}} "
        "for f in sorted(glob.glob(os.path.join(@dataset_dir, '*_0000.nii.gz')))]"
    )


def _before(deployed: Mapping[str, Any]) -> list[dict[str, Any]]:
    if deployed["nan"] != "background":
        return BEFORE
    zero = "$lambda values: torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)"
    load, *others = BEFORE
    return [load, {"_target_": "Lambdad", "keys": "image", "func": zero}, *others]


def _after(deployed: Mapping[str, Any], description: ModelDescription) -> list[dict[str, Any]]:
    """MONAI's transforms from logits to files of labels."""
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
            "output_dtype": str(np.min_scalar_type(max(deployed["labels"].values()))),
            "resample": False,
            "separate_folder": False,
        },
    ]


def _renumbered(labelling: Labelling) -> list[dict[str, Any]]:
    """Transform from the numbers 0, 1, 2, … of the outputs to those in files, if they differ."""
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


def readme_of(deployed: Mapping[str, Any]) -> str:
    """The text of the README, from the data of `deployment`."""
    channels = deployed["input"]["channels"]
    windows = deployed["windows"]
    inputs = "The scans are files `CASE.nii.gz`."
    if len(channels) > 1:
        files = ", ".join(f"`CASE_{at:04d}.nii.gz` ({name})" for at, name in enumerate(channels))
        inputs = f"A case is the files {files}."
    template = Path(__file__).with_name("bundle_readme.md").read_text(encoding="utf-8")
    return template.format(
        run=deployed["run"],
        names=", ".join(list(deployed["labels"])[1:]),
        made_by=deployed["made_by"],
        inputs=inputs,
        labels="\n".join(f"- {number}: {name}" for name, number in deployed["labels"].items()),
        spacing=_times(deployed["spacing"]),
        interpolation=deployed["interpolation"],
        patch=_times(windows["patch"]),
        overlap=_times(windows["overlap"]),
        num_outputs=len(deployed["outputs"]["logits"]),
        num_channels=len(channels),
        shape=", ".join(str(size) for size in windows["patch"]),
    )


def license_of(segkit: Distribution) -> str:
    """The licence of the script in the bundle; its full text if segkit is installed with it."""
    return LICENSE + (segkit.read_text("licenses/LICENSE") or ELSEWHERE)


def _times(numbers: list[float]) -> str:
    return " x ".join(f"{number:g}" for number in numbers)
