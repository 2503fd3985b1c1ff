"""Laws of a training's parts: what is replaced is used, is told by the run, and resumes with it."""

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor, nn

from segkit.config.load import load_config
from segkit.config.network import NetworkConfig
from segkit.data.prepared_cache import StoredCase
from segkit.errors import ConfigError, ModelError
from segkit.io.safe_text import read_json_object
from segkit.model.folder import described_model, load_model, save_model
from segkit.nn.network import weights_of
from segkit.training.fit import fit, train
from segkit.training.parts import Augmentation, TrainingParts, prepare
from segkit.training.resume import resume
from tests.small import small_config, small_dataset
from tests.training.test_module import Rates
from tests.training.test_resume import StopAfter, StoppedError

PLAIN: dict[str, object] = {"channels": [4, 8], "attention": {}}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


def parts_of(dataset: Path, runs: Path, **sections: dict[str, object]) -> TrainingParts:
    return prepare(small_config(dataset, **sections), runs=runs)


def initial(parts: TrainingParts) -> dict[str, Tensor]:
    assert isinstance(parts.network, nn.Module)
    return copy.deepcopy(dict(parts.network.state_dict()))


def saved(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "weights.safetensors")


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def no_loss(levels: Sequence[Tensor], label: Tensor) -> Tensor:
    """Whose gradient is zero everywhere."""
    return torch.stack([0 * level.sum() for level in levels]).sum()


def test_prepare_makes_no_run_and_train_equals_fit_after_prepare(
    dataset: Path, tmp_path: Path
) -> None:
    parts = parts_of(dataset, tmp_path)
    assert parts.replaced == [] and [path.name for path in tmp_path.iterdir()] == [".cache"]
    fitted = fit(parts, runs=tmp_path)
    trained = train(small_config(dataset), runs=str(tmp_path))
    assert [run.folder.name for run in (fitted, trained)] == ["small", "small-2"]
    assert same(saved(fitted.folder), saved(trained.folder))
    assert load_config(fitted.folder / "config.yaml").replaced == []


def test_the_same_parts_can_be_fitted_again(dataset: Path, tmp_path: Path) -> None:
    parts = parts_of(dataset, tmp_path)
    before = initial(parts)
    first, second = fit(parts, runs=tmp_path), fit(parts, runs=tmp_path)
    assert same(initial(parts), before) and same(saved(first.folder), saved(second.folder))
    assert not same(saved(first.folder), before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_a_loss_without_a_gradient_leaves_only_weight_decay(
    decay: float, dataset: Path, tmp_path: Path
) -> None:
    """By the product of 1 - rate · decay over the steps, as AdamW takes it off by itself."""
    parts = parts_of(dataset, tmp_path, train={"weight_decay": decay})
    before = initial(parts)
    rates = Rates()
    run = fit(replace(parts, loss=no_loss), runs=tmp_path, callbacks=[rates])
    left = float(np.prod([1 - rate * decay for rate in rates.values]))
    assert len(rates.values) == 4 and (left == 1) == (decay == 0)
    for key, value in saved(run.folder).items():
        torch.testing.assert_close(value, left * before[key])
    assert load_config(run.folder / "config.yaml").replaced == ["loss"]


def test_a_loss_is_given_every_supervised_level_finest_first_and_the_label(
    dataset: Path, tmp_path: Path
) -> None:
    seen: list[list[tuple[int, ...]]] = []

    def watched(levels: Sequence[Tensor], label: Tensor) -> Tensor:
        seen.append([*(tuple(level.shape) for level in levels), tuple(label.shape)])
        return no_loss(levels, label)

    parts = parts_of(dataset, tmp_path, train={"steps": 1}, network={"channels": [4, 8, 8, 8]})
    fit(replace(parts, loss=watched), runs=tmp_path)
    assert seen == [[(2, 2, 16, 16, 16), (2, 2, 8, 8, 8), (2, 16, 16, 16)]]


def test_a_replaced_optimiser_takes_the_steps(dataset: Path, tmp_path: Path) -> None:
    parts = parts_of(dataset, tmp_path, train={"steps": 1, "gradient_clip": 1e9})
    before, found = initial(parts), {}

    def sign_descent(parameters: Any) -> torch.optim.Optimizer:
        made = torch.optim.SGD(parameters, lr=0.5)
        found["made"] = made
        return made

    def still(optimiser: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimiser, factor=1.0)

    def slope(levels: Sequence[Tensor], label: Tensor) -> Tensor:
        return levels[0][:, 1].mean()

    changed = replace(parts, optimiser=sign_descent, schedule=still, loss=slope)
    after = saved(fit(changed, runs=tmp_path).folder)
    # The logit of class 1 is its features plus its bias: of slope 1 in that, 0 in the other's.
    step = after["heads.0.bias"] - before["heads.0.bias"]
    torch.testing.assert_close(step, torch.tensor([0.0, -0.5]))
    assert isinstance(found["made"], torch.optim.SGD)


def test_patches_come_from_where_a_replaced_sampler_says(dataset: Path, tmp_path: Path) -> None:
    asked: list[int] = []
    seen: list[Tensor] = []

    def corner(
        cases: Sequence[StoredCase], index: int, random: np.random.Generator
    ) -> tuple[StoredCase, Sequence[int]]:
        asked.append(index)
        return cases[1], (4, 4, 4)

    def kept(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        seen.append(image)
        return image, label

    parts = parts_of(dataset, tmp_path, data={"patch_size": [8, 8, 8]}, network=PLAIN)
    run = fit(replace(parts, sampler=corner, augmentation=Augmentation(kept)), runs=tmp_path)
    assert asked == list(range(8))  # four batches of two
    expected = torch.from_numpy(parts.cases[1].image[:, :8, :8, :8].astype(np.float32))
    assert all(torch.equal(patch, expected) for batch in seen for patch in batch)
    assert load_config(run.folder / "config.yaml").replaced == ["augmentation", "sampler"]


def test_an_identity_for_augmentation_is_training_without_any(
    dataset: Path, tmp_path: Path
) -> None:
    plain = fit(parts_of(dataset, tmp_path, data={"augment": False}), runs=tmp_path)
    parts = parts_of(dataset, tmp_path)
    assert parts.augmentation.margin == (2, 2, 2)
    identity = Augmentation(lambda image, label, generator: (image, label))
    assert identity.margin == (0, 0, 0)
    run = fit(replace(parts, augmentation=identity), runs=tmp_path)
    assert same(saved(run.folder), saved(plain.folder))


def test_a_replaced_score_is_logged_by_its_name_and_decides_which_checkpoint_is_best(
    dataset: Path, tmp_path: Path
) -> None:
    values = iter([0.25, 0.5])

    def told(prediction: Tensor, label: Tensor) -> Tensor:
        assert prediction.shape == label.shape == (16, 16, 16)
        return torch.tensor([next(values)])

    parts = parts_of(dataset, tmp_path)
    scored = replace(parts.validation, score=told, measure="agreement")
    run = fit(replace(parts, validation=scored), runs=tmp_path)
    assert run.summary["validation"]["best_mean_agreement_during_training"] == 0.5
    assert "validation/agreement_ball" in (run.folder / "metrics.csv").read_text()
    assert torch.load(run.folder / "best.ckpt", weights_only=True)["global_step"] == 4


def test_a_replaced_network_is_trained_itself_and_must_be_what_the_config_says(
    dataset: Path, tmp_path: Path
) -> None:
    parts, others = parts_of(dataset, tmp_path), parts_of(dataset, tmp_path, train={"seed": 9})
    before = initial(others)
    run = fit(replace(parts, network=others.network), runs=tmp_path)
    assert not same(initial(others), before) and same(initial(others), saved(run.folder))
    assert same(dict(weights_of(load_model(run.folder).network).state_dict()), saved(run.folder))
    wide = parts_of(dataset, tmp_path, network={"channels": [4, 8, 16]})
    with pytest.raises(ModelError, match=r"the weights of parts\.network do not fit the network"):
        fit(replace(parts, network=wide.network), runs=tmp_path / "none")
    with pytest.raises(ModelError, match=r"described as a U-Net.*set network\.given\.multiple"):
        fit(replace(parts, network=nn.Conv3d(1, 2, 1)), runs=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_part_that_others_were_made_from_cannot_be_replaced_alone(
    dataset: Path, tmp_path: Path
) -> None:
    parts = parts_of(dataset, tmp_path)
    other = parts.config.model_copy(update={"name": "other"})
    with pytest.raises(ConfigError, match=r"^parts\.config was replaced, .*; change the config"):
        fit(replace(parts, config=other), runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_a_network_is_not_replaced_by_one_that_start_from_does_not_reach(
    dataset: Path, tmp_path: Path
) -> None:
    parts = parts_of(dataset, tmp_path)
    lent = train(small_config(dataset, train={"steps": 1}), runs=tmp_path).folder
    began = parts_of(dataset, tmp_path, train={"start_from": str(lent)})
    with pytest.raises(
        ConfigError, match=r"^parts\.network was replaced, but train\.start_from has"
    ):
        fit(replace(began, network=parts.network), runs=tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_module_from_python_begins_with_the_weights_of_another_run(
    dataset: Path, tmp_path: Path
) -> None:
    given = {"given": {"multiple": [1, 1, 1]}}
    first = small_config(dataset).model_copy(
        update={"network": NetworkConfig.model_validate(given)}
    )
    lent, own = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(1, 2, 3, padding=1)
    parts = prepare(first, runs=tmp_path, network=lent)
    save_model(tmp_path / "lent", described_model(parts.description, lent))
    settings = first.train.model_copy(update={"start_from": tmp_path / "lent"})
    began = prepare(first.model_copy(update={"train": settings}), runs=tmp_path, network=own)
    assert torch.equal(own.weight, lent.weight) and torch.equal(own.bias, lent.bias)
    assert began.taken_over is not None and began.taken_over.copied == 2


# Of a run whose parts were replaced


def doubled(loss: Any, levels: Sequence[Tensor], label: Tensor) -> Tensor:
    return 2 * loss(levels, label)


def with_doubled_loss(parts: TrainingParts) -> TrainingParts:
    return replace(parts, loss=partial(doubled, parts.loss))


@pytest.fixture(scope="module")
def stopped(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with another loss that was stopped after its third step of four."""
    runs = tmp_path_factory.mktemp("stopped")
    with pytest.raises(StoppedError):
        fit(with_doubled_loss(parts_of(dataset, runs)), runs=runs, callbacks=[StopAfter(3)])
    return runs / "small"


def test_without_its_parts_such_a_run_is_refused_in_one_sentence(
    dataset: Path, stopped: Path, tmp_path: Path
) -> None:
    sentence = r"^small: was trained with parts replaced from Python \(loss\), .*; replace the same"
    with pytest.raises(ConfigError, match=sentence):
        resume(stopped)
    config = load_config(stopped / "config.yaml")
    assert config.replaced == ["loss"]
    for attempt in (train, lambda config, runs: fit(prepare(config, runs=runs), runs=runs)):
        with pytest.raises(ConfigError, match=sentence):
            attempt(config, runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_parts_that_are_not_those_of_the_run_are_refused(dataset: Path, stopped: Path) -> None:
    config = load_config(stopped / "config.yaml")
    parts = with_doubled_loss(prepare(config, runs=stopped.parent))
    more = replace(parts, augmentation=Augmentation(parts.augmentation.vary, (2, 2, 2)))
    with pytest.raises(ConfigError, match=r"replaced \(loss\), found augmentation, loss; repla"):
        resume(stopped, more)
    other = load_config(stopped / "config.yaml", ["train.seed=6"])
    with pytest.raises(ConfigError, match=r"train\.seed was changed from 0 to 6, but the earlier"):
        resume(stopped, with_doubled_loss(prepare(other, runs=stopped.parent)))


def test_resumed_with_the_same_parts_it_ends_with_the_weights_of_one_never_stopped(
    dataset: Path, stopped: Path, tmp_path: Path
) -> None:
    whole = fit(with_doubled_loss(parts_of(dataset, tmp_path)), runs=tmp_path)
    config = load_config(stopped / "config.yaml")
    run = resume(str(stopped), with_doubled_loss(prepare(config, runs=stopped.parent)))
    assert run.summary["steps"] == 4
    assert same(saved(run.folder), saved(whole.folder))
    assert run.summary["validation"] == whole.summary["validation"]


def test_the_split_of_a_run_lies_in_its_folder_by_name(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset, train={"steps": 1}), runs=tmp_path)
    told = read_json_object(run.folder / "split.json")
    assert len(told["train"]) == 3 and len(told["held_out"]) == 1
    assert sorted([*told["train"], *told["held_out"]]) == [f"case_{n}" for n in range(4)]
    assert load_config(run.folder / "config.yaml").data.validation == told["held_out"]
