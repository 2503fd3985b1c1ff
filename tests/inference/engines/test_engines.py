"""Laws of engines: each gives what PyTorch gives, and what was converted is kept and trusted only
as long as nothing it depends on has changed."""

import logging
import shutil
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException

from segkit.errors import ModelError
from segkit.geometry.grid import Grid
from segkit.inference import windows
from segkit.inference.engines.choose import EngineName, WillingEngine, choose_engine
from segkit.inference.engines.conversion_cache import MANIFEST, artefact, find, user_cache
from segkit.inference.engines.converted import (
    ENGINES_FOLDER,
    ConversionError,
    ConvertedEngine,
    digest,
)
from segkit.inference.engines.onnx import OnnxRuntime
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.out_of_memory import SparingEngine
from segkit.inference.engines.torch_compile import CompiledEngine
from segkit.inference.engines.torch_eager import LOGITS, PRESENCE, Engine, TorchEngine
from segkit.inference.predictor import Predictor
from segkit.inference.windows import WindowLayout, slide
from segkit.io.atomic import write_text
from segkit.io.volume import Volume
from segkit.model.folder import Model, load_model
from segkit.nn.map_tap import editing
from segkit.nn.network import unet_of
from tests.models import FAST, SLOW, model_of, saved

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def unchecked_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """While torch traces, sizes are tensors, not the integers that signatures tell of."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def windows_of(spatial_dims: int, count: int = 3, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    size = (12, 6, 6) if spatial_dims == 3 else (12, 10, 4)
    return torch.randn(count, 2, *size, generator=generator)


def keys_of(model: Model) -> list[str]:
    presence = [PRESENCE] if model.network.presence is not None else []
    return [*model.network.maps(), *presence]


def assert_agree(engine: Engine, model: Model, batch: Tensor) -> None:
    """Logits and every map, with and without being asked for."""
    keys = keys_of(model)
    expected = TorchEngine(model.network, device=CPU)(batch, keys)
    found = engine(batch, keys)
    assert set(found) == set(expected) == {LOGITS, *keys}
    for key, values in expected.items():
        torch.testing.assert_close(found[key], values, rtol=0, atol=1e-4)
    same = found[LOGITS].argmax(dim=1) == expected[LOGITS].argmax(dim=1)
    assert same.float().mean() >= 0.9999
    bare = engine(batch, ())
    assert set(bare) == {LOGITS}
    torch.testing.assert_close(bare[LOGITS], expected[LOGITS], rtol=0, atol=1e-4)


def agrees(name: EngineName, spatial_dims: int, attention: dict[str, Any]) -> None:
    model = model_of(attention, spatial_dims)
    engine = choose_engine(name, model, device="cpu")
    for count in (1, 3):
        assert_agree(engine, model, windows_of(spatial_dims, count))


@pytest.mark.parametrize("family", FAST)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_an_engine_gives_the_logits_and_maps_that_pytorch_gives(
    name: EngineName, family: str
) -> None:
    agrees(name, *FAST[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", SLOW)
@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_every_family_runs_in_every_engine(name: EngineName, family: str) -> None:
    agrees(name, *SLOW[family])


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_torch_compile_gives_the_logits_and_maps_that_pytorch_gives(family: str) -> None:
    # In a process of its own, where shapes are not checked: the compiler cannot read the checks.
    module = "tests.inference.engines.test_engines"
    code = f"from {module} import FAST, agrees; agrees('compile', *FAST[{family!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the folders that OpenVINO was told to write, as it is told."""
    told: list[str] = []
    convert = OpenVino.convert

    def counted(runtime: OpenVino, network: Any, window: Tensor, folder: Path) -> None:
        told.append(folder.name)
        convert(runtime, network, window, folder)

    monkeypatch.setattr(OpenVino, "convert", counted)
    return told


def test_a_model_is_converted_once_and_anew_for_other_weights_windows_and_versions(
    tmp_path: Path, conversions: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    assert len(conversions) == 1
    again = load_model(tmp_path)
    assert_agree(ConvertedEngine(again, OpenVino()), again, batch)
    assert len(conversions) == 1
    assert not again.network.training

    with torch.no_grad():
        next(again.network.parameters()).add_(0.1)
    assert_agree(ConvertedEngine(again, OpenVino()), again, batch)
    assert len(conversions) == 2
    assert len(list((user_cache() / ENGINES_FOLDER).iterdir())) == 2
    assert len({digest(model, (2, size, 4, 4), f"2026.{size}") for size in (4, 8)}) == 2
    assert digest(model, (2, 4, 4, 4), "1") != digest(model, (2, 4, 4, 4), "2")
    assert digest(model, (2, 4, 4, 4), "1") == digest(load_model(tmp_path), (2, 4, 4, 4), "1")


def test_a_damaged_conversion_is_made_again(
    tmp_path: Path, conversions: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    (folder,) = (user_cache() / ENGINES_FOLDER).iterdir()
    numbers = bytearray((folder / "network.bin").read_bytes())
    numbers[len(numbers) // 2] ^= 0xFF
    (folder / "network.bin").write_bytes(numbers)
    assert_agree(ConvertedEngine(model, OpenVino()), model, batch)
    assert len(conversions) == 2
    assert "is damaged and is made again" in caplog.text
    (folder / MANIFEST).write_text("{}")
    assert not ConvertedEngine(model, OpenVino()).is_ready(batch[:, :, :4])
    assert not ConvertedEngine(model, OpenVino()).is_ready(batch)


def test_a_model_without_a_folder_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = model_of({}, 3)
    engine = ConvertedEngine(model, OnnxRuntime())
    engine(windows_of(3), ())
    assert len(list(tmp_path.iterdir())) == 1
    del engine
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_kept_is_converted_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "cache").write_text("a file where the folder should be")
    model = saved(tmp_path / "model")
    with caplog.at_level(logging.INFO):
        assert_agree(ConvertedEngine(model, OnnxRuntime()), model, windows_of(3))
    assert "cannot be written" in caplog.text
    assert not ConvertedEngine(model, OnnxRuntime()).is_ready(windows_of(3))


def test_nothing_beside_a_model_is_taken_for_its_conversion(
    tmp_path: Path, conversions: list[str]
) -> None:
    """A model comes with engines of another's weights, named and summed as its own would be."""
    model, batch = saved(tmp_path / "model"), windows_of(3)
    other = saved(tmp_path / "other", {"encoder": "se"})
    ConvertedEngine(other, OpenVino())(batch, ())
    (foreign,) = (user_cache() / ENGINES_FOLDER).iterdir()
    name = f"openvino-{digest(model, tuple(batch.shape[1:]), OpenVino().version)[:32]}"
    for place in (tmp_path / "model" / ENGINES_FOLDER, user_cache() / ENGINES_FOLDER):
        shutil.copytree(foreign, place / name)
    engine = ConvertedEngine(model, OpenVino())
    assert not engine.is_ready(batch)
    assert_agree(engine, model, batch)
    assert len(conversions) == 2


def test_a_conversion_holds_the_files_of_its_manifest_and_no_others(tmp_path: Path) -> None:
    folder = artefact("name", [tmp_path], lambda made: write_text(made / "a", "a"))
    assert find("name", [tmp_path]) == folder
    write_text(folder / "b", "an extension")
    assert find("name", [tmp_path]) is None
    (folder / "b").unlink()
    (folder / "a").unlink()
    assert find("name", [tmp_path]) is None


def test_an_artefact_is_whole_or_not_there(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        artefact("name", [tmp_path], fail)
    assert not list(tmp_path.iterdir())


def test_edited_maps_are_edited_in_every_engine() -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    engine = choose_engine("onnx", model)
    bare = engine(batch, ())[LOGITS]
    (key,) = model.network.maps()
    with editing(model.network, {key: torch.zeros_like}):
        shut = engine(batch, (key,))
        expected = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    assert torch.equal(shut[LOGITS], expected)
    assert not shut[key].any()
    assert not torch.allclose(expected, bare, atol=1e-3)
    assert torch.equal(engine(batch, ())[LOGITS], bare)


@pytest.mark.parametrize("name", ["torch", "openvino", "onnx"])
def test_an_engine_leaves_the_callers_arithmetic_as_it_was(name: EngineName) -> None:
    choose_engine(name, model_of({}, 3), device="cpu")(windows_of(3), ())
    assert (torch.full((4,), 1e-40) * 1.0).all()


def test_auto_is_openvino_converted_once_for_a_model_with_a_folder(
    tmp_path: Path, conversions: list[str]
) -> None:
    model, batch = saved(tmp_path), windows_of(3)
    first = choose_engine("auto", model, device="cpu")
    assert isinstance(first, WillingEngine) and isinstance(first.chosen, ConvertedEngine)
    assert_agree(first, model, batch)
    # The next time it is there, and gives the same to the last bit.
    again = choose_engine("auto", load_model(tmp_path), device="cpu")
    assert torch.equal(again(batch, ())[LOGITS], first(batch, ())[LOGITS])
    assert len(conversions) == 1


def test_auto_stays_in_pytorch_with_one_warning_where_a_conversion_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(OpenVino, "convert", fail)
    model, batch = saved(tmp_path), windows_of(3)
    with pytest.raises(ConversionError, match="openvino cannot run this network: no such operat"):
        choose_engine("openvino", model)(batch, ())
    engine = choose_engine("auto", model, device="cpu")
    eager = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    for _ in range(3):
        assert torch.equal(engine(batch, ())[LOGITS], eager)
    assert caplog.text.count("cannot run this network") == 1


def test_auto_is_pytorch_without_a_folder_or_in_a_precision_that_openvino_lacks(
    tmp_path: Path,
) -> None:
    assert type(choose_engine("auto", model_of({}, 3), device="cpu")) is TorchEngine
    double = choose_engine("auto", saved(tmp_path), device="cpu", precision=torch.float64)
    assert type(double) is TorchEngine
    assert isinstance(choose_engine("compile", model_of({}, 3), device="cpu"), CompiledEngine)


@pytest.mark.parametrize(("name", "package"), [("openvino", "openvino"), ("onnx", "onnxruntime")])
def test_an_engine_that_is_not_installed_is_one_sentence(
    name: EngineName, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    sentence = rf"{name} is not installed; pip install 'segkit\[{name}\]'"
    with pytest.raises(ModelError, match=sentence):
        choose_engine(name, model_of({}, 3))
    if name == "openvino":
        assert type(choose_engine("auto", saved(tmp_path), device="cpu")) is TorchEngine


def test_an_engine_refuses_what_it_cannot_do() -> None:
    model = model_of({}, 3)
    with pytest.raises(ModelError, match="openvino runs on the CPU, found --device cuda"):
        choose_engine("openvino", model, device="cuda")
    for name in ("openvino", "onnx"):
        with pytest.raises(ModelError, match=r"float32.*found torch\.float16"):
            choose_engine(name, model, precision=torch.float16)


def test_openvino_leaves_the_classes_of_a_voxel_side_by_side(tmp_path: Path) -> None:
    found = choose_engine("openvino", saved(tmp_path), device="cpu")(windows_of(3, 1), ())
    assert found[LOGITS].stride()[1] == 1


def test_openvino_tells_nobody_that_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openvino_telemetry", raising=False)
    OpenVino()
    assert sys.modules["openvino_telemetry"] is None


def test_ctrl_c_is_heard_when_another_thread_has_let_go_of_openvino(tmp_path: Path) -> None:
    # In a process of its own, which a segmentation fault would end.
    code = """if True:
        import gc, signal, sys, threading
        from pathlib import Path
        from segkit.errors import Stopped
        from segkit.inference.engines.choose import choose_engine
        from segkit.system.signals import handling
        from tests.inference.engines.test_engines import saved, windows_of

        engines = []
        for name in "ab":
            folder = Path(sys.argv[1], name)
            folder.mkdir()
            engines.append(choose_engine("openvino", saved(folder), device="cpu"))
            engines[-1](windows_of(3, 1), ())
        thread = threading.Thread(target=lambda: (engines.clear(), gc.collect()))
        thread.start()
        thread.join()
        try:
            with handling():
                signal.raise_signal(signal.SIGINT)
        except Stopped as stopped:
            print("heard", stopped.signum)
        """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "heard 2\n"), done.stderr[-2000:]


def test_a_compiler_that_fails_is_one_sentence() -> None:
    def fail(*arguments: object) -> None:
        raise TorchDynamoException("no C++ compiler")

    engine = CompiledEngine(model_of({}, 3).network, device=CPU)
    engine.compiled = fail
    with pytest.raises(
        ModelError, match=r"cannot compile .*: no C\+\+ compiler; use --engine torch"
    ):
        engine(windows_of(3), ())


@pytest.mark.parametrize("name", ["openvino", "onnx"])
def test_a_volume_is_segmented_alike_in_every_engine(name: EngineName, tmp_path: Path) -> None:
    model = saved(tmp_path)
    values = np.random.default_rng(0).standard_normal((18, 11, 9, 2)).astype(np.float32)
    volume = Volume(values, Grid((18, 11, 9), np.eye(4)))
    expected = Predictor(model, engine="torch")(volume, maps=True, probabilities=True)
    found = Predictor.load(tmp_path, engine=name)(volume, maps=True, probabilities=True)
    assert (found.labels.data == expected.labels.data).mean() >= 0.9999
    assert found.probabilities is not None and expected.probabilities is not None
    np.testing.assert_allclose(found.probabilities.data, expected.probabilities.data, atol=1e-3)
    for key, attention_map in expected.maps.items():
        there, here = attention_map.volume, found.maps[key].volume
        assert there is not None and here is not None
        np.testing.assert_allclose(here.data, there.data, atol=1e-4)


class Planted:
    """An engine whose device runs out of memory at these calls."""

    def __init__(self, engine: Engine, failing: Collection[int]) -> None:
        self.engine = engine
        self.failing = failing
        self.calls = 0

    def __call__(self, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls in self.failing:
            raise torch.OutOfMemoryError("planted")
        return self.engine(windows, keys)


def test_out_of_memory_gives_up_the_sums_first_and_then_the_device(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    eager = TorchEngine(model.network, device=CPU)
    keys = keys_of(model)
    device, host = Planted(eager, failing=(2, 4)), Planted(eager, failing=())
    engine = SparingEngine(device, lambda: host)
    counts = []
    for _ in range(6):
        found = engine(batch, keys)
        for key, values in eager(batch, keys).items():
            assert torch.equal(found[key], values)
        counts.append((device.calls, host.calls))
    # The second batch alone goes to the host; from the fourth on, all do.
    assert counts == [(1, 0), (2, 1), (3, 1), (4, 2), (4, 3), (4, 4)]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 2
    assert "sums over windows are kept on the host" in caplog.messages[0]
    assert "the network runs on the CPU" in caplog.messages[1]


def test_another_error_of_the_device_is_not_taken_for_want_of_memory() -> None:
    def fail(windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        raise RuntimeError("device-side assert")

    engine = SparingEngine(fail, lambda: fail)
    with pytest.raises(RuntimeError, match="device-side assert"):
        engine(windows_of(3), ())


def test_sums_that_do_not_fit_on_the_device_are_kept_on_the_host(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    image = windows_of(3, 1)[0]

    def slid() -> Tensor:
        return slide(
            image,
            lambda batch: {"same": batch},
            WindowLayout((4, 4, 4), (0.5, 0.5, 0.5), (2, 2, 2)),
        )["same"]

    zeros = torch.zeros
    expected = slid()

    def crowded(*size: Any, **options: Any) -> Tensor:
        # Sums alone have a channel and three axes.
        if "device" in options and isinstance(size[0], tuple) and len(size[0]) == 4:
            raise torch.OutOfMemoryError("planted")
        return zeros(*size, **options)

    monkeypatch.setattr(windows.torch, "zeros", crowded)
    assert torch.equal(slid(), expected)
    assert "kept on the host" in caplog.text


def test_logits_that_overflow_float16_are_computed_again_in_float32(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, batch = model_of({}, 3), windows_of(3)
    with torch.no_grad():
        unet_of(model.network).heads[0].weight.mul_(1e6)
    exact = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    engine = TorchEngine(model.network, device=CPU, precision=torch.float16)
    for _ in range(2):
        assert torch.equal(engine(batch, ())[LOGITS], exact)
    assert caplog.text.count("overflow float16") == 1


def test_bfloat16_comes_back_as_float32() -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    outputs = TorchEngine(model.network, device=CPU, precision=torch.bfloat16)(
        batch, keys_of(model)
    )
    assert {output.dtype for output in outputs.values()} == {torch.float32}


def test_openvino_computes_in_bfloat16_where_asked_and_the_cpu_can() -> None:
    model, batch = model_of({}, 3), windows_of(3)
    able = OpenVino().core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        with pytest.raises(ModelError, match=r"float32 here, found torch\.bfloat16"):
            choose_engine("openvino", model, precision=torch.bfloat16)
        return
    exact = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    rough = choose_engine("openvino", model, precision=torch.bfloat16)(batch, ())[LOGITS]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.std()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
def test_a_gpu_gives_what_the_cpu_gives(precision: torch.dtype) -> None:
    model, batch = model_of({"skip": "additive_grid"}, 3), windows_of(3)
    keys = keys_of(model)
    expected = TorchEngine(model_of({"skip": "additive_grid"}, 3).network, device=CPU)(batch, keys)
    # Otherwise cuDNN rounds what it multiplies to ten bits, in float32 too.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        found = choose_engine("auto", model, device="cuda", precision=precision)(batch, keys)
    for key, values in expected.items():
        assert found[key].device.type == "cuda"
        tolerance = 1e-3 if precision == torch.float32 else 0.1 * values.std()
        assert (found[key].cpu() - values).abs().mean() < tolerance


@pytest.mark.gpu
def test_a_gpu_whose_memory_runs_out_mid_scan_ends_where_it_would_have_ended() -> None:
    model = model_of({"skip": "additive_grid"}, 3)
    values = np.random.default_rng(0).standard_normal((34, 19, 21, 2)).astype(np.float32)
    volume = Volume(values, Grid((34, 19, 21), np.eye(4)))
    predictor = Predictor(model, device="cuda")
    expected = predictor(volume, maps=True).labels.data
    (member,) = predictor.members
    assert isinstance(member.engine, SparingEngine) and member.engine.engine is not None
    planted = Planted(member.engine.engine, failing=(5, 9))
    member.engine.engine = planted
    assert (predictor(volume, maps=True).labels.data == expected).mean() > 0.999
    assert planted.calls == 9 and member.engine.engine is None
