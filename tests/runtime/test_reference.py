"""What a model keeps to be tried with on a GPU, and what happens where a GPU computes something else.

The GPU of these tests is ONNX Runtime on the CPU over a graph whose halves are rounded as a GPU rounds
them, so that they overflow.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from geodeploy.errors import DeviceError, GeodeployError, ParityError
from geodeploy.export import export
from geodeploy.export.options import ExportOptions
from geodeploy.runtime import Session, hold, open_session
from geodeploy.runtime.cuda import Cuda
from geodeploy.runtime.float32 import in_float32
from geodeploy.runtime.graph import OnnxFile, read_onnx
from geodeploy.runtime.onnx import OnnxSession
from geodeploy.runtime.reference import Reference, difference, pixels_to_keep, reference_of, thinned
from geodeploy.spec import REFERENCE_KEY, ModelSpec, Target
from geodeploy.train.run import load_run

TARGETS = (Target(name="height", unit="m"), Target(name="moisture"))
MakeModel = Callable[..., Any]
MakeSpec = Callable[..., ModelSpec]
Tune = Callable[..., Path]


@pytest.fixture(scope="module")
def exported(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    run, model = tune(), tmp_path_factory.mktemp("reference") / "model.onnx"
    export(run, model, options=ExportOptions(precision="fp16"))
    return run, model


class Gpu:
    """Computes halves as halves, and remembers in which precision it was asked to."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, file: OnnxFile) -> Session:
        self.asked.append(file.spec.precision)
        model = in_float32(onnx.load_from_string(file.content), rounded=True)
        session = OnnxSession(replace(file, content=model.SerializeToString()), device="cpu", threads=1)
        session.device = "cuda"
        return session


def with_a_detour(file: OnnxFile) -> OnnxFile:
    """Behind the first product of halves all is made 60 000 squared as large, and small again."""
    model = onnx.load_from_string(file.content)
    graph = model.graph
    kind = TensorProto.FLOAT16
    halves = {value.name for value in graph.value_info if value.type.tensor_type.elem_type == kind}
    place, node = next(
        (place, node)
        for place, node in enumerate(graph.node)
        if node.op_type == "Conv" and node.output[0] in halves
    )
    name, node.output[0] = node.output[0], "step0"
    for step, factor in enumerate((6e4, 6e4, 1 / 6e4, 1 / 6e4)):
        graph.initializer.append(helper.make_tensor(f"by{step}", kind, [], [factor]))
        given = name if step == 3 else f"step{step + 1}"
        mul = helper.make_node("Mul", [f"step{step}", f"by{step}"], [given])
        graph.node.insert(place + step + 1, mul)
    return replace(file, content=model.SerializeToString())


def test_an_export_keeps_real_tiles_and_what_the_tuned_model_gives(
    exported: tuple[Path, Path],
) -> None:
    run = load_run(exported[0])
    reference = reference_of(read_onnx(exported[1]))
    assert reference is not None
    real = run.tiles.pixels[: len(reference.pixels)]
    spread = real.max(axis=(0, 2, 3)) - real.min(axis=(0, 2, 3))
    assert (np.abs(reference.pixels - real).max(axis=(0, 2, 3)) <= spread / 500).all()
    with torch.inference_mode():
        judge = run.model(torch.from_numpy(reference.pixels)).numpy()[:, :, ::4, ::4]
    np.testing.assert_allclose(reference.outputs, judge, rtol=1e-3, atol=1e-4)
    with OnnxSessionOf(exported[1]) as session:
        assert difference(session, reference) is None


class OnnxSessionOf:
    def __init__(self, model: Path) -> None:
        self.session = open_session(model, runtime="onnxruntime", device="cpu", threads=1)

    def __enter__(self) -> Session:
        return self.session

    def __exit__(self, *_: object) -> None:
        self.session.close()


def test_what_is_packed_is_what_is_read(make_spec: MakeSpec) -> None:
    spec, random = make_spec(tile=64), np.random.default_rng(0)
    pixels = pixels_to_keep(random.normal(size=(5, 6, 64, 64)).astype(np.float32))
    outputs = thinned(random.normal(size=(2, 4, 64, 64)).astype(np.float32))
    text = Reference(pixels, outputs).to_text()
    read = Reference.from_text(text, spec)
    np.testing.assert_allclose(read.pixels, pixels, atol=1e-5)
    np.testing.assert_allclose(read.outputs, outputs, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="are needed"):
        Reference.from_text(text, make_spec(tile=128))


def test_quantities_beyond_halves_are_kept_and_told_apart_each_by_its_size(
    make_model: MakeModel, make_spec: MakeSpec, tmp_path: Path
) -> None:
    spec = make_spec(tile=16, overlap=4, targets=TARGETS)
    model = make_model(tmp_path / "model.onnx", spec)
    pixels = pixels_to_keep(np.random.default_rng(0).uniform(0, 0.6, (2, 6, 16, 16)).astype(np.float32))
    with OnnxSessionOf(model.path) as session:
        outputs = thinned(session.run(pixels))
        sizes = np.array([1e6, 1e-6], np.float32).reshape(2, 1, 1)
        kept = Reference.from_text(Reference(pixels, outputs * sizes).to_text(), spec)
        np.testing.assert_allclose(kept.outputs, outputs * sizes, rtol=2e-3, atol=1e-9)
        assert difference(session, Reference(pixels, outputs)) is None
        wrong = outputs * np.array([1, 1.2], np.float32).reshape(2, 1, 1)
        told = difference(session, Reference(pixels, wrong))
    assert told is not None
    assert told.startswith("quantities differ")


@pytest.mark.parametrize("text", ["", "?", "AAAA", "eJwDAAAAAAE="])
def test_a_reference_that_cannot_be_read_is_none(exported: tuple[Path, Path], text: str) -> None:
    assert reference_of(replace(read_onnx(exported[1]), reference=text)) is None


def test_a_sound_model_stays_in_its_precision(exported: tuple[Path, Path]) -> None:
    gpu = Gpu()
    session = hold(read_onnx(exported[1]), gpu)
    assert session.precision == "fp16"
    assert gpu.asked == ["fp16"]


def test_halves_that_overflow_on_the_gpu_are_computed_in_float32_aloud(
    exported: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    gpu = Gpu()
    file = with_a_detour(read_onnx(exported[1]))
    with OnnxSessionOf(exported[1]) as sound:
        tiles = load_run(exported[0]).tiles.pixels
        expected = sound.run(tiles)
    session = hold(file, gpu)
    assert gpu.asked == ["fp16", "fp32"]
    assert session.precision == "fp32"
    assert session.sha256 == file.sha256
    assert "in fp16 is refused" in caplog.text
    assert "computed in float32 instead" in caplog.text
    assert np.abs(session.run(tiles) - expected).max() <= 0.02 * np.abs(expected).max()


def test_a_gpu_that_computes_something_else_in_float32_too_is_refused(
    exported: tuple[Path, Path],
) -> None:
    file = read_onnx(exported[1])
    reference = reference_of(file)
    assert reference is not None
    other = replace(reference, outputs=-reference.outputs)
    with pytest.raises(ParityError, match=r"on this GPU: .* of pixels have the same class"):
        hold(replace(file, reference=other.to_text()), Gpu())


def test_a_model_without_tiles_to_try_is_run_with_a_warning(
    make_model: MakeModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model(tmp_path / "model.onnx").path
    assert REFERENCE_KEY.encode() not in model.read_bytes()
    assert hold(read_onnx(model), Gpu()).precision == "fp32"
    assert "nothing proves it here" in caplog.text


@pytest.fixture
def no_gpu() -> None:
    try:
        Cuda()
    except GeodeployError:
        return
    pytest.skip("there is a GPU")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("runtime", ["tensorrt", "onnxruntime-tensorrt"])
def test_tensorrt_without_a_gpu_is_told_in_one_line(
    make_model: MakeModel, tmp_path: Path, runtime: str
) -> None:
    model = make_model(tmp_path / "model.onnx").path
    with pytest.raises(GeodeployError) as caught:
        open_session(model, runtime=runtime)
    assert "\n" not in str(caught.value)
    with pytest.raises(DeviceError, match="needs a GPU"):
        open_session(model, runtime=runtime, device="cpu")


@pytest.mark.usefixtures("no_gpu")
def test_an_export_to_tensorrt_without_a_gpu_writes_nothing(tune: Tune, tmp_path: Path) -> None:
    with pytest.raises(GeodeployError) as caught:
        export(tune(), tmp_path / "model.onnx", options=ExportOptions(to="tensorrt"))
    assert "\n" not in str(caught.value)
    assert "--device" not in str(caught.value), "which no export has"
    assert not list(tmp_path.iterdir())
