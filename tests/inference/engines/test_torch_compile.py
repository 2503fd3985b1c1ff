"""The compiled network gives what the network gives."""

import subprocess
import sys

import pytest
from torch._dynamo.exc import TorchDynamoException

from segkit.errors import ModelError
from segkit.inference.engines.torch_compile import CompiledEngine
from tests.conftest import ROOT
from tests.engines import CPU, windows_of
from tests.models import FAST, model_of


@pytest.mark.slow
@pytest.mark.parametrize("family", FAST)
def test_torch_compile_gives_the_logits_and_maps_that_pytorch_gives(family: str) -> None:
    # In a process of its own, where shapes are not checked: the compiler cannot read the checks.
    modules = "from tests.engines import agrees; from tests.models import FAST"
    code = f"{modules}; agrees('compile', *FAST[{family!r}])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_compiler_that_fails_is_one_sentence() -> None:
    def fail(*arguments: object) -> None:
        raise TorchDynamoException("no C++ compiler")

    engine = CompiledEngine(model_of({}, 3).network, device=CPU)
    engine.compiled = fail
    with pytest.raises(
        ModelError, match=r"cannot compile .*: no C\+\+ compiler; use --engine torch"
    ):
        engine(windows_of(3), ())
