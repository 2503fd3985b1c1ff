"""Whatever segkit does on a GPU, it does on the CPU: each road there, beside the same road here."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor

import segkit
from segkit.data.patches import PatchDataset
from segkit.data.resident import ResidentPatches
from segkit.model.build import build_network
from segkit.nn.losses import deep_dice_cross_entropy
from segkit.system.graphed_step import GraphedStep
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError

pytestmark = pytest.mark.gpu
SGD: dict[str, Any] = {"optimiser": "sgd", "learning_rate": 1e-3, "steps": 6, "validate_every": 3}


@pytest.fixture(autouse=True)
def whole_float32() -> Iterator[None]:
    """Without TF32, whose rounding would hide a fault."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = allowed


def config_on(accelerator: str, data: Path, **sections: Any) -> segkit.Config:
    trainer = {"accelerator": accelerator, "precision": "32-true"}
    return small_config(
        data,
        data={"augment": False, "batch_size": 2},
        train={**SGD, **sections.pop("train", {})},
        trainer={**trainer, **sections.pop("trainer", {})},
        **sections,
    )


def weights(run: segkit.Run) -> dict[str, Tensor]:
    """The last weights. Which weights are best, rounding could decide."""
    state = torch.load(run.folder / "last.ckpt", weights_only=True, map_location="cpu")[
        "state_dict"
    ]
    return {
        key.removeprefix("network."): values
        for key, values in state.items()
        if key.startswith("network.")
    }


def assert_near(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, atol=tolerance, rtol=tolerance, msg=name)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("gpu") / "data", num_cases=6, size=20)


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> segkit.Run:
    folder = tmp_path_factory.mktemp("trained")
    config = small_config(
        data,
        train={"steps": 150, "validate_every": 50},
        trainer={"accelerator": "gpu", "precision": "auto"},
    )
    return segkit.train(config, runs=folder)


@pytest.mark.parametrize("attention", [{"skip": "additive_grid"}, {"encoder": "cbam"}, {}])
@pytest.mark.parametrize("averaging", [None, 0.9])
def test_training_on_a_gpu_gives_the_weights_of_training_on_the_cpu(
    attention: dict[str, Any], averaging: float | None, data: Path, tmp_path: Path
) -> None:
    runs = {
        accelerator: segkit.train(
            config_on(
                accelerator,
                data,
                network={"attention": attention},
                train={"averaging": averaging},
            ),
            runs=tmp_path / accelerator,
        )
        for accelerator in ("cpu", "gpu")
    }
    assert_near(weights(runs["gpu"]), weights(runs["cpu"]), 2e-4)


def test_a_training_that_was_stopped_on_a_gpu_ends_with_the_weights_of_one_that_was_not(
    data: Path, tmp_path: Path
) -> None:
    config = config_on("gpu", data, train={"averaging": 0.9})
    whole = segkit.train(config, runs=tmp_path / "whole")
    with pytest.raises(StoppedError):
        segkit.train(config, runs=tmp_path / "stopped", callbacks=[StopAfter(4)])
    resumed = segkit.resume(tmp_path / "stopped" / config.name)
    assert_near(weights(resumed), weights(whole), 1e-5)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_training_in_half_precision_goes_on_with_its_fused_optimiser(
    precision: str, optimiser: str, data: Path, tmp_path: Path
) -> None:
    config = config_on(
        "gpu",
        data,
        train={"optimiser": optimiser, "learning_rate": None},
        trainer={"precision": precision},
    )
    with pytest.raises(StoppedError):
        segkit.train(config, runs=tmp_path, callbacks=[StopAfter(4)])
    run = segkit.resume(tmp_path / "small")
    assert run.summary["steps"] == 6
    state = torch.load(run.folder / "last.ckpt", weights_only=True, map_location="cpu")
    assert state["optimizer_states"][0]["param_groups"][-1]["fused"]


def test_augmented_training_in_half_precision_learns_on_a_gpu(trained: segkit.Run) -> None:
    table = np.genfromtxt(
        trained.folder / "metrics.csv", delimiter=",", names=True, invalid_raise=False
    )
    losses, dice = (
        table[name][np.isfinite(table[name])] for name in ("trainloss", "validationdice")
    )
    assert len(losses) == len(dice) == 3  # it learns on after each validation
    assert losses[-1] < losses[0] and dice[-1] > dice[0] + 0.02
    assert trained.summary["validation"]["mean_dice"] > 0.6


def test_patches_cut_on_a_gpu_are_those_cut_on_the_host(data: Path, tmp_path: Path) -> None:
    parts = segkit.prepare(config_on("gpu", data), runs=tmp_path)
    patches = PatchDataset(
        parts.cases, patch_size=(16, 16, 16), margin=(3, 0, 2), sampler=parts.sampler, seed=7
    )
    found = ResidentPatches(patches, torch.device("cuda")).batch(range(20))
    for number in range(20):
        assert (found["image"][number].cpu() == patches[number]["image"].float()).all()
        assert (found["label"][number].cpu() == patches[number]["label"]).all()


def test_a_graphed_step_has_the_loss_and_the_gradients_of_the_step_itself(
    trained: segkit.Run,
) -> None:
    network = build_network(trained.model.description).cuda().train()
    parameters = list(network.parameters())

    def loss(image: Tensor, label: Tensor) -> tuple[Tensor, ...]:
        return (deep_dice_cross_entropy(network.supervised(image)[0], label, pool_batch=False),)

    def draw() -> tuple[Tensor, Tensor]:
        label = torch.randint(0, 2, (2, 16, 16, 16), device="cuda", dtype=torch.uint8)
        return torch.randn(2, 1, 16, 16, 16, device="cuda"), label

    graphed = GraphedStep(loss, parameters, *draw())
    for _ in range(3):
        image, label = draw()
        (found,) = graphed(image, label)
        gradients = [parameter.grad.clone() for parameter in parameters]  # type: ignore[union-attr]
        (expected,) = loss(image, label)
        wanted = torch.autograd.grad(expected, parameters)
        torch.testing.assert_close(found, expected.detach())
        torch.testing.assert_close(gradients, list(wanted), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("tta", [False, True])
def test_a_gpu_predicts_the_labels_maps_and_probabilities_of_the_cpu(
    precision: str, tta: bool, trained: segkit.Run, data: Path
) -> None:
    volume = segkit.read_volume(sorted((data / "imagesTr").iterdir())[0])
    found, expected = (
        segkit.Predictor(
            trained.model,
            device=device,
            engine="torch",
            precision=getattr(torch, kind),
            tta=tta,
        )(volume, maps=True, probabilities=True)
        for device, kind in (("cuda", precision), ("cpu", "float32"))
    )
    assert (found.labels.data == expected.labels.data).mean() > 0.998
    tolerance = 1e-4 if precision == "float32" else 0.03
    for key, of_cpu in expected.maps.items():
        assert np.nanmax(abs(found.maps[key].volume.data - of_cpu.volume.data)) < tolerance
    assert found.probabilities is not None and expected.probabilities is not None
    assert abs(found.probabilities.data - expected.probabilities.data).max() < tolerance


def test_explaining_on_a_gpu_gives_the_measures_of_the_cpu(trained: segkit.Run, data: Path) -> None:
    volume = segkit.read_volume(sorted((data / "imagesTr").iterdir())[0])
    reference = segkit.read_labels(sorted((data / "labelsTr").iterdir())[0])
    found, expected = (
        segkit.explain_volume(
            segkit.Predictor(trained.model, device=device, engine="torch"), volume, reference
        )
        for device in ("cuda", "cpu")
    )
    assert (found.labels.data == expected.labels.data).mean() > 0.998
    assert found.dice["ball"] == pytest.approx(expected.dice["ball"], abs=0.01)
    assert expected.maps.keys() == found.maps.keys() >= {"skip.1/gate"}
    for key, of_cpu in expected.maps.items():
        assert np.nanmax(abs(found.maps[key].volume.data - of_cpu.volume.data)) < 1e-3


def test_a_model_trained_on_a_gpu_is_exported_with_the_labels_of_the_cpu(
    trained: segkit.Run, tmp_path: Path
) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    export = segkit.export_model(trained.model, "onnx", tmp_path / "model.onnx", check=True)
    assert export.agreement is not None


def test_prediction_files_of_a_gpu_keep_the_grid_of_the_scan(
    trained: segkit.Run, data: Path, tmp_path: Path
) -> None:
    from segkit.inference.predict_files import predict_files
    from segkit.io.inputs import find_inputs

    source = sorted((data / "imagesTr").iterdir())[0]
    predictor = segkit.Predictor(trained.model, device="cuda")
    (outcome,) = predict_files(
        predictor, find_inputs([source], 1), out=tmp_path / "seg.nii.gz", maps=tmp_path / "maps"
    )
    assert not outcome.error
    written, scan = nib.load(tmp_path / "seg.nii.gz"), nib.load(source)
    assert written.shape == scan.shape and np.allclose(written.affine, scan.affine)


def test_a_training_too_large_for_the_gpu_is_told_in_a_sentence(data: Path, tmp_path: Path) -> None:
    # A limit of this process only: other tests may run beside it on the same GPU.
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.02)
    config = config_on("gpu", data, network={"channels": [512, 512, 512]})
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"patch_size": [128] * 3})}
    )
    try:
        with pytest.raises(segkit.TrainingError, match=r"memory.*data\.batch_size"):
            segkit.train(config, runs=tmp_path)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()


def test_a_replaced_loss_is_trained_with_on_a_gpu(data: Path, tmp_path: Path) -> None:
    parts = segkit.prepare(config_on("gpu", data), runs=tmp_path / "replaced")

    def none(levels: Any, label: Tensor) -> Tensor:
        return 0 * levels[0].sum()

    decay = dataclasses.replace(parts, loss=none)
    run = segkit.fit(decay, runs=tmp_path / "replaced")
    before = parts.network.state_dict()
    for name, values in weights(run).items():
        torch.testing.assert_close(values, before[name].cpu(), atol=1e-5, rtol=1e-3)
