"""One contender segments one volume, from file to file; how long it took, how much it held.

    python inference.py segkit|monai|nnunet CASE INPUT.nii.gz OUT.nii.gz [KEY=VALUE …]
    python inference.py network CASE FILE

Run by benchmarks/inference.py, each in a process of its own. Imports are not counted, nor is making
the network; everything from opening the input to closing the output is. Peak memory is that of the
process and, if it starts others (nnU-Net's export), of the largest of them as well.

Settings: device=cuda; repeat=N takes the volume so often and tells the last time, when a GPU is
warm; half=bfloat16 and batch=N are MONAI's best on a GPU.

The second form writes MONAI's network as TorchScript, for a process that would hold no MONAI, whose
import takes 0.2 GiB, were it not for the comparison.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.model.folder import Model, save_model
from segkit.nn.unet import UNet


@dataclass(frozen=True)
class Case:
    """What is segmented: by which network, at which spacing (mm), in which windows."""

    num_classes: int
    spacing: float
    patch: int
    channels: tuple[int, ...]
    gated: bool
    """segkit's attention U-Net, or MONAI's plain one."""


BRAIN = Case(3, 1.2, 96, (32, 64, 128, 256), gated=True)
CASES = {
    "brain": BRAIN,
    "body": BRAIN,
    "classes10": Case(10, 1.5, 96, (8, 16, 32), gated=False),
    "classes60": Case(60, 1.5, 96, (8, 16, 32), gated=False),
}


class PlainNetwork(nn.Module):
    """MONAI's U-Net with what segkit asks of a network: it has no maps."""

    presence = None

    def __init__(self, network: nn.Module, total_stride: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.total_stride = total_stride

    def maps(self) -> dict[str, object]:
        return {}

    def forward(self, image: Tensor) -> Tensor:
        return self.network(image)


def description_of(case: Case) -> ModelDescription:
    """The case as segkit's own models are described."""
    names = ["background", *(f"label {number}" for number in range(1, case.num_classes))]
    return validated(
        ModelDescription,
        {
            "segkit": version("segkit"),
            "run": "benchmark",
            "channels": ["MRI"],
            "labels": {name: number for number, name in enumerate(names)},
            "network": {
                "channels": list(case.channels),
                "attention": {"skip": "additive_grid"} if case.gated else {},
            },
            "spacing": [case.spacing] * 3,
            "normalisation": [{"kind": "zscore"}],
            "slices": "axial",
            "patch_size": [case.patch] * 3,
        },
        "benchmark",
    )


def network_of(case: Case) -> nn.Module:
    """The network, with the same weights in every process."""
    torch.manual_seed(0)
    if case.gated:
        from segkit.model.build import build_network

        network: nn.Module = build_network(description_of(case))
        # Wider apart than at the start of training, so that few voxels are all but ties.
        assert isinstance(network, UNet)
        with torch.no_grad():
            network.heads[0].weight.mul_(30)
    else:
        from monai.networks.nets import UNet as MonaiUNet

        strides = (2,) * (len(case.channels) - 1)
        network = MonaiUNet(3, 1, case.num_classes, case.channels, strides, norm="instance")
    return network.eval()


def segkit(case: Case, source: Path, target: Path, settings: dict[str, str]) -> dict[str, float]:
    """segkit's predictor, by the engine and with the maps that the settings ask for."""
    from segkit.inference.predict_files import predict_files
    from segkit.inference.predictor import Predictor
    from segkit.io.inputs import find_inputs

    # As if it had been read from there; what it is converted to is kept in a cache of its own.
    kept = Path(settings["model"])
    os.environ["XDG_CACHE_HOME"] = str(kept / "cache")
    if case.gated:
        network = network_of(case)
    else:
        file = kept / "network.pt"
        if not file.exists():
            kept.mkdir(parents=True, exist_ok=True)
            name = next(name for name, other in CASES.items() if other is case)
            subprocess.run([sys.executable, __file__, "network", name, str(file)], check=True)
        strides = (2 ** (len(case.channels) - 1),) * 3
        network = PlainNetwork(torch.jit.load(file).eval(), strides)
    model = Model(description_of(case), network, (), kept)  # type: ignore[arg-type]
    save_model(kept, model)
    clock = EngineClock()
    maps = Path(settings["maps"]) if "maps" in settings else None
    device = settings.get("device", "cpu")
    started = time.perf_counter()
    predictor = Predictor(model, device=device, engine=settings.get("engine", "auto"))
    clock.watch(predictor)
    for number in range(int(settings.get("repeat", 1))):
        if number:
            started = time.perf_counter()
            clock.seconds, clock.windows = 0.0, 0
        (outcome,) = predict_files(
            predictor, find_inputs([source], 1), out=target, maps=maps, overwrite=True
        )
        seconds = time.perf_counter() - started
        if outcome.error:
            raise SystemExit(outcome.error)
    return {"seconds": seconds, "in_engine": clock.seconds, "windows": clock.windows}


class EngineClock:
    """Seconds inside the engine, and windows that went through it."""

    def __init__(self) -> None:
        self.seconds, self.windows = 0.0, 0

    def watch(self, predictor: object) -> None:
        """Put a clock around the predictor's engine."""
        engine: Callable[..., dict[str, Tensor]] = predictor.members[0].engine  # type: ignore[attr-defined]

        def timed(windows: Tensor, keys: object) -> dict[str, Tensor]:
            started = time.perf_counter()
            outputs = engine(windows, keys)
            self.seconds += time.perf_counter() - started
            self.windows += len(windows)
            return outputs

        predictor.members[0].engine = timed  # type: ignore[attr-defined]


def monai(case: Case, source: Path, target: Path, settings: dict[str, str]) -> dict[str, float]:
    """MONAI's transforms and sliding windows; logits go back to the input's grid, then labels."""
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference
    from monai.transforms import (
        AsDiscreted,
        Compose,
        EnsureChannelFirstd,
        Invertd,
        LoadImaged,
        NormalizeIntensityd,
        Orientationd,
        SaveImaged,
        Spacingd,
    )

    device = torch.device(settings.get("device", "cpu"))
    half = getattr(torch, settings.get("half", "float32"))
    network = network_of(case).to(device)
    count = 0

    def forward(windows: Tensor) -> Tensor:
        nonlocal count
        count += len(windows)
        with torch.autocast(device.type, half, enabled=half != torch.float32):
            return network(windows)

    before = Compose(
        [
            LoadImaged("image"),
            EnsureChannelFirstd("image"),
            Orientationd("image", axcodes="RAS", labels=None),
            NormalizeIntensityd("image"),
            Spacingd("image", pixdim=(case.spacing,) * 3, mode="bilinear"),
        ]
    )
    after = Compose(
        [
            Invertd("pred", transform=before, orig_keys="image", nearest_interp=False),
            AsDiscreted("pred", argmax=True),
            SaveImaged(
                "pred",
                output_dir=target.parent,
                output_postfix="",
                separate_folder=False,
                output_dtype="uint8",
                resample=False,
                print_log=False,
                output_name_formatter=lambda *_: {"subject": target.name.removesuffix(".nii.gz")},
            ),
        ]
    )
    for _ in range(int(settings.get("repeat", 1))):
        count = 0
        started = time.perf_counter()
        item = before({"image": str(source)})
        image = item["image"]
        with torch.inference_mode():
            (logits,) = sliding_window_inference(
                image.as_tensor()[None].to(device),
                case.patch,
                int(settings.get("batch", 1)),
                forward,
                overlap=0.5,
                mode="gaussian",
            )
        item["pred"] = MetaTensor(logits.float(), meta=image.meta)
        after(item)
        seconds = time.perf_counter() - started
    return {"seconds": seconds, "windows": count}


def nnunet(case: Case, source: Path, target: Path, settings: dict[str, str]) -> dict[str, float]:
    """nnU-Net's predictor on files: preprocessing and export in spawned processes, no mirroring."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, tempfile.gettempdir())
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    order_of = {"is_seg": False, "order_z": 0, "force_separate_z": None}
    plans = PlansManager(
        {
            "dataset_name": "Dataset001_Benchmark",
            "plans_name": "benchmark",
            "image_reader_writer": "SimpleITKIO",
            # Its readers give z, y, x; turned, the network sees what it sees elsewhere.
            "transpose_forward": [2, 1, 0],
            "transpose_backward": [2, 1, 0],
            "label_manager": "LabelManager",
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {
                "3d_fullres": {
                    "data_identifier": "benchmark",
                    "preprocessor_name": "DefaultPreprocessor",
                    "batch_size": 2,
                    "patch_size": [case.patch] * 3,
                    "spacing": [case.spacing] * 3,
                    "normalization_schemes": ["ZScoreNormalization"],
                    "use_mask_for_norm": [False],
                    "resampling_fn_data": "resample_data_or_seg_to_shape",
                    "resampling_fn_seg": "resample_data_or_seg_to_shape",
                    "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
                    "resampling_fn_data_kwargs": {**order_of, "order": 3},
                    "resampling_fn_seg_kwargs": {**order_of, "is_seg": True, "order": 1},
                    "resampling_fn_probabilities_kwargs": {**order_of, "order": 1},
                    "architecture": {"arch_kwargs": {}},
                }
            },
        }
    )
    labels = description_of(case).labels
    described = {"channel_names": {"0": "MRI"}, "labels": labels, "file_ending": ".nii.gz"}
    predictor = nnUNetPredictor(
        use_mirroring=False,
        device=torch.device(settings.get("device", "cpu")),
        allow_tqdm=False,
        verbose=False,
    )
    network = network_of(case)
    predictor.manual_initialization(
        network,
        plans,
        plans.get_configuration("3d_fullres"),
        [network.state_dict()],
        described,
        "nnUNetTrainer",
        None,
    )
    clock = {"seconds": 0.0, "windows": 0}
    inner = network.forward

    def forward(windows: Tensor) -> Tensor:
        started = time.perf_counter()
        logits: Tensor = inner(windows)
        clock["seconds"] += time.perf_counter() - started
        clock["windows"] += len(windows)
        return logits

    network.forward = forward  # type: ignore[method-assign]
    started = time.perf_counter()
    predictor.predict_from_files(
        [[str(source)]],
        [str(target).removesuffix(".nii.gz")],
        num_processes_preprocessing=1,
        num_processes_segmentation_export=1,
    )
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "in_engine": clock["seconds"], "windows": clock["windows"]}


def main() -> None:
    """Run one contender and print its figures."""
    if sys.argv[1] == "network":
        case = CASES[sys.argv[2]]
        window = torch.zeros(1, 1, case.patch, case.patch, case.patch)
        torch.jit.trace(network_of(case), window, check_trace=False).save(sys.argv[3])
        return
    contender, name, source, target, *words = sys.argv[1:]
    settings = dict(word.split("=", 1) for word in words)
    runs = {"segkit": segkit, "monai": monai, "nnunet": nnunet}
    figures = runs[contender](CASES[name], Path(source), Path(target), settings)
    own, others = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    print(json.dumps({**figures, "gib": own, "gib_of_child": others}))


if __name__ == "__main__":
    main()
