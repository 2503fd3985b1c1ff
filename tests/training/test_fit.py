"""Laws of a training run: one seed gives one set of weights, and the folder says what was done."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from numpy.testing import assert_array_equal
from safetensors.torch import load_file

from segkit.config.attention import AttentionConfig, MeanPoolingConfig
from segkit.config.data import ZScoreConfig
from segkit.config.load import load_config
from segkit.config.model import ModelDescription
from segkit.config.network import NetworkConfig
from segkit.data.dataset import read_dataset
from segkit.data.prepared_cache import StoredCase
from segkit.errors import ConfigError, DatasetError
from segkit.evaluation.overlap import Overlap, confusion_matrix
from segkit.inference.predictor import Predictor
from segkit.io.volume import read_volume, write_volume
from segkit.model.build import build_network
from segkit.model.folder import Model, load_model
from segkit.nn import pooling
from segkit.training.final_scores import score
from segkit.training.fit import train
from tests.small import small_config, small_dataset

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def metrics(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(
    dataset: Path, tmp_path: Path
) -> None:
    weights = []
    for seed in (0, 0, 1):
        config = small_config(dataset, train={"seed": seed})
        run = train(config, runs=tmp_path)
        weights.append(load_file(run.folder / "model" / "weights.safetensors"))
    first, second, other = weights
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_a_run_folder_holds_all_that_was_promised(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset), runs=tmp_path)
    assert run.folder == tmp_path / "small"
    for name in ("config.yaml", "last.ckpt", "best.ckpt", "metrics.csv", "summary.json"):
        assert (run.folder / name).is_file(), name
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["steps"] == 4 and summary["seed"] == 0
    assert summary["training_cases"] == 3 and summary["validation"]["cases"] == 1
    assert summary["parameters"] == sum(p.numel() for p in run.model.network.parameters())
    rows = metrics(run.folder)
    scored = [row["validation/dice"] for row in rows if row["validation/dice"]]
    assert len(scored) == 2  # every second of four steps
    resolved = load_config(run.folder / "config.yaml")
    assert resolved.data.spacing == (1.0, 1.0, 1.0)
    asked = small_config(dataset).network
    assert resolved.network.channels == asked.channels
    assert resolved.network.strides == asked.step_strides
    assert resolved.network.kernels == asked.level_kernels


def test_checkpoints_hold_only_plain_data(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset), runs=tmp_path)
    for name in ("last.ckpt", "best.ckpt"):
        content = torch.load(run.folder / name, weights_only=True)
        assert content["state_dict"].keys() >= {"network.heads.0.weight"}


def test_the_last_checkpoint_is_of_the_last_step(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset, train={"steps": 8, "validate_every": 2}), runs=tmp_path)
    content = torch.load(run.folder / "last.ckpt", weights_only=True)
    assert content["global_step"] == 8
    saved = load_file(run.folder / "model" / "weights.safetensors")
    for key, weight in saved.items():
        assert torch.equal(content["state_dict"][f"network.{key}"], weight)


def test_a_second_run_of_the_same_name_gets_a_folder_of_its_own(
    dataset: Path, tmp_path: Path
) -> None:
    config = small_config(dataset, train={"steps": 1})
    names = [train(config, runs=tmp_path).folder.name for _ in range(2)]
    assert names == ["small", "small-2"]


def test_the_summary_is_what_the_saved_model_scores(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset, train={"steps": 30, "validate_every": 30}), runs=tmp_path)
    scores = run.summary["validation"]
    (name,) = scores["dice_of_cases"]
    label = read_volume(dataset / "labelsTr" / f"{name}.nii.gz").data
    predictor = Predictor(load_model(run.folder))
    predicted = predictor(read_volume(dataset / "imagesTr" / f"{name}.nii.gz")).labels.data
    matrix = confusion_matrix(torch.from_numpy(predicted), torch.from_numpy(label), 2)
    expected = float(Overlap.of_groups(matrix, [[1]]).dice[0])
    assert 0 < expected <= 1
    assert scores["mean_dice"] == pytest.approx(expected, abs=1e-9)


@pytest.mark.slow
def test_training_learns_the_balls(dataset: Path, tmp_path: Path) -> None:
    config = small_config(
        dataset, train={"steps": 120, "validate_every": 120}, network={"channels": [8, 16, 16]}
    )
    assert train(config, runs=tmp_path).summary["validation"]["mean_dice"] > 0.8


def test_a_2d_network_trains_on_slices_and_predicts_the_volume(
    dataset: Path, tmp_path: Path
) -> None:
    config = small_config(
        dataset,
        network={"spatial_dims": 2},
        data={"patch_size": [16, 16], "batch_size": 4, "slices": "coronal"},
    )
    run = train(config, runs=tmp_path)
    prediction = Predictor.load(run.folder)(
        read_volume(dataset / "imagesTr" / "case_0.nii.gz"), maps=True
    )
    assert prediction.labels.data.shape == (16, 16, 16)
    info = prediction.maps["skip.1/gate"].info
    assert info.placement is not None and info.placement.stride == (4.0, 1.0, 4.0)


@pytest.mark.slow
def test_a_dataset_of_only_label_maps_is_trained_by_synthesis(
    dataset: Path, tmp_path: Path
) -> None:
    bare = small_dataset(tmp_path / "bare")
    content = json.loads((bare / "dataset.json").read_text())
    for entry in content["training"][:3]:
        del entry["image"]
    (bare / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(DatasetError, match="has no image"):
        train(small_config(bare, data={"validation": ["case_3"]}), runs=tmp_path)
    drawn = small_config(
        bare,
        data={
            "validation": ["case_3"],
            "synthesis": {"intensities": {"background": [0.0, 0.3], "ball": [0.7, 1.0]}},
        },
        train={"steps": 80, "validate_every": 80, "learning_rate": 0.01},
        network={"channels": [8, 16, 16]},
    )
    assert train(drawn, runs=tmp_path).summary["validation"]["mean_dice"] > 0.5
    wrong = small_config(
        bare, data={"validation": ["case_3"], "synthesis": {"intensities": {"bal": [0, 1]}}}
    )
    with pytest.raises(ConfigError, match="names 'bal', but the dataset has 'background', 'ball'"):
        train(wrong, runs=tmp_path)


def test_a_ct_window_is_read_off_the_training_cases(tmp_path: Path) -> None:
    data = small_dataset(tmp_path / "data")
    content = json.loads((data / "dataset.json").read_text())
    content["modality"] = {"0": "CT"}
    (data / "dataset.json").write_text(json.dumps(content))
    run = train(
        small_config(data, data={"validation": ["case_0"]}, train={"steps": 1}), runs=tmp_path
    )
    (window,) = run.model.description.normalisation
    images = [read_volume(data / "imagesTr" / f"case_{i}.nii.gz").data for i in (1, 2, 3)]
    labels = [read_volume(data / "labelsTr" / f"case_{i}.nii.gz").data for i in (1, 2, 3)]
    inside = np.concatenate(
        [image[label > 0] for image, label in zip(images, labels, strict=True)]
    ).astype(float)
    assert window.model_dump() == pytest.approx(
        {
            "kind": "ct",
            "lower": np.percentile(inside, 0.5),
            "upper": np.percentile(inside, 99.5),
            "mean": inside.mean(),
            "std": inside.std(),
        }
    )


@pytest.mark.parametrize("wrong", [{"accelerator": "abacus"}, {"strategy": "hope"}])
def test_settings_that_lightning_refuses_give_one_sentence_and_leave_no_run(
    wrong: dict[str, object], dataset: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="trainer: Lightning refuses these settings"):
        train(small_config(dataset, trainer=wrong), runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_fewer_held_out_cases_than_processes_are_refused(dataset: Path, tmp_path: Path) -> None:
    config = small_config(
        dataset, data={"validation": 0.25}, trainer={"devices": 4, "strategy": "ddp"}
    )
    with pytest.raises(
        ConfigError, match=r"^each of the 4 processes needs a held-out case, but only \d"
    ):
        train(config, runs=tmp_path)
    assert not (tmp_path / "small").exists()


def test_the_dataset_folder_is_left_as_it_was(dataset: Path, tmp_path: Path) -> None:
    before = sorted(dataset.rglob("*"))
    train(small_config(dataset, train={"steps": 1}), runs=tmp_path)
    assert sorted(dataset.rglob("*")) == before


@pytest.mark.parametrize(("interpolation", "order"), [("linear", 1), ("cubic", 3)])
def test_training_and_prediction_see_one_image(
    interpolation: str, order: int, dataset: Path, tmp_path: Path
) -> None:
    data = {"spacing": [0.9, 1.1, 4.0], "interpolation": interpolation, "patch_size": [16, 16, 4]}
    network = {"channels": [4, 8], "attention": {}}
    config = small_config(dataset, data=data, network=network, train={"steps": 1})
    predictor = Predictor(train(config, runs=tmp_path).model)
    for case in read_dataset(dataset).cases:
        prepared = predictor.prepare(read_volume(case.images[0]))
        assert prepared.orders == (order, order, 0)  # 4 mm is over 3 times the finest
        (stored,) = (tmp_path / ".cache").glob(f"{case.name}-*")
        image = StoredCase(case.name, stored).image
        assert_array_equal(image, prepared.image.half().numpy())


def test_a_run_may_hold_out_no_case(dataset: Path, tmp_path: Path) -> None:
    run = train(small_config(dataset, data={"validation": 0.0}), runs=tmp_path)
    assert run.summary["validation"]["cases"] == 0
    assert json.loads((run.folder / "summary.json").read_text())["validation"]["mean_dice"] is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_trains_for_one_step(path: Path, dataset: Path, tmp_path: Path) -> None:
    tree = yaml.safe_load(path.read_text())
    assert tree["name"] == path.stem
    own_heads = path.stem == "self_attention_unet_3d"
    narrow = ["network.attention.bottleneck.head_channels=8"] * own_heads
    config = load_config(
        path,
        [
            f"data.folder={dataset}",
            "data.batch_size=2",
            "train.steps=1",
            "trainer.accelerator=cpu",
            "network.channels=[4, 8, 16, 32]",
            *narrow,
        ],
    )
    run = train(config, runs=tmp_path)
    rows = metrics(run.folder)
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    gated = any(info.kind == "gate" for info in run.model.network.maps().values())
    assert run.summary["steps"] == 1 and np.isfinite(losses).all()
    assert gated == path.stem.startswith(("attention", "u_transformer"))


def balls_told_by(head: MeanPoolingConfig | None, logit: float = 0.0) -> Model:
    """A model of balls whose head says the same of every image."""
    description = ModelDescription(
        segkit="test",
        run="test",
        channels=["MRI"],
        labels={"background": 0, "ball": 1},
        network=NetworkConfig(channels=[2, 4], attention=AttentionConfig(head=head)),
        spacing=(1.0, 1.0, 1.0),
        normalisation=[ZScoreConfig()],
        slices="axial",
        patch_size=[16, 16, 16],
    )
    network = build_network(description)
    if isinstance(network.presence, pooling.MeanPooling):
        torch.nn.init.zeros_(network.presence.classify.weight)
        torch.nn.init.constant_(network.presence.classify.bias, logit)
    return Model(description, network.eval())


def test_presence_accuracy_is_the_share_of_cases_with_a_correct_answer(tmp_path: Path) -> None:
    folder = small_dataset(tmp_path)
    empty = folder / "labelsTr" / "case_2.nii.gz"
    label = read_volume(empty)
    write_volume(empty, label.like(np.zeros_like(label.data)))
    dataset = read_dataset(folder)

    def scored(model: Model) -> dict[str, object]:
        return score(model, dataset, dataset.cases, lambda cases, what, count: cases)

    # Three of the four cases hold a ball.
    for logit, accuracy in ((2.0, 0.75), (-2.0, 0.25)):
        scores = scored(balls_told_by(MeanPoolingConfig(), logit))
        assert scores["cases"] == 4
        assert scores["presence_accuracy"] == {"ball": accuracy}
    assert "presence_accuracy" not in scored(balls_told_by(None))


@pytest.mark.slow
def test_the_summary_has_presence_if_the_network_has_a_head(dataset: Path, tmp_path: Path) -> None:
    attention = {"head": {"kind": "gated", "width": 4, "weight": 3.0}}
    run = train(small_config(dataset, network={"attention": attention}), runs=tmp_path)
    (name,) = run.summary["validation"]["dice_of_cases"]
    told = Predictor(load_model(run.folder))(
        read_volume(dataset / "imagesTr" / f"{name}.nii.gz")
    ).presence
    assert told is not None
    # Every case holds a ball.
    expected = {"ball": float(told["ball"] > 0.5)}
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["validation"]["presence_accuracy"] == expected
    logged = [row for row in metrics(run.folder) if row["train/presence_loss"]]
    assert logged
    for row in logged:
        assert float(row["train/loss"]) > 3.0 * float(row["train/presence_loss"]) > 0

    plain = train(small_config(dataset, train={"steps": 1}), runs=tmp_path)
    assert "presence_accuracy" not in plain.summary["validation"]
    assert "train/presence_loss" not in metrics(plain.folder)[0]


@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_cases_that_lie_on_the_device_give_the_weights_of_cases_on_disk(
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", logger="segkit")
    config = small_config(dataset, train={"averaging": 0.9})
    on_disk = train(config, runs=tmp_path / "disk")
    assert "which cuts patches" not in caplog.text
    monkeypatch.setattr("segkit.data.datamodule.fits", lambda *_: True)
    resident = train(config, runs=tmp_path / "device")
    assert "all cases lie in the memory of cpu, which cuts patches" in caplog.text
    expected = load_file(on_disk.folder / "model" / "weights.safetensors")
    found = load_file(resident.folder / "model" / "weights.safetensors")
    assert all(torch.equal(found[name], values) for name, values in expected.items())
    assert (
        metrics(resident.folder)[-1]["validation/dice"]
        == (metrics(on_disk.folder)[-1]["validation/dice"])
    )
