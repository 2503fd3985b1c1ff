import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Generator, Tensor, nn
from torch.utils.data import DataLoader

from segkit.config.training import TrainConfig
from segkit.nn.gates import AdditiveGridGate, HardGate
from segkit.nn.losses import (
    deep_dice_binary_cross_entropy,
    deep_dice_cross_entropy,
    presence_cross_entropy,
)
from segkit.nn.pooling import MeanPooling
from segkit.nn.slicewise import SlicewiseNetwork
from segkit.nn.unet import UNet
from segkit.training.module import SegmentationModule
from segkit.training.optimisers import make_optimiser, make_schedule
from segkit.training.validation import Validation, dice_of_groups

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*have no `val_dataloader`"),
]
Case = dict[str, Tensor]


def network() -> SlicewiseNetwork:
    torch.manual_seed(0)
    return SlicewiseNetwork(
        UNet(2, 1, out_channels=3, channels=(8, 16), deep_supervision=True), axis=2
    )


def unvaried(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
    return image, label


def as_said(network: SlicewiseNetwork, image: Tensor) -> Tensor:
    """The labels that the image itself holds."""
    return image[0].long()


def module_of(
    kind: type[SegmentationModule] = SegmentationModule,
    *,
    class_names: Sequence[str] = ("background", "near", "far"),
    optimiser: str = "adamw",
    learning_rate: float = 1e-2,
    weight_decay: float = 0.0,
    num_steps: int = 19,
    regions: Sequence[Sequence[int]] = (),
    ignore: int | None = None,
    **changes: Any,
) -> Any:
    config = TrainConfig.model_validate(
        {
            "optimiser": optimiser,
            "learning_rate": learning_rate,
            "weight_decay": weight_decay,
            "steps": num_steps,
        }
    )
    groups = regions or [(number,) for number in range(1, len(class_names))]
    arguments: dict[str, Any] = {
        "loss": (
            partial(deep_dice_binary_cross_entropy, regions=regions, pool_batch=True, ignore=ignore)
            if regions
            else partial(deep_dice_cross_entropy, pool_batch=True, ignore=ignore)
        ),
        "optimiser": make_optimiser(config),
        "schedule": make_schedule(config),
        "vary": unvaried,
        "validation": Validation(
            (), segment=as_said, score=partial(dice_of_groups, groups=groups, ignore=ignore)
        ),
        "class_names": class_names,
        "num_steps": num_steps,
        "seed": 5,
    }
    return kind(network(), **{**arguments, **changes})


def trainer_of(steps: int = -1, **changes: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **changes,
    )


def batches(count: int, size: int = 8) -> DataLoader[Case]:
    """One batch so many times: a square of each foreground class on noise."""
    generator = Generator().manual_seed(1)
    label = torch.zeros(size, size, 1, dtype=torch.uint8)
    label[1 : size // 2, 1 : size // 2] = 1
    label[size // 2 : -1, size // 2 : -1] = 2
    image = label[None].float() + 0.3 * torch.randn(1, size, size, 1, generator=generator)
    return DataLoader([{"image": image, "label": label}] * count, batch_size=1)  # type: ignore[arg-type]


class Losses(L.Callback):
    """What each training step gave."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.values.append(float(outputs["loss"]))


class Rates(L.Callback):
    """The learning rate that each step is taken at."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self.values.append(trainer.optimizers[0].param_groups[0]["lr"])


def recording(numbers: list[float]) -> Callable[..., tuple[Tensor, Tensor]]:
    """Varies nothing, and keeps the first number that each step's generator gives."""

    def vary(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        numbers.append(float(torch.rand((), generator=generator)))
        return image, label

    return vary


def numbers_of(
    steps: int, *, seed: int = 5, save: Path | None = None, resume: Path | None = None
) -> list[float]:
    numbers: list[float] = []
    trainer = trainer_of(steps)
    module = module_of(vary=recording(numbers), seed=seed)
    trainer.fit(module, batches(2), ckpt_path=resume, weights_only=False)
    if save is not None:
        trainer.save_checkpoint(save)
    return numbers


def test_every_step_is_varied_anew_and_a_step_always_alike(tmp_path: Path) -> None:
    numbers = numbers_of(4)
    assert len(set(numbers)) == 4
    assert numbers_of(4) == numbers
    assert not set(numbers_of(4, seed=6)) & set(numbers)
    assert numbers_of(2, save=tmp_path / "half.ckpt") == numbers[:2]
    assert numbers_of(4, resume=tmp_path / "half.ckpt") == numbers[2:]


def test_patches_are_varied_in_full_precision() -> None:
    """Sampling grids in bfloat16 would miss by part of a voxel."""
    autocast: list[bool] = []

    def vary(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        autocast.append(torch.is_autocast_enabled("cpu"))
        return image, label

    trainer_of(1, precision="bf16-mixed").fit(module_of(vary=vary), batches(1))
    assert autocast == [False]


def rates_of(steps: int, **changes: Any) -> list[float]:
    """The rate of each step, and the one that a step after the last would have."""
    rates = Rates()
    trainer = trainer_of(steps, callbacks=[rates])
    trainer.fit(module_of(num_steps=steps, **changes), batches(2))
    return [*rates.values, trainer.optimizers[0].param_groups[0]["lr"]]


def test_adamw_follows_one_cycle() -> None:
    """From lr / 25 up to lr at 30 % and down to lr / 250,000."""
    rates = rates_of(19, optimiser="adamw", learning_rate=2e-3)
    assert len(rates) == 20
    assert rates[0] == pytest.approx(2e-3 / 25)
    assert rates[5] == pytest.approx(2e-3) == max(rates)  # 0.3 of 20 points, less the first
    assert rates[-1] == pytest.approx(2e-3 / 25 / 1e4)
    assert rates[:6] == sorted(rates[:6]) and rates[5:] == sorted(rates[5:], reverse=True)


def test_sgd_follows_a_polynomial() -> None:
    rates = rates_of(10, optimiser="sgd", learning_rate=1e-2)
    assert rates == pytest.approx([1e-2 * (1 - step / 10) ** 0.9 for step in range(11)])


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("adamw", torch.optim.AdamW, {"weight_decay": 0.03}),
        ("sgd", torch.optim.SGD, {"weight_decay": 0.03, "momentum": 0.99, "nesterov": True}),
    ],
)
def test_an_optimiser_has_every_parameter_once(
    name: str, kind: type, expected: Mapping[str, Any]
) -> None:
    module = module_of(optimiser=name, weight_decay=0.03)
    (optimiser,), _ = module.configure_optimizers()
    (group,) = optimiser.param_groups
    assert isinstance(optimiser, kind)
    assert {key: group[key] for key in expected} == expected
    assert [id(p) for p in group["params"]] == [id(p) for p in module.network.parameters()]


def held_out(prediction: list[int], reference: list[int]) -> Case:
    return {
        "image": torch.tensor(prediction, dtype=torch.float32).view(1, -1, 1, 1),
        "label": torch.tensor(reference, dtype=torch.uint8).view(-1, 1, 1),
    }


def validated(module: SegmentationModule, cases: list[Case]) -> dict[str, float]:
    loader: DataLoader[Case] = DataLoader(cases, batch_size=None)  # type: ignore[arg-type]
    trainer = trainer_of()
    trainer.validate(module, loader, verbose=False)
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def test_dice_is_averaged_over_cases_and_then_classes_without_undefined_ones() -> None:
    module = module_of(class_names=("background", "a", "b", "c"))
    cases = [
        # a: 2·1 / (2 + 1) = 2/3; b is in neither
        held_out([1, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0]),
        # a is in one only: 0; b: 2·2 / (3 + 2) = 4/5
        held_out([1, 2, 2, 2, 0, 0], [0, 2, 2, 0, 0, 0]),
        # a: 1; b is in neither
        held_out([1, 1, 1, 0, 0, 0], [1, 1, 1, 0, 0, 0]),
    ]
    for _ in range(2):  # nothing is carried over to the next validation
        scores = validated(module, cases)
        assert scores["validation/dice_a"] == pytest.approx((2 / 3 + 0 + 1) / 3)
        assert scores["validation/dice_b"] == pytest.approx(4 / 5)
        assert "validation/dice_c" not in scores  # in no case at all
        assert scores["validation/dice"] == pytest.approx((5 / 9 + 4 / 5) / 2)


def test_the_dice_of_a_region_is_that_of_all_its_labels_if_nothing_is_ignored() -> None:
    module = module_of(
        class_names=("background", "whole", "core"), regions=((1, 2), (2,)), ignore=3
    )
    # Of the first five voxels: whole 2·3 / (4 + 3), core 2·1 / (2 + 2).
    scores = validated(module, [held_out([1, 1, 2, 2, 0, 2], [1, 2, 2, 0, 0, 3])])
    assert scores["validation/dice_whole"] == pytest.approx(6 / 7)
    assert scores["validation/dice_core"] == pytest.approx(1 / 2)


class Idle(SegmentationModule):
    """One process of several, to which no case fell."""

    def validation_step(self, case: Mapping[str, Tensor], batch_index: int) -> None:
        pass


def test_a_process_without_a_case_still_counts_every_class() -> None:
    scores = validated(module_of(Idle), [held_out([1], [1])])
    assert scores == {"validation/dice": 1}


def test_a_correct_empty_prediction_has_the_best_score() -> None:
    nothing, something = held_out([0, 0], [0, 0]), held_out([0, 1], [0, 0])
    assert validated(module_of(), [nothing, nothing]) == {"validation/dice": 1}
    assert validated(module_of(), [nothing, something]) == {
        "validation/dice": 0,
        "validation/dice_near": 0,
    }


def test_the_loss_is_that_of_the_varied_batch() -> None:
    """A batch that is varied to hold other labels is trained on with those."""

    def blank(image: Tensor, label: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        return image, torch.zeros_like(label)

    first, other = Losses(), Losses()
    trainer_of(1, callbacks=[first]).fit(module_of(), batches(1))
    trainer_of(1, callbacks=[other]).fit(module_of(vary=blank), batches(1))
    assert abs(first.values[0] - other.values[0]) > 0.05


def test_training_can_overfit_one_patch() -> None:
    losses = Losses()
    module = module_of(num_steps=60, learning_rate=2e-2)
    trainer_of(60, callbacks=[losses]).fit(module, batches(60, size=16))
    assert losses.values[0] > 0.8
    assert losses.values[-1] < 0.1

    batch = next(iter(batches(1, size=16)))
    with torch.no_grad():
        labels = module.network(batch["image"]).argmax(1)
    assert (labels == batch["label"]).float().mean() > 0.98


def with_head() -> SlicewiseNetwork:
    """The network of the other tests, and a head for its two foreground classes."""
    torch.manual_seed(0)
    unet = UNet(
        2,
        1,
        out_channels=3,
        channels=(8, 16),
        deep_supervision=True,
        presence_head=lambda channels: MeanPooling(channels, num_classes=2),
    )
    return SlicewiseNetwork(unet, axis=2)


def trained(
    network: SlicewiseNetwork, steps: int = 1, *more: L.Callback, **changes: Any
) -> tuple[list[float], Mapping[str, Tensor]]:
    """The loss of each step of a network's training, and what was logged last."""
    losses = Losses()
    module = module_of(**changes)
    module.network = network
    trainer = trainer_of(steps, callbacks=[losses, *more])
    trainer.fit(module, batches(steps))
    return losses.values, trainer.callback_metrics


@pytest.mark.parametrize("weight", [0.0, 0.1, 2.0])
def test_the_loss_is_that_of_segmentation_plus_the_weighted_one_of_presence(weight: float) -> None:
    network = with_head()
    batch = next(iter(batches(1)))
    levels, logits = network.supervised(batch["image"])
    segmentation = deep_dice_cross_entropy(levels, batch["label"], pool_batch=True).item()
    assert logits is not None
    presence = presence_cross_entropy(logits, batch["label"]).item()
    assert presence > 0.1
    (loss,), logged = trained(network, presence_weight=weight)
    assert loss == pytest.approx(segmentation + weight * presence, rel=1e-6)
    assert logged["train/loss"].item() == pytest.approx(loss)
    assert logged["train/presence_loss"].item() == pytest.approx(presence, rel=1e-6)


def test_the_presence_loss_trains_the_presence_head() -> None:
    for weight in (0.0, 0.5):
        network = with_head()
        assert isinstance(network.presence, MeanPooling)
        classify = network.presence.classify
        before = {name: value.clone() for name, value in classify.state_dict().items()}
        trained(network, presence_weight=weight)
        for name, value in classify.state_dict().items():
            # Both classes are there, so that both of their logits are too low.
            assert torch.equal(value, before[name]) == (weight == 0)
        assert (classify.bias > before["bias"]).all() == (weight > 0)


def test_a_network_without_a_head_has_no_loss_of_presence() -> None:
    expected, logged = trained(network(), 3)
    assert trained(network(), 3, presence_weight=5.0)[0] == expected
    assert "train/loss" in logged and "train/presence_loss" not in logged


def hard_gated() -> SlicewiseNetwork:
    """A network whose gates are open or shut with equal probability."""

    def make(
        *,
        level: int,
        skip_channels: int,
        coarse_channels: int,
        upsampled_channels: int,
        stride: Sequence[int],
        deepest: bool,
    ) -> nn.Module:
        return AdditiveGridGate(
            2,
            skip_channels=skip_channels,
            signal_channels=coarse_channels,
            stride=stride,
            deepest=deepest,
            initial_bias=0.0,
            coefficients="hard",
        )

    torch.manual_seed(0)
    return SlicewiseNetwork(UNet(2, 1, out_channels=3, channels=(8, 16), skip_gate=make), axis=2)


class Unsettled(L.Callback):
    """Puts the global generator into another state before training and before each step."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, *_: Any) -> None:
        torch.manual_seed(self.seed)
        self.seed += 1


def test_the_noise_of_hard_gates_depends_only_on_the_seed_and_the_step() -> None:
    # So slow that the weights stay as they are: whatever changes is noise.
    still = {"optimiser": "sgd", "learning_rate": 1e-12}
    losses, _ = trained(hard_gated(), 4, **still)
    assert len(set(losses)) == 4
    for global_seed in (1, 2):
        assert trained(hard_gated(), 4, Unsettled(global_seed), **still)[0] == losses
    assert not set(trained(hard_gated(), 4, seed=6, **still)[0]) & set(losses)


class Temperatures(L.Callback):
    """The temperature that each step was taken at."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        gates = [part for part in module.network.modules() if isinstance(part, HardGate)]
        self.values.extend(gate.temperature.item() for gate in gates)


def test_hard_gates_cool_from_1_to_a_half_over_the_steps_of_training() -> None:
    temperatures = Temperatures()
    trained(hard_gated(), 4, temperatures, num_steps=4)
    assert temperatures.values == [1.0, 0.875, 0.75, 0.625]  # a step later it would be a half


def test_lightning_reads_no_loss_while_steps_run(monkeypatch: pytest.MonkeyPatch) -> None:
    readers: list[str] = []
    item = Tensor.item

    def watched(value: Tensor) -> Any:
        readers.append(sys._getframe(1).f_code.co_filename)
        return item(value)

    class Watch(L.Callback):
        """Watches all steps but the first and the last."""

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if trainer.global_step == 1:
                monkeypatch.setattr(Tensor, "item", watched)
            if trainer.global_step == 4:
                assert torch.ones(()).item() == 1  # a reader that is seen
            if trainer.global_step == 7:
                monkeypatch.undo()

    module = module_of()
    trainer = trainer_of(8, callbacks=[Watch()], log_every_n_steps=50)
    trainer.fit(module, batches(20))
    assert readers == [__file__]
