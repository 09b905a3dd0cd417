"""Each runtime on a GPU against the tuned model in PyTorch on the CPU: `pytest tests/gpu`.

Not run yet on any GPU.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch

from geodeploy.errors import GeodeployError
from geodeploy.export import export, export_adapters
from geodeploy.export.options import ExportOptions
from geodeploy.predict import PredictOptions, predict
from geodeploy.runtime import open_base, open_session
from geodeploy.runtime.adapter import read_adapter
from geodeploy.runtime.cuda import Cuda
from geodeploy.train.run import load_run

Tune = Callable[..., Path]
FAR = {"fp32": 1e-3, "fp16": 1e-2, "bf16": 5e-2, "int8-tensorrt": 0.2}
"""Of the largest logit."""


def gpu_lacks() -> str | None:
    """Why there is no GPU to try."""
    try:
        Cuda()
    except GeodeployError as error:
        return str(error)
    return None


# Before the models are made, which takes minutes.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(gpu_lacks() is not None, reason=f"needs an NVIDIA GPU: {gpu_lacks()}"),
]


def lacking(runtime: str) -> str | None:
    """Which package ``runtime`` needs and is not there."""
    if runtime == "tensorrt":
        return None if find_spec("tensorrt") else "needs tensorrt: pip install 'geodeploy-eo[tensorrt]'"
    import onnxruntime

    needed = {"onnxruntime": "CUDA", "onnxruntime-tensorrt": "Tensorrt"}[runtime]
    if f"{needed}ExecutionProvider" not in onnxruntime.get_available_providers():
        return "needs onnxruntime-gpu: pip install 'geodeploy-eo[gpu]'"
    return None


@pytest.fixture(params=["onnxruntime", "onnxruntime-tensorrt", "tensorrt"])
def runtime(request: pytest.FixtureRequest) -> str:
    if reason := lacking(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture(scope="session")
def models(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The RUN, and its models by their precision."""
    folder = tmp_path_factory.mktemp("gpu")
    for name in FAR:
        export(tune(), folder / f"{name}.onnx", options=ExportOptions(precision=name))
    return {"run": tune()} | {name: folder / f"{name}.onnx" for name in FAR}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEODEPLOY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("precision", FAR)
def test_logits_are_those_of_pytorch_for_any_batch(
    models: dict[str, Path], runtime: str, precision: str
) -> None:
    run = load_run(models["run"])
    with closing(open_session(models[precision], runtime=runtime, device="cuda")) as session:
        assert session.device == "cuda"
        assert session.precision == precision, "refused at its first load"
        for batch in (1, 3, 8, 19):
            pixels = np.resize(run.tiles.pixels, (batch, *run.tiles.pixels.shape[1:]))
            with torch.inference_mode():
                judge = run.model(torch.from_numpy(pixels)).numpy()
            assert np.abs(session.run(pixels) - judge).max() <= FAR[precision] * np.abs(judge).max()


def test_threads_may_share_a_session(models: dict[str, Path], runtime: str) -> None:
    tiles = load_run(models["run"]).tiles.pixels
    with closing(open_session(models["fp32"], runtime=runtime, device="cuda")) as session:
        shares = [np.roll(np.resize(tiles, (8, *tiles.shape[1:])), place, 0) for place in range(4)]
        judges = [session.run(pixels) for pixels in shares]
        with ThreadPoolExecutor(len(shares)) as pool:
            for _ in range(20):
                for found, judge in zip(pool.map(session.run, shares), judges, strict=True):
                    assert np.abs(found - judge).max() <= FAR["fp32"] * np.abs(judge).max()


@pytest.mark.parametrize("precision", FAR)
def test_a_scene_is_mapped_as_on_the_cpu(
    models: dict[str, Path], runtime: str, precision: str, real_scene: Path, tmp_path: Path
) -> None:
    maps = []
    for model, options in (
        (models["fp32"], PredictOptions(device="cpu")),
        (models[precision], PredictOptions(device="cuda", runtime=runtime)),
    ):
        output = tmp_path / f"{len(maps)}.tif"
        report = predict(real_scene, model, output, options=options)
        with rasterio.open(output) as dataset:
            maps.append(dataset.read(1))
    assert report.device == "cuda"
    assert (maps[0] == maps[1]).mean() >= (0.99 if precision == "int8-tensorrt" else 0.999)


def onnxruntime_for_gpus() -> None:
    if reason := lacking("onnxruntime"):
        pytest.skip(reason)


@pytest.fixture(scope="session")
def adapters(tune: Tune, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Path]]:
    """A base, and its adapters by their RUNs."""
    folder = tmp_path_factory.mktemp("gpu-adapters")
    runs = []
    for name, override in (("a", "method.r=4"), ("b", "method.r=2")):
        shutil.copytree(tune(override), folder / name)  # adapters are called as their RUNs are
        runs.append(folder / name)
    export_adapters(runs, folder / "models")
    return folder / "models" / "base.onnx", {
        run: folder / "models" / f"{run.name}.onnx_adapter" for run in runs
    }


def test_adapters_give_the_logits_of_their_runs_for_any_batch(
    adapters: tuple[Path, dict[Path, Path]], caplog: pytest.LogCaptureFixture
) -> None:
    onnxruntime_for_gpus()
    path, made = adapters
    base = open_base(path, device="cuda")
    for folder, adapter in made.items():
        run, session = load_run(folder), base.session(adapter)
        assert session.device == "cuda"
        for batch in (1, 3, 8, 19):
            pixels = np.resize(run.tiles.pixels, (batch, *run.tiles.pixels.shape[1:]))
            with torch.inference_mode():
                judge = run.model(torch.from_numpy(pixels)).numpy()
            assert np.abs(session.run(pixels) - judge).max() <= FAR["fp32"] * np.abs(judge).max()
    assert not caplog.records, "each was held against its tiles"


def test_what_goes_from_base_to_decoder_stays_on_the_gpu(
    adapters: tuple[Path, dict[Path, Path]],
) -> None:
    onnxruntime_for_gpus()
    path, made = adapters
    graph = open_base(path, device="cuda").graph
    (folder, adapter), *_ = made.items()
    tensors = {name: graph.value(value) for name, value in read_adapter(adapter).tensors.items()}
    pixels = graph.value(load_run(folder).tiles.pixels[:2])
    assert pixels.device_name() == "cuda"
    found = graph.run([value.name for value in graph.outputs], {"pixels": pixels, **tensors})
    assert {value.device_name() for value in found} == {"cuda"}


def test_onnxruntime_keeps_engines_and_timings_of_tensorrt(
    models: dict[str, Path], cache: Path
) -> None:
    if reason := lacking("onnxruntime-tensorrt"):
        pytest.skip(reason)
    run = load_run(models["run"])
    with closing(open_session(models["fp32"], runtime="onnxruntime-tensorrt")) as session:
        session.run(np.resize(run.tiles.pixels, (3, *run.tiles.pixels.shape[1:])))
    folder = cache / "onnxruntime-tensorrt"
    assert list(folder.glob("*.timing"))
    assert len(list(folder.glob("*/*.engine"))) == 1, "one shape, one engine"


@pytest.mark.parametrize("option", ["version_compatible", "hardware_compatible", "refit"])
def test_an_engine_with_each_option_does_the_same(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    if reason := lacking("tensorrt"):
        pytest.skip(reason)
    (tmp_path / "own.toml").write_text(f"{option} = true\n")
    monkeypatch.setenv("GEODEPLOY_TENSORRT", str(tmp_path / "own.toml"))
    run = load_run(models["run"])
    with torch.inference_mode():
        judge = run.model(torch.from_numpy(run.tiles.pixels)).numpy()
    for _ in range(2):  # built, and found
        with closing(open_session(models["fp32"], runtime="tensorrt")) as session:
            found = session.run(run.tiles.pixels)
        assert np.abs(found - judge).max() <= FAR["fp32"] * np.abs(judge).max()


def test_a_retuned_model_takes_the_engine_of_another_with_its_own_weights(
    tune: Tune, models: dict[str, Path], tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason := lacking("tensorrt"):
        pytest.skip(reason)
    (tmp_path / "own.toml").write_text("refit = true\n")
    monkeypatch.setenv("GEODEPLOY_TENSORRT", str(tmp_path / "own.toml"))
    export(tune("seed=4"), tmp_path / "retuned.onnx")
    open_session(models["fp32"], runtime="tensorrt").close()
    run = load_run(tune("seed=4"))
    with closing(open_session(tmp_path / "retuned.onnx", runtime="tensorrt")) as session:
        found = session.run(run.tiles.pixels)
    assert len(list((cache / "tensorrt").glob("*.engine"))) == 1, "none was built for it"
    with torch.inference_mode():
        judge = run.model(torch.from_numpy(run.tiles.pixels)).numpy()
    assert np.abs(found - judge).max() <= FAR["fp32"] * np.abs(judge).max()


def test_an_engine_is_built_once(models: dict[str, Path], cache: Path) -> None:
    if reason := lacking("tensorrt"):
        pytest.skip(reason)
    times = []
    for _ in range(2):
        open_session(models["fp16"], runtime="tensorrt").close()
        (engine,) = (cache / "tensorrt").glob("*.engine")
        times.append(engine.stat().st_mtime_ns)
    assert times[0] == times[1]
    engine.write_bytes(b"stale")
    open_session(models["fp16"], runtime="tensorrt").close()
    assert engine.stat().st_size > 1000
    assert (cache / "tensorrt").stat().st_mode & 0o077 == 0


def test_export_to_tensorrt_fills_the_cache(tune: Tune, tmp_path: Path, cache: Path) -> None:
    if reason := lacking("tensorrt"):
        pytest.skip(reason)
    export(tune(), tmp_path / "model.onnx", options=ExportOptions(to="tensorrt", precision="fp16"))
    assert len(list((cache / "tensorrt").glob("*.engine"))) == 1
