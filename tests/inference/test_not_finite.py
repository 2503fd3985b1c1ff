"""Outputs that overflow float16 are computed in float32; NaN elsewhere is an error."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from numpy.testing import assert_array_equal

from segkit.errors import ModelError
from segkit.inference.made_by import made_by
from segkit.inference.predictor import Prediction, Predictor
from segkit.inference.segment_prepared import segment_prepared
from segkit.io.disk_arrays import OnDisk
from segkit.model.folder import Model
from segkit.nn.network import unet_of
from tests.models import headed_model, noise_volume

EVERYTHING: dict[str, Any] = {"maps": True, "disagreement": True, "probabilities": True}
SHAPE = (9, 12, 20)


def overflowing(factor: float, part: str = "heads.0.weight") -> Model:
    """A model whose logits, or those of presence, overflow float16 if the factor is 1e6."""
    model = headed_model()
    with torch.no_grad():
        unet_of(model.network).get_parameter(part).mul_(factor)
    return model


def assert_same(found: Prediction, expected: Prediction) -> None:
    assert_array_equal(found.labels.data, expected.labels.data)
    assert found.presence == expected.presence
    assert found.probabilities is not None and expected.probabilities is not None
    assert_array_equal(found.probabilities.data, expected.probabilities.data)
    assert found.maps.keys() == expected.maps.keys() >= {"skip.1/gate", "head/pool"}
    for key, expected_map in expected.maps.items():
        for name in ("volume", "disagreement"):
            of_found, of_expected = getattr(found.maps[key], name), getattr(expected_map, name)
            assert_array_equal(of_found.data, of_expected.data)


@pytest.mark.parametrize("part", ["heads.0.weight", "presence.classify.weight"])
@pytest.mark.parametrize("tta", [False, True])
def test_a_volume_whose_outputs_overflow_float16_is_predicted_again_in_float32(
    part: str, tta: bool, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    model = overflowing(1e8, part)
    model = Model(model.description.model_copy(update={"mirror": ["x"]}), model.network)
    settings: dict[str, Any] = {"device": "cpu", "engine": "torch", "tta": tta, "batch_size": 3}
    expected = Predictor(model, **settings)(noise_volume(SHAPE), **EVERYTHING)
    predictor = Predictor(model, precision=torch.float16, **settings)
    for allocate in ({}, {"allocate": OnDisk(tmp_path)}):
        assert_same(predictor(noise_volume(SHAPE), **EVERYTHING, **allocate), expected)
    assert caplog.text.count("overflow float16") == 1
    (engine,) = made_by(predictor, {}, [])["engines"]
    assert engine == "torch, in float32 because float16 overflowed"


def test_a_volume_whose_outputs_fit_into_float16_stays_in_float16(
    caplog: pytest.LogCaptureFixture,
) -> None:
    predictor = Predictor(headed_model(), device="cpu", engine="torch", precision=torch.float16)
    predictor(noise_volume(SHAPE), **EVERYTHING)
    assert predictor.members[0].precision == torch.float16 and not caplog.records
    assert made_by(predictor, {}, [])["engines"] == ["torch"]


def test_only_the_model_that_overflows_is_computed_in_float32_also_in_several_threads(
    caplog: pytest.LogCaptureFixture,
) -> None:
    models = [headed_model(), overflowing(1e8)]
    half = Predictor(models, device="cpu", engine="torch", precision=torch.float16)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(half, [noise_volume(SHAPE)] * 6))
    assert [member.precision for member in half.members] == [torch.float16, torch.float32]
    assert caplog.text.count("overflow float16") == 1
    expected = half(noise_volume(SHAPE)).labels.data
    for each in found:
        assert_array_equal(each.labels.data, expected)


def test_only_the_windows_of_the_last_slab_need_overflow() -> None:
    model = overflowing(1e3)
    volume = noise_volume((8, 8, 40))
    volume.data[:, :, 30:] *= 1e5
    exact = Predictor(model, device="cpu", engine="torch")(volume)
    half = Predictor(model, device="cpu", engine="torch", precision=torch.float16)
    assert_array_equal(half(volume).labels.data, exact.labels.data)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["heads.0.bias", "presence.classify.bias"])
def test_outputs_that_are_not_finite_in_float32_are_an_error(
    part: str, value: float, precision: torch.dtype
) -> None:
    model = overflowing(1.0)
    with torch.no_grad():
        unet_of(model.network).get_parameter(part)[1] = value
    predictor = Predictor(model, device="cpu", engine="torch", precision=precision)
    with pytest.raises(ModelError, match=r"test: .*contains NaN or infinity; predict in float32"):
        predictor(noise_volume(SHAPE))


def test_logits_of_windows_that_overflow_float16_are_computed_in_float32() -> None:
    model, windows = overflowing(1e6), torch.randn(3, 1, 8, 8, 8)
    exact = Predictor(model, device="cpu", engine="torch").members[0].logits(windows)
    half = Predictor(model, device="cpu", engine="torch", precision=torch.float16).members[0]
    assert torch.equal(half.logits(windows), exact) and exact.isfinite().all()


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_a_validation_in_float16_has_the_labels_of_float32_where_it_overflows(
    factor: float,
) -> None:
    network = overflowing(factor).network.eval()
    image = torch.from_numpy(noise_volume(SHAPE).data[None])
    exact = segment_prepared(network, image, patch_size=(8, 8, 8))
    with torch.autocast("cpu", dtype=torch.float16):
        found = segment_prepared(network, image, patch_size=(8, 8, 8))
    assert (found == exact).double().mean() > (0.99 if factor == 1 else 0.9999)


def test_a_validation_on_a_cpu_computes_in_the_precision_of_the_training() -> None:
    network = headed_model().network.eval()
    image = torch.from_numpy(noise_volume(SHAPE).data[None])
    kinds = set()
    unet_of(network).heads[0].register_forward_hook(lambda *each: kinds.add(each[2].dtype))
    labels = []
    for half in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            labels.append(segment_prepared(network, image, patch_size=(8, 8, 8)))
    assert kinds == {torch.float32, torch.bfloat16}
    assert (labels[0] == labels[1]).double().mean() > 0.98
