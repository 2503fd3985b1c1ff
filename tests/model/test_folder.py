"""A model folder gives back the network that was put in, and nothing else."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segkit.config.data import ZScoreConfig
from segkit.config.model import ModelDescription, PostprocessingConfig
from segkit.config.network import NetworkConfig
from segkit.errors import ModelError
from segkit.io.atomic import write_json
from segkit.model.build import build_network
from segkit.model.folder import (
    Model,
    adopt,
    checksums_of,
    load_description,
    load_model,
    model_folders,
    newest_model,
    save_model,
)


def small_model(seed: int = 0, spatial_dims: int = 3) -> Model:
    torch.manual_seed(seed)
    told = ModelDescription.model_validate(
        {
            "segkit": "0",
            "run": "small",
            "channels": ["T1", "T2"],
            "labels": {"background": 0, "lesion": 1},
            "network": {
                "spatial_dims": spatial_dims,
                "channels": [4, 8, 8],
                "attention": {"skip": "additive_grid", "encoder": "cbam"},
            },
            "spacing": (1.0, 1.0, 2.5),
            "normalisation": [{"kind": "zscore"}, {"kind": "zscore", "nonzero": True}],
            "slices": "axial",
            "patch_size": [8] * spatial_dims,
        }
    )
    return Model(told, build_network(told).eval())


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_saved_model_gives_the_same_logits_bit_for_bit(tmp_path: Path, spatial_dims: int) -> None:
    model = small_model(spatial_dims=spatial_dims)
    save_model(tmp_path, model)
    torch.manual_seed(99)
    loaded = load_model(tmp_path)
    assert loaded.description == model.description
    image = torch.randn(1, 2, 8, 8, 8)
    with torch.inference_mode():
        assert torch.equal(loaded.network(image), model.network(image))
    assert not loaded.network.training


def test_a_run_folder_stands_for_its_model(tmp_path: Path) -> None:
    save_model(tmp_path / "model", small_model())
    assert load_model(tmp_path).description.run == "small"


def test_the_newest_run_is_the_one_that_finished_last(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="expected a finished run under"):
        newest_model(tmp_path)
    for name in ("b", "a"):
        save_model(tmp_path / name / "model", small_model())
        write_json(tmp_path / name / "summary.json", {})
    older = tmp_path / "b" / "summary.json"
    stat = (tmp_path / "a" / "summary.json").stat()
    os.utime(older, ns=(stat.st_atime_ns - 10**9, stat.st_mtime_ns - 10**9))
    save_model(tmp_path / "c" / "model", small_model())  # one that is not finished
    assert newest_model(tmp_path) == tmp_path / "a" / "model"


def change(folder: Path, **keys: object) -> None:
    path = folder / "model.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_a_cross_validation_counts_once_it_is_finished(tmp_path: Path) -> None:
    save_model(tmp_path / "run" / "model", small_model())
    write_json(tmp_path / "run" / "summary.json", {})
    for fold in (0, 3):
        save_model(tmp_path / "five" / f"fold_{fold}" / "model", small_model())
    assert newest_model(tmp_path) == tmp_path / "run" / "model"
    write_json(tmp_path / "five" / "summary.json", {})
    stat = (tmp_path / "run" / "summary.json").stat()
    os.utime(tmp_path / "run" / "summary.json", ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
    assert newest_model(tmp_path) == tmp_path / "five"
    (tmp_path / "five" / "fold_1" / "model").mkdir(parents=True)  # one that is not finished
    expected = tuple(tmp_path / "five" / f"fold_{fold}" / "model" for fold in (0, 3))
    assert model_folders(tmp_path / "five") == expected


def test_a_description_from_before_post_processing_loads_unchanged(tmp_path: Path) -> None:
    model = small_model()
    save_model(tmp_path, model)
    path = tmp_path / "model.json"
    content = json.loads(path.read_text())
    assert content.pop("postprocessing") == {"largest_foreground": False, "largest_of": []}
    path.write_text(json.dumps(content))
    assert load_model(tmp_path).description == model.description


def test_adopting_changes_only_the_post_processing_of_a_model(tmp_path: Path) -> None:
    model = small_model()
    save_model(tmp_path, model)
    weights = (tmp_path / "weights.safetensors").read_bytes()
    chosen = PostprocessingConfig(largest_foreground=True, largest_of=(1,))
    adopt(tmp_path, chosen)
    assert load_description(tmp_path) == model.description.model_copy(
        update={"postprocessing": chosen}
    )
    assert (tmp_path / "weights.safetensors").read_bytes() == weights


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"expected a run or a model folder with model\.json"):
        load_model(tmp_path)


def test_a_description_of_another_kind_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    change(tmp_path, format=2)
    with pytest.raises(ModelError, match=r"format is 2.*use the version of segkit that wrote"):
        load_model(tmp_path)
    (tmp_path / "model.json").write_text("{")
    with pytest.raises(ModelError, match=r"model\.json: cannot be read"):
        load_model(tmp_path)


def test_weights_that_do_not_fit_the_description_are_refused(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    network = NetworkConfig(channels=[4, 8, 16]).model_dump(mode="json")
    change(tmp_path, network=network)
    with pytest.raises(ModelError, match=r"its weights do not fit its model\.json"):
        load_model(tmp_path)


def test_missing_weights_are_named(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    (tmp_path / "weights.safetensors").unlink()
    with pytest.raises(ModelError, match=r"expected weights\.safetensors in it, found none"):
        load_model(tmp_path)


def test_a_pickle_in_the_place_of_the_weights_runs_nothing(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    proof = tmp_path / "it_ran"

    class Planted:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (proof,)  # type: ignore[return-value]

    (tmp_path / "weights.safetensors").write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ModelError, match="its weights do not fit"):
        load_model(tmp_path)
    assert not proof.exists()


def test_a_lone_extra_tensor_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    path = tmp_path / "weights.safetensors"
    save_file({**load_file(path), "stowaway": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="stowaway"):
        load_model(tmp_path)


def test_normalisation_survives_the_round_trip(tmp_path: Path) -> None:
    save_model(tmp_path, small_model())
    assert load_model(tmp_path).description.normalisation == [
        ZScoreConfig(),
        ZScoreConfig(nonzero=True),
    ]


def test_a_model_has_the_checksums_of_its_files_before_and_after_it_is_written(
    tmp_path: Path,
) -> None:
    model = small_model()
    save_model(tmp_path, model)
    expected = {
        name: hashlib.sha256((tmp_path / name).read_bytes()).hexdigest()
        for name in ("model.json", "weights.safetensors")
    }
    assert checksums_of(model) == checksums_of(load_model(tmp_path)) == expected
    assert checksums_of(small_model(1)) != expected
