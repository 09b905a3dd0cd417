from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from geodeploy.errors import ModelError
from geodeploy.inspect import MapInspection, ModelInspection, inspect
from geodeploy.predict import predict


def test_a_model_tells_its_bands_classes_and_hash(pointwise: object) -> None:
    found = inspect(pointwise.path)
    assert isinstance(found, ModelInspection)
    assert found.spec == pointwise.spec
    text = str(found)
    for needed in ("swir22", "class 3", "64 x 64", found.sha256):
        assert needed in text


def test_a_model_tells_what_it_saw_in_training_if_it_knows(
    tmp_path: Path, make_model: Callable[..., Any], make_spec: Callable[..., Any], pointwise: object
) -> None:
    model = make_model(tmp_path / "model.onnx", make_spec(seen=(0.0123, 0.7)))
    assert "valid -0.2 to 1.6, seen 0.0123 to 0.7" in str(inspect(model.path))
    assert "seen" not in str(inspect(pointwise.path))


def test_a_map_tells_what_made_it(tmp_path: Path, pointwise: object, real_scene: Path) -> None:
    report = predict(real_scene, pointwise.path, tmp_path / "map.tif")
    found = inspect(tmp_path / "map.tif")
    assert isinstance(found, MapInspection)
    assert (found.height, found.width, found.crs) == (509, 531, "EPSG:32616")
    assert found.tags["MODEL_SHA256"] == report.model_sha256
    assert "blend          cosine" in str(found)


def test_a_run_tells_how_it_was_tuned(tune: Callable[..., Path]) -> None:
    found = inspect(tune())
    assert isinstance(found, ModelInspection)
    assert found.kind == "RUN"
    assert "lora, r=4 alpha=4" in str(found)


def test_what_is_none_of_them_is_said(tmp_path: Path, real_scene: Path) -> None:
    with pytest.raises(ModelError, match="no map that geodeploy made"):
        inspect(real_scene)
    with pytest.raises(ModelError, match=r"without spec\.json"):
        inspect(tmp_path)
