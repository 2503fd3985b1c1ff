"""What several models say is averaged on the volume's own rows, whatever grids they work on."""

import math
import threading
import weakref
from collections.abc import Collection, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor
from torch.testing import assert_close

from segkit.config.attention import AdditiveGridGateConfig, AttentionConfig
from segkit.config.data import ZScoreConfig
from segkit.config.network import NetworkConfig
from segkit.errors import ModelError
from segkit.geometry.grid import Grid
from segkit.inference.engines.torch_eager import LOGITS
from segkit.inference.ensemble import RunningVariance, merge, predictive_entropy
from segkit.inference.predictor import Predictor
from segkit.inference.source_rows import SourceRows
from segkit.io.volume import Volume
from segkit.model.folder import Model, save_model
from tests.helpers import affine_of
from tests.models import description, headed_model, nearest_class, noise_volume, random_model


def seeded(seed: int, **settings: object) -> Model:
    model = random_model(NetworkConfig.model_validate({"channels": [4, 4, 4], **settings}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.network.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def flat_model(seed: int) -> Model:
    torch.manual_seed(seed)
    return random_model(NetworkConfig(spatial_dims=2, channels=[4, 4, 4]), patch_size=(8, 8))


def respaced(model: Model, spacing: tuple[float, float, float]) -> Model:
    return Model(model.description.model_copy(update={"spacing": spacing}), model.network)


def shares_of(predictor: Predictor, volume: Volume) -> np.ndarray:
    found = predictor(volume, probabilities=True).probabilities
    assert found is not None
    return found.data.astype(np.float64)


ENSEMBLES = {
    "one grid": [seeded(1), seeded(2), seeded(3)],
    "several spacings": [seeded(1), respaced(seeded(2), (1.7, 0.8, 2.3))],
    "2D and 3D": [seeded(1), flat_model(4), respaced(flat_model(5), (1.0, 1.3, 0.6))],
}


@pytest.mark.parametrize("name", list(ENSEMBLES))
@pytest.mark.parametrize("code", ["RAS", "LIP"])
def test_probabilities_are_the_mean_of_the_models(name: str, code: str) -> None:
    models = ENSEMBLES[name]
    values = noise_volume((19, 14, 17)).data
    affine = affine_of(code, spacing=(1.0, 1.1, 0.9))
    volume = Volume(values, Grid(values.shape, affine))
    together = Predictor(models)(volume, probabilities=True, uncertainty=True)
    single = np.stack([shares_of(Predictor(model), volume) for model in models])
    assert together.probabilities is not None
    assert_allclose(together.probabilities.data, single.mean(axis=0), atol=2e-3)
    chosen = np.take_along_axis(
        single.mean(axis=0), together.labels.data[..., None].astype(int), axis=-1
    )
    assert (chosen[..., 0] >= single.mean(axis=0).max(axis=-1) - 2e-3).all()
    assert together.variance is not None and together.entropy is not None
    assert together.variance.data.dtype == together.entropy.data.dtype == np.float32
    assert_allclose(together.variance.data, single.var(axis=0).mean(axis=-1), atol=1e-3)
    assert together.variance.data.max() > 0.01
    mean = np.maximum(single.mean(axis=0), 1e-12)
    expected = -(mean * np.log(mean)).sum(axis=-1) / np.log(3)
    assert_allclose(together.entropy.data, expected, atol=3e-3)
    bare = Predictor(models)(volume)
    assert_array_equal(bare.labels.data, together.labels.data)
    assert bare.probabilities is None and bare.entropy is None and bare.variance is None


def test_copies_of_one_model_are_that_model() -> None:
    volume = noise_volume((12, 9, 21))
    one = Predictor(seeded(1))(volume, probabilities=True, uncertainty=True)
    three = Predictor([seeded(1)] * 3)(volume, probabilities=True, uncertainty=True)
    assert one.probabilities is not None and three.probabilities is not None
    assert_array_equal(one.probabilities.data, three.probabilities.data)
    assert one.entropy is not None and three.entropy is not None and three.variance is not None
    assert one.variance is not None
    assert_array_equal(one.entropy.data, three.entropy.data)
    assert_array_equal(three.variance.data, 0)
    assert np.isnan(one.variance.data).all()  # one answer has no variance
    assert ((one.entropy.data >= 0) & (one.entropy.data <= 1)).all()


def test_variance_of_models_and_of_mirror_images_add_up() -> None:
    models = [
        Model(model.description.model_copy(update={"mirror": ["x"]}), model.network)
        for model in (seeded(1), seeded(2))
    ]
    volume = noise_volume((8, 8, 8))
    found = Predictor(models, tta=True)(volume, uncertainty=True).variance
    within = [Predictor(m, tta=True)(volume, uncertainty=True).variance for m in models]
    single = np.stack([shares_of(Predictor(model, tta=True), volume) for model in models])
    assert found is not None and within[0] is not None and within[1] is not None
    expected = single.var(axis=0).mean(axis=-1) + (within[0].data + within[1].data) / 2
    assert_allclose(found.data, expected, atol=1e-3)


def test_maps_are_those_of_the_first_model_and_presence_is_the_mean() -> None:
    gated = seeded(1, attention=AttentionConfig(skip=AdditiveGridGateConfig()))
    volume = noise_volume((9, 8, 12))
    together = Predictor([gated, seeded(2)])(volume, maps=True)
    alone = Predictor(gated)(volume, maps=True)
    assert list(together.maps) == ["skip.1/gate"] and together.presence is None
    left, right = together.maps["skip.1/gate"].volume, alone.maps["skip.1/gate"].volume
    assert left is not None and right is not None
    assert_array_equal(left.data, right.data)
    headed = [headed_model(), headed_model()]
    with torch.no_grad():
        for parameter in headed[1].network.parameters():
            parameter.mul_(1.5)
    single = [Predictor(model)(volume).presence for model in headed]
    presence = Predictor([*headed, seeded(2)])(volume).presence
    assert presence is not None and single[0] is not None and single[1] is not None
    for name, share in presence.items():
        assert share == pytest.approx((single[0][name] + single[1][name]) / 2, abs=1e-6)
        assert single[0][name] != pytest.approx(single[1][name], abs=1e-4)


def test_models_of_several_tasks_do_not_predict_together() -> None:
    spacing = (1.0, 1.0, 1.0)
    three, four = (Model(description(classes=n, spacing=spacing), nearest_class(n)) for n in (3, 4))
    with pytest.raises(ModelError, match=r"same labels and channels, but test has the labels"):
        Predictor([three, four])
    with pytest.raises(ModelError, match="expected at least one model"):
        Predictor([])


def test_models_with_equal_preparation_share_an_image() -> None:
    models = [seeded(1), seeded(2), respaced(seeded(3), (2.0, 1.0, 1.0))]
    scored = seeded(4)
    told = scored.description.model_copy(update={"normalisation": [ZScoreConfig()]})
    predictor = Predictor([*models, Model(told, scored.network)])
    images = predictor._prepare_all(noise_volume((9, 8, 12)), None)
    assert images[0] is images[1]
    assert len({id(image) for image in images}) == 3


def test_a_predictor_of_several_folders_is_one_of_their_models(tmp_path: Path) -> None:
    for number in (1, 2):
        save_model(tmp_path / str(number), seeded(number))
    volume = noise_volume((8, 8, 8))
    loaded = Predictor.load(tmp_path / "1", tmp_path / "2", engine="torch")
    assert_array_equal(
        shares_of(loaded, volume), shares_of(Predictor([seeded(1), seeded(2)]), volume)
    )


def rows_of(*lengths: int, alive: list[weakref.ref[Tensor]]) -> Iterator[tuple[int, SourceRows]]:
    """Rows that hold their own numbers, in chunks."""
    first = 0
    for length in lengths:
        slab = torch.arange(first, first + length).float().expand(1, 2, 2, length).clone()
        alive.append(weakref.ref(slab))
        axis = np.arange(2.0)
        yield first, SourceRows(slab, None, (axis, axis, np.arange(float(length))))
        first += length
        del slab


@settings(max_examples=50)
@given(st.integers(1, 30), st.data())
def test_merged_rows_are_the_same_for_all_models_and_each_holds_one_slab(
    size: int, data: st.DataObject
) -> None:
    members, alive = [], []
    for _ in range(3):
        ends = sorted({*data.draw(st.sets(st.integers(1, size))), size})
        alive.append([])
        members.append(rows_of(*np.diff([0, *ends]).tolist(), alive=alive[-1]))
    reached = 0
    for first, rows in merge(members):
        assert first == reached
        assert len({member.count for member in rows}) == 1
        reached += rows[0].count
        for member in rows:
            assert_close(
                member._resampled(slice(None))[0, 0, 0], torch.arange(first, reached).float()
            )
        del rows, member
        for slabs in alive:
            assert sum(slab() is not None for slab in slabs) <= 1
    assert reached == size


def test_entropy_is_1_for_equal_probabilities_and_0_for_a_certain_class() -> None:
    shares = torch.tensor([[0.25, 1.0, 0.5], [0.25, 0.0, 0.5], [0.25, 0.0, 0.0], [0.25, 0.0, 0.0]])
    assert_close(predictive_entropy(shares), torch.tensor([1.0, 0.0, math.log(2) / math.log(4)]))


def test_moments_are_those_of_all_answers_at_once() -> None:
    answers = torch.rand(5, 3, 4, 4)
    moments = RunningVariance(class_axis=0)
    for answer in answers:
        moments.add(answer)
    assert_close(moments.mean, answers.mean(dim=0))
    assert_close(moments.variance, answers.var(dim=0, correction=0).mean(dim=0))
    same = RunningVariance(class_axis=0)
    for _ in range(7):
        same.add(answers[0])
    assert_array_equal(same.mean, answers[0])
    assert_array_equal(same.variance, 0)


def test_an_array_with_an_affine_needs_no_files_and_threads_do_not_disturb_one_another() -> None:
    gated = seeded(1, attention=AttentionConfig(skip=AdditiveGridGateConfig()))
    predictor = Predictor([gated, seeded(2)])
    volumes = [
        Volume(np.random.default_rng(seed).normal(size=(14, 12, 17)), Grid((14, 12, 17), np.eye(4)))
        for seed in range(4)
    ]
    expected = [predictor(volume, maps=True, probabilities=True) for volume in volumes]
    found: dict[int, object] = {}
    start = threading.Barrier(len(volumes))

    def run(number: int) -> None:
        start.wait()
        found[number] = predictor(volumes[number], maps=True, probabilities=True)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(volumes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, alone in enumerate(expected):
        together = found[number]
        assert isinstance(together, type(alone))
        assert_array_equal(together.labels.data, alone.labels.data)
        assert together.probabilities is not None and alone.probabilities is not None
        assert_array_equal(together.probabilities.data, alone.probabilities.data)
        left, right = together.maps["skip.1/gate"].volume, alone.maps["skip.1/gate"].volume
        assert left is not None and right is not None
        assert_array_equal(left.data, right.data)


def test_maps_recorded_by_two_threads_at_once_are_each_threads_own() -> None:
    """Without a lock the second thread's maps would land in the first one's dictionary."""
    gated = seeded(1, attention=AttentionConfig(skip=AdditiveGridGateConfig()))
    predictor = Predictor(gated)
    engine = predictor.members[0].engine
    inside = threading.Semaphore(1)

    def watched(windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        assert inside.acquire(blocking=False), "two threads are in one network"
        try:
            return engine(windows, keys)
        finally:
            inside.release()

    predictor.members[0].engine = watched
    failures: list[BaseException] = []

    def run() -> None:
        try:
            predictor(noise_volume((12, 12, 12)), maps=True)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_progress_is_that_of_the_first_model() -> None:
    counts, seen = [], []

    def track(slabs: Iterator[object], count: int) -> Iterator[object]:
        counts.append(count)
        for slab in slabs:
            seen.append(LOGITS)
            yield slab

    Predictor([seeded(1), respaced(seeded(2), (1.0, 1.0, 0.5))])(
        noise_volume((8, 8, 30)), track=track
    )
    assert counts == [len(seen)]
