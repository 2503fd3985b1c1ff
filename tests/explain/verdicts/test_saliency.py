"""Laws of saliency: closed forms where the network is simple, definitions where it is not."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import Tensor, nn

from segkit.config.attention import AdditiveGridGateConfig
from segkit.errors import ModelError
from segkit.explain.verdicts.saliency import grad_cam, input_gradient
from segkit.geometry.grid import Grid
from segkit.inference.predictor import Predictor
from segkit.io.volume import Volume
from segkit.model.folder import Model
from segkit.nn.network import unet_of
from segkit.nn.unet import UNet
from tests.explain.heads.test_study import attending_model, noise_volume
from tests.models import description

GATED: dict[str, Any] = {"skip": AdditiveGridGateConfig(levels=[0, 1])}


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_next_to_the_logits_grad_cam_has_a_closed_form(spatial_dims: Literal[2, 3]) -> None:
    """With logits W A + b, the gradient is W where the class is predicted and 0 elsewhere, so that
    the map is relu(logit - b) times the share of voxels, or of the plane's, that are predicted."""
    model = attending_model(spatial_dims=spatial_dims, **GATED)
    volume = noise_volume(8, 8, 8)
    found = grad_cam(Predictor(model, device="cpu"), volume, "label 1", level=0)
    with torch.no_grad():
        logits = model.network(torch.from_numpy(volume.data)[None, None])[0]
    chosen = (logits.argmax(dim=0) == 1).float()
    share = chosen.mean(dim=(0, 1)) if spatial_dims == 2 else chosen.mean()
    bias = float(unet_of(model.network).heads[0].bias[1].detach())
    assert 0 < chosen.mean() < 1
    assert found.volume is not None and found.info.kind == "saliency"
    assert found.info.key == "decoder.0/gradcam-label 1"
    expected = (logits[1] - bias).relu() * share
    assert_allclose(found.volume.data, expected.numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("position", ["encoder", "decoder"])
def test_grad_cam_is_its_definition_and_lies_where_its_features_do(
    position: Literal["encoder", "decoder"],
) -> None:
    model = attending_model(**GATED)
    for parameter in model.network.parameters():
        parameter.requires_grad_(False)
    volume = noise_volume(8, 8, 8)
    found = grad_cam(Predictor(model, device="cpu"), volume, "label 2", level=1, position=position)
    kept: list[Tensor] = []
    module = getattr(unet_of(model.network), position)[1]
    handle = module.register_forward_hook(lambda _, given, output: kept.append(output))
    image = torch.from_numpy(volume.data)[None, None].requires_grad_()
    logits = model.network(image)
    handle.remove()
    total = logits[:, 2][logits.argmax(dim=1) == 2].sum()
    (slope,) = torch.autograd.grad(total, [kept[0]])
    expected = (slope.mean(dim=(2, 3, 4), keepdim=True) * kept[0]).sum(dim=1).relu()[0].detach()
    assert expected.max() > 0
    assert found.volume is not None
    assert_allclose(found.volume.data, expected.numpy(), rtol=1e-3, atol=1e-7)
    assert_allclose(found.volume.grid.affine, np.diag([2.0, 2.0, 2.0, 1.0]))


def test_windows_are_not_scaled() -> None:
    """Two windows beside one another, the second image of less contrast: each is as it is alone."""
    model = attending_model(**GATED)
    predictor = Predictor(model, device="cpu", overlap=0.0)
    parts = [noise_volume(8, 8, 8, seed=seed) for seed in range(2)]
    whole = Volume(np.concatenate([part.data for part in parts]), Grid((16, 8, 8), np.eye(4)))
    for saliency in (
        lambda volume: grad_cam(predictor, volume, "label 1", level=1),
        lambda volume: input_gradient(predictor, volume, "label 1"),
    ):
        alone = [saliency(part).volume for part in parts]
        together = saliency(whole).volume
        expected = np.concatenate([part.data for part in alone])
        assert_allclose(together.data, expected, rtol=1e-4, atol=1e-7)
        assert alone[0].data.max() != pytest.approx(alone[1].data.max(), rel=1e-3)


class Linear(UNet):
    """The logit 2 x - 3 y of a class, of the channels x and y, and 0 of the background."""

    def forward(self, image: Tensor) -> Tensor:
        logit = 2 * image[:, :1] - 3 * image[:, 1:]
        return torch.cat([0 * logit, logit], dim=1)


def test_the_gradient_of_a_linear_network_is_its_largest_weight_where_it_says_yes() -> None:
    told = description(channels=2, classes=2, spacing=(1.0, 1.0, 1.0))
    network = Linear(3, 2, out_channels=2, channels=(2, 2))
    volume = noise_volume(9, 8, 7, 2)
    predictor = Predictor(Model(told, network.eval()), device="cpu")
    found = input_gradient(predictor, volume, "label 1")
    assert found.volume is not None
    yes = 2 * volume.data[..., 0] > 3 * volume.data[..., 1]
    assert_allclose(found.volume.data, 3.0 * yes, rtol=1e-5)
    assert_allclose(found.volume.grid.affine, np.eye(4))


def test_saliency_leaves_the_model_as_it_was() -> None:
    model = attending_model(**GATED)
    nn.init.ones_(unet_of(model.network).heads[0].bias)
    before = {name: value.clone() for name, value in model.network.state_dict().items()}
    predictor = Predictor(model, device="cpu")
    grad_cam(predictor, noise_volume(8, 8, 8), "label 1", level=1)
    input_gradient(predictor, noise_volume(8, 8, 8), "label 1")
    assert all(parameter.grad is None for parameter in model.network.parameters())
    for name, value in model.network.state_dict().items():
        assert torch.equal(value, before[name])


def test_classes_and_levels_that_are_not_there_are_refused() -> None:
    predictor, volume = Predictor(attending_model(**GATED), device="cpu"), noise_volume(8, 8, 8)
    with pytest.raises(ModelError, match="label 0, label 1, label 2, found 'liver'; name one"):
        grad_cam(predictor, volume, "liver", level=0)
    with pytest.raises(ModelError, match=r"the decoder has the levels 0 … 1, found 2; name one"):
        grad_cam(predictor, volume, "label 1", level=2)
