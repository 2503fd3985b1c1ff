"""The speed of this machine is measured once, on free cores."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Generator, Tensor, nn

from segkit.nn.muon import MuonForKernels
from segkit.nn.unet import UNet
from segkit.planning import speed
from segkit.planning.speed import Figures, multiply_adds_per_second, step_seconds


def test_the_measured_speed_is_that_of_a_processor() -> None:
    assert 1e8 < multiply_adds_per_second() < 1e14


def had(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """From now on, this process has this share of the cores."""
    monkeypatch.setattr(speed, "CoreShare", lambda: SimpleNamespace(share=lambda: share))


def test_a_figure_of_the_processor_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had(monkeypatch, 1.0)
    values = iter([3.5, 4.5, 5.5, 6.5])
    file = tmp_path / "cache" / "speed.json"

    def measured(**figure: object) -> float:
        return Figures(file).once(figure, lambda: next(values))

    assert [measured(patch=(1, 2)), measured(patch=(1, 2))] == [3.5, 3.5]
    assert [measured(patch=(1, 3)), measured(patch=(1, 2)), measured(patch=(1, 3))] == [
        4.5,
        3.5,
        4.5,
    ]
    for damaged in ("{", '{"measured": [3]}'):
        file.write_text(damaged)
        assert measured(patch=(1, 2)) > 4.5


def test_a_figure_in_another_precision_is_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    had(monkeypatch, 1.0)
    values = iter([3.5, 4.5])
    file = tmp_path / "speed.json"
    for half, expected in [(torch.float32, 3.5), (torch.bfloat16, 4.5), (torch.float32, 3.5)]:
        monkeypatch.setattr(speed, "precision_of", lambda _, half=half: half)
        assert Figures(file).once({"what": "step"}, lambda: next(values)) == expected


def test_a_figure_measured_on_busy_cores_is_only_for_this_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = iter([3.5, 4.5])
    figures = Figures(tmp_path / "speed.json")
    assert figures.busy() is None
    had(monkeypatch, 0.4)
    for _ in range(2):
        assert figures.once({"what": "step"}, lambda: next(values)) == 3.5
    assert "their threads had a core for 40% of the time" in str(figures.busy())
    assert not figures.file.exists()
    had(monkeypatch, 1.0)
    later = Figures(figures.file)
    assert later.once({"what": "step"}, lambda: next(values)) == 4.5
    assert later.busy() is None and figures.file.exists()


def test_time_in_which_other_programs_had_the_cores_does_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter(range(1000))
    clock = SimpleNamespace(perf_counter=lambda: float(next(now)))
    monkeypatch.setattr(speed, "time", clock)  # each step takes a second
    had(monkeypatch, 0.25)
    network = UNet(2, 1, out_channels=2, channels=(2, 2))
    seconds = step_seconds(network, torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8).long())
    assert seconds == 0.25


@pytest.mark.parametrize("muon", [True, False])
def test_a_step_is_timed_with_its_optimiser(muon: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[nn.Parameter] = []
    step = MuonForKernels.step

    def counted(self: MuonForKernels) -> None:
        moved.extend(each for group in self.param_groups for each in group["params"])
        step(self)

    monkeypatch.setattr(MuonForKernels, "step", counted)
    network = UNet(2, 1, out_channels=2, channels=(2, 2))
    step_seconds(network, torch.zeros(2, 1, 8, 8), torch.zeros(2, 8, 8).long(), muon=muon)
    assert {id(each) for each in moved} == (
        {id(each) for each in network.parameters()} if muon else set()
    )


def test_a_step_on_the_cpu_includes_the_mean_time_of_its_augmentation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    had(monkeypatch, 0.5)
    takes = iter([0.0, 9.0, *(0.1, 0.3) * 4])  # the first augments the batch of all steps

    def vary(image: Tensor, label: Tensor, _: Generator) -> tuple[Tensor, Tensor]:
        now[0] += next(takes)
        return image[..., 1:-1, 1:-1], label[..., 1:-1, 1:-1].long()

    network = UNet(2, 1, out_channels=2, channels=(2, 2))
    image, label = torch.zeros(2, 1, 10, 10), torch.zeros(2, 10, 10, dtype=torch.uint8)
    monkeypatch.setattr(speed, "LONG_ENOUGH", 60.0)
    assert step_seconds(network, image, label, vary=vary) == pytest.approx(0.5 * 0.2)
