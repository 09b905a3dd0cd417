import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from geodeploy.errors import DeviceError, ModelError, SpecError
from geodeploy.runtime import Runtime, open_session
from geodeploy.spec import METADATA_KEY, ModelSpec

MakeModel = Callable[..., Any]
MakeSpec = Callable[..., ModelSpec]
NEAR = {"rtol": 1e-5, "atol": 1e-5}
"""float32 sums of a few dozen terms against float64. OpenVINO left to itself takes bfloat16 where the
processor has it, which is far outside."""


def test_a_session_returns_what_the_weights_say(
    make_model: MakeModel, tmp_path: Path, runtime: Runtime
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3, 3))
    pixels = np.random.default_rng(0).random((3, 6, 64, 64), np.float32)
    session = open_session(model.path, runtime=runtime, device="cpu")
    outputs = session.run(pixels)
    for tile, output in zip(pixels, outputs, strict=True):
        np.testing.assert_allclose(output, model.on_the_whole(tile), **NEAR)
    assert outputs.dtype == np.float32
    session.close()


def test_a_session_says_what_it_is(make_model: MakeModel, tmp_path: Path, runtime: Runtime) -> None:
    model = make_model(tmp_path / "model.onnx")
    session = open_session(model.path, runtime=runtime, device="cpu")
    assert session.spec == model.spec
    assert session.name == f"{runtime} {version(runtime)}"
    assert session.device == "cpu"
    assert session.precision == "fp32"
    assert session.sha256 == hashlib.sha256(model.path.read_bytes()).hexdigest()


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_tile_does_not_depend_on_its_batch(
    make_model: MakeModel, tmp_path: Path, batch: int, runtime: Runtime
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3,)).path
    session = open_session(model, runtime=runtime, device="cpu")
    pixels = np.random.default_rng(0).random((5, 6, 64, 64), np.float32)
    whole = session.run(pixels)
    parts = [session.run(pixels[place : place + batch]) for place in range(0, 5, batch)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_a_foreign_model_runs_with_a_description_beside_it_and_is_normalised_for(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path, runtime: Runtime
) -> None:
    spec = make_spec(normalise=True, output="probabilities")
    model = make_model(tmp_path / "foreign.onnx", metadata=None)
    (tmp_path / "foreign.spec.json").write_text(spec.to_json())
    session = open_session(model.path, runtime=runtime, device="cpu")
    assert session.spec == spec
    pixels = np.random.default_rng(0).random((1, 6, 64, 64), np.float32)
    judge = model.on_the_whole((pixels[0].astype(np.float64) - 0.2) / 0.1)
    np.testing.assert_allclose(session.run(pixels)[0], judge, rtol=1e-4, atol=1e-4)
    # The caller's pixels are as they were.
    assert pixels.max() <= 1


def test_a_model_of_bytes_over_255_is_fed_from_zero_to_one(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path, runtime: Runtime
) -> None:
    model = make_model(tmp_path / "foreign.onnx", make_spec(input_range=(0.0, 255.0)))
    pixels = np.random.default_rng(0).integers(0, 256, (1, 6, 64, 64)).astype(np.float32)
    found = open_session(model.path, runtime=runtime, device="cpu").run(pixels)
    judge = model.on_the_whole(pixels[0].astype(np.float64) / 255)
    np.testing.assert_allclose(found[0], judge, rtol=1e-4, atol=1e-4)


def test_the_description_inside_wins_over_one_beside_the_model(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model.onnx")
    (tmp_path / "model.spec.json").write_text(make_spec(overlap=0).to_json())
    assert open_session(model.path, device="cpu").spec == model.spec


def test_what_is_no_model_is_told(make_model: MakeModel, tmp_path: Path) -> None:
    (tmp_path / "model.pt2").touch()
    with pytest.raises(ModelError, match=r"model\.pt2 is a program of torch\.export"):
        open_session(tmp_path / "model.pt2")
    with pytest.raises(ModelError, match=r"gone\.onnx does not exist"):
        open_session(tmp_path / "gone.onnx")
    whole = make_model(tmp_path / "model.onnx").path.read_bytes()
    for content in (b"", b"junk", b"\x08\x0a" + b"\0" * 500, whole[:300], whole[300:]):
        (tmp_path / "junk.onnx").write_bytes(content)
        with pytest.raises(ModelError, match=r"junk\.onnx is not an ONNX model that") as caught:
            open_session(tmp_path / "junk.onnx")
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "complaint"),
    [
        (None, r"does not say which bands and classes it has.*model\.spec\.json beside it"),
        ("{", "is not JSON"),
        ('{"spec_version": 9}', "version 9, this program reads up to 1"),
        ('{"name": "x"}', "does not hold: "),
    ],
)
def test_a_model_whose_description_is_no_use_is_told(
    make_model: MakeModel, tmp_path: Path, metadata: str | None, complaint: str
) -> None:
    model = make_model(tmp_path / "model.onnx", metadata=metadata)
    with pytest.raises(SpecError, match=complaint) as caught:
        open_session(model.path)
    assert str(model.path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [
        ((5, 4, 64), r"the input pixels has shape .*5, 64, 64.* says \(batch, 6, 64, 64\)"),
        ((6, 4, 32), r"the input pixels has shape .*6, 32, 32"),
        ((6, 3, 64), r"the output logits has shape .*3, 64, 64.* says \(batch, 4, 64, 64\)"),
    ],
)
def test_a_graph_of_another_shape_than_its_description_is_refused(
    make_model: MakeModel,
    tmp_path: Path,
    runtime: Runtime,
    shape: tuple[int, int, int],
    complaint: str,
) -> None:
    model = make_model(tmp_path / "model.onnx", shape=shape)
    with pytest.raises(ModelError, match=complaint):
        open_session(model.path, runtime=runtime)


def graph(path: Path, spec: ModelSpec, kind: int, outputs: int, shape: list[object]) -> Path:
    values = [helper.make_tensor_value_info(f"out{place}", kind, shape) for place in range(outputs)]
    nodes = [helper.make_node("Identity", ["pixels"], [value.name]) for value in values]
    inputs = [helper.make_tensor_value_info("pixels", kind, shape)]
    model = helper.make_model(
        helper.make_graph(nodes, "g", inputs, values),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    helper.set_model_props(model, {METADATA_KEY: spec.to_json()})
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("kind", "outputs", "shape", "complaint"),
    [
        (TensorProto.FLOAT16, 1, ["b", 4, 64, 64], r"is f(loat)?16, float32 is needed"),
        (TensorProto.FLOAT, 2, ["b", 4, 64, 64], r"has 2 outputs, exactly one is needed"),
        (TensorProto.FLOAT, 1, ["b", 4, 64], r"has shape \[('b'|None), 4, 64\]"),
    ],
)
def test_a_graph_of_another_kind_is_refused(
    make_spec: MakeSpec,
    tmp_path: Path,
    runtime: Runtime,
    kind: int,
    outputs: int,
    shape: list[object],
    complaint: str,
) -> None:
    spec = make_spec(["blue", "green", "red", "nir"])
    with pytest.raises(ModelError, match=complaint):
        open_session(
            graph(tmp_path / "model.onnx", spec, kind, outputs, shape), runtime=runtime, device="cpu"
        )


def test_a_graph_of_any_size_fits_any_tile(
    make_spec: MakeSpec, tmp_path: Path, runtime: Runtime
) -> None:
    spec = make_spec(["blue", "green", "red", "nir"], tile=32)
    path = graph(tmp_path / "model.onnx", spec, TensorProto.FLOAT, 1, ["b", 4, "h", "w"])
    pixels = np.ones((2, 4, 32, 32), np.float32)
    np.testing.assert_array_equal(open_session(path, runtime=runtime).run(pixels), pixels)


@pytest.mark.parametrize("size", [1, 3, 8])
def test_a_graph_with_a_batch_of_its_own_gives_what_one_for_any_batch_gives(
    make_model: MakeModel, tmp_path: Path, size: int, runtime: Runtime
) -> None:
    free = make_model(tmp_path / "free.onnx", kernels=(3,)).path
    fixed = onnx.load(free)
    for value in (fixed.graph.input[0], fixed.graph.output[0]):
        value.type.tensor_type.shape.dim[0].dim_value = size
    onnx.save(fixed, tmp_path / "fixed.onnx")
    pixels = np.random.default_rng(0).random((5, 6, 64, 64), np.float32)
    ours, theirs = (
        open_session(path, runtime=runtime).run(pixels) for path in (tmp_path / "fixed.onnx", free)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_a_gpu_that_is_not_there_is_an_error_and_not_the_processor(
    make_model: MakeModel, tmp_path: Path
) -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime can use a GPU")
    path = make_model(tmp_path / "model.onnx").path
    with pytest.raises(DeviceError, match=r"GPU was asked for.*geodeploy-eo\[gpu\].*--device cpu"):
        open_session(path, device="cuda")
    assert open_session(path, device="auto").device == "cpu"


def test_external_weights_outside_the_models_folder_are_not_read(
    make_model: MakeModel, tmp_path: Path, runtime: Runtime
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3, 3))
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(1 << 16))
    loaded = onnx.load(model.path)
    tensor = loaded.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=str(secret))
    (tmp_path / "deep").mkdir()
    hostile = tmp_path / "deep" / "model.onnx"
    hostile.write_bytes(loaded.SerializeToString())
    with pytest.raises(ModelError, match="is not an ONNX model"):
        open_session(hostile, runtime=runtime)


def test_the_spec_in_a_model_is_the_json_document_of_the_design(
    make_model: MakeModel, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model.onnx")
    (text,) = [p.value for p in onnx.load(model.path).metadata_props if p.key == METADATA_KEY]
    assert json.loads(text)["spec_version"] == 1
