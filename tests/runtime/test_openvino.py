"""Which runtime runs a model, and what OpenVINO does otherwise than ONNX Runtime."""

import logging
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import rasterio
from onnx import TensorProto, helper

from geodeploy import Model, PredictOptions, predict
from geodeploy.errors import DeviceError, MissingExtraError, ModelError, ParityError
from geodeploy.runtime import open_session
from geodeploy.runtime.openvino import has_bf16
from geodeploy.spec import ModelSpec, Parity

MakeModel = Callable[..., Any]
MakeSpec = Callable[..., ModelSpec]
LAYERS = (3, 1, 3, 3)

pytest.importorskip("openvino", reason="needs openvino: pip install 'geodeploy-eo[cpu]'")


def proved(spec: ModelSpec, *runtimes: str) -> ModelSpec:
    """``spec`` with a parity report that covers ``runtimes``."""
    parity = Parity(argmax_agreement=1.0, report_sha256="ab", runtimes=runtimes)
    return spec.model_copy(update={"parity": parity})


@pytest.fixture
def covered(make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path) -> Path:
    """A model that its report proves in both runtimes."""
    spec = proved(make_spec(), "onnxruntime", "openvino")
    return make_model(tmp_path / "covered.onnx", spec, kernels=LAYERS).path


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="auto takes it on x86 alone")
def test_auto_takes_the_faster_runtime_that_the_report_covers_and_says_so(
    covered: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert open_session(covered, device="cpu").name.startswith("openvino ")
    assert "in OpenVINO, the fastest that its parity report covers" in caplog.text
    assert open_session(covered, runtime="onnxruntime").name.startswith("onnxruntime ")


def test_what_no_report_covers_stays_in_onnx_runtime(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = make_model(tmp_path / "old.onnx", proved(make_spec(), "onnxruntime")).path
    with caplog.at_level(logging.INFO):
        assert open_session(old, device="cpu").name.startswith("onnxruntime ")
    if platform.machine() in ("x86_64", "AMD64"):
        assert "in ONNX Runtime: its parity report does not cover OpenVINO" in caplog.text
    with pytest.raises(ParityError, match=r"its parity report covers onnxruntime. Export it again"):
        open_session(old, runtime="openvino")
    # A model from elsewhere has no report at all: whoever asks for OpenVINO gets it, and a warning.
    foreign = make_model(tmp_path / "foreign.onnx").path
    assert open_session(foreign).name.startswith("onnxruntime ")
    assert open_session(foreign, runtime="openvino").name.startswith("openvino ")
    assert "has no parity report" in caplog.text


@pytest.mark.parametrize(
    ("precision", "covered_by", "advice"),
    [
        ("fp32", ["onnxruntime"], "again where openvino is installed, or take --runtime onnxruntime"),
        ("int8-tensorrt", ["onnxruntime"], "with --precision int8, or take --runtime onnxruntime"),
        ("bf16", [], "again where openvino is installed"),
    ],
)
def test_what_is_advised_in_place_of_openvino_helps(
    make_model: MakeModel,
    make_spec: MakeSpec,
    tmp_path: Path,
    precision: str,
    covered_by: list[str],
    advice: str,
) -> None:
    spec = proved(make_spec().model_copy(update={"precision": precision}), *covered_by)
    model = make_model(tmp_path / "model.onnx", spec).path
    with pytest.raises(ParityError, match=rf"Export .*{advice}\.$"):
        open_session(model, runtime="openvino")


@pytest.mark.parametrize("precision", ["bf16", "int8"])
def test_bfloat16_is_left_where_the_report_does_not_cover_it(
    make_model: MakeModel,
    make_spec: MakeSpec,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    precision: str,
) -> None:
    spec = proved(make_spec().model_copy(update={"precision": precision}), "openvino")
    model = make_model(tmp_path / "model.onnx", spec, kernels=LAYERS).path
    with caplog.at_level(logging.INFO):
        session = open_session(model, runtime="openvino")
    assert session.name.startswith("openvino ")
    told = "does not cover bfloat16, in which this processor is faster" in caplog.text
    assert told == has_bf16()
    float32 = make_model(
        tmp_path / "float32.onnx", proved(make_spec(), "openvino"), kernels=LAYERS
    ).path
    pixels = np.random.default_rng(3).uniform(0, 0.6, (1, 6, 64, 64)).astype(np.float32)
    judge = open_session(float32, runtime="openvino").run(pixels)
    assert np.array_equal(session.run(pixels), judge)


@pytest.mark.parametrize(
    "asked", [{"runtime": "openvino-bf16"}, {"runtime": "OpenVINO"}, {"device": "gpu"}]
)
def test_an_unknown_runtime_or_device_is_not_taken_for_another(
    covered: Path, asked: dict[str, Any]
) -> None:
    (name,) = asked
    with pytest.raises(DeviceError, match=rf"{name}='.*' is none of auto, "):
        open_session(covered, **asked)
    with pytest.raises(DeviceError, match="is none of"):
        Model(covered, **asked)


def test_a_mask_in_bfloat16_is_widened_to_numbers(covered: Path) -> None:
    """Logits times whether they are positive, all in bfloat16: as elsewhere made."""
    pixels = np.random.default_rng(5).uniform(0, 0.6, (1, 6, 64, 64)).astype(np.float32)
    logits = open_session(covered, runtime="openvino").run(pixels)
    model = onnx.load(covered)
    graph, half = model.graph, TensorProto.BFLOAT16
    graph.node[-1].output[0] = "raw"
    graph.initializer.append(helper.make_tensor("nothing", TensorProto.FLOAT, [], [0.0]))
    graph.node.extend(
        [
            helper.make_node("Greater", ["raw", "nothing"], ["positive"]),
            helper.make_node("Cast", ["positive"], ["mask"], to=half),
            helper.make_node("Cast", ["raw"], ["half"], to=half),
            helper.make_node("Mul", ["half", "mask"], ["kept"]),
            helper.make_node("Cast", ["kept"], ["logits"], to=TensorProto.FLOAT),
        ]
    )
    onnx.save(model, covered)
    found = open_session(covered, runtime="openvino").run(pixels)
    np.testing.assert_allclose(found, np.maximum(logits, 0), rtol=1e-5, atol=1e-6)


def test_what_openvino_cannot_do_is_told(covered: Path, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="OpenVINO runs on the CPU"):
        open_session(covered, runtime="openvino", device="cuda")
    with pytest.raises(ModelError, match="is a RUN, which PyTorch runs"):
        open_session(tmp_path, runtime="openvino")


def test_an_absent_openvino_is_named_when_asked_for_and_left_out_otherwise(
    covered: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"package openvino.*geodeploy-eo\[cpu\]"):
        open_session(covered, runtime="openvino")
    assert open_session(covered).name.startswith("onnxruntime ")


def test_a_node_that_openvino_lacks_is_named_in_one_line(covered: Path) -> None:
    graph = onnx.load(covered)
    last = graph.graph.node[-1]
    last.output[0] = "raw"
    graph.graph.node.append(helper.make_node("Inverse", ["raw"], ["logits"], domain="com.microsoft"))
    graph.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    onnx.save(graph, covered)
    complaint = (
        r"covered\.onnx is not an ONNX model that OpenVINO .*com\.microsoft\.Inverse.*onnxruntime"
    )
    with pytest.raises(ModelError, match=complaint) as caught:
        open_session(covered, runtime="openvino")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [{"threads": 1, "batch": 3}, {"threads": 2, "batch": 5, "readers": 3}, {"threads": 2, "batch": 1}],
)
def test_batches_and_threads_change_no_byte_of_a_map_made_in_openvino(
    covered: Path, small_scene: Path, tmp_path: Path, options: dict[str, int]
) -> None:
    for name, chosen in (("one", {}), ("other", options)):
        report = predict(
            small_scene,
            covered,
            tmp_path / f"{name}.tif",
            options=PredictOptions(runtime="openvino", **chosen),
        )
        assert report.runtime.startswith("openvino ")
    assert (tmp_path / "one.tif").read_bytes() == (tmp_path / "other.tif").read_bytes()


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where compiled models are kept."""
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("GEODEPLOY_OPENVINO_CACHE", "1")
    return tmp_path / "cache" / "openvino"


def test_a_compiled_model_is_kept_if_asked_for_and_changes_no_bit(
    covered: Path, kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(3).uniform(0, 0.6, (3, 6, 64, 64)).astype(np.float32)
    first, second = (open_session(covered, runtime="openvino").run(pixels) for _ in range(2))
    (engine,) = kept.glob("*.engine")
    assert kept.stat().st_mode & 0o077 == 0
    open_session(covered, runtime="openvino", threads=1).close()
    assert len(list(kept.glob("*.engine"))) == 2, "one for each number of threads"
    monkeypatch.delenv("GEODEPLOY_OPENVINO_CACHE")
    engine.unlink()
    judge = open_session(covered, runtime="openvino").run(pixels)
    assert not engine.exists()
    np.testing.assert_array_equal(first, judge)
    np.testing.assert_array_equal(second, judge)


def test_a_compiled_model_that_was_damaged_or_is_anothers_is_compiled_again(
    covered: Path, kept: Path, make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pixels = np.random.default_rng(3).uniform(0, 0.6, (1, 6, 64, 64)).astype(np.float32)
    other = make_model(tmp_path / "other.onnx", kernels=LAYERS, seed=1).path
    open_session(other, runtime="openvino").close()
    (theirs,) = kept.glob("*.engine")
    judge = open_session(covered, runtime="openvino").run(pixels)
    (mine,) = (path for path in kept.glob("*.engine") if path != theirs)
    whole = mine.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :]
    for content in (flipped, theirs.read_bytes()):
        caplog.clear()
        mine.write_bytes(content)
        np.testing.assert_array_equal(open_session(covered, runtime="openvino").run(pixels), judge)
        assert "it is built again" in caplog.text


def test_the_map_is_that_of_onnx_runtime(covered: Path, real_scene: Path, tmp_path: Path) -> None:
    maps = []
    for runtime in ("onnxruntime", "openvino"):
        output = tmp_path / f"{runtime}.tif"
        predict(real_scene, covered, output, options=PredictOptions(runtime=runtime))
        with rasterio.open(output) as mapped:
            maps.append(mapped.read(1))
    # Sums in another order: only a pixel whose two best classes are all but level may turn.
    assert (maps[0] == maps[1]).mean() > 0.9999
    assert len(np.unique(maps[0])) > 2
