"""A deployer is told each step."""

import json

from segkit.export.deployment import deployment
from segkit.geometry.grid import Placement
from segkit.model.folder import Model
from segkit.nn.map_tap import MapInfo
from tests.models import model_of


def test_the_deployment_data_holds_each_step_of_prediction() -> None:
    description = model_of({}, 3).description.model_copy(
        update={"mirror": ["x", "z"], "spacing": (1.0, 1.5, 2.0), "interpolation": "cubic"}
    )
    model = Model(description, model_of({"skip": "additive_grid", "encoder": "se"}, 3).network)
    told = json.loads(json.dumps(deployment(model, overlap=0.25), allow_nan=False))
    assert told["input"]["channels"] == ["a", "b"]
    assert told["orientation"] == "RAS" and told["spacing"] == [1.0, 1.5, 2.0]
    assert told["interpolation"] == "cubic" and told["mirror_axes"] == [0, 2]
    assert told["normalisation"] == [{"kind": "zscore", "nonzero": False}] * 2
    assert told["windows"]["patch"] == [16, 8, 8] and told["windows"]["overlap"] == [0.25] * 3
    assert told["windows"]["multiple"] == list(model.network.total_stride)
    assert told["labels"] == {"background": 0, "one": 1, "two": 2}
    infos: dict[str, MapInfo] = model.network.maps()
    assert set(told["outputs"]["maps"]) == set(infos)
    for key, info in infos.items():
        found = told["outputs"]["maps"][key]
        assert found["range"] == [info.lowest, info.highest]
        if info.placement is None:
            assert found["stride"] is None
        else:
            assert Placement(tuple(found["stride"]), tuple(found["offset"])) == info.placement
