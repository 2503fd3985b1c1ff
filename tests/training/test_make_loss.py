from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from segkit import ConfigError, fit, load_config, prepare
from segkit.config.loss import ADDED, LossConfig, TermName
from segkit.nn.losses import SummedLoss
from segkit.training.make_loss import make_loss
from segkit.training.resume import resume
from tests.models import description
from tests.nn.test_loss_terms import EVERY
from tests.nn.test_losses import example
from tests.pretended_device import pretended
from tests.small import small_config, small_dataset

TERMS: Sequence[TermName] = tuple(EVERY)  # type: ignore[arg-type]


THREE = description(classes=3, spacing=(1.0, 1.0, 1.0))


def config(name: TermName, **changes: object) -> LossConfig:
    beside = {"dice": 1.0} if name in ADDED else {}
    return LossConfig.model_validate({"terms": {name: 1.0, **beside}, **changes})


@pytest.mark.parametrize("name", TERMS)
def test_a_config_gives_the_term_that_it_names(name: TermName) -> None:
    logits, label = example((6, 5, 4))
    settings = {"top_share": 0.2, "boundary_reach": 3, "centre_line_iterations": 3}
    loss = make_loss(
        config(name, class_weights={"label 2": 2.0}, level_weights=[3.0, 1.0], **settings),
        THREE,
        pool_batch=True,
    )
    assert isinstance(loss, SummedLoss) and loss.levels == (0.75, 0.25)
    added = ((1.0, EVERY["dice"]),) if name in ADDED else ()
    expected = SummedLoss(
        ((1.0, EVERY[name]), *added),
        weights=(1.0, 1.0, 2.0),
        spacing=loss.spacing,
        levels=(3.0, 1.0),
        pool_batch=True,
    )
    levels = [logits, logits[..., ::2]]
    assert_close(loss(levels, label), expected(levels, label) / 4)


def test_dice_and_cross_entropy_are_the_default_to_the_bit() -> None:
    logits, label = example((6, 5, 4))
    plain = make_loss(LossConfig(), THREE, pool_batch=False)
    assert not isinstance(plain, SummedLoss)
    weighted = make_loss(
        LossConfig(level_weights=[1.0]),
        THREE,
        pool_batch=False,
    )
    assert_close(plain([logits], label), weighted([logits], label))


def test_every_term_waits_for_nothing() -> None:
    logits, label = example((8, 8, 4))
    losses = [SummedLoss(((1.0, term),), (1.0, 2.0, 3.0), ignore=2) for term in EVERY.values()]
    with pretended() as device:
        levels = [device.put(logits), device.put(logits[..., ::2].contiguous())]
        held = device.put(label.to(torch.uint8))
        for loss in losses:
            loss(levels, held)
    assert not device.waits and not device.mismatches


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"terms": {"boundary": 1.0}}, "must include a term that counts voxels"),
        ({"terms": {}}, "terms"),
        ({"level_weights": [0.0, 0.0]}, "first of level_weights must be above 0, found 0"),
        ({"level_weights": [0.0, 1.0]}, "first of level_weights must be above 0, found 0"),
        ({"false_positives": 0.0, "false_negatives": 0.0}, "are both 0"),
    ],
)
def test_a_loss_that_trains_nothing_is_refused(changes: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        LossConfig.model_validate(changes)


def test_names_of_classes_and_numbers_of_levels_must_be_those_of_the_model(
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="has 'liver', which is not one of label 0"):
        make_loss(LossConfig(class_weights={"liver": 2.0}), THREE, pool_batch=False)
    data = small_dataset(tmp_path / "data")
    small = small_config(data, train={"loss": {"level_weights": [1.0] * 4}})
    with pytest.raises(ConfigError, match="has 4 numbers, but the network supervises"):
        prepare(small, runs=tmp_path / "runs")
    assert not list((tmp_path / "runs").glob("[!.]*"))


REGIONS = THREE.model_copy(
    update={"labels": {"background": 0, "whole": 1}, "regions": {"whole": [1]}}
)


@pytest.mark.parametrize("weighted", ["label 0", "label 1", "whole"])
@pytest.mark.parametrize("name", TERMS)
def test_a_class_weight_is_refused_exactly_if_it_does_not_change_the_loss(
    name: TermName, weighted: str
) -> None:
    described = REGIONS if weighted == "whole" else description(classes=2, spacing=(1.0, 1.0, 1.0))
    torch.manual_seed(0)
    logits = torch.randn(2, len(described.labelling.outputs), 6, 5, 4)
    label = (torch.rand(2, 6, 5, 4) < 0.3).long()
    settings = config(name, class_weights={weighted: 5.0})
    plain, changed = (
        SummedLoss(
            tuple((1.0, EVERY[term]) for term in settings.terms),
            tuple(5.0 if output == weighted and given else 1.0 for output in outputs),
            regions=tuple(tuple(group) for group in described.regions.values()),
        )([logits], label)
        for outputs in [described.labelling.outputs]
        for given in (False, True)
    )
    if torch.isclose(plain, changed, rtol=1e-6):
        with pytest.raises(ConfigError, match=rf"has 5 for '{weighted}', which has no effect"):
            make_loss(settings, described, pool_batch=False)
    else:
        make_loss(settings, described, pool_batch=False)
    make_loss(config(name, class_weights={weighted: 1.0}), described, pool_batch=False)


def test_class_weights_without_effect_are_refused_if_a_run_is_resumed(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    train = {"steps": 1, "pictures": 0, "loss": {"terms": {"dice": 1.0}}}
    run = fit(prepare(small_config(data, train=train), runs=tmp_path), runs=tmp_path)
    before = (run.folder / "config.yaml").read_text()
    changes = ["train.steps=2", "train.loss.class_weights={ball: 5}"]
    with pytest.raises(ConfigError, match="has 5 for 'ball', which has no effect"):
        resume(run.folder, overrides=changes)
    assert (run.folder / "config.yaml").read_text() == before


def test_a_run_trains_by_the_loss_that_it_was_given_and_says_so(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    loss = {"terms": {"focal": 1.0, "tversky": 2.0}, "false_negatives": 0.9}
    small = small_config(data, train={"loss": loss, "steps": 2, "validate_every": 2})
    parts = prepare(small, runs=tmp_path / "runs")
    assert isinstance(parts.loss, SummedLoss) and not parts.replaced
    run = fit(parts, runs=tmp_path / "runs")
    said = load_config(run.folder / "config.yaml").train.loss
    assert said.terms == {"focal": 1.0, "tversky": 2.0} and said.false_negatives == 0.9
