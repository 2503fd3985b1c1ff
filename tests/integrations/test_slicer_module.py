"""The part of Slicer's extension that needs Slicer, with Slicer's objects replaced by recorders.

This finds mistakes of Python and of logic. It cannot show that Slicer has these methods.
"""

import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest

from SegkitPredictLib.errors import ExtensionError
from SegkitPredictLib.results import Label, Overlay, Result

CONCEPT = "c~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~~^^~^^"


WIDGETS = ("QCheckBox", "QComboBox", "QLabel", "QLineEdit", "QPlainTextEdit", "QPushButton")


class Base:
    """A base class of scripted modules."""

    def __init__(self, parent: Any = None) -> None:
        self.parent = parent
        self.layout = MagicMock()

    def setup(self) -> None:
        """Slicer's own part of the panel."""


class Segment:
    """A segment that knows what was done to it."""

    def __init__(self, value: int) -> None:
        self.value = value
        self.told: dict[str, Any] = {}

    def GetLabelValue(self) -> int:  # noqa: N802
        return self.value

    def GetTerminologyEntryTagName(self) -> str:  # noqa: N802
        return "TerminologyEntry"

    def SetName(self, name: str) -> None:  # noqa: N802
        self.told["name"] = name

    def SetColor(self, *colour: float) -> None:  # noqa: N802
        self.told["colour"] = colour

    def SetTag(self, name: str, value: str) -> None:  # noqa: N802
        self.told[name] = value


@pytest.fixture
def slicer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> MagicMock:
    """Slicer's modules, recorded."""
    recorder = MagicMock()
    recorder.app.temporaryPath = str(tmp_path / "temporary")
    (tmp_path / "temporary").mkdir()
    recorder.app.slicerUserSettingsFilePath = str(tmp_path / "Slicer.ini")
    recorder.util.startupEnvironment.return_value = {"PATH": "/nowhere"}
    internationalised = ModuleType("slicer.i18n")
    internationalised.tr = lambda text: text  # type: ignore[attr-defined]
    internationalised.translate = lambda _, text: text  # type: ignore[attr-defined]
    bases = ModuleType("slicer.ScriptedLoadableModule")
    for ending in ("", "Widget", "Logic", "Test"):
        setattr(bases, f"ScriptedLoadableModule{ending}", type(f"Base{ending}", (Base,), {}))
    qt, ctk = MagicMock(), MagicMock()
    for kit, names in {qt: WIDGETS, ctk: ("ctkPathLineEdit", "ctkSliderWidget")}.items():
        for name in names:
            getattr(kit, name).side_effect = lambda *_: MagicMock()
    qt.QFormLayout.return_value.rowCount.return_value = 0
    qt.QSettings.return_value.value.side_effect = lambda name, default: default
    for name, module in {
        "slicer": recorder,
        "slicer.i18n": internationalised,
        "slicer.ScriptedLoadableModule": bases,
        "qt": qt,
        "ctk": ctk,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    return recorder


@pytest.fixture
def module(slicer: MagicMock) -> Iterator[Any]:
    yield import_module("SegkitPredict")
    sys.modules.pop("SegkitPredict")


@pytest.fixture
def panel(module: Any) -> Any:
    """The panel, for a model with one channel and with a volume chosen."""
    widget = module.SegkitPredictWidget()
    widget.setup()
    widget.model.currentPath = "hf:owner/name"
    widget.command.currentPath = ""
    widget.device.currentText = "cpu"
    widget.mirrors.checked = False
    widget.onModelChanged()
    return widget


def test_segments_get_names_colours_and_concepts_and_a_background_is_removed(
    module: Any, slicer: MagicMock
) -> None:
    segments = {"s1": Segment(1), "s4": Segment(4), "s9": Segment(9)}
    node = slicer.mrmlScene.AddNewNodeByClass.return_value
    segmentation = node.GetSegmentation.return_value
    segmentation.GetSegmentIDs.return_value = tuple(segments)
    segmentation.GetSegment.side_effect = segments.get
    labels = (Label(1, "liver", (1.0, 0.5, 0.0), CONCEPT), Label(4, "lesion", None, None))
    result = Result(Path("labels.nrrd"), labels, 9, ())
    assert module.SegkitPredictLogic().showLabels(result, MagicMock()) is node
    assert segments["s1"].told == {
        "name": "liver",
        "colour": (1.0, 0.5, 0.0),
        "TerminologyEntry": CONCEPT,
    }
    assert segments["s4"].told == {"name": "lesion"}
    segmentation.RemoveSegment.assert_called_once_with("s9")


def test_maps_are_loaded_with_their_range_and_without_their_files(
    module: Any, slicer: MagicMock
) -> None:
    overlay = Overlay(Path("native") / "a.nii.gz", "skip.1/gate", 0.0, 1.0)
    result = Result(Path("labels.nrrd"), (), 0, (overlay,))
    nodes = module.SegkitPredictLogic().loadMaps(result, MagicMock())
    node = slicer.util.loadVolume.return_value
    assert nodes == {"skip.1/gate": node}
    node.GetDisplayNode().SetWindowLevelMinMax.assert_called_once_with(0.0, 1.0)
    node.SetAndObserveStorageNodeID.assert_called_once_with(None)
    slicer.mrmlScene.RemoveNode.assert_called_once_with(node.GetStorageNode())


def test_channels_are_saved_under_segkits_names(
    module: Any, slicer: MagicMock, tmp_path: Path
) -> None:
    logic, nodes = module.SegkitPredictLogic(), [MagicMock(), MagicMock()]
    logic.exportVolumes(nodes, tmp_path)
    saved = [call.args[1] for call in slicer.util.exportNode.call_args_list]
    assert saved == [str(tmp_path / f"scan_000{number}.nrrd") for number in (0, 1)]
    slicer.util.exportNode.return_value = False
    with pytest.raises(ExtensionError, match="cannot be saved to"):
        logic.exportVolumes(nodes, tmp_path)


def test_a_failed_command_gives_a_sentence_and_leaves_no_files(
    panel: Any, slicer: MagicMock, tmp_path: Path
) -> None:
    panel.onApply()
    assert panel.status.text.startswith("Segkit was not found; press Install")
    assert not any((tmp_path / "temporary").iterdir()) and panel.job is None
    for selector in panel.volumes:
        selector.currentNode.return_value = None
    panel.onApply()
    assert panel.status.text == "Expected a volume, found none; load one and choose it"


def test_a_job_is_shown_until_it_ends_and_its_files_are_removed(
    panel: Any, tmp_path: Path, module: Any
) -> None:
    command = tmp_path / "segkit"
    command.write_text("#!/bin/sh\necho '{\"progress\": 0.25}' >&2\necho segkit: bad >&2\nexit 2\n")
    command.chmod(0o755)
    panel.command.currentPath = str(command)
    panel.onApply()
    assert panel.job is not None and panel.status.text == "Starting segkit"
    (folder,) = (tmp_path / "temporary").iterdir()
    while panel.job is not None:
        panel.onTimer()
    panel.bar.setValue.assert_called_with(25)
    assert panel.status.text == "Bad" and not folder.exists()


def test_a_job_can_be_cancelled_and_ends_with_slicer(panel: Any, tmp_path: Path) -> None:
    command = tmp_path / "segkit"
    command.write_text("#!/bin/sh\nexec sleep 60\n")
    command.chmod(0o755)
    panel.command.currentPath = str(command)
    panel.onApply()
    panel.onCancel()
    assert panel.status.text == "Stopping"
    while panel.job is not None:
        panel.onTimer()
    assert panel.status.text == "Stopped, because you pressed Cancel"
    panel.onApply()
    panel.cleanup()
    assert panel.job is None and not any((tmp_path / "temporary").iterdir())
