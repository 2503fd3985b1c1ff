"""`import segkit`: few names, each documented, and nothing loaded before it is asked for."""

import ast
import doctest
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import segkit
from segkit.errors import SegkitError
from segkit.nn.map_tap import MapInfo
from tests.small import small_config, small_dataset

# Whoever adds a name adds it here, and to docs/reference.py, which sorts them for readers.
PUBLIC = [
    "AttentionMap",
    "AttentionShare",
    "AttentionStudy",
    "Attribution",
    "AttributionSettings",
    "BlockVerdict",
    "Comparison",
    "Config",
    "ConfigError",
    "CrossValidation",
    "DatasetError",
    "Evaluation",
    "Explanation",
    "Export",
    "GateVerdict",
    "Grid",
    "Model",
    "ModelDescription",
    "ModelError",
    "Orientation",
    "Placement",
    "Planned",
    "Prediction",
    "Predictor",
    "Push",
    "Run",
    "SegkitError",
    "TrainingError",
    "TrainingParts",
    "Understood",
    "Volume",
    "VolumeError",
    "WholeVolume",
    "WorkerError",
    "as_identity",
    "attention_blocks",
    "attention_share",
    "attribute",
    "check",
    "compare",
    "cross_validate",
    "demo_config",
    "described_model",
    "evaluate",
    "explain_volume",
    "export_model",
    "fetch_model",
    "fit",
    "gate",
    "judge_attention",
    "judge_gates",
    "label_colour",
    "load_config",
    "load_model",
    "load_template",
    "map_on_source",
    "max_sensitivity",
    "noisy_copies",
    "plan_dataset",
    "pool",
    "prepare",
    "push_model",
    "random_logit",
    "read_labels",
    "read_volume",
    "record",
    "relative_input_stability",
    "relative_output_stability",
    "resume",
    "road",
    "save_model",
    "smooth_mprt",
    "train",
    "write_dataset",
    "write_hippocampi",
    "write_montage",
    "write_volume",
]
each_name = pytest.mark.parametrize("name", PUBLIC)


def test_the_public_names_are_these() -> None:
    assert sorted(segkit.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(segkit))


def test_importing_segkit_loads_nothing_that_takes_time() -> None:
    code = (
        "import sys; import segkit; dir(segkit)\n"
        "print(sorted({'torch', 'lightning', 'numpy', 'pydantic', 'nibabel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_errors_are_caught_without_torch() -> None:
    code = (
        "import sys; from segkit import ConfigError, load_config\n"
        "print('torch' in sys.modules, 'lightning' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False False", done.stdout + done.stderr


def test_an_unknown_name_raises_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'segkit' has no attribute 'tarin'"):
        segkit.tarin  # noqa: B018


def test_no_name_is_also_that_of_a_module() -> None:
    # Importing segkit.x sets the attribute x of segkit, whatever was there.
    modules = {module.name for module in pkgutil.iter_modules(segkit.__path__)}
    assert modules & set(PUBLIC) == set()


def test_type_checkers_see_the_names_that_exist() -> None:
    tree = ast.parse(Path(segkit.__file__).read_text())
    (checked,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.asname or alias.name: (node.module, alias.name)
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert sorted(seen) == sorted(PUBLIC)
    for name, (module, there) in seen.items():
        assert getattr(segkit, name) is getattr(sys.modules[str(module)], there), name


@each_name
def test_a_public_name_says_what_it_is(name: str) -> None:
    thing = getattr(segkit, name)
    assert thing.__doc__ and len(thing.__doc__.split()) >= 3
    # A dataclass without a docstring gets its signature as one.
    assert not thing.__doc__.startswith(f"{thing.__name__}(")
    for method, function in vars(thing).items() if inspect.isclass(thing) else ():
        if method.startswith("_") and method != "__call__":
            continue
        if inspect.isfunction(function) or isinstance(function, property | classmethod):
            assert inspect.getdoc(getattr(thing, method)), f"{name}.{method}"


@each_name
def test_a_public_function_has_types_and_names_its_errors(name: str) -> None:
    thing = getattr(segkit, name)
    if inspect.isclass(thing):
        return
    signature = inspect.signature(thing)
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty, parameter
    assert "Raises" in thing.__doc__


def check_session(name: str) -> None:
    """Run the session in a docstring, in the working directory."""
    known = {"np": np, "torch": torch, "Path": Path, "segkit": segkit}
    known |= {each: getattr(segkit, each) for each in PUBLIC}
    text = inspect.cleandoc(getattr(segkit, name).__doc__)
    session = doctest.DocTestParser().get_doctest(text, known, name, None, None)
    assert session.examples
    said: list[str] = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    assert runner.run(session, out=said.append).failed == 0, "".join(said)


@pytest.mark.parametrize(
    "name",
    [
        "ConfigError",
        "DatasetError",
        "Grid",
        "ModelError",
        "Orientation",
        "Placement",
        "SegkitError",
        "VolumeError",
        "WholeVolume",
        "label_colour",
        "noisy_copies",
    ],
)
def test_an_example_that_needs_no_data_prints_the_results_that_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_session(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["TrainingError", "WorkerError", "load_config"])
def test_an_example_that_needs_a_dataset_prints_the_results_that_it_shows(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = small_config(small_dataset(Path("my_dataset"), num_cases=2))
    Path("my_dataset.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    check_session(name)


@pytest.mark.parametrize("name", PUBLIC)
def test_a_path_may_be_given_as_text(name: str) -> None:
    thing = getattr(segkit, name)
    methods = vars(thing).values() if inspect.isclass(thing) else [thing]
    for function in methods:
        function = inspect.unwrap(getattr(function, "__func__", function))
        if not inspect.isfunction(function) or function.__name__.startswith("_"):
            continue
        for parameter in inspect.signature(function).parameters.values():
            kinds = str(parameter.annotation)
            assert "Path" not in kinds or "str" in kinds, (function.__name__, parameter)


def test_every_error_is_one_family() -> None:
    errors = [name for name in PUBLIC if name.endswith("Error")]
    assert all(issubclass(getattr(segkit, name), SegkitError) for name in errors)
    assert {kind.__name__ for kind in SegkitError.__subclasses__()} <= set(errors)


def test_a_map_over_channels_is_refused_in_one_sentence() -> None:
    grid = segkit.Grid((2, 2, 2), np.eye(4))
    info = MapInfo(
        key="encoder.0/channel", kind="channel", level=0, placement=None, lowest=0.0, highest=1.0
    )
    vector = segkit.AttentionMap(info, None, grid, np.zeros(4), np.zeros(4))
    with pytest.raises(segkit.VolumeError, match=r"encoder\.0/channel: expected a map over voxels"):
        segkit.map_on_source(vector, segkit.Volume(np.zeros((2, 2, 2)), grid))
