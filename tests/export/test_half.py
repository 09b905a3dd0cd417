"""fp16 and bf16: against rounding by hand, against the tuned model, and with an overflow planted."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto

from geodeploy.errors import ModelError, ParityError, RecipeError
from geodeploy.export import export, half, verify
from geodeploy.export import onnx as export_module
from geodeploy.export.options import ExportOptions
from geodeploy.runtime import open_session
from geodeploy.runtime.float32 import in_float32, types_of
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.openvino import OpenVinoSession
from geodeploy.train.run import Run, load_run

Tune = Callable[..., Path]
MakeModel = Callable[..., Any]
KINDS = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture(scope="module", params=["fp16", "bf16"])
def precision(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def exported(precision: str, tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, model = tune(), tmp_path_factory.mktemp(precision) / "model.onnx"
    export(run, model, options=ExportOptions(precision=precision))
    return run, model


def on_cpu(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (found,) = session.run(None, {"pixels": pixels})
    return found


def test_products_are_halves_and_what_needs_digits_is_float32(
    exported: tuple[Path, Path], precision: str
) -> None:
    model = onnx.load(exported[1])
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    kinds = types_of(model)
    found: dict[str, set[int]] = {}
    for node in model.graph.node:
        found.setdefault(node.op_type, set()).update(kinds[name] for name in node.output)
    assert found["MatMul"] == {KINDS[precision]}
    assert found["Conv"] == {KINDS[precision], TensorProto.FLOAT}  # float32: the layer of the logits
    for name in ("Log", "LayerNormalization", "Softmax", "Resize"):
        assert found[name] == {TensorProto.FLOAT}, name
    (last,) = [node for node in model.graph.node if "logits" in node.output]
    assert kinds[last.input[0]] == kinds[last.input[1]] == TensorProto.FLOAT
    assert read_onnx(exported[1]).spec.precision == precision


def test_rounded_is_what_rounding_by_hand_after_each_layer_gives(
    make_model: MakeModel, tmp_path: Path, precision: str
) -> None:
    model = make_model(tmp_path / "model.onnx", kernels=(3, 3, 1))
    graph = onnx.load(model.path)
    graph.opset_import[0].version = 22  # the first whose convolutions take bfloat16
    half.halve(graph, precision, {})
    pixels = np.random.default_rng(0).random((2, 6, 64, 64), np.float32)

    def rounding(values: torch.Tensor) -> torch.Tensor:
        return values.to(DTYPES[precision]).float()

    values = rounding(torch.from_numpy(pixels))
    *layers, last = map(torch.from_numpy, model.weights)
    for layer in layers:
        values = torch.nn.functional.conv2d(values, rounding(layer), padding=1)
        values = rounding(values).relu()
    judge = torch.nn.functional.conv2d(values, last).numpy()
    # Sums of another order round to the neighbouring half now and then: one step, 2**-8 in bf16.
    found = on_cpu(in_float32(graph, rounded=True), pixels)
    assert np.abs(found - judge).max() <= 2**-7 * np.abs(judge).max()
    assert (np.abs(found - judge) <= 1e-5 * np.abs(judge).max()).mean() > 0.99
    exact = np.stack([model.on_the_whole(tile) for tile in pixels])
    assert np.abs(judge - exact).max() > 1e-5 * np.abs(judge).max()


def test_overflow_shows_when_rounded_and_not_in_a_runtime_on_the_cpu(
    make_model: MakeModel, tmp_path: Path
) -> None:
    ones = np.ones((1, 1, 1, 1), np.float32)
    weights = [
        np.full((2, 6, 1, 1), 4e4, np.float32),
        np.full((2, 2, 1, 1), 1e-4, np.float32),
        np.ones((4, 2, 1, 1), np.float32) * ones,
    ]
    path = make_model(tmp_path / "model.onnx", kernels=(1, 1, 1), weights=weights).path
    graph = onnx.load(path)
    half.halve(graph, "fp16", {})
    pixels = np.ones((1, 6, 64, 64), np.float32)
    assert np.isinf(on_cpu(in_float32(graph, rounded=True), pixels)).all()
    assert np.isfinite(on_cpu(graph, pixels)).all()  # which is why it cannot be the judge


def test_a_half_model_is_proved_as_a_gpu_computes_it_and_in_what_runs_it(
    exported: tuple[Path, Path], precision: str
) -> None:
    report = json.loads(exported[1].with_suffix(".parity.json").read_bytes())
    assert report["rounded"]
    assert report["precision"] == precision
    assert report["tolerances"]["argmax_agreement"] == 0.999
    assert 1e-6 < report["exported"]["relative_diff"] <= report["tolerances"]["relative_diff"]
    parity = read_onnx(exported[1]).spec.parity
    assert parity is not None
    assert ("onnxruntime" in parity.runtimes) == (precision == "fp16")
    assert verify(*exported).released


def test_a_half_model_runs_on_a_cpu_where_a_runtime_can(
    exported: tuple[Path, Path], precision: str
) -> None:
    run = load_run(exported[0])
    with torch.inference_mode():
        judge = run.model(torch.from_numpy(run.tiles.pixels)).numpy()
    proved = read_onnx(exported[1]).spec.parity.runtimes
    for runtime in {"onnxruntime", "openvino"}.intersection(proved):
        found = open_session(exported[1], runtime=runtime, device="cpu").run(run.tiles.pixels)
        assert np.abs(found - judge).max() <= 0.02 * np.abs(judge).max()
    if precision == "bf16":
        with pytest.raises(ModelError, match="in bf16, which ONNX Runtime has on GPUs alone"):
            open_session(exported[1], runtime="onnxruntime", device="cpu")


def test_openvino_computes_bf16_in_bfloat16_where_the_processor_has_it_and_the_report_covers_it(
    tune: Tune, tmp_path: Path
) -> None:
    openvino = pytest.importorskip("openvino", reason="needs openvino")
    run, model = tune(), tmp_path / "model.onnx"
    has_bf16 = "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    report = export(run, model, options=ExportOptions(precision="bf16"))
    assert report.covered == ("openvino", "openvino-bf16")[: 1 + has_bf16]
    pixels = load_run(run).tiles.pixels
    session = open_session(model, runtime="openvino")
    assert session.name.startswith("openvino-bf16 " if has_bf16 else "openvino ")
    found = session.run(pixels)
    # Elsewhere the weights are those of bfloat16, and the arithmetic is float32's.
    widened = on_cpu(in_float32(onnx.load(model), rounded=False), pixels)
    plain = OpenVinoSession(read_onnx(model), threads=None).run(pixels)
    assert np.abs(plain - widened).max() <= 1e-5 * np.abs(widened).max()
    assert (np.abs(found - widened).max() > 1e-4 * np.abs(widened).max()) == has_bf16


def test_the_same_run_gives_the_same_bytes(
    exported: tuple[Path, Path], precision: str, tmp_path: Path
) -> None:
    run, model = exported
    export(run, tmp_path / "again.onnx", options=ExportOptions(precision=precision))
    assert (tmp_path / "again.onnx").read_bytes() == model.read_bytes()


# An overflow, planted ----------------------------------------------------------------------------


@pytest.fixture
def reaching_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """RUNs are loaded with a million times what goes between two convolutions of the decoder."""

    def scaled(path: Path) -> Run:
        run = load_run(path)
        first, second = run.model.decoder.levels[0]
        with torch.no_grad():
            first[1].weight.mul_(1e6)
            first[1].bias.mul_(1e6)
            second[0].weight.div_(1e6)
        return run

    monkeypatch.setattr(export_module, "load_run", scaled)


def test_layers_beyond_the_range_of_fp16_stay_float32(
    tune: Tune, tmp_path: Path, reaching_far: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    report = export(tune(), tmp_path / "model.onnx", options=ExportOptions(precision="fp16"))
    assert report.released
    assert "stay float32, for float16 ends at 65504" in caplog.text
    assert f"Wrote {tmp_path / 'model.onnx'} in " in caplog.text
    steps = [line.partition(",")[0] for line in caplog.messages if line.startswith("Step ")]
    assert steps == [f"Step {number} of 5" for number in range(1, 6)]


def test_an_overflow_is_refused_and_the_layer_named(
    tune: Tune, tmp_path: Path, reaching_far: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(half, "_largest", lambda *_: {})
    with pytest.raises(ParityError, match=r"made of decoder\.levels\.0\."):
        export(tune(), tmp_path / "model.onnx", options=ExportOptions(precision="fp16"))
    names = {item.name for item in tmp_path.iterdir()}
    assert names == {"model.refused.json", "model.refused.png"}


def test_bf16_needs_no_heed_of_ranges(tune: Tune, tmp_path: Path, reaching_far: None) -> None:
    assert export(tune(), tmp_path / "model.onnx", options=ExportOptions(precision="bf16")).released


@pytest.mark.parametrize("more", [{"profile": "deepness"}, {"to": "torch-export"}])
def test_forms_that_are_float32_are_told(tune: Tune, tmp_path: Path, more: dict[str, str]) -> None:
    options = ExportOptions(precision="fp16", **more)
    with pytest.raises(RecipeError, match="leave --precision fp16 out"):
        export(tune(), tmp_path / "model.onnx", options=options)
