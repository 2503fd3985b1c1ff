"""Laws of prediction: what goes in comes back where it was, and maps lie where their cells are."""

from collections.abc import Collection, Iterable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from numpy import ndarray
from numpy.testing import assert_allclose, assert_array_equal
from torch import Tensor

from segkit.config.attention import (
    AdditiveGridGateConfig,
    AttentionConfig,
    SqueezeExcitationConfig,
)
from segkit.config.model import PostprocessingConfig
from segkit.config.network import NetworkConfig
from segkit.data.preprocess import prepare_image
from segkit.errors import ModelError, VolumeError
from segkit.geometry.grid import Grid, Orientation
from segkit.inference.attention_maps import map_on_source
from segkit.inference.engines.torch_eager import PRESENCE, TorchEngine
from segkit.inference.model_walk import PredictionOptions
from segkit.inference.predict_files import predict_files
from segkit.inference.predictor import Predictor
from segkit.inference.segment_prepared import segment_prepared
from segkit.inference.source_rows import WALK_AXIS, to_source_rows
from segkit.inference.windows import WindowLayout, stream
from segkit.io.inputs import find_inputs
from segkit.io.volume import Volume
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model, save_model
from segkit.nn.slicewise import SlicewiseNetwork
from tests.helpers import ORIENTATIONS, affine_of
from tests.models import (
    class_volume,
    constant_gates,
    description,
    headed_model,
    inside_both,
    nearest_class,
    noise_volume,
    pooled_coordinates,
    random_model,
    world_axes,
)


def test_a_second_component_is_removed_if_the_model_has_post_processing() -> None:
    values = np.zeros((20, 12, 9), np.uint8)
    values[2:6, 3:7, 2:6] = 1  # the larger
    values[4:6, 3:5, 3:5] = 2  # a class inside it
    values[12:15, 8:11, 4:7] = 2  # the smaller, the largest of its class
    volume = Volume(values, Grid(values.shape, np.eye(4)))
    told = description(classes=3, spacing=(1.0, 1.0, 1.0))
    network = nearest_class(3)

    def labels(adopted: PostprocessingConfig) -> ndarray:
        changed = told.model_copy(update={"postprocessing": adopted})
        prediction = Predictor(Model(changed, network))(volume, probabilities=True)
        # Probabilities stay those of the network.
        assert prediction.probabilities is not None
        assert_array_equal(prediction.probabilities.data.argmax(axis=3), values)
        return prediction.labels.data

    assert_array_equal(labels(PostprocessingConfig()), values)
    without_blob, without_inside = values.copy(), values.copy()
    without_blob[12:15] = 0
    assert_array_equal(labels(PostprocessingConfig(largest_foreground=True)), without_blob)
    without_inside[4:6, 3:5, 3:5] = 0
    assert_array_equal(labels(PostprocessingConfig(largest_of=(2,))), without_inside)
    both = PostprocessingConfig(largest_foreground=True, largest_of=(2,))
    assert_array_equal(labels(both), without_blob)


@pytest.mark.parametrize("code", sorted(ORIENTATIONS))
def test_every_orientation_comes_back_voxel_for_voxel(code: str) -> None:
    grid = Grid((9, 11, 7), affine_of(code))
    volume = class_volume(grid, 5)
    spacing = Orientation.of(grid.affine).turn_grid(grid).spacing
    predictor = Predictor(Model(description(classes=5, spacing=spacing), nearest_class(5)))
    prediction = predictor(volume)
    assert_array_equal(prediction.labels.data, volume.data)
    assert prediction.labels.grid is volume.grid
    assert prediction.labels.data.dtype == np.uint8


@pytest.mark.parametrize("code", ["RAS", "LPS", "PSR", "IAL"])
@pytest.mark.parametrize("slice_distance", [1.0, 1.9, 3.9])
def test_slices_far_apart_are_not_blended_on_the_way_there_or_back(
    code: str, slice_distance: float
) -> None:
    """Noise from slice to slice comes back voxel for voxel, at any finer distance of slices."""
    x, y, z = ((0.7, 1.3, 4.0)[axis] for axis in world_axes(code))
    grid = Grid((9, 11, 7), affine_of(code, spacing=(x, y, z)))
    values = np.random.default_rng(0).integers(0, 5, grid.shape)
    predictor = Predictor(
        Model(description(classes=5, spacing=(0.7, 1.3, slice_distance)), nearest_class(5))
    )
    volume = Volume(values.astype(np.uint8), grid)
    prepared = predictor.prepare(volume)
    assert prepared.orders == (1, 1, 0) and prepared.grid.shape[2] > prepared.source.shape[2] - 1
    assert_array_equal(predictor(volume).labels.data, values)


def test_an_interpolation_is_the_models(tmp_path: Path) -> None:
    grid = Grid((9, 8, 7), np.diag([1.0, 1.0, 1.0, 1.0]))
    volume = Volume(np.random.default_rng(0).normal(size=grid.shape).astype(np.float32), grid)
    told = description(spacing=(0.8, 0.9, 1.1))
    assert told.interpolation == "linear"  # as in models from before there was another
    images = {}
    for name, order in (("linear", 1), ("cubic", 3)):
        model = Model(told.model_copy(update={"interpolation": name}), nearest_class(2))
        save_model(tmp_path / name, Model(model.description, build_network(told)))
        assert load_model(tmp_path / name).description.interpolation == name
        prepared = Predictor(model).prepare(volume)
        assert prepared.orders == (order,) * 3
        images[name] = prepared.image
    assert not torch.equal(images["linear"], images["cubic"])


@pytest.mark.parametrize("code", sorted(ORIENTATIONS))
def test_a_file_of_every_orientation_comes_back_with_its_affine_codes_and_units(
    code: str, tmp_path: Path
) -> None:
    affine = affine_of(code)
    values = class_volume(Grid((9, 11, 7), affine), 5).data
    image = nib.Nifti1Image(values, affine)
    image.set_sform(affine, 3)
    image.set_qform(affine, 1)
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, tmp_path / "scan.nii.gz")
    spacing = Orientation.of(affine).turn_grid(Grid((9, 11, 7), affine)).spacing
    predictor = Predictor(Model(description(classes=5, spacing=spacing), nearest_class(5)))
    (outcome,) = predict_files(predictor, find_inputs([tmp_path / "scan.nii.gz"], 1))
    assert outcome.error is None
    source, result = nib.load(tmp_path / "scan.nii.gz"), nib.load(outcome.written[0])
    assert_array_equal(np.asarray(result.dataobj), values)
    index = np.array(list(np.ndindex(*values.shape)))
    assert_allclose(
        nib.affines.apply_affine(result.affine, index),
        nib.affines.apply_affine(affine, index),
        atol=1e-4,
    )
    for form in ("get_sform", "get_qform"):
        expected, found = (getattr(file, form)(coded=True) for file in (source, result))
        assert_array_equal(found[0], expected[0])
        assert found[1] == expected[1]
    assert result.header.get_xyzt_units() == ("mm", "sec")


@pytest.mark.parametrize("code", ["RAS", "LPS", "PSR", "IAL"])
@pytest.mark.parametrize("spacing", [(0.7, 1.3, 4.0), (1.0, 1.0, 1.0), (2.5, 0.9, 3.0)])
def test_world_coordinates_survive_resampling_windows_and_the_way_back(
    code: str, spacing: tuple[float, float, float]
) -> None:
    grid = Grid((13, 17, 9), affine_of(code))
    world = grid.centres()
    prepared = prepare_image(
        Volume(world.astype(np.float32), grid), spacing=spacing, normalisers=[lambda x: x] * 3
    )
    slabs = stream(
        prepared.image,
        lambda windows: {"logits": windows},
        WindowLayout((8, 8, 8), (0.5, 0.5, 0.5), (4, 4, 4)),
        axis=WALK_AXIS,
    )
    back = np.full((*prepared.source.shape, 3), np.nan, np.float32)
    for first, rows in to_source_rows((slab.rows["logits"] for slab in slabs), prepared):
        planes = rows._resampled(slice(None)).movedim(0, -1).numpy()
        back[:, :, first : first + rows.count] = planes
    assert np.isfinite(back).all()
    returned = prepared.orientation.turn_back(back)
    inside = inside_both(prepared.grid, grid)
    assert inside.mean() > 0.25
    assert_allclose(returned[inside], world[inside], atol=1e-4)


@pytest.mark.parametrize(
    "strides", [[[2, 2, 2]] * 3, [[2, 2, 1], [2, 2, 1], [2, 2, 2]]], ids=["even", "anisotropic"]
)
@pytest.mark.parametrize("code", ["RAS", "LPS", "ASL"])
def test_a_pooled_coordinate_field_comes_back_within_a_hundredth_of_a_millimetre(
    strides: list[list[int]], code: str
) -> None:
    model = pooled_coordinates(strides)
    axes = [(0.7, 1.3, 4.0)[world] for world in world_axes(code)]
    x, y, z = axes
    grid = Grid((35, 37, 29), affine_of(code, spacing=(x, y, z)))
    world = grid.centres()
    volume = Volume(world.astype(np.float32), grid)
    prediction = Predictor(model)(volume, maps=True)
    assert set(prediction.maps) == {"skip.0/gate", "skip.1/gate", "skip.2/gate"}
    for attention_map in prediction.maps.values():
        native = attention_map.volume
        assert native is not None
        # On its own grid: every cell that lies wholly in the volume holds its own place.
        cells = native.grid.centres()
        placement = attention_map.info.placement
        assert placement is not None
        turned = Orientation.of(grid.affine).turn_grid(grid)
        whole = np.array(turned.shape) // np.array(placement.stride).astype(int)
        region = tuple(slice(0, size) for size in whole)
        assert_allclose(native.data[region], cells[region], atol=1e-2)
        # On the volume's grid: every voxel between the centres of such cells.
        onto = map_on_source(attention_map, volume)
        index = native.grid.index(world)
        inside = ((index >= 0) & (index <= whole - 1)).all(axis=-1)
        assert inside.mean() > 0.2
        assert_allclose(onto.data[inside], world[inside], atol=1e-2)


def test_a_constant_gate_gives_a_constant_map_at_every_level() -> None:
    volume = Volume(np.random.default_rng(0).random((13, 9, 21)), Grid((13, 9, 21), np.eye(4)))
    maps = Predictor(constant_gates(0.3125))(volume, maps=True).maps
    assert list(maps) == ["skip.0/gate", "skip.1/gate"]
    for attention_map in maps.values():
        assert attention_map.volume is not None
        assert_allclose(attention_map.volume.data, 0.3125, rtol=1e-6)
        assert_allclose(map_on_source(attention_map, volume).data, 0.3125, rtol=1e-6)


def test_requesting_maps_and_probabilities_changes_no_label() -> None:
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    volume = noise_volume((15, 14, 13))
    predictor = Predictor(random_model(network))
    bare, full = predictor(volume), predictor(volume, maps=True, probabilities=True)
    assert_array_equal(bare.labels.data, full.labels.data)
    assert full.probabilities is not None
    assert full.probabilities.data.shape == (15, 14, 13, 3)
    assert full.probabilities.data.dtype == np.float32
    assert_allclose(full.probabilities.data.sum(-1), 1, atol=1e-6)
    assert_array_equal(full.probabilities.data.argmax(-1), full.labels.data)


@pytest.mark.parametrize("num_models", [1, 2])
@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.3, 2.1)])
def test_probabilities_add_up_to_1_and_the_largest_is_of_the_label_whatever_the_spacing(
    num_models: int, spacing: tuple[float, float, float]
) -> None:
    source = noise_volume((15, 14, 13))
    volume = Volume(source.data, Grid((15, 14, 13), np.diag([*spacing, 1.0])))
    models = [random_model(NetworkConfig(channels=[4, 4, 4])) for _ in range(num_models)]
    result = Predictor(models)(volume, probabilities=True)
    assert result.probabilities is not None
    assert_allclose(result.probabilities.data.sum(-1), 1, atol=1e-6)
    assert_array_equal(result.probabilities.data.argmax(-1), result.labels.data)


def test_streamed_labels_are_those_of_the_whole_at_once() -> None:
    volume = noise_volume((20, 14, 27))
    model = random_model(NetworkConfig(channels=[4, 4, 4]))
    streamed = Predictor(model)(volume).labels.data
    whole = segment_prepared(
        model.network, torch.from_numpy(volume.data[None]), patch_size=(8, 8, 8)
    )
    assert len(np.unique(streamed)) == 3
    assert (streamed == whole.numpy()).mean() > 0.9999


def test_a_2d_network_segments_a_volume_slice_by_slice() -> None:
    network = NetworkConfig(spatial_dims=2, channels=[4, 4, 4])
    model = random_model(network, patch_size=(8, 8))
    assert isinstance(model.network, SlicewiseNetwork)
    volume = noise_volume((8, 8, 11))
    labels = Predictor(model)(volume).labels.data
    for index in range(11):
        plane = torch.from_numpy(volume.data[None, None, :, :, index])
        alone = model.network.network(plane)[0].argmax(0).numpy()
        assert_array_equal(labels[:, :, index], alone)


def test_maps_over_channels_come_as_mean_and_deviation_over_windows() -> None:
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(encoder=SqueezeExcitationConfig())
    )
    model = random_model(network)
    volume = noise_volume((8, 8, 8))
    maps = Predictor(model)(volume, maps=True).maps
    assert list(maps) == ["encoder.0/channel", "encoder.1/channel", "encoder.2/channel"]
    first = maps["encoder.0/channel"]
    assert first.volume is None and first.channel_mean is not None and first.channel_std is not None
    assert first.channel_mean.shape == (4,)
    assert ((first.channel_mean > 0) & (first.channel_mean < 1)).all()
    assert_array_equal(first.channel_std, 0)  # there is one window only


@pytest.mark.parametrize(
    ("patch_size", "shape", "options", "batches"),
    [
        ((8, 8, 8), (16, 8, 8), {}, [2, 1]),  # three windows; the engine doubles the last
        ((8, 8, 8), (8, 8, 8), {"tta": True}, [2, 2]),  # one window, four mirror images
        ((8, 8, 8), (16, 8, 8), {"batch_size": 1}, [1, 1, 1]),
        ((72, 72, 8), (144, 72, 8), {}, [1, 1, 1]),  # 4 channels x 72 x 72 is not small
        ((8, 8), (16, 8, 1), {}, [1, 1, 1]),
    ],
)
def test_small_windows_on_a_cpu_are_computed_two_at_once(
    patch_size: tuple[int, ...],
    shape: tuple[int, int, int],
    options: PredictionOptions,
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = NetworkConfig(channels=[4, 4, 4], spatial_dims=len(patch_size))
    model = random_model(network, patch_size)
    model = Model(model.description.model_copy(update={"mirror": ["x", "y"]}), model.network)
    predictor = Predictor(model, device="cpu", engine="torch", **options)
    seen = batch_sizes(monkeypatch)
    predictor(noise_volume(shape))
    assert seen == batches


@pytest.mark.parametrize(
    ("patch_size", "shape", "batches"),
    [
        ((8, 8, 8), (8, 16, 8), [2, 1]),
        ((72, 72, 8), (72, 144, 8), [1, 1, 1]),
        ((8, 8), (16, 8, 1), [1, 1, 1]),
    ],
)
def test_validation_computes_as_many_windows_at_once_as_prediction(
    patch_size: tuple[int, ...],
    shape: tuple[int, int, int],
    batches: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    network = NetworkConfig(channels=[4, 4, 4], spatial_dims=len(patch_size))
    model = random_model(network, patch_size)
    image = torch.from_numpy(noise_volume(shape).data[None])
    seen = batch_sizes(monkeypatch)
    segment_prepared(model.network, image, patch_size=model.description.volume_patch)
    assert seen == batches


def batch_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list to which each later call of PyTorch's engine adds its number of windows."""
    called = TorchEngine.__call__
    seen: list[int] = []

    def watched(engine: TorchEngine, windows: Tensor, keys: Collection[str]) -> dict[str, Tensor]:
        seen.append(len(windows))
        return called(engine, windows, keys)

    monkeypatch.setattr(TorchEngine, "__call__", watched)
    return seen


def test_batches_of_windows_change_nothing_but_the_last_digits() -> None:
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    model = random_model(network)
    volume = noise_volume((20, 20, 20))
    one = Predictor(model, batch_size=1)(volume, maps=True, probabilities=True)
    five = Predictor(model, batch_size=5)(volume, maps=True, probabilities=True)
    assert one.probabilities is not None and five.probabilities is not None
    assert_allclose(one.probabilities.data, five.probabilities.data, atol=2e-3)
    left, right = one.maps["skip.1/gate"].volume, five.maps["skip.1/gate"].volume
    assert left is not None and right is not None
    assert_allclose(left.data, right.data, atol=1e-5)


def test_many_classes_go_block_by_block_to_the_same_labels() -> None:
    grid = Grid((10, 9, 8), np.diag([1.0, 1.0, 1.0, 1.0]))
    volume = class_volume(grid, 21)
    model = Model(description(classes=21, spacing=(1.0, 1.0, 1.0)), nearest_class(21))
    assert_array_equal(Predictor(model)(volume).labels.data, volume.data)


def test_more_labels_than_a_byte_holds_take_two_bytes() -> None:
    volume = Volume(np.full((8, 8, 8), 299.0), Grid((8, 8, 8), np.eye(4)))
    model = Model(description(classes=300, spacing=(1.0, 1.0, 1.0)), nearest_class(300))
    labels = Predictor(model)(volume).labels.data
    assert labels.dtype == np.uint16
    assert_array_equal(labels, 299)


def test_a_volume_with_other_channels_is_refused() -> None:
    predictor = Predictor(Model(description(spacing=(1.0, 1.0, 1.0)), nearest_class(2)))
    volume = Volume(np.zeros((8, 8, 8, 2)), Grid((8, 8, 8), np.eye(4)))
    with pytest.raises(ModelError, match=r"expects 1 channel \(channel 0\), found 2 in the volume"):
        predictor(volume)


def test_a_volume_with_holes_in_its_numbers_is_refused() -> None:
    predictor = Predictor(Model(description(spacing=(1.0, 1.0, 1.0)), nearest_class(2)))
    values = np.zeros((8, 8, 8))
    values[1, 2, 3] = np.nan
    with pytest.raises(VolumeError, match="1 NaN or infinite values among 512"):
        predictor(Volume(values, Grid((8, 8, 8), np.eye(4))))


def test_progress_sees_every_slab_and_their_number_beforehand() -> None:
    seen: list[int] = []
    counts: list[int] = []

    def track(slabs: Iterable, count: int) -> Iterable:
        counts.append(count)
        for slab in slabs:
            seen.append(1)
            yield slab

    model = Model(description(spacing=(1.0, 1.0, 1.0)), nearest_class(2))
    Predictor(model)(noise_volume((8, 8, 30)), track=track)
    assert counts == [len(seen)] and counts[0] > 1


def test_beyond_the_body_labels_are_background_and_maps_are_nan() -> None:
    """A background of zeros is cut off before the network sees it."""
    grid = Grid((24, 20, 22), affine_of("LPS", spacing=(1.0, 1.0, 1.0), rotation=(0.0, 0.0, 0.0)))
    body = np.zeros(grid.shape, bool)
    body[5:17, 3:15, 6:20] = True
    values = np.where(body, np.random.default_rng(0).normal(5, 1, grid.shape), 0)
    network = NetworkConfig(
        channels=[4, 4, 4], attention=AttentionConfig(skip=AdditiveGridGateConfig())
    )
    predictor = Predictor(random_model(network))
    volume = Volume(values.astype(np.float32), grid)
    prediction = predictor(volume, maps=True, probabilities=True)
    box = (slice(5, 17), slice(3, 15), slice(6, 20))
    corner = grid.placed((12, 12, 14), (1.0, 1.0, 1.0), (5.0, 3.0, 6.0))
    alone = predictor(Volume(volume.data[box], corner), maps=True, probabilities=True)
    assert_array_equal(prediction.labels.data[box], alone.labels.data)
    assert not prediction.labels.data[~body].any()
    assert prediction.probabilities is not None
    assert (prediction.probabilities.data[~body] == [1, 0, 0]).all()
    gate = map_on_source(prediction.maps["skip.1/gate"], volume).data
    assert_allclose(
        gate[box], map_on_source(alone.maps["skip.1/gate"], Volume(volume.data[box], corner)).data
    )
    assert np.isnan(gate[~body]).all() and (gate[body] > 0).all()


def test_presence_of_one_window_is_the_sigmoid_of_the_networks_logits() -> None:
    model = headed_model()
    volume = noise_volume((8, 8, 8))
    presence = Predictor(model)(volume).presence
    with torch.no_grad():
        logits = model.network.classified(torch.from_numpy(volume.data[None, None]))[1]
    first, second = torch.sigmoid(logits[0]).tolist()
    assert abs(first - second) > 0.01
    assert presence == pytest.approx({"label 1": first, "label 2": second}, rel=1e-5)
    assert presence is not None and list(presence) == ["label 1", "label 2"]


def test_presence_of_a_volume_is_the_highest_of_its_windows() -> None:
    predictor = Predictor(headed_model())
    volume = noise_volume((8, 12, 20))
    image = predictor.prepare(volume).image
    # Windows of 8 voxels that share half: at 0 and 4 of 12 voxels, and at 0, 4, 8 and 12 of 20.
    windows = torch.stack(
        [image[:, :, y : y + 8, z : z + 8] for z in (0, 4, 8, 12) for y in (0, 4)]
    )
    logits = predictor.members[0].engine(windows, [PRESENCE])[PRESENCE]
    highest, best = logits.max(dim=0)
    assert logits.std(dim=0).min() > 1e-3
    assert set(best.tolist()) - {0, 7}  # not always the first or the last
    expected = dict(zip(("label 1", "label 2"), torch.sigmoid(highest).tolist(), strict=True))
    for batch_size in (1, 3):
        batched = Predictor(predictor.model, batch_size=batch_size)
        assert batched(volume).presence == pytest.approx(expected, rel=1e-5)


def test_presence_in_2d_is_the_maximum_over_slices() -> None:
    model = headed_model(patch_size=(8, 8), spatial_dims=2)
    assert isinstance(model.network, SlicewiseNetwork)
    volume = noise_volume((8, 8, 11))
    planes = torch.from_numpy(volume.data).movedim(2, 0)[:, None]
    with torch.no_grad():
        highest = model.network.network.classified(planes)[1].amax(dim=0)
    presence = Predictor(model)(volume).presence
    assert presence is not None
    assert_allclose(list(presence.values()), torch.sigmoid(highest).numpy(), rtol=1e-5)


def test_presence_is_the_same_with_maps_and_does_not_change_them() -> None:
    volume = noise_volume((12, 8, 13))
    model = headed_model()
    predictor = Predictor(model)
    bare, full = predictor(volume), predictor(volume, maps=True, probabilities=True)
    assert full.presence == bare.presence
    assert_array_equal(full.labels.data, bare.labels.data)
    assert set(full.maps) == {"skip.1/gate", "head/pool"}

    without = headed_model(attention=AttentionConfig(skip=AdditiveGridGateConfig()))
    without.network.load_state_dict(model.network.state_dict(), strict=False)
    plain = Predictor(without)(volume, maps=True)
    assert plain.presence is None
    assert_array_equal(plain.labels.data, bare.labels.data)
    left, right = plain.maps["skip.1/gate"].volume, full.maps["skip.1/gate"].volume
    assert left is not None and right is not None
    assert_array_equal(left.data, right.data)
