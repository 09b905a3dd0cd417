"""Models that geodeploy did not export run with a description beside them, as they are."""

import importlib.metadata
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import rasterio
from numpy.typing import NDArray
from onnx import TensorProto, helper

from geodeploy import PredictOptions, predict
from geodeploy.batches import Batch, whole_answers
from geodeploy.errors import ModelError
from geodeploy.runtime import Runtime, open_session
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid

MakeModel = Callable[..., Any]
MakeSpec = Callable[..., ModelSpec]
MakeRaster = Callable[..., Path]

DESCRIPTIONS = Path(__file__).parents[2] / "export" / "ukis-csmask"
CSMASK = ("model_4b_l1c", "model_4b_l2a", "model_6b_l1c", "model_6b_l2a")


def described(path: Path, spec: ModelSpec) -> Path:
    """``path`` with ``spec`` in a file beside it."""
    path.with_suffix(".spec.json").write_text(spec.to_json())
    return path


def make_channels_last(path: Path) -> None:
    """Turn the graph in ``path`` into one that takes and gives NHWC, as TensorFlow's are."""
    model = onnx.load(path)
    graph = model.graph
    first, last = graph.node[0], graph.node[-1]
    first.input[0], last.output[0] = "bands_first", "classes_first"
    graph.node.insert(0, helper.make_node("Transpose", ["pixels"], ["bands_first"], perm=[0, 3, 1, 2]))
    graph.node.append(helper.make_node("Transpose", ["classes_first"], ["logits"], perm=[0, 2, 3, 1]))
    for value in (graph.input[0], graph.output[0]):
        batch, channels, height, width = (
            axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim
        )
        value.CopyFrom(
            helper.make_tensor_value_info(
                value.name, TensorProto.FLOAT, [batch, height, width, channels]
            )
        )
    onnx.save(model, path)


def add_softmax(path: Path) -> None:
    model = onnx.load(path)
    model.graph.node[-1].output[0] = "raw"
    model.graph.node.append(helper.make_node("Softmax", ["raw"], ["logits"], axis=1))
    onnx.save(model, path)


def mapped(
    scene: Path, model: Path, output: Path, runtime: Runtime = "onnxruntime"
) -> NDArray[np.uint8]:
    predict(scene, model, output, options=PredictOptions(runtime=runtime, device="cpu", threads=2))
    with rasterio.open(output) as dataset:
        return dataset.read(1)


def test_a_channels_last_model_maps_as_its_channels_first_twin_does(
    make_model: MakeModel, make_spec: MakeSpec, small_scene: Path, tmp_path: Path, runtime: Runtime
) -> None:
    spec = make_spec(normalise=True)
    first = make_model(tmp_path / "first.onnx", kernels=(3, 3), metadata=None).path
    last = make_model(tmp_path / "last.onnx", kernels=(3, 3), metadata=None).path
    make_channels_last(last)
    described(first, spec)
    described(last, spec.model_copy(update={"layout": "NHWC"}))
    expected = mapped(small_scene, first, tmp_path / "first.tif", runtime)
    np.testing.assert_array_equal(mapped(small_scene, last, tmp_path / "last.tif", runtime), expected)
    assert len(np.unique(expected)) > 1


@pytest.mark.parametrize(("model_is", "described_as"), [("NHWC", "NCHW"), ("NCHW", "NHWC")])
def test_the_wrong_layout_is_refused_with_the_right_one(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path, model_is: str, described_as: str
) -> None:
    path = make_model(tmp_path / "model.onnx", metadata=None).path
    if model_is == "NHWC":
        make_channels_last(path)
    described(path, make_spec(layout=described_as))
    with pytest.raises(ModelError, match=f'Write "layout": "{model_is}" in the description'):
        open_session(path)


def test_a_model_with_a_softmax_of_its_own_gets_no_second_one(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path
) -> None:
    logits = described(make_model(tmp_path / "logits.onnx", metadata=None).path, make_spec())
    softmax = make_model(tmp_path / "softmax.onnx", metadata=None).path
    add_softmax(softmax)
    described(softmax, make_spec(output="probabilities"))
    pixels = np.random.default_rng(2).random((1, 6, 64, 64), np.float32)
    (tile,) = TileGrid(64, 64, 64, 16)
    batch = Batch([(tile, np.ones((64, 64), bool), 0)], pixels)
    ours, theirs = (whole_answers(open_session(path), batch) for path in (logits, softmax))
    np.testing.assert_allclose(theirs, ours, atol=1e-6)  # two exponentials in float32


def test_logits_described_as_probabilities_are_told(
    make_model: MakeModel, make_spec: MakeSpec, small_scene: Path, tmp_path: Path
) -> None:
    path = make_model(tmp_path / "model.onnx", metadata=None).path
    described(path, make_spec(output="probabilities"))
    with pytest.raises(ModelError, match=r'which sum to 1.*write "output": "logits"') as caught:
        predict(small_scene, path, tmp_path / "map.tif")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "map.tif").exists()


def loose(path: Path, nodes: list[onnx.NodeProto]) -> Path:
    """A graph of ``nodes`` from pixels to logits that says nothing of its sizes."""
    free = ["batch", "c", "h", "w"]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, free) for name in ("pixels", "logits")
    ]
    graph = helper.make_graph(nodes, "loose", values[:1], values[1:])
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), path
    )
    return path


def test_a_graph_that_breaks_on_the_tile_or_returns_another_size_is_told_in_one_line(
    make_spec: MakeSpec, tmp_path: Path, capfd: pytest.CaptureFixture[str], runtime: Runtime
) -> None:
    spec = make_spec(["blue", "green", "red", "nir"])
    pixels = np.zeros((2, 4, 64, 64), np.float32)
    halving = {"kernel_shape": [2, 2], "strides": [2, 2]}
    halves = loose(
        tmp_path / "halves.onnx", [helper.make_node("MaxPool", ["pixels"], ["logits"], **halving)]
    )
    breaks = loose(
        tmp_path / "breaks.onnx",
        [
            helper.make_node("MaxPool", ["pixels"], ["half"], **halving),
            helper.make_node("Add", ["pixels", "half"], ["logits"]),
        ],
    )
    broken = {
        "onnxruntime": r"breaks\.onnx: onnxruntime .* could not run it on \[2, 4, 64, 64\] \(",
        "openvino": r"breaks\.onnx: OpenVINO .* cannot run it on tiles of 64 pixels \(",
    }[runtime]
    for path, complaint in (
        (breaks, broken),
        (halves, r"halves\.onnx returned \[., 4, 32, 32\] for .*, \[., 4, 64, 64\] is needed"),
    ):
        with pytest.raises(ModelError, match=complaint) as caught:
            open_session(described(path, spec), runtime=runtime).run(pixels)
        assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""  # nothing beside the line either


@pytest.mark.parametrize("name", CSMASK)
def test_the_descriptions_in_export_hold(name: str) -> None:
    spec = ModelSpec.read(DESCRIPTIONS / f"{name}.spec.json")
    assert len(spec.bands) == int(name[len("model_")])
    assert spec.normalise


@pytest.fixture(scope="session")
def csmask() -> Path:
    """The folder of the models in ukis-csmask 1.0.0 (German Aerospace Center, Apache-2.0)."""
    folder = os.environ.get("GEODEPLOY_UKIS_CSMASK")
    if folder is None:
        try:
            package = importlib.metadata.distribution("ukis-csmask")
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(
                "needs the models of ukis-csmask: pip install --no-deps ukis-csmask==1.0.0, or "
                "GEODEPLOY_UKIS_CSMASK=FOLDER (where its .onnx files are)"
            )
        folder = str(package.locate_file("ukis_csmask"))
    assert all((Path(folder) / f"{name}.onnx").exists() for name in CSMASK), folder
    return Path(folder)


@pytest.mark.parametrize("name", CSMASK)
def test_a_published_model_maps_as_its_own_package_computes(
    csmask: Path, name: str, real_scene: Path, make_raster: MakeRaster, tmp_path: Path
) -> None:
    # What the package does of itself: its statistics from its JSON, bands last, mean off, over std.
    statistics = json.loads((csmask / f"{name}.json").read_text())["data"]["dataset_statistics"]
    with rasterio.open(real_scene) as dataset:
        names = dataset.descriptions
        stored = dataset.read()[:, 150:450, 100:500]
        scales, offsets = dataset.scales, dataset.offsets
    picked = [names.index(band) for band in statistics["band_names"]]
    reflectance = stored * np.reshape(scales, (-1, 1, 1)) + np.reshape(offsets, (-1, 1, 1))
    image = np.moveaxis(reflectance[picked, :256, :256], 0, -1).astype(np.float32)
    normalised = image.copy()
    normalised -= statistics["img"][0]
    normalised /= statistics["img"][1]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    theirs = onnxruntime.InferenceSession(
        csmask / f"{name}.onnx", options, providers=["CPUExecutionProvider"]
    )
    (logits,) = theirs.run(None, {"input": np.moveaxis(normalised[np.newaxis], -1, 1)})
    assert np.abs(logits.sum(axis=1) - 1).max() > 0.5, "no softmax inside: the description is right"
    odds = np.exp(logits[0] - logits[0].max(axis=0))
    probs = odds / odds.sum(axis=0)

    (tmp_path / f"{name}.onnx").symlink_to(csmask / f"{name}.onnx")
    description = (DESCRIPTIONS / f"{name}.spec.json").read_text()
    (tmp_path / f"{name}.spec.json").write_text(description)
    session = open_session(tmp_path / f"{name}.onnx", device="cpu", threads=2)
    np.testing.assert_allclose(
        session.run(np.moveaxis(image, -1, 0)[np.newaxis]), logits, rtol=1e-3, atol=1e-3
    )
    session.close()

    scene = make_raster(tmp_path / "scene.tif", stored, names=names, scales=scales, offsets=offsets)
    found = mapped(scene, tmp_path / f"{name}.onnx", tmp_path / "map.tif")
    assert found.shape == (300, 400)
    assert set(np.unique(found)) <= {0, 1, 2}
    # Up to the second tile at 256 - 52 pixels, the map is what the first tile alone says.
    alone = np.s_[:204, :204]
    second, best = np.sort(probs, axis=0)[-2:]
    sure = (best - second)[alone] > 1e-3
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[alone][sure], probs.argmax(axis=0)[alone][sure])
    assert len(np.unique(found)) > 1
