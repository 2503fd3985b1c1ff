"""A first layer is fitted to other channels by their names; what was taken over is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from segkit.config.model import FirstStageConfig, ModelDescription
from segkit.errors import ModelError
from segkit.model.build import build_network, wrap_network
from segkit.model.folder import Model, described_model, save_model
from segkit.model.start_from import FIRST_LAYERS, OUTPUTS, TakenOver, fitted_kernels, start_from
from segkit.nn.network import weights_of

KERNELS = torch.tensor([[1.0, 2.0, 6.0], [10.0, 20.0, 60.0]])[..., None, None, None]
"""Two kernels of one voxel for T1, T2 and FLAIR."""
GIVEN = ["T1", "T2", "FLAIR"]


def fitted(channels: list[str], other_channels: Any = "mean") -> tuple[Tensor, dict[str, str]]:
    own = torch.full((2, len(channels), 1, 1, 1), 5.0)
    kernels, sources = fitted_kernels(
        KERNELS, own, given_channels=GIVEN, channels=channels, other_channels=other_channels
    )
    return kernels[0].flatten(), sources


@pytest.mark.parametrize(
    ("channels", "other_channels", "expected"),
    [
        (["FLAIR", "T1"], "mean", [6, 1]),
        (["T1", "T1ce", "T2", "FLAIR"], "mean", [1, 3, 2, 6]),
        (["T1", "T1ce", "T2", "FLAIR"], "zero", [1, 0, 2, 6]),
        (["T1", "T1ce", "T2", "FLAIR"], "anew", [1, 5, 2, 6]),
        (["a", "b", "T2", "c", "d"], "copied", [1, 2, 2, 6, 1]),
        (["CT"], "mean", [3]),
        (["T2", "T1", "FLAIR"], "mean", [2, 1, 6]),  # in another order
        (["T1", "FLAIR", "T1ce"], "mean", [1, 6, 3]),  # as many, of which two are known
        (["a", "b", "c"], "zero", [1, 2, 6]),  # as many, of which none is known: in their order
    ],
)
def test_a_channel_keeps_its_kernels_by_its_name(
    channels: list[str], other_channels: str, expected: list[float]
) -> None:
    kernels, sources = fitted(channels, other_channels)
    assert kernels.tolist() == expected
    assert list(sources) == channels


def test_the_origin_of_each_kernel_is_reported() -> None:
    words = {"mean": "the mean of all", "copied": "those of T1", "zero": "zero", "anew": "new ones"}
    for other_channels, word in words.items():
        assert fitted(["FLAIR", "CT"], other_channels)[1] == {
            "FLAIR": "those of FLAIR",
            "CT": word,
        }


def description(channels: list[str], **changes: Any) -> ModelDescription:
    return ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "other",
            "channels": channels,
            "labels": {"background": 0, "ball": 1},
            "network": {"channels": [4, 8], "spatial_dims": 3},
            "spacing": [1, 1, 1],
            "normalisation": [{"kind": "zscore"}] * len(channels),
            "slices": "axial",
            "patch_size": [8, 8, 8],
            **changes,
        }
    )


def saved(folder: Path, channels: list[str], **changes: Any) -> dict[str, Tensor]:
    told = description(channels, **changes)
    save_model(folder, Model(told, build_network(told)))
    return load_file(folder / "weights.safetensors")


PLANES = {"network": {"channels": [4, 8], "spatial_dims": 2}, "patch_size": [8, 8]}
MEDNEXT = {"network": {"channels": [4, 8], "block": "mednext"}}
KINDS = {"3D": {}, "2D": PLANES, "MedNeXt": MEDNEXT}
every_kind = pytest.mark.parametrize("changes", KINDS.values(), ids=KINDS)


def first_layer_of(changes: dict[str, Any]) -> str:
    return FIRST_LAYERS[description(["T1"], **changes).network.block.kind]


@every_kind
def test_the_first_layer_is_the_only_one_that_sees_the_channels(changes: dict[str, Any]) -> None:
    one, two = (
        weights_of(build_network(description(names, **changes))).state_dict()
        for names in (["T1"], ["T1", "T2"])
    )
    assert [key for key in one if one[key].shape != two[key].shape] == [first_layer_of(changes)]


@every_kind
def test_a_network_of_more_channels_begins_with_all_of_a_model(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    lent = saved(tmp_path, ["T1", "T2"], **changes)
    told = description(["T2", "CT", "T1"], **changes)
    network = build_network(told)
    taken = start_from(network, tmp_path, description=told)
    own = weights_of(network).state_dict()
    name = first_layer_of(changes)
    first = lent[name]
    expected = torch.stack([first[:, 1], first.mean(dim=1), first[:, 0]], dim=1)
    assert torch.equal(own[name], expected)
    for key, value in lent.items():
        assert key == name or torch.equal(own[key], value)
    assert taken == TakenOver(
        str(tmp_path),
        len(own) - 1,
        len(own),
        {"T2": "those of T2", "CT": "the mean of all", "T1": "those of T1"},
    )
    assert taken.told == (
        f"{len(own) - 1} of {len(own)} weights were copied from {tmp_path}; kernels of the first "
        f"layer for T2: those of T2, CT: the mean of all, T1: those of T1"
    )


@every_kind
def test_channels_in_another_order_are_put_right(changes: dict[str, Any], tmp_path: Path) -> None:
    lent = saved(tmp_path, ["T1", "T2"], **changes)
    told = description(["T2", "T1"], **changes)
    network = build_network(told)
    start_from(network, tmp_path, description=told)
    name = first_layer_of(changes)
    found = weights_of(network).state_dict()[name]
    assert torch.equal(found, lent[name].flip(1))


def module_from(
    folder: Path, own: nn.Module, channels: list[str], labels: dict[str, int]
) -> TakenOver:
    told = description(channels, labels=labels, network=GIVEN_MODULE)
    return start_from(wrap_network(told, own), folder, description=told)


GIVEN_MODULE = {"given": {"multiple": [1, 1, 1]}}


def module(channels: int, classes: int) -> nn.Module:
    return nn.Sequential(nn.Conv3d(channels, 3, 1), nn.BatchNorm3d(3), nn.Conv3d(3, classes, 1))


def test_a_module_from_python_gets_the_weights_of_the_same_name_and_shape(tmp_path: Path) -> None:
    lent = module(1, 2)
    save_model(tmp_path, described_model(description(["T1"], network=GIVEN_MODULE), lent))
    own = module(1, 3)
    anew = {key: own.state_dict()[key].clone() for key in ("2.weight", "2.bias")}
    taken = module_from(tmp_path, own, ["T1"], {"background": 0, "a": 1, "b": 2})
    for key, value in own.state_dict().items():
        assert torch.equal(value, anew[key] if key in anew else lent.state_dict()[key]), key
    assert taken.told == (
        f"7 of 9 weights were copied from {tmp_path}; these begin anew: 2.weight, 2.bias"
    )


def test_weights_for_other_channels_and_classes_of_a_module_are_copied_and_named(
    tmp_path: Path,
) -> None:
    lent, own = module(2, 2), module(2, 2)
    save_model(tmp_path, described_model(description(["T1", "T2"], network=GIVEN_MODULE), lent))
    taken = module_from(tmp_path, own, ["T1", "CT"], {"background": 0, "lesion": 1})
    assert all(
        torch.equal(lent.state_dict()[key], own.state_dict()[key]) for key in own.state_dict()
    )
    assert (taken.copied, taken.anew) == (9, ())
    assert "also those for its channels T1, T2 and classes ball, because" in taken.told


def test_a_module_that_sees_channels_or_classes_in_another_order_is_refused(tmp_path: Path) -> None:
    labels = {"background": 0, "a": 1, "b": 2}
    told = description(["T1", "T2"], labels=labels, network=GIVEN_MODULE)
    save_model(tmp_path, described_model(told, module(2, 3)))
    with pytest.raises(ModelError, match=r"expected the channels T2, T1, found .* order T1, T2"):
        module_from(tmp_path, module(2, 3), ["T2", "T1"], labels)
    with pytest.raises(ModelError, match=r"expected the classes b, a, found .* order a, b"):
        module_from(tmp_path, module(2, 3), ["T1", "T2"], {"background": 0, "b": 1, "a": 2})


def test_a_module_that_no_weight_fits_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, ["T1"])
    with pytest.raises(
        ModelError, match=r"the module, which has weights such as 0\.weight, 0\.bia"
    ):
        module_from(tmp_path, module(1, 2), ["T1"], {"background": 0, "ball": 1})


def test_other_channels_are_refused_if_several_layers_see_them(tmp_path: Path) -> None:
    """Four channels of the image and four features: MedNeXt needs no stem."""
    channels = ["a", "b", "c", "d"]
    lent = saved(tmp_path, channels, **MEDNEXT)
    same = description(channels, **MEDNEXT)
    network = build_network(same)
    assert start_from(network, tmp_path, description=same).copied == len(lent)
    for others in (["b", "a", "c", "d"], ["a", "b", "c", "d", "e"], ["a"]):
        told = description(others, **MEDNEXT)
        with pytest.raises(ModelError, match=r"found a, b, c, d, and several layers see them"):
            start_from(build_network(told), tmp_path, description=told)


def test_labels_of_a_first_stage_keep_their_kernels_only_if_their_names_are_the_same(
    tmp_path: Path,
) -> None:
    def told(classes: list[str]) -> ModelDescription:
        stage = {"models": 1, "classes": classes}
        return description(["T1"]).model_copy(
            update={"first_stage": FirstStageConfig.model_validate(stage)}
        )

    given = told(["liver"])
    first = Model(description(["T1"], **classes("liver")), build_network(description(["T1"])))
    save_model(tmp_path, Model(given, build_network(given), (first,)))
    name = FIRST_LAYERS["convolution"]
    lent = load_file(tmp_path / "weights.safetensors")[name]
    for label, kept in (("liver", True), ("kidney", False)):
        network = build_network(told([label]))
        before = network.state_dict()[name].clone()
        start_from(network, tmp_path, description=told([label]))
        after = network.state_dict()[name]
        assert torch.equal(after[:, 0], lent[:, 0])
        assert torch.equal(after[:, 1], lent[:, 1] if kept else before[:, 1])


def test_the_same_channels_are_copied_as_they_are(tmp_path: Path) -> None:
    lent = saved(tmp_path, ["T1", "T2"])
    told = description(["T1", "T2"])
    network = build_network(told)
    taken = start_from(network, tmp_path, description=told)
    assert taken == TakenOver(str(tmp_path), len(lent), len(lent))
    for key, value in weights_of(network).state_dict().items():
        assert torch.equal(value, lent[key])


def classes(*names: str) -> dict[str, Any]:
    return {"labels": {"background": 0} | {name: n for n, name in enumerate(names, start=1)}}


def regions(*names: str) -> dict[str, Any]:
    return {**classes(*names), "regions": {name: [1] for name in names}}


POOLINGS = [{"kind": "mean"}, {"kind": "gated"}, {"kind": "learned_query"}]


def with_head(pooling: dict[str, Any]) -> dict[str, Any]:
    return {"network": {"channels": [4, 8, 8], "attention": {"head": pooling}}}


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda pooling: pooling["kind"])
def test_the_layers_of_logits_are_those_with_a_row_for_each_class(pooling: dict[str, Any]) -> None:
    two, three = (
        weights_of(build_network(description(["T1"], **labels, **with_head(pooling)))).state_dict()
        for labels in (classes("a", "b"), classes("a", "b", "c"))
    )
    depend = {key for key in two if two[key].shape != three[key].shape}
    assert depend == {key for key in two if OUTPUTS.fullmatch(key)}


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda pooling: pooling["kind"])
@pytest.mark.parametrize(
    ("other", "own"),
    [
        (classes("liver", "tumour"), classes("kidney", "cyst")),
        (classes("liver", "tumour"), classes("liver", "cyst")),
        (regions("whole", "core"), classes("whole", "core")),
        (regions("a", "b", "c"), classes("a", "b")),  # both have three rows of logits
    ],
    ids=["none", "one", "kind", "rows"],
)
def test_layers_that_compute_logits_of_other_classes_begin_anew(
    other: dict[str, Any], own: dict[str, Any], pooling: dict[str, Any], tmp_path: Path
) -> None:
    lent = saved(tmp_path, ["T1"], **other, **with_head(pooling))
    told = description(["T1"], **own, **with_head(pooling))
    network = build_network(told)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    taken = start_from(network, tmp_path, description=told)
    anew = [key for key in before if OUTPUTS.fullmatch(key)]
    assert list(taken.anew) == anew and not taken.reordered
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key] if key in anew else lent[key]), key


@pytest.mark.parametrize("pooling", POOLINGS, ids=lambda pooling: pooling["kind"])
@pytest.mark.parametrize(
    ("kind", "rows"), [(classes, [0, 2, 3, 1]), (regions, [1, 2, 0])], ids=["classes", "regions"]
)
def test_rows_of_the_same_classes_in_another_order_are_put_right(
    kind: Any, rows: list[int], pooling: dict[str, Any], tmp_path: Path
) -> None:
    lent = saved(tmp_path, ["T1"], **kind("a", "b", "c"), **with_head(pooling))
    told = description(["T1"], **kind("b", "c", "a"), **with_head(pooling))
    network = build_network(told)
    taken = start_from(network, tmp_path, description=told)
    assert taken.reordered and taken.copied == taken.of
    assert "by the names of the classes" in taken.told
    for key, value in network.state_dict().items():
        expected = lent[key]
        if key.startswith("heads."):
            expected = expected[rows]
        elif OUTPUTS.fullmatch(key):
            expected = expected[[1, 2, 0]]
        assert torch.equal(value, expected), key
