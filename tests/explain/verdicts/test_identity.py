"""Laws of attention blocks as the identity, on blocks whose worth is known."""

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from segkit.config.network import NetworkConfig
from segkit.errors import ModelError, VolumeError
from segkit.explain.verdicts.ablation import Ablation
from segkit.explain.verdicts.identity import (
    EVERY_BLOCK,
    check_blocks,
    judge_attention,
    judge_blocks,
)
from segkit.inference.predictor import Predictor
from segkit.model.folder import Model, described_model
from segkit.nn.attention_blocks import attention_share
from tests.explain.heads.test_study import attending_model, noise_case
from tests.models import description
from tests.planted import planted_case


class AttentionBlock(nn.Module):
    """x + W x of a W that is given."""

    def __init__(self, matrix: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.mix = nn.Conv3d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.mix.weight.copy_(torch.tensor(matrix).view(3, 3, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x)


class Foreign(nn.Module):
    """A ball is the first channel less the second, which only one block subtracts."""

    def __init__(self) -> None:
        super().__init__()
        self.useful = AttentionBlock([[0, -1, 0], [0, 0, 0], [0, 0, 0]])
        self.idle = AttentionBlock([[0, 0, 0]] * 3)
        self.scale = nn.Parameter(torch.tensor(10.0))

    def forward(self, image: Tensor) -> Tensor:
        logit = self.scale * (self.idle(self.useful(image))[:, :1] - 0.5)
        return torch.cat([-logit, logit], dim=1)


def foreign() -> Predictor:
    network = NetworkConfig.model_validate({"given": {"multiple": [1, 1, 1], "name": "planted"}})
    told = description(channels=3, spacing=(1.0, 1.0, 1.0), network=network)
    return Predictor(described_model(told, Foreign().eval()), device="cpu", engine="torch")


def test_a_planted_block_that_matters_is_found_and_an_idle_one_too() -> None:
    predictor = foreign()
    cases = [planted_case(seed) for seed in range(12)]
    study = judge_attention(predictor, [(case.volume, case.reference) for case in cases])
    useful, idle, both = study.verdicts
    assert (useful.block, idle.block, both.block) == ("useful", "idle", EVERY_BLOCK)
    assert (useful.word, idle.word, both.word) == ("needed", "not needed", "needed")
    assert useful.dice == idle.dice == 1 and idle.dice_lost == 0 and idle.low == idle.high == 0
    assert useful.dice_lost == both.dice_lost > 0.3
    assert useful.low < useful.dice_lost < useful.high
    assert useful.scans == useful.scans_where_it_matters == 12 and idle.scans_where_it_matters == 0
    assert "Over 12 scans, the network needs it: Dice 1.000, and 0." in useful.reason
    # 9 weights a block, and one scale; 3 x 3 products a block and voxel, of 8 x 8 x 8.
    assert (study.share.parameters, study.share.parameters_outside) == (19, 1)
    assert (study.share.multiply_adds, study.share.multiply_adds_outside) == (18 * 512, 0)
    assert "outside attention: 1 of 19 parameters (5.3%)" in study.said()
    assert study.to_json()["verdicts"][0]["word"] == "needed"
    # As it was.
    assert judge_attention(predictor, [(cases[0].volume, None)]).verdicts[0].dice == 1


def test_blocks_can_be_named_and_one_block_alone_has_no_row_for_all() -> None:
    case = planted_case()
    study = judge_attention(foreign(), [(case.volume, case.reference)], blocks=["idle"])
    (verdict,) = study.verdicts
    assert (verdict.block, verdict.word, verdict.dice_lost) == ("idle", "cannot tell", 0)
    assert math.isnan(verdict.low) and study.blocks == ("idle",)
    assert study.share.parameters_outside == 10
    assert [(row.case, row.map, row.operation) for row in study.ablations] == [
        ("case 0", "idle", "identity")
    ] * 2


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_segkits_own_blocks_are_those_of_their_maps(spatial_dims: int) -> None:
    model: Model = attending_model(
        spatial_dims=spatial_dims,  # type: ignore[arg-type]
        skip="additive_grid",
        encoder="sse",
        bottleneck="self_attention",
    )
    predictor, case = Predictor(model, device="cpu"), noise_case(8, 8, 8)
    study = judge_attention(predictor, [(case.volume, None)])
    expected = ["encoder.0", "encoder.1", "encoder.2", "bottleneck", "skip.1"]
    assert list(study.blocks) == expected
    assert [one.block for one in study.verdicts] == [*expected, EVERY_BLOCK]
    assert all(one.word is None and one.dice == 1 for one in study.verdicts)
    assert study.verdicts[-1].dice_without < 1
    patch = torch.zeros(1, 1, *model.description.volume_patch)
    assert study.share == attention_share(model.network, patch)


def test_a_module_that_cannot_be_the_identity_is_refused() -> None:
    predictor = foreign()
    for blocks, reason in (
        (["nothing"], "no attention block 'nothing'"),
        ([], "expected the names of attention blocks"),
    ):
        with pytest.raises(ModelError, match=reason):
            check_blocks(predictor, blocks)
    with pytest.raises(ModelError, match="expected a model with attention blocks"):
        check_blocks(Predictor(attending_model(), device="cpu"))
    wider = foreign()
    wider.model.network.module.useful.mix = nn.Sequential(nn.Conv3d(3, 4, 1), nn.Conv3d(4, 3, 1))
    with pytest.raises(ModelError, match=r"useful\.mix\.0: expected a module.*found \(1, 4, 8, 8"):
        check_blocks(wider, ["useful.mix.0"])
    assert check_blocks(wider, ["useful.mix"]) == ("useful.mix",)
    case = planted_case()
    with pytest.raises(VolumeError, match="reference"):
        judge_attention(predictor, [(case.volume, case.reference.like(case.reference.data + 4))])


def rows_of(block: str, falls: Sequence[float]) -> list[Ablation]:
    return [
        Ablation(f"case {n}", block, "identity", None, "reference", 0.9, 0.9 - fall, -fall)
        for n, fall in enumerate(falls)
    ]


@pytest.mark.parametrize(
    ("falls", "word"),
    [
        ([0.05, 0.04, 0.06, 0.03, 0.08, 0.07], "needed"),
        ([0.05, 0.04, 0.06, 0.03, 0.08], "cannot tell"),  # p is 1/32 at least, in each direction
        ([0.002, -0.001, 0.003, 0, 0.001, -0.002, 0.004, 0.001], "not needed"),
        ([0.002, -0.001, 0.003, 0, 0.001, -0.002, 0.004], "cannot tell"),  # (2/3)^7 is above 0.05
        ([0.0] * 6 + [0.02] * 3, "cannot tell"),  # it matters in a third
        ([-0.05, -0.04, -0.06, -0.03, -0.08, -0.07], "harmful"),
        ([-0.008] * 12, "not needed"),
    ],
)
def test_a_word_follows_from_the_falls(falls: list[float], word: str) -> None:
    (verdict,) = judge_blocks(rows_of("bottleneck", falls))
    assert verdict.word == word
    assert verdict.dice_lost == pytest.approx(sum(falls) / len(falls))


def test_many_blocks_need_more_scans() -> None:
    falls = [0.05, 0.04, 0.06, 0.03, 0.08, 0.07]
    rows = [row for n in range(5) for row in rows_of(f"block {n}", falls)]
    # Each p is 1/64, times 10 by Holm: five blocks, each in two directions.
    assert {verdict.word for verdict in judge_blocks(rows)} == {"cannot tell"}
    assert judge_blocks(rows)[0].p_needed == pytest.approx(10 / 64)


def test_pairs_that_are_missing_are_refused() -> None:
    case = planted_case()
    pair = (case.volume, case.reference)
    for pairs in ([], iter([])):
        with pytest.raises(VolumeError, match="expected pairs of a scan and its reference, found"):
            judge_attention(foreign(), pairs)
    for pairs in ([pair], iter([pair])):
        with pytest.raises(VolumeError, match="unlabelled has the index 7, but there are only 1 p"):
            judge_attention(foreign(), pairs, unlabelled={7: ["two"]})
    with pytest.raises(VolumeError, match=r"expected a pair .* found str; pass \[\(scan"):
        judge_attention(foreign(), {"one": pair})  # type: ignore[arg-type]
