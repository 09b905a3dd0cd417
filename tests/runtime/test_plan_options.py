"""What an engine is built for, and the calls of TensorRT that no machine here answers.

Where TensorRT is needed a few lines stand in for it, which do what its reference says; TensorRT for RTX
tells whether they have the names right.
"""

import contextlib
import importlib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from geodeploy.errors import DeviceError, RecipeError
from geodeploy.export import export
from geodeploy.export.options import ExportOptions
from geodeploy.runtime import open_session
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.plan import PlanOptions, plan_options, set_timings
from geodeploy.runtime.refit import graph_hash, refit

Tune = Callable[..., Path]
PROFILE = Path(__file__).parents[2] / "export" / "tensorrt.toml"


def test_the_profile_in_export_says_what_holds_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan_options() == PlanOptions()
    monkeypatch.setenv("GEODEPLOY_TENSORRT", str(PROFILE))
    assert plan_options() == PlanOptions()
    assert all(name in PROFILE.read_text() for name in PlanOptions.model_fields)


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible", "refit"])
def test_each_option_is_reached_through_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    text = PROFILE.read_text().replace(f"{option} = false", f"{option} = true")
    (tmp_path / "own.toml").write_text(text)
    monkeypatch.setenv("GEODEPLOY_TENSORRT", str(tmp_path / "own.toml"))
    assert plan_options() == PlanOptions(**{option: True})


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"version_compatibel = true", r"version_compatibel: .* The options are batch, version_compat"),
        (b"batch = 0", r"own\.toml: batch: .*greater than 0"),
        (b"batch 4", r"own\.toml is no TOML \("),
        (b"\xff", r"own\.toml is no TOML \("),
        (None, r"GEODEPLOY_TENSORRT=.*own\.toml cannot be read \(No such file"),
    ],
)
def test_a_file_that_says_no_options_is_refused_before_any_work(
    tune: Tune,
    make_model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
    complaint: str,
) -> None:
    if content is not None:
        (tmp_path / "own.toml").write_bytes(content)
    monkeypatch.setenv("GEODEPLOY_TENSORRT", str(tmp_path / "own.toml"))
    model = make_model(tmp_path / "model.onnx").path
    with pytest.raises(RecipeError, match=complaint) as caught:
        open_session(model, runtime="tensorrt")
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=complaint):
        export(tune(), tmp_path / "other.onnx", options=ExportOptions(to="tensorrt"))


class Config:
    """The part of a builder's configuration that keeps timings, on the GPU ``gpu``."""

    def __init__(self, gpu: str) -> None:
        self.gpu = gpu
        self.cache: str | None = None

    def create_timing_cache(self, timings: bytes) -> str | None:
        return None if timings == b"damaged" else timings.decode() or f"{self.gpu}: nothing yet"

    def set_timing_cache(self, cache: str, ignore_mismatch: bool) -> bool:
        assert isinstance(cache, str)
        assert not ignore_mismatch
        fits = cache.startswith(self.gpu)
        self.cache = cache if fits else self.cache
        return fits


@pytest.mark.parametrize(
    ("timings", "taken"),
    [
        (b"A: many", "A: many"),
        (b"", "A: nothing yet"),
        (b"damaged", "A: nothing yet"),
        (b"B: many", "A: nothing yet"),
    ],
)
def test_timings_that_are_damaged_or_of_another_gpu_are_begun_afresh(
    timings: bytes, taken: str
) -> None:
    config = Config("A")
    assert set_timings(config, timings) == taken
    assert config.cache == taken


def test_a_builder_that_takes_no_timings_goes_without() -> None:
    config = Config("A")
    config.create_timing_cache = lambda timings: None  # type: ignore[method-assign]
    assert set_timings(config, b"A: many") is None


def tensorrt(*, parses: bool = True, fits: bool = True) -> tuple[Any, list[Any]]:
    """A stand-in for the package, and what was asked of it."""
    asked: list[Any] = []

    class Logger:
        ERROR = 1

        def __init__(self, severity: int) -> None:
            assert severity == self.ERROR

    class Refitter:
        def __init__(self, engine: str, log: Logger) -> None:
            asked.append(engine)

        def refit_cuda_engine(self) -> bool:
            asked.append("refit")
            return fits

    class OnnxParserRefitter:
        def __init__(self, refitter: Refitter, log: Logger) -> None:
            assert isinstance(refitter, Refitter)

        def refit_from_bytes(self, model: bytes, path: str) -> bool:
            asked.append((model, path))
            return parses

    kinds = (Logger, Refitter, OnnxParserRefitter)
    return SimpleNamespace(**{kind.__name__: kind for kind in kinds}), asked


def test_an_engine_is_given_the_weights_of_the_file(make_model: Any, tmp_path: Path) -> None:
    file = read_onnx(make_model(tmp_path / "model.onnx").path)
    trt, asked = tensorrt()
    assert refit(trt, "engine", file)
    assert asked == ["engine", (file.content, str(file.path)), "refit"]
    for broken in ({"parses": False}, {"fits": False}):
        assert not refit(tensorrt(**broken)[0], "engine", file)


def test_the_names_are_those_of_tensorrt() -> None:
    if find_spec("tensorrt_rtx") is None:
        pytest.skip("needs TensorRT for RTX: pip install tensorrt-rtx-cu12")
    rtx, (ours, _) = importlib.import_module("tensorrt_rtx"), tensorrt()
    for kind in (ours.Refitter, ours.OnnxParserRefitter):
        for name in (name for name in vars(kind) if not name.startswith("_")):
            assert hasattr(getattr(rtx, kind.__name__), name)
    for name in ("create_timing_cache", "set_timing_cache", "get_timing_cache"):
        assert hasattr(rtx.IBuilderConfig, name)


def test_retuned_models_of_one_architecture_have_one_graph(tune: Tune, tmp_path: Path) -> None:
    few = ("training.steps=2", "training.validate_every=1")
    made = [tune(*few), tune("seed=4", *few), tune("model.decoder=linear", *few)]
    files = []
    for number, run in enumerate(made):
        export(run, tmp_path / f"{number}.onnx")
        files.append(read_onnx(tmp_path / f"{number}.onnx"))
    one, retuned, other = map(graph_hash, files)
    assert one == retuned
    assert files[0].sha256 != files[1].sha256
    assert other != one


def test_tensorrt_for_rtx_in_the_place_of_tensorrt_is_said(
    make_model: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if find_spec("tensorrt_rtx") is None or find_spec("tensorrt") is not None:
        pytest.skip("needs TensorRT for RTX and no other: pip install tensorrt-rtx-cu12")
    model = make_model(tmp_path / "model.onnx").path
    with contextlib.suppress(DeviceError):  # without a GPU
        open_session(model, runtime="tensorrt").close()
    assert "TensorRT for RTX (tensorrt_rtx) stands in for TensorRT" in caplog.text
