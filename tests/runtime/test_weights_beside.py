"""Models whose weights lie in a file of their own, as those above 2 GB must."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
from numpy.typing import NDArray

from geodeploy import PredictOptions, predict
from geodeploy.errors import ModelError, OutputError
from geodeploy.runtime import Runtime

RUNTIMES: tuple[Runtime, ...] = ("onnxruntime", "openvino")


@pytest.fixture
def model(make_model: Callable[..., Any], tmp_path: Path) -> Path:
    """A model in a folder of its own, its weights in two files beside it."""
    whole = onnx.load(make_model(tmp_path / "whole.onnx", kernels=(3, 1)).path)
    (tmp_path / "parted").mkdir()
    for number, tensor in enumerate(whole.graph.initializer):
        onnx.external_data_helper.set_external_data(tensor, f"weights{number}.bin")
    onnx.save(whole, tmp_path / "parted" / "model.onnx")
    assert len(list((tmp_path / "parted").iterdir())) == 3
    return tmp_path / "parted" / "model.onnx"


def mapped(scene: Path, model: Path, runtime: Runtime, **options: Any) -> tuple[str, NDArray[np.uint8]]:
    output = model.with_name("map.tif")
    report = predict(scene, model, output, options=PredictOptions(runtime=runtime, **options))
    with rasterio.open(output) as dataset:
        return report.model_sha256, dataset.read(1)


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_map_is_that_of_the_same_model_in_one_file(
    model: Path, small_scene: Path, runtime: Runtime
) -> None:
    digest, found = mapped(small_scene, model, runtime)
    whole_digest, needed = mapped(small_scene, model.parents[1] / "whole.onnx", runtime)
    np.testing.assert_array_equal(found, needed)
    assert digest != whole_digest


def test_other_weights_are_another_model(model: Path, small_scene: Path) -> None:
    digest, found = mapped(small_scene, model, "onnxruntime")
    weights = model.with_name("weights1.bin")
    values = np.frombuffer(weights.read_bytes(), np.float32)
    weights.write_bytes((-values).tobytes())
    with pytest.raises(OutputError, match="exists"):
        mapped(small_scene, model, "onnxruntime")
    other, changed = mapped(small_scene, model, "onnxruntime", overwrite=True)
    assert other != digest
    assert (changed != found).any()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_weights_that_are_not_there_are_told_in_one_line(
    model: Path, small_scene: Path, runtime: Runtime
) -> None:
    model.with_name("weights0.bin").unlink()
    with pytest.raises(ModelError, match=r"weights0\.bin, which is not beside it") as caught:
        mapped(small_scene, model, runtime)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["../weights0.bin", "/etc/hostname", ""])
def test_weights_elsewhere_are_not_read(model: Path, small_scene: Path, place: str) -> None:
    made = onnx.load(model, load_external_data=False)
    for entry in made.graph.initializer[0].external_data:
        if entry.key == "location":
            entry.value = place
    onnx.save(made, model)
    with pytest.raises(ModelError, match="no file beside it"):
        mapped(small_scene, model, "onnxruntime")
