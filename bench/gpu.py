"""All that can be measured on an NVIDIA GPU, in one command whose JSON can be sent back.

    python bench/gpu.py -o gpu.json              tunes the quick-start first (minutes)
    python bench/gpu.py RUN -o gpu.json          of a RUN that exists
    python bench/gpu.py RUN --rehearse           the same on the CPU: that this program works, no more

Needs the extras `export`, `gpu`, `tensorrt` and `dev`. It runs `pytest tests/gpu` first. Then for each
precision and runtime: whether it was taken or refused, how far it is from the tuned model on the RUN's
real tiles, images a second with the copies to the GPU and back, the most memory on the GPU. Beside them
PyTorch, compiled and under autocast. A whole scene is mapped in each, and compared with its map in
float32 on the CPU. What fails is told and left out.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable
from contextlib import closing
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray

from geodeploy.demo import SCENE
from geodeploy.export import export
from geodeploy.export.merge import merge
from geodeploy.export.options import ExportOptions
from geodeploy.export.parity import compare, logits_of
from geodeploy.machine import peak_memory_bytes
from geodeploy.predict import PredictOptions, predict
from geodeploy.runtime import open_session
from geodeploy.runtime.cuda import Cuda
from geodeploy.train.run import Run, load_run

IN_TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PRECISIONS = (*IN_TORCH, "int8-tensorrt")
PACKAGES = (
    "geodeploy-eo", "torch", "onnx", "onnxruntime-gpu", "onnxruntime", "openvino", "tensorrt",
    "cuda-bindings",
)  # fmt: skip
Compute = Callable[[NDArray[np.float32]], object]
Row = dict[str, object]


def main() -> None:
    """Print one JSON document, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="a RUN; the quick-start is tuned without")
    parser.add_argument("-o", "--output", type=Path, help="the JSON file; on stdout without")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, by its runtimes")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="geodeploy-") as name:
        folder = Path(name)
        path = arguments.run or tune(folder / "run")
        found = {
            "machine": machine(arguments.rehearse),
            "run": path.name,
            "batch": arguments.batch,
            "tests": tests(folder / "tests.xml"),
            **measure(path, folder, arguments.batch, arguments.seconds, arguments.rehearse),
        }
    text = json.dumps(found, indent=1) + "\n"
    if arguments.output:
        arguments.output.write_text(text)
    else:
        sys.stdout.write(text)


def tune(run: Path) -> Path:
    """The quick-start's RUN."""
    recipe = Path(__file__).parent.parent / "train" / "quickstart.toml"
    subprocess.run([sys.executable, "-m", "geodeploy", "train", recipe, "-o", run], check=True)
    return run


def tests(report: Path) -> Row:
    """What `pytest tests/gpu` says: those that failed with their reasons, and how many did not."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "tests/gpu", f"--junitxml={report}"]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if not report.exists():
        return {"error": (done.stderr or done.stdout)[-2000:]}
    found: dict = {"passed": 0, "skipped": {}, "failed": {}}
    for case in ET.parse(report).iter("testcase"):
        problem = next((item for item in case if item.tag in ("failure", "error", "skipped")), None)
        if problem is None:
            found["passed"] += 1
            continue
        kind = "skipped" if problem.tag == "skipped" else "failed"
        found[kind][case.get("name")] = problem.get("message", "")[:500]
    return found


def machine(rehearse: bool) -> Row:
    """What was measured on."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return {
        "gpu": None if rehearse else Cuda().describe(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": versions,
    }


def measure(path: Path, folder: Path, batch: int, seconds: float, rehearse: bool) -> Row:
    """Each way to run the model of the RUN ``path``."""
    run = load_run(path)
    pixels = np.resize(run.tiles.pixels, (batch, *run.tiles.pixels.shape[1:]))
    device = "cpu" if rehearse else "cuda"
    runtimes = (
        ("onnxruntime", "openvino") if rehearse else ("onnxruntime", "onnxruntime-tensorrt", "tensorrt")
    )
    judge = folder / "judge.tif"
    rows: list[Row] = []
    for precision in PRECISIONS:
        model = folder / f"{precision}.onnx"
        made = tried({"precision": precision}, partial(exported, path, model, precision))
        if "error" in made:
            rows.append(made)
            continue
        if not judge.exists():
            predict(SCENE, model, judge, options=PredictOptions(device="cpu"))
        rows += [
            tried(
                {"precision": precision, "runtime": runtime},
                partial(of_session, run, model, runtime, device, pixels, seconds),
                partial(of_scene, model, runtime, device, judge, folder),
            )
            for runtime in runtimes
        ]
    torch_rows = [
        tried({"precision": name}, partial(of_torch, run, name, device, pixels, seconds))
        for name in IN_TORCH
    ]
    return {"runtimes": rows, "torch": torch_rows}


def tried(row: Row, *parts: Callable[[], Row]) -> Row:
    """``row`` with what ``parts`` give, up to the one that fails: what there is can be sent back."""
    for part in parts:
        try:
            row = row | part()
        except Exception as error:  # a compiler or a driver may raise anything
            row = row | {"error": f"{type(error).__name__}: {error}"}
            break
    print(row, file=sys.stderr, flush=True)
    return row


def exported(path: Path, model: Path, precision: str) -> Row:
    """What the export says."""
    return {"export": str(export(path, model, options=ExportOptions(precision=precision)))}


def of_session(
    run: Run, model: Path, runtime: str, device: str, pixels: NDArray[np.float32], seconds: float
) -> Row:
    """Whether it was taken, parity, speed and memory."""
    with Peak(device) as peak:
        begun = time.perf_counter()
        session = open_session(model, runtime=runtime, device=device)
        loading = time.perf_counter() - begun
        tiles, labels = run.tiles.pixels, run.tiles.labels
        with closing(session):
            found = compare(logits_of(run.model, tiles), logits_of(session, tiles), labels, run.spec)
            speed = images_per_second(session.run, pixels, seconds)
    return {
        "name": session.name,
        "taken_in": session.precision,
        "load_s": loading,
        "parity": found.model_dump(),
        "images_per_s": speed,
        "peak_bytes": peak.bytes,
    }


def of_scene(model: Path, runtime: str, device: str, judge: Path, folder: Path) -> Row:
    """Seconds for the scene in the package, and the share of pixels with the judge's class."""
    output = folder / "map.tif"
    options = PredictOptions(runtime=runtime, device=device, overwrite=True)
    begun = time.perf_counter()
    predict(SCENE, model, output, options=options)
    elapsed = time.perf_counter() - begun
    with rasterio.open(output) as ours, rasterio.open(judge) as theirs:
        return {
            "scene_s": elapsed,
            "scene_pixels": ours.width * ours.height,
            "scene_agreement": float((ours.read(1) == theirs.read(1)).mean()),
        }


def of_torch(run: Run, precision: str, device: str, pixels: NDArray[np.float32], seconds: float) -> Row:
    """The merged model in PyTorch, compiled where there is a GPU."""
    if device == "cuda":
        torch.cuda.empty_cache()  # what the last precision held counts for this one else
    model = merge(run.model).to(device)
    compiled = torch.compile(model) if device == "cuda" else model
    kind = IN_TORCH[precision]

    def compute(tiles: NDArray[np.float32]) -> object:
        with torch.inference_mode(), torch.autocast(device, kind, enabled=precision != "fp32"):
            return compiled(torch.from_numpy(tiles).to(device)).float().cpu().numpy()

    with Peak(device) as peak:
        speed = images_per_second(compute, pixels, seconds)
    return {"compiled": device == "cuda", "images_per_s": speed, "peak_bytes": peak.bytes}


def images_per_second(compute: Compute, pixels: NDArray[np.float32], seconds: float) -> float:
    """After a warm-up, tiles through ``compute`` by the clock."""
    for _ in range(3):
        compute(pixels)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        compute(pixels)
        done += len(pixels)
    return done / (time.perf_counter() - begun)


class Peak:
    """The most memory taken while it lasts, above what was taken before: looked up 100 times a second.

    On a GPU by everything there, as its owner needs to know; in a rehearsal by this process.
    """

    def __init__(self, device: str, taken: Callable[[], int] | None = None) -> None:
        self.bytes = 0
        self._taken = taken or (taken_on_gpu if device == "cuda" else peak_memory_bytes)
        self._over = threading.Event()
        self._watch = threading.Thread(target=self._look)

    def __enter__(self) -> "Peak":
        self._before = self._taken()
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._watch.join()

    def _look(self) -> None:
        while True:
            self.bytes = max(self.bytes, self._taken() - self._before)
            if self._over.wait(0.01):
                return


def taken_on_gpu() -> int:
    """Bytes."""
    api = Cuda().api
    error, free, whole = api.cudaMemGetInfo()
    assert error == api.cudaError_t.cudaSuccess
    return int(whole) - int(free)


if __name__ == "__main__":
    main()
