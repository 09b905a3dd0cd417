"""int8: against torch's own quantisation, against the tuned model, and with faults planted."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from matplotlib.image import imread
from onnx import TensorProto, helper, numpy_helper

from geodeploy.errors import ModelError, ParityError, RecipeError
from geodeploy.export import export, int8, verify
from geodeploy.export import onnx as export_module
from geodeploy.export.options import ExportOptions
from geodeploy.export.parity import ParityReport, Tolerance
from geodeploy.export.values import values_of
from geodeploy.runtime import open_session
from geodeploy.runtime.graph import read_onnx
from geodeploy.train.run import Run, load_run

Tune = Callable[..., Path]
MakeModel = Callable[..., Any]
INT8 = ExportOptions(precision="int8")


@pytest.fixture(scope="module")
def exported(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, model = tune(), tmp_path_factory.mktemp("int8") / "model.onnx"
    export(run, model, options=INT8)
    return run, model


@pytest.fixture(scope="module")
def exported_signed(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ParityReport]:
    model = tmp_path_factory.mktemp("signed") / "model.onnx"
    return model, export(tune(), model, options=ExportOptions(precision="int8-tensorrt"))


def on_cpu(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"pixels": pixels})
    return found


def rounding(values: torch.Tensor, limits: tuple[float, float], *, signed: bool) -> torch.Tensor:
    """By torch: 256 steps between ``limits``; where signed, 127 on both sides of 0, and one more."""
    if signed:
        step = max(-limits[0], limits[1]) / 127
        return torch.fake_quantize_per_tensor_affine(values, step, 0, -128, 127)
    step = (limits[1] - limits[0]) / 255
    return torch.fake_quantize_per_tensor_affine(values, step, round(-limits[0] / step), 0, 255)


@pytest.mark.parametrize("signed", [False, True])
def test_a_chain_of_convolutions_gives_what_torch_makes_of_its_quantisation(
    make_model: MakeModel, tmp_path: Path, signed: bool
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3, 3, 1))
    graph = onnx.load(model.path)
    pixels = np.random.default_rng(0).random((2, 6, 64, 64), np.float32)
    layers = int8.layers_of(graph)
    assert [layer.output for layer in layers] == ["conv0", "conv1"]  # not that of the logits
    ranges = {"pixels": (0.0, 1.0), "relu1": (0.0, 2.0), "relu2": (0.0, 3.0)}
    values = rounding(torch.from_numpy(pixels), ranges["pixels"], signed=signed)
    *hidden, last = map(torch.from_numpy, model.weights)
    for place, weights in enumerate(hidden, 1):
        steps = weights.abs().amax(dim=(1, 2, 3)) / 64
        zeros = torch.zeros(len(steps), dtype=torch.int32)
        layer = torch.fake_quantize_per_channel_affine(weights, steps, zeros, 0, -64, 64)
        values = torch.nn.functional.conv2d(values, layer, padding=1).relu()
        values = rounding(values, ranges[f"relu{place}"], signed=signed)
    judge = torch.nn.functional.conv2d(values, last).numpy()
    found = on_cpu(int8.quantise(graph, layers, ranges, signed=signed), pixels)
    # A sum that lies between two steps may go to either: now and then one step of the last value.
    step = 3 / (127 if signed else 255)
    assert np.abs(found - judge).max() <= 2 * step * np.abs(model.weights[-1]).sum(axis=1).max()
    assert (np.abs(found - judge) <= 1e-4 * np.abs(judge).max()).mean() > 0.99
    exact = np.stack([model.on_the_whole(tile) for tile in pixels])
    assert np.abs(judge - exact).max() > 1e-3 * np.abs(judge).max()


def norm_and_product(outlier: float) -> onnx.ModelProto:
    """A layer norm with one wide channel, and a product that takes it."""
    random = np.random.default_rng(0)
    gamma = np.ones(16, np.float32)
    gamma[3] = outlier
    weights = random.normal(size=(16, 8)).astype(np.float32)
    weights[3] /= outlier
    arrays = {"gamma": gamma, "beta": random.normal(size=16).astype(np.float32), "w": weights}
    arrays["head"] = np.eye(8, dtype=np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("LayerNormalization", ["pixels", "gamma", "beta"], ["norm"], axis=-1),
            helper.make_node("MatMul", ["norm", "w"], ["product"]),
            helper.make_node("MatMul", ["product", "head"], ["logits"]),
        ],
        "norm",
        [helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["batch", 20, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 20, 8])],
        [numpy_helper.from_array(values, name) for name, values in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("signed", [False, True])
def test_smoothing_changes_no_product_and_saves_what_a_wide_channel_costs(signed: bool) -> None:
    model = norm_and_product(outlier=100)
    pixels = np.random.default_rng(1).normal(size=(1, 20, 16)).astype(np.float32)
    judge = on_cpu(model, pixels)
    norm = values_of(model, ["norm"])(pixels)["norm"]
    layers = int8.layers_of(model)
    ends = {"norm": (float(norm.min()), float(norm.max()))}
    plain = int8.quantise(model, layers, ends, signed=signed)
    ranges, expected = int8.calibrate(model, layers, [pixels], signed=signed)  # smooths
    np.testing.assert_array_equal(expected, judge)
    np.testing.assert_allclose(on_cpu(model, pixels), judge, rtol=1e-4, atol=1e-5)
    lost = np.abs(on_cpu(plain, pixels) - judge).max()
    smoothed = int8.quantise(model, layers, ranges, signed=signed)
    assert np.abs(on_cpu(smoothed, pixels) - judge).max() < lost / 5


def test_products_are_int8_and_input_output_and_logits_layer_float32(
    exported: tuple[Path, Path],
) -> None:
    model = onnx.load(exported[1])
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    report = json.loads(exported[1].with_suffix(".parity.json").read_bytes())
    products = [node for node in model.graph.node if node.op_type in ("Conv", "MatMul")]
    whole = [
        node
        for node in products
        if (maker := makers.get(node.input[1])) and kinds.get(maker.input[0]) == TensorProto.INT8
    ]
    assert all(makers[node.input[0]].op_type == "DequantizeLinear" for node in whole)
    assert len(whole) == report["quantisation"]["int8_layers"] > 10
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    assert last not in whole
    assert read_onnx(exported[1]).spec.precision == "int8"


def test_it_is_judged_by_tiles_that_its_ranges_were_not_taken_from(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run = load_run(exported[0])
    report = json.loads(exported[1].with_suffix(".parity.json").read_bytes())
    assert report["precision"] == "int8"
    assert report["exported"]["tiles"] == len(run.tiles.pixels) // 2
    assert report["quantisation"]["calibrated_on"] == len(run.tiles.pixels) - len(run.tiles.pixels) // 2
    assert report["exported"]["argmax_agreement"] >= report["tolerances"]["argmax_agreement"] == 0.99
    assert report["exported"]["relative_diff"] > 1e-4
    assert abs(sum(report["exported"]["iou_change"].values()) / 3) <= 5e-3
    picture = tmp_path / "worst.png"
    assert verify(*exported, picture=picture).released
    assert np.ptp(imread(picture)) > 0.5
    tiles = run.tiles.every_other(1).pixels
    with torch.inference_mode():
        judge = run.model(torch.from_numpy(tiles)).numpy().argmax(axis=1)
    for runtime in {"onnxruntime", "openvino"}.intersection(
        read_onnx(exported[1]).spec.parity.runtimes
    ):
        found = open_session(exported[1], runtime=runtime, device="cpu").run(tiles).argmax(axis=1)
        assert (found == judge).mean() >= 0.99


def test_the_same_run_gives_the_same_bytes(exported: tuple[Path, Path], tmp_path: Path) -> None:
    run, model = exported
    export(run, tmp_path / "again.onnx", options=INT8)
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()


# For TensorRT ------------------------------------------------------------------------------------


def test_for_tensorrt_all_whole_numbers_are_signed_around_0(
    exported_signed: tuple[Path, ParityReport],
) -> None:
    graph = onnx.load(exported_signed[0]).graph
    arrays = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    pairs = [node for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    weights = 0
    for node in pairs:
        steps, zeros = (arrays[name] for name in node.input[1:])
        assert zeros.dtype == np.int8
        assert not zeros.any()
        assert steps.dtype == np.float32
        if (whole := arrays.get(node.input[0])) is None:
            assert steps.ndim == 0
        else:
            weights += 1
            assert len(steps) == whole.shape[node.attribute[0].i]
            assert np.abs(whole.astype(int)).max() == 64
    report = exported_signed[1]
    assert report.quantisation is not None
    assert weights == report.quantisation.int8_layers > 10


def test_the_report_says_whether_int8_keeps_what_it_should(
    exported_signed: tuple[Path, ParityReport],
) -> None:
    report = exported_signed[1]
    share = 0.996
    good = report.exported.model_copy(
        update={"argmax_agreement": share, "miou_reference": 0.5, "miou_exported": 0.502}
    )
    assert "the aim of 99.5% of pixels and 0.3 points is met" in str(
        report.model_copy(update={"exported": good})
    )
    for poor in ({"argmax_agreement": 0.994}, {"miou_exported": 0.504}):
        found = good.model_copy(update=poor)
        assert "0.3 points is missed: " in str(report.model_copy(update={"exported": found}))


def test_for_tensorrt_it_is_proved_as_any_int8_is(exported_signed: tuple[Path, ParityReport]) -> None:
    model, report = exported_signed
    assert report.precision == read_onnx(model).spec.precision == "int8-tensorrt"
    assert report.tolerances["argmax_agreement"] == 0.99
    assert report.exported.argmax_agreement >= 0.99
    assert report.exported.relative_diff > 1e-4
    with pytest.raises(ParityError, match="its parity report covers onnxruntime"):
        open_session(model, runtime="openvino")


def test_int8_for_cpus_is_refused_where_tensorrt_is_asked_for(exported: tuple[Path, Path]) -> None:
    for runtime in ("tensorrt", "onnxruntime-tensorrt"):
        with pytest.raises(ModelError, match="Export the RUN with --precision int8-tensorrt"):
            open_session(exported[1], runtime=runtime)


# Faults, planted ---------------------------------------------------------------------------------


def widened(run: Run) -> Run:
    """The same function, with one channel between two layers 10 000 times as wide as the others."""
    first, second = run.model.decoder.levels[2]
    with torch.no_grad():
        first[1].weight[0].mul_(1e4)
        first[1].bias[0].mul_(1e4)
        second[0].weight[:, 0].div_(1e4)
    return run


@pytest.mark.parametrize("precision", int8.INT8)
def test_a_layer_that_int8_would_harm_stays_float32_and_is_named(
    tune: Tune, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(export_module, "load_run", lambda path: widened(load_run(path)))
    # Of so small a network four steps of training leave little that could differ.
    monkeypatch.setattr(export_module, "AIM", Tolerance(argmax_agreement=0.99, relative_diff=0.017))
    report = export(tune(), tmp_path / "model.onnx", options=ExportOptions(precision=precision))
    assert report.quantisation is not None
    (layer,) = report.quantisation.float32_layers
    assert layer.module == "decoder.levels.2.1.1"  # with its normalisation, which is folded in
    assert 1e-3 < layer.drift < 1e-2
    assert "in float32, for int8 in them moves the outputs most: decoder.levels.2.1.1 (" in str(report)


def test_faults_in_one_layer_are_refused_and_the_layer_named(
    exported: tuple[Path, Path], tmp_path: Path
) -> None:
    run, model = exported

    def plant(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Path:
        graph = onnx.load(model)
        (tensor,) = [item for item in graph.graph.initializer if item.name == name]
        tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor)).copy(), name))
        onnx.save(graph, tmp_path / "faulty.onnx")
        return tmp_path / "faulty.onnx"

    names = {item.name: list(item.dims) for item in onnx.load(model).graph.initializer}
    *_, square = (name for name, dims in names.items() if dims == [8, 8, 3, 3])
    step = square.replace(".int8", ".step")
    for name, change in (
        (square, lambda values: values.swapaxes(0, 1)),
        (step, lambda values: 3 * values),
    ):
        with pytest.raises(ParityError, match=r"made of decoder\.levels\.3\.1.* is the first value"):
            verify(run, plant(name, change))


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"profile": "deepness"}, "leave --precision int8 out"),
        ({"to": "torch-export"}, "leave --precision int8 out"),
        ({"to": "tensorrt"}, "for TensorRT take int8-tensorrt"),
    ],
)
def test_forms_that_are_not_int8_are_told(
    tune: Tune, tmp_path: Path, more: dict[str, str], told: str
) -> None:
    with pytest.raises(RecipeError, match=told):
        export(tune(), tmp_path / "model.onnx", options=ExportOptions(precision="int8", **more))
