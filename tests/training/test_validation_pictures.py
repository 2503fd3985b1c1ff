"""Pictures of held-out cases: the right way up, as round as in the patient, of one pass."""

import logging
from pathlib import Path

import numpy as np
import pytest
from numpy import ndarray

from segkit.io.pictures import (
    CasePicture,
)
from segkit.training import parts as training
from segkit.training import validation_pictures as samples
from segkit.training.fit import train
from tests.small import small_config, small_dataset

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


def test_each_validation_leaves_a_picture_of_what_it_predicted(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    passes, rows = [], []
    segment, draw_rows = training.segment_prepared, samples.draw_cases

    def counted(*inputs: object, **settings: object) -> object:
        passes.append(segment(*inputs, **settings))  # type: ignore[arg-type]
        return passes[-1]

    def kept(given: list[CasePicture], **words: object) -> ndarray:
        rows.append(list(given))
        return draw_rows(given, **words)  # type: ignore[arg-type]

    monkeypatch.setattr(training, "segment_prepared", counted)
    monkeypatch.setattr(samples, "draw_cases", kept)
    config = small_config(dataset, data={"validation": 0.5}, train={"pictures": 1})
    run = train(config, runs=tmp_path)
    assert len(passes) == 2 * 2  # two validations of two cases
    written = sorted((run.folder / "samples").iterdir())
    assert [path.name for path in written] == ["step_000002.png", "step_000004.png"]
    assert [len(given) for given in rows] == [1, 1]
    (shown,) = rows[0]
    (first, *_) = run.summary["validation"]["dice_of_cases"]
    assert shown.caption.startswith(first)
    assert any(
        np.array_equal(shown.predictions[2], passes[0].numpy()[:, :, at].T[::-1, ::-1])
        for at in range(16)
    )
    events = EventAccumulator(str(run.folder / "tensorboard"))
    events.Reload()
    logged = events.Images("samples")
    assert [image.step for image in logged] == [2, 4]
    with Image.open(written[0]) as picture:
        assert (logged[0].width, logged[0].height) == picture.size


@pytest.mark.parametrize("missing", [False, True])
def test_no_picture_if_none_is_wanted_or_pillow_is_missing(
    missing: bool,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if missing:
        monkeypatch.setattr(samples, "find_spec", lambda name: None)
    count = 2 if missing else 0
    with caplog.at_level(logging.INFO, "segkit"):
        run = train(small_config(dataset, train={"steps": 1, "pictures": count}), runs=tmp_path)
    assert not (run.folder / "samples").exists()
    told = [line for line in caplog.messages if "held-out cases are not drawn" in line]
    assert len(told) == missing
