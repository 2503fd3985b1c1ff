"""Laws of modules that Python gives: trained, saved, read and asked as a U-Net is."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.networks.nets import UNet as MonaiUNet
from safetensors.torch import load_file
from torch import Tensor, nn

from segkit.config.load import validated
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.config.training import Config
from segkit.data.dataset_json import read_labelling
from segkit.errors import ConfigError, ModelError
from segkit.evaluation.evaluate import score_pairs
from segkit.evaluation.pairing import pair_with
from segkit.evaluation.references import references_in
from segkit.evaluation.tolerance import Tolerance
from segkit.inference.engines.choose import choose_engine
from segkit.inference.engines.torch_eager import TorchEngine
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.io.inputs import find_inputs
from segkit.io.volume import read_volume
from segkit.model.build import build_network, wrap_network
from segkit.model.folder import described_model, load_model
from segkit.training.fit import Run, fit, train
from segkit.training.parts import prepare
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_resume import StopAfter, StoppedError


def monai_unet(spatial_dims: int = 3, seed: int = 0, out_channels: int = 2) -> MonaiUNet:
    torch.manual_seed(seed)
    return MonaiUNet(
        spatial_dims=spatial_dims,
        in_channels=1,
        out_channels=out_channels,
        channels=(4, 8, 8),
        strides=(2, 2),
        norm="batch",
    )


def config_for(folder: Path, spatial_dims: int = 3, **sections: dict[str, object]) -> Config:
    base = small_config(folder)
    network = NetworkConfig.model_validate(
        {
            "spatial_dims": spatial_dims,
            "given": {"multiple": [4] * spatial_dims, "name": "monai UNet"},
        }
    )
    data = base.data.model_copy(update={"patch_size": [16] * spatial_dims})
    changed = base.model_copy(update={"network": network, "data": data})
    return changed.model_copy(
        update={
            name: getattr(changed, name).model_copy(update=section)
            for name, section in sections.items()
        }
    )


def assert_alike(one: nn.Module, other: nn.Module) -> None:
    theirs = other.state_dict()
    assert one.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in one.state_dict().items())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_monai_network_is_trained_saved_read_and_predicts_the_same(
    tmp_path: Path, spatial_dims: int
) -> None:
    data = small_dataset(tmp_path / "data")
    untrained, module = monai_unet(spatial_dims), monai_unet(spatial_dims)
    run = train(config_for(data, spatial_dims), runs=tmp_path / "runs", network=module)
    assert not torch.equal(next(module.parameters()), next(untrained.parameters()))
    assert run.summary["validation"]["cases"] == 1
    # Weights lie in the file by the module's own names, and nothing names a class to import.
    assert set(load_file(run.folder / "model" / "weights.safetensors")) == set(module.state_dict())

    scan = read_volume(data / "imagesTr" / "case_0.nii.gz")
    expected = Predictor(run.model)(scan, maps=True, probabilities=True)
    assert expected.maps == {}
    again = monai_unet(spatial_dims, seed=99)
    found = Predictor.load(run.folder, network=again)(scan, probabilities=True)
    assert_alike(again, module)
    assert expected.probabilities is not None and found.probabilities is not None
    assert np.array_equal(found.probabilities.data, expected.probabilities.data)
    assert np.array_equal(found.labels.data, expected.labels.data)


def test_predictions_of_a_users_module_are_written_and_scored(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    run = train(config_for(data), runs=tmp_path / "runs", network=monai_unet())
    out = tmp_path / "out"
    inputs = find_inputs([data / "imagesTr"], 1)
    outcomes = list(predict_files(Predictor(run.model), inputs, out=out))
    assert [outcome.error for outcome in outcomes] == [None] * 4
    pairs = pair_with(out, references_in(data / "labelsTr"), data / "labelsTr").pairs
    labelling = read_labelling(data / "dataset.json")
    rows, failures = score_pairs(pairs, labelling, tolerance=Tolerance(mm=1.0))
    scan = read_volume(inputs[0].files[0])
    assert np.array_equal(
        read_volume(outcomes[0].written[0]).data, Predictor(run.model)(scan).labels.data
    )
    assert len(rows) == 4 and not failures


def test_a_resumed_run_with_a_users_module_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    config = config_for(small_dataset(tmp_path / "data"))
    whole = train(config, runs=tmp_path / "whole", network=monai_unet())
    with pytest.raises(StoppedError):
        train(config, runs=tmp_path / "parts", network=monai_unet(), callbacks=[StopAfter(3)])
    resumed = resume(tmp_path / "parts" / "small", network=monai_unet(seed=5))
    assert resumed.summary["steps"] == whole.summary["steps"] == 4
    assert_alike(resumed.model.network, whole.model.network)


def description_of(**changes: object) -> ModelDescription:
    return ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "elsewhere",
            "channels": ["T1"],
            "labels": {"background": 0, "ball": 1},
            "network": {"given": {"multiple": [4, 4, 4], "name": "monai UNet"}},
            "spacing": (1.0, 1.0, 1.0),
            "normalisation": ["zscore"],
            "slices": "axial",
            "patch_size": [16, 16, 16],
            **changes,
        }
    )


def test_a_module_trained_elsewhere_needs_a_description_and_nothing_else(tmp_path: Path) -> None:
    scan = read_volume(small_dataset(tmp_path) / "imagesTr" / "case_0.nii.gz")
    module = monai_unet().eval()
    model = described_model(description_of(), module)
    labels = Predictor(model, overlap=0.0)(scan).labels.data
    values = torch.from_numpy(scan.data)
    image = (values - values.mean()) / values.std(correction=0)
    assert image.shape == (16, 16, 16)
    with torch.no_grad():
        expected = module(image[None, None]).argmax(dim=1)[0].numpy()
    assert np.array_equal(labels, expected)


def test_a_model_of_a_users_module_names_it_if_it_is_missing(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    run = train(config_for(data), runs=tmp_path / "runs", network=monai_unet())
    told = json.loads((run.folder / "model" / "model.json").read_text())
    assert told["network"]["given"] == {"multiple": [4, 4, 4], "name": "monai UNet"}
    with pytest.raises(ModelError, match=r"Python module \(monai UNet\), which is not saved in"):
        load_model(run.folder)
    with pytest.raises(ModelError, match=r"its weights do not fit its model\.json"):
        load_model(run.folder, network=monai_unet(out_channels=3))
    with pytest.raises(ModelError, match="one module cannot hold the weights of 2 models"):
        Predictor.load(run.folder, run.folder, network=monai_unet())


def test_a_users_module_needs_a_config_with_network_given(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    with pytest.raises(ModelError, match=r"described as a U-Net.*set network\.given\.multiple"):
        train(small_config(data), runs=tmp_path / "runs", network=monai_unet())
    with pytest.raises(ModelError, match=r"train\(config, network=module\)"):
        train(config_for(data), runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("small*"))


class Fixed(nn.Module):
    """Gives the same, whatever it is asked."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, image: Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("answer", "sentence"),
    [
        (torch.zeros(1, 3, 16, 16, 16), r"window of \(1, 16, 16, 16\), found \(3, 16, 16, 16\)"),
        (torch.zeros(1, 2, 8, 8, 8), r"expected logits \(2, 16, 16, 16\)"),
        ([torch.zeros(1, 2, 16, 16, 16)], "expected a tensor of logits from Fixed, found a list"),
    ],
)
def test_a_module_that_gives_no_logits_is_refused_and_leaves_no_run(
    tmp_path: Path, answer: object, sentence: str
) -> None:
    config = config_for(small_dataset(tmp_path / "data"))
    with pytest.raises(ModelError, match=sentence):
        train(config, runs=tmp_path / "runs", network=Fixed(answer))
    assert not list((tmp_path / "runs").glob("small*"))


class SinglePrecision(nn.Module):
    """Writes the result of a convolution into a tensor of its input's type, by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(1, 2, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        output = image.new_zeros(len(image), 2, *image.shape[2:])
        output[:, torch.tensor([1, 0])] = self.conv(image)
        return output


@pytest.mark.parametrize("replaced", [False, True])
def test_a_module_that_fails_in_bfloat16_is_refused_with_what_to_set(
    tmp_path: Path, replaced: bool
) -> None:
    config = config_for(small_dataset(tmp_path / "data"))

    def fit_in(precision: str) -> Run:
        trainer = config.trainer.model_copy(update={"precision": precision})
        asked = config.model_copy(update={"trainer": trainer})
        if not replaced:
            return train(asked, runs=tmp_path / "runs", network=SinglePrecision())
        parts = prepare(asked, runs=tmp_path / "runs", network=nn.Conv3d(1, 2, 1))
        return fit(dataclasses.replace(parts, network=SinglePrecision()), runs=tmp_path / "runs")

    with pytest.raises(
        ModelError,
        match=r"SinglePrecision computes logits in single precision, but in bfloat16, .* fails "
        r"\(Index put requires .*\); set trainer.precision=32-true",
    ):
        fit_in("bf16-mixed")
    assert fit_in("32-true").summary["steps"] > 0


class Stateful(nn.Conv3d):
    """Keeps something that is not a tensor."""

    def get_extra_state(self) -> Sequence[str]:
        return ["history"]


def test_a_module_whose_state_cannot_be_saved_is_refused() -> None:
    with pytest.raises(ModelError, match="keeps _extra_state in its state, which is not a tensor"):
        wrap_network(description_of(), Stateful(1, 2, 3, padding=1))


def test_settings_of_a_u_net_with_a_users_module_are_refused() -> None:
    with pytest.raises(ValueError, match=r"network\.channels is a setting of a U-Net"):
        NetworkConfig.model_validate({"given": {"multiple": [4, 4, 4]}, "channels": [4, 8]})
    with pytest.raises(ValueError, match=r"network\.given\.multiple must have 2 numbers"):
        NetworkConfig.model_validate({"spatial_dims": 2, "given": {"multiple": [4, 4, 4]}})
    with pytest.raises(ConfigError, match=r"data\.patch_size .* must be multiples of \[32, 32, 32"):
        tree = small_config(Path("data")).model_dump(mode="json")
        tree["network"] = {"given": {"multiple": [32, 32, 32]}}
        validated(Config, tree, "test")


def test_no_conversion_of_a_users_module_is_kept(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    run = train(config_for(data), runs=tmp_path / "runs", network=monai_unet())
    model = load_model(run.folder, network=monai_unet())
    assert type(choose_engine("auto", model, device="cpu")) is TorchEngine


def test_a_description_without_network_given_builds_a_u_net() -> None:
    network = build_network(description_of(network={"channels": [4, 8]}))
    assert network(torch.zeros(1, 1, 4, 4, 4)).shape == (1, 2, 4, 4, 4)
