"""Models whose weights lie in a file of their own, as those above 2 GB must."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from geodeploy import PredictOptions, predict
from geodeploy.errors import ModelError, OutputError
from geodeploy.inspect import ModelInspection, inspect
from geodeploy.runtime import Runtime
from geodeploy.runtime.graph import read_onnx
from geodeploy.spec import METADATA_KEY, ModelSpec

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


def in_a_constant(weights: TensorProto, shape: list[Any]) -> list[NodeProto]:
    return [
        helper.make_node("Constant", [], ["weights"], value=weights),
        helper.make_node("Conv", ["pixels", "weights"], ["logits"]),
    ]


def in_a_branch(weights: TensorProto, shape: list[Any]) -> list[NodeProto]:
    then, otherwise = (
        helper.make_graph(
            [helper.make_node("Conv", ["pixels", weights.name], [name])],
            name,
            [],
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)],
            [weights],
        )
        for name in ("then", "otherwise")
    )
    true = numpy_helper.from_array(np.array(True), "")
    return [
        helper.make_node("Constant", [], ["true"], value=true),
        helper.make_node("If", ["true"], ["logits"], then_branch=then, else_branch=otherwise),
    ]


@pytest.mark.parametrize("build", [in_a_constant, in_a_branch])
def test_weights_deeper_in_the_graph_count_too(
    make_spec: Callable[..., ModelSpec], tmp_path: Path, build: Callable[..., list[NodeProto]]
) -> None:
    spec = make_spec(("red", "nir"), (0, 1), tile=16, overlap=4)
    shape = ["batch", 2, 16, 16]
    weights = numpy_helper.from_array(np.eye(2, dtype=np.float32)[..., None, None], "weights")
    onnx.external_data_helper.set_external_data(weights, "weights.bin")
    beside = tmp_path / "weights.bin"
    beside.write_bytes(weights.raw_data)
    weights.ClearField("raw_data")
    taken, given = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("pixels", "logits")
    )
    graph = helper.make_graph(build(weights, shape), "deep", [taken], [given])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    helper.set_model_props(made, {METADATA_KEY: spec.to_json()})
    (tmp_path / "model.onnx").write_bytes(made.SerializeToString())
    assert read_onnx(tmp_path / "model.onnx").weights == (beside,)
    found = inspect(tmp_path / "model.onnx")
    beside.write_bytes((-np.eye(2, dtype=np.float32)).tobytes())
    changed = inspect(tmp_path / "model.onnx")
    assert isinstance(found, ModelInspection)
    assert isinstance(changed, ModelInspection)
    assert found.sha256 != changed.sha256
    assert found.bytes == (tmp_path / "model.onnx").stat().st_size + 16


def test_weights_behind_a_link_are_told_in_one_line(model: Path, small_scene: Path) -> None:
    weights = model.with_name("weights0.bin")
    weights.symlink_to(weights.rename(model.parents[1] / "blob"))  # as the cache of a model hub has it
    with pytest.raises(ModelError, match=r"weights0\.bin, a link to another folder.*cp -L"):
        mapped(small_scene, model, "onnxruntime")


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
