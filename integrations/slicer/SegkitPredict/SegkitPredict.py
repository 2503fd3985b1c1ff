"""3D Slicer: segment volumes with segkit, and show labels and attention maps.

Only this file needs Slicer. Names of methods that Slicer calls, and of its signals, are Slicer's.
"""

import os
import tempfile
from pathlib import Path

import ctk
import qt
import slicer
from slicer.i18n import tr as _
from slicer.i18n import translate
from slicer.ScriptedLoadableModule import (
    ScriptedLoadableModule,
    ScriptedLoadableModuleLogic,
    ScriptedLoadableModuleTest,
    ScriptedLoadableModuleWidget,
)

from SegkitPredictLib.environment import (
    clean_environment,
    find_python,
    find_segkit,
    forget_environment,
    install_steps,
)
from SegkitPredictLib.errors import ExtensionError
from SegkitPredictLib.job import Job
from SegkitPredictLib.results import (
    channels_of,
    input_names,
    predict_words,
    remove,
    result_of,
)

MILLISECONDS = 200
"""Time between two looks at a command that runs."""
INFERNO = "vtkMRMLColorTableNodeFileInferno.txt"
SETTINGS = "SegkitPredict/"


class SegkitPredict(ScriptedLoadableModule):
    """The module as Slicer lists it."""

    def __init__(self, parent):
        super().__init__(parent)
        self.parent.title = _("Segkit")
        self.parent.categories = [translate("qSlicerAbstractCoreModule", "Segmentation")]
        self.parent.contributors = ["The segkit authors"]
        self.parent.helpText = _(
            "Segments the loaded volume with a model of segkit, and shows its attention maps on "
            "their own grids. For research only, not for diagnosis."
        )
        self.parent.acknowledgementText = ""


class SegkitPredictWidget(ScriptedLoadableModuleWidget):
    """The panel: a command, a model, volumes, a button, and what came of it."""

    def setup(self):
        """Build the panel."""
        super().setup()
        self.logic = SegkitPredictLogic()
        self.job = None
        self.whenDone = None
        self.volumes = []
        self.overlays = {}
        self.timer = qt.QTimer()
        self.timer.setInterval(MILLISECONDS)
        self.timer.connect("timeout()", self.onTimer)
        self.setupSegmenting()
        self.setupMaps()
        self.setupCommand()
        self.layout.addStretch(1)
        self.onModelChanged()
        self.showRunning(False)

    def setupSegmenting(self):
        """The section with model, volumes and the button."""
        form = self.section(_("Segment"))
        self.model = self.pathEdit("Model", ctk.ctkPathLineEdit.Dirs)
        self.model.setToolTip(_("The folder of a run or of a model of segkit."))
        self.model.connect("currentPathChanged(QString)", self.onModelChanged)
        form.addRow(_("Model:"), self.model)
        self.volumeRows = qt.QWidget()
        self.volumeForm = qt.QFormLayout(self.volumeRows)
        self.volumeForm.setContentsMargins(0, 0, 0, 0)
        form.addRow(self.volumeRows)
        self.maps = qt.QCheckBox(_("Show attention maps"))
        self.maps.checked = True
        form.addRow(self.maps)
        self.mirrors = qt.QCheckBox(_("Average over mirror images (slower)"))
        form.addRow(self.mirrors)
        self.device = qt.QComboBox()
        self.device.addItems(["auto", "cpu", "cuda"])
        form.addRow(_("Device:"), self.device)
        self.apply = qt.QPushButton(_("Segment"))
        self.apply.connect("clicked(bool)", self.onApply)
        self.cancel = qt.QPushButton(_("Cancel"))
        self.cancel.connect("clicked(bool)", self.onCancel)
        form.addRow(self.apply)
        form.addRow(self.cancel)
        self.bar = qt.QProgressBar()
        form.addRow(self.bar)
        self.status = qt.QLabel("")
        self.status.setWordWrap(True)
        form.addRow(self.status)

    def setupMaps(self):
        """The section that chooses the map that lies over the scan."""
        form = self.section(_("Attention maps"))
        self.shown = qt.QComboBox()
        self.shown.connect("currentIndexChanged(int)", self.onMapChosen)
        form.addRow(_("Map:"), self.shown)
        self.opacity = ctk.ctkSliderWidget()
        self.opacity.minimum, self.opacity.maximum, self.opacity.singleStep = 0, 1, 0.05
        self.opacity.value = 0.5
        self.opacity.connect("valueChanged(double)", self.onMapChosen)
        form.addRow(_("Opacity:"), self.opacity)

    def setupCommand(self):
        """The section that says where the segkit command is, or installs it."""
        form = self.section(_("The segkit command"), collapsed=True)
        self.command = self.pathEdit("Command", ctk.ctkPathLineEdit.Files)
        self.command.setToolTip(
            _("Leave it empty to use the environment that Install makes, or one on the PATH.")
        )
        form.addRow(_("Command:"), self.command)
        self.python = self.pathEdit("Python", ctk.ctkPathLineEdit.Files)
        self.python.setToolTip(_("Python 3.11 or newer that makes the environment."))
        form.addRow(_("Python:"), self.python)
        self.requirement = qt.QLineEdit(self.setting("Requirement", "segkit"))
        self.requirement.setToolTip(_("What pip installs: a name, a wheel, or a folder."))
        form.addRow(_("Install:"), self.requirement)
        self.cpuOnly = qt.QCheckBox(_("This computer has no NVIDIA GPU (smaller download)"))
        form.addRow(self.cpuOnly)
        self.install = qt.QPushButton(_("Install segkit into an environment of its own"))
        self.install.connect("clicked(bool)", self.onInstall)
        form.addRow(self.install)
        self.log = qt.QPlainTextEdit()
        self.log.setReadOnly(True)
        form.addRow(self.log)

    def section(self, title, collapsed=False):
        """The form of a new section of the panel."""
        button = ctk.ctkCollapsibleButton()
        button.text = title
        button.collapsed = collapsed
        self.layout.addWidget(button)
        return qt.QFormLayout(button)

    def pathEdit(self, name, filters):
        """A field for a path that remembers what was typed."""
        edit = ctk.ctkPathLineEdit()
        edit.filters = filters
        edit.settingKey = SETTINGS + name
        edit.setCurrentPath(self.setting(name + "Last", ""))
        return edit

    def setting(self, name, default):
        """What was stored under a name in the last session."""
        return qt.QSettings().value(SETTINGS + name, default)

    def cleanup(self):
        """Stop what runs, as Slicer asks when the module is reloaded or Slicer ends."""
        self.timer.stop()
        if self.job is not None:
            self.job.stop()
            self.job.wait()
            self.finish()

    def onModelChanged(self, path=None):
        """Show a selector for each channel of the model."""
        try:
            names = channels_of(self.model.currentPath) if self.model.currentPath else [""]
        except ExtensionError as problem:
            self.say(str(problem))
            names = [""]
        while self.volumeForm.rowCount() > 0:
            self.volumeForm.removeRow(0)
        self.volumes = []
        for name in names:
            selector = slicer.qMRMLNodeComboBox()
            selector.nodeTypes = ["vtkMRMLScalarVolumeNode"]
            selector.showChildNodeTypes = False
            selector.addEnabled = False
            selector.removeEnabled = False
            selector.noneEnabled = False
            selector.setMRMLScene(slicer.mrmlScene)
            self.volumeForm.addRow(_("Volume:") if not name else f"{name}:", selector)
            self.volumes.append(selector)

    def onApply(self, checked=False):
        """Start to segment."""
        nodes = [selector.currentNode() for selector in self.volumes]
        if None in nodes:
            self.say(_("expected a volume, found none; load one and choose it"))
            return
        qt.QSettings().setValue(SETTINGS + "ModelLast", self.model.currentPath)
        qt.QSettings().setValue(SETTINGS + "CommandLast", self.command.currentPath)

        def start(folder, variables):
            segkit = find_segkit(self.command.currentPath, self.logic.environment(), variables)
            words = predict_words(
                segkit,
                folder,
                [self.model.currentPath],
                num_channels=len(nodes),
                maps=self.maps.checked,
                mirrors=self.mirrors.checked,
                device=self.device.currentText,
            )
            self.logic.exportVolumes(nodes, folder)
            return Job([words], folder, variables)

        self.start(start, lambda job: self.show(job, nodes[0]), _("starting segkit"))

    def onInstall(self, checked=False):
        """Start to install segkit."""
        environment = self.logic.environment()
        qt.QSettings().setValue(SETTINGS + "PythonLast", self.python.currentPath)
        qt.QSettings().setValue(SETTINGS + "Requirement", self.requirement.text)

        def start(folder, variables):
            steps = install_steps(
                find_python(self.python.currentPath, variables),
                environment,
                self.requirement.text.strip() or "segkit",
                cpu_only=self.cpuOnly.checked,
            )
            return Job(steps, folder, variables, together=True)

        self.start(start, lambda job: _("segkit is installed"), _("installing segkit"))

    def start(self, makeJob, whenDone, text):
        """Start a job in a folder of its own, and look at it from time to time."""
        self.folder = Path(tempfile.mkdtemp(prefix="segkit-", dir=slicer.app.temporaryPath))
        self.whenDone = whenDone
        self.log.clear()
        try:
            variables = clean_environment(slicer.util.startupEnvironment())
            self.job = makeJob(self.folder, variables)
        except ExtensionError as problem:
            remove(self.folder)
            self.say(str(problem))
            return
        except BaseException:
            remove(self.folder)
            raise
        self.say(text)
        self.showRunning(True)
        self.timer.start()

    def onTimer(self):
        """Show how far the job is; if it has ended, show what came of it."""
        job = self.job
        before = len(job.log)
        try:
            ended = job.poll()
        except ExtensionError as problem:  # a later step cannot be started
            self.say(str(problem))
            self.finish()
            return
        for line in job.log[before:]:
            self.log.appendPlainText(line)
        if job.progress is not None:
            self.bar.setRange(0, 100)
            self.bar.setValue(round(100 * job.progress))
        if not ended:
            if job.asked_to_stop is None and job.seconds_left is not None:
                self.say(_("about {0} s left").format(round(job.seconds_left)))
            return
        problem = job.problem()
        try:
            self.say(problem if problem is not None else self.whenDone(job))
        except (ExtensionError, RuntimeError) as error:  # Slicer raises RuntimeError for files
            self.say(str(error))
        finally:
            self.finish()

    def onCancel(self, checked=False):
        """Ask the job to stop."""
        if self.job is not None:
            self.job.stop()
            self.say(_("stopping"))

    def finish(self):
        """Forget the job and remove its files, which hold copies of the scan."""
        self.timer.stop()
        self.job = None
        remove(self.folder)
        forget_environment(self.logic.environment())
        self.showRunning(False)

    def show(self, job, reference):
        """Show the result over the volume. Returns the sentence that says so."""
        result = result_of(self.folder, job.printed)
        segmentation = self.logic.showLabels(result, reference)
        self.overlays = self.logic.loadMaps(result, reference)
        self.shown.clear()
        self.shown.addItems([_("none"), *self.overlays])
        count = segmentation.GetSegmentation().GetNumberOfSegments()
        told = [_("{0} of {1} labels occur in the scan").format(count, len(result.classes))]
        return "; ".join([*told, *result.notes])

    def onMapChosen(self, value=None):
        """Lay the chosen map over the scan."""
        node = self.overlays.get(self.shown.currentText)
        slicer.util.setSliceViewerLayers(
            foreground=node, foregroundOpacity=self.opacity.value if node is not None else 0
        )

    def showRunning(self, running):
        """Enable the buttons that make sense."""
        self.apply.enabled = not running
        self.install.enabled = not running
        self.cancel.enabled = running
        self.bar.visible = running
        self.bar.setRange(0, 0)  # a bar without a share, until the job tells one

    def say(self, text):
        """Show a sentence."""
        self.status.text = text[:1].upper() + text[1:]


class SegkitPredictLogic(ScriptedLoadableModuleLogic):
    """From nodes of the scene to files, and from segkit's files to nodes."""

    def environment(self):
        """The folder of the environment that Install makes, beside Slicer's settings."""
        return Path(slicer.app.slicerUserSettingsFilePath).parent / "segkit-environment"

    def exportVolumes(self, nodes, folder):
        """Save the channels of a scan, in the coordinates of the volumes, without transforms.

        Raises:
            ExtensionError: a volume cannot be saved.
        """
        for node, name in zip(nodes, input_names(len(nodes))):
            path = os.path.join(folder, name)
            if not slicer.util.exportNode(node, path, {"useCompression": 0}):
                raise ExtensionError(
                    f"{node.GetName()} cannot be saved to {path}; free some space there"
                )

    def showLabels(self, result, reference):
        """A segmentation node with the name, the colour and the concept of each label."""
        labelmap = slicer.util.loadLabelVolume(str(result.labels), {"show": False})
        node = slicer.mrmlScene.AddNewNodeByClass(
            "vtkMRMLSegmentationNode", f"{reference.GetName()} segmentation"
        )
        node.CreateDefaultDisplayNodes()
        node.SetReferenceImageGeometryParameterFromVolumeNode(reference)
        slicer.modules.segmentations.logic().ImportLabelmapToSegmentationNode(labelmap, node)
        self.forgetFile(labelmap)
        slicer.mrmlScene.RemoveNode(labelmap)
        node.SetAndObserveTransformNodeID(reference.GetTransformNodeID())
        segmentation = node.GetSegmentation()
        classes = {label.number: label for label in result.classes}
        for identity in list(segmentation.GetSegmentIDs()):
            segment = segmentation.GetSegment(identity)
            label = classes.get(segment.GetLabelValue())
            if label is None:
                segmentation.RemoveSegment(identity)  # a background that is not 0
                continue
            segment.SetName(label.name)
            if label.colour is not None:
                segment.SetColor(*label.colour)
            if label.terminology is not None:
                segment.SetTag(segment.GetTerminologyEntryTagName(), label.terminology)
        node.CreateClosedSurfaceRepresentation()
        return node

    def loadMaps(self, result, reference):
        """A volume node for each map, by its key, on the map's own grid.

        Values that were not computed are NaN. The threshold keeps what lies between two values, so
        it makes NaN transparent. Colours are not interpolated, so that each cell of the map shows.
        """
        nodes = {}
        for overlay in result.maps:
            properties = {"name": overlay.key, "show": False, "singleFile": True}
            node = slicer.util.loadVolume(str(overlay.path), properties)
            self.forgetFile(node)
            node.SetAndObserveTransformNodeID(reference.GetTransformNodeID())
            display = node.GetDisplayNode()
            display.SetAndObserveColorNodeID(INFERNO)
            display.SetAutoWindowLevel(False)
            display.SetWindowLevelMinMax(overlay.low, overlay.high)
            display.SetThreshold(-1e30, 1e30)
            display.SetApplyThreshold(True)
            display.SetInterpolate(False)
            nodes[overlay.key] = node
        return nodes

    def forgetFile(self, node):
        """Let Slicer save the node with its scene, because its file is removed."""
        storage = node.GetStorageNode()
        node.SetAndObserveStorageNodeID(None)
        if storage is not None:
            slicer.mrmlScene.RemoveNode(storage)


class SegkitPredictTest(ScriptedLoadableModuleTest):
    """What only Slicer can show: that nodes have the names, colours and places of the files."""

    def runTest(self):
        """Run the test."""
        slicer.mrmlScene.Clear()
        self.test_labels_keep_names_colours_and_concepts()

    def test_labels_keep_names_colours_and_concepts(self):
        """Write files as segkit does, and show them."""
        import numpy as np

        from SegkitPredictLib.results import Label, Overlay, Result

        scan = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "scan")
        slicer.util.updateVolumeFromArray(scan, np.zeros((8, 9, 10), np.int16))
        scan.SetSpacing(1.0, 2.0, 3.0)
        scan.SetOrigin(4.0, 5.0, 6.0)
        values = np.zeros((8, 9, 10), np.uint8)
        values[2:4], values[6:] = 1, 4
        labels = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLLabelMapVolumeNode", "labels")
        slicer.util.updateVolumeFromArray(labels, values)
        labels.CopyOrientation(scan)
        coarse = slicer.mrmlScene.AddNewNodeByClass("vtkMRMLScalarVolumeNode", "coarse")
        map_values = np.full((2, 3, 3), 0.5, np.float32)
        map_values[0, 0, 0] = np.nan
        slicer.util.updateVolumeFromArray(coarse, map_values)
        coarse.SetSpacing(4.0, 8.0, 12.0)
        coarse.SetOrigin(5.5, 8.0, 10.5)
        folder = Path(tempfile.mkdtemp(dir=slicer.app.temporaryPath))
        slicer.util.exportNode(labels, str(folder / "labels.nrrd"))
        slicer.util.exportNode(coarse, str(folder / "map.nii.gz"))
        concept = "c~SCT^123037004^Anatomical Structure~SCT^10200004^Liver~^^~~^^~^^"
        result = Result(
            folder / "labels.nrrd",
            (Label(1, "liver", (1.0, 0.5, 0.0), concept), Label(4, "lesion", None, None)),
            0,
            (Overlay(folder / "map.nii.gz", "skip.1/gate", 0.0, 1.0),),
        )
        logic = SegkitPredictLogic()
        segmentation = logic.showLabels(result, scan).GetSegmentation()
        maps = logic.loadMaps(result, scan)
        remove(folder)
        segments = [
            segmentation.GetNthSegment(number)
            for number in range(segmentation.GetNumberOfSegments())
        ]
        self.assertEqual([segment.GetName() for segment in segments], ["liver", "lesion"])
        self.assertEqual(segments[0].GetColor(), (1.0, 0.5, 0.0))
        self.assertEqual(segments[0].GetTerminology(), concept)
        shown = maps["skip.1/gate"]
        np.testing.assert_allclose(shown.GetSpacing(), (4.0, 8.0, 12.0), rtol=1e-5)
        np.testing.assert_allclose(shown.GetOrigin(), (5.5, 8.0, 10.5), rtol=1e-5)
        self.assertTrue(np.isnan(slicer.util.arrayFromVolume(shown)[0, 0, 0]))
        self.delayDisplay("Test passed")
