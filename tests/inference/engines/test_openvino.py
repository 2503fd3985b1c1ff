"""What OpenVINO does to the process, and to the order of numbers."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from segkit.errors import ModelError
from segkit.inference.engines.choose import choose_engine
from segkit.inference.engines.openvino import OpenVino
from segkit.inference.engines.torch_eager import LOGITS, TorchEngine
from tests.conftest import ROOT
from tests.engines import CPU, windows_of
from tests.models import model_of, saved


def test_openvino_leaves_the_classes_of_a_voxel_side_by_side(tmp_path: Path) -> None:
    found = choose_engine("openvino", saved(tmp_path), device="cpu")(windows_of(3, 1), ())
    assert found[LOGITS].stride()[1] == 1


def test_openvino_sends_no_usage_data(monkeypatch: pytest.MonkeyPatch) -> None:
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
        from segkit.system.signals import handling_signals
        from tests.engines import windows_of
        from tests.models import saved

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
            with handling_signals():
                signal.raise_signal(signal.SIGINT)
        except Stopped as stopped:
            print("heard", stopped.signum)
        """
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "heard 2\n"), done.stderr[-2000:]


def test_openvino_computes_in_bfloat16_if_requested_and_supported() -> None:
    model, batch = model_of({}, 3), windows_of(3)
    able = OpenVino().core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if "BF16" not in able:
        with pytest.raises(ModelError, match=r"float32 on this CPU, found torch\.bfloat16"):
            choose_engine("openvino", model, precision=torch.bfloat16)
        return
    exact = TorchEngine(model.network, device=CPU)(batch, ())[LOGITS]
    rough = choose_engine("openvino", model, precision=torch.bfloat16)(batch, ())[LOGITS]
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().mean() < 0.05 * exact.std()
