"""segkit: attention U-Nets for medical images, and gate maps on the patient's own voxel grid.

Every public function and class is an attribute of this module. Each is imported at its first use:
`import segkit` itself is fast and does not load torch.

    run = segkit.train(segkit.load_config("my_dataset.yaml"))
    prediction = segkit.Predictor(run.model)(segkit.read_volume(Path("scan.nii.gz")), maps=True)

Volumes are (x, y, z) or (x, y, z, channel) in the file's axis order; world coordinates are RAS+ in
mm. A mistake that a user can make raises a `SegkitError` of one sentence. The modules below are
internal and may change without notice.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from segkit.checking.check import check
    from segkit.checking.understood import Understood
    from segkit.config.load import load_config
    from segkit.config.model import ModelDescription
    from segkit.config.training import Config
    from segkit.demo.demo import demo_config, load_template, write_dataset
    from segkit.demo.phantoms import write_hippocampi
    from segkit.errors import (
        ConfigError,
        DatasetError,
        ModelError,
        SegkitError,
        TrainingError,
        VolumeError,
        WorkerError,
    )
    from segkit.evaluation.compare import Comparison, compare
    from segkit.evaluation.evaluate import Evaluation, evaluate
    from segkit.explain.attribution.attribute import Attribution, AttributionSettings, attribute
    from segkit.explain.attribution.parameter_tests import random_logit, smooth_mprt
    from segkit.explain.attribution.road import road
    from segkit.explain.attribution.stability import (
        max_sensitivity,
        noisy_copies,
        relative_input_stability,
        relative_output_stability,
    )
    from segkit.explain.explain_scan import explain_volume
    from segkit.explain.explanation import Explanation
    from segkit.explain.verdicts.identity import AttentionStudy, BlockVerdict, judge_attention
    from segkit.explain.verdicts.judge import judge_gates
    from segkit.explain.verdicts.rule import GateVerdict
    from segkit.export.export import Export, export_model
    from segkit.export.push import Push, push_model
    from segkit.export.whole_volume import WholeVolume
    from segkit.geometry.grid import Grid, Orientation, Placement
    from segkit.inference.attention_maps import AttentionMap, map_on_source
    from segkit.inference.predictor import Prediction, Predictor
    from segkit.io.pictures import label_colour, write_montage
    from segkit.io.volume import Volume, read_labels, read_volume, write_volume
    from segkit.model.fetch_model import fetch_model
    from segkit.model.folder import Model, described_model, load_model, save_model
    from segkit.nn.attention_blocks import (
        AttentionShare,
        as_identity,
        attention_blocks,
        attention_share,
    )
    from segkit.nn.foreign_gates import gate
    from segkit.nn.foreign_maps import record
    from segkit.planning.make_plan import Planned, plan_dataset
    from segkit.training.cross_validation import CrossValidation, cross_validate
    from segkit.training.fit import Run, fit, train
    from segkit.training.parts import TrainingParts, prepare
    from segkit.training.pool import pool
    from segkit.training.resume import resume

__all__ = [
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

_HOMES = {
    "segkit.checking.check": ("check",),
    "segkit.checking.understood": ("Understood",),
    "segkit.config.model": ("ModelDescription",),
    "segkit.config.training": ("Config",),
    "segkit.config.load": ("load_config",),
    "segkit.training.cross_validation": ("CrossValidation", "cross_validate"),
    "segkit.demo.demo": ("demo_config", "load_template", "write_dataset"),
    "segkit.demo.phantoms": ("write_hippocampi",),
    "segkit.errors": (
        "ConfigError",
        "DatasetError",
        "ModelError",
        "SegkitError",
        "TrainingError",
        "VolumeError",
        "WorkerError",
    ),
    "segkit.evaluation.compare": ("Comparison", "compare"),
    "segkit.evaluation.evaluate": ("Evaluation", "evaluate"),
    "segkit.explain.attribution.attribute": ("Attribution", "AttributionSettings", "attribute"),
    "segkit.explain.attribution.parameter_tests": (
        "random_logit",
        "smooth_mprt",
    ),
    "segkit.explain.attribution.road": ("road",),
    "segkit.explain.attribution.stability": (
        "max_sensitivity",
        "noisy_copies",
        "relative_input_stability",
        "relative_output_stability",
    ),
    "segkit.explain.explain_scan": ("explain_volume",),
    "segkit.explain.explanation": ("Explanation",),
    "segkit.explain.verdicts.identity": ("AttentionStudy", "BlockVerdict", "judge_attention"),
    "segkit.explain.verdicts.judge": ("judge_gates",),
    "segkit.explain.verdicts.rule": ("GateVerdict",),
    "segkit.export.export": ("Export", "export_model"),
    "segkit.export.push": ("Push", "push_model"),
    "segkit.export.whole_volume": ("WholeVolume",),
    "segkit.geometry.grid": ("Grid", "Orientation", "Placement"),
    "segkit.inference.attention_maps": ("AttentionMap", "map_on_source"),
    "segkit.inference.predictor": ("Prediction", "Predictor"),
    "segkit.model.fetch_model": ("fetch_model",),
    "segkit.model.folder": ("Model", "described_model", "load_model", "save_model"),
    "segkit.nn.attention_blocks": (
        "AttentionShare",
        "as_identity",
        "attention_blocks",
        "attention_share",
    ),
    "segkit.nn.foreign_gates": ("gate",),
    "segkit.nn.foreign_maps": ("record",),
    "segkit.planning.make_plan": ("Planned", "plan_dataset"),
    "segkit.training.fit": ("Run", "fit", "train"),
    "segkit.training.parts": ("TrainingParts", "prepare"),
    "segkit.training.pool": ("pool",),
    "segkit.training.resume": ("resume",),
    "segkit.io.pictures": ("label_colour", "write_montage"),
    "segkit.io.volume": ("Volume", "read_labels", "read_volume", "write_volume"),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'segkit' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
