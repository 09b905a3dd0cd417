"""All that can be measured on an NVIDIA GPU, in one command whose JSON can be sent back.

    python bench/gpu.py -o gpu.json              tunes the quick-start first (minutes)
    python bench/gpu.py RUN -o gpu.json          of a RUN that exists
    python bench/gpu.py RUN --rehearse           the same on the CPU: that this program works, no more

Needs the extras `export`, `gpu` and `tensorrt`. For each precision and runtime: whether it was taken or
refused, how far it is from the tuned model on the RUN's real tiles, images a second with the copies to
the GPU and back, memory on the GPU. Beside them PyTorch, compiled and under autocast. A whole scene
is mapped in each, and compared with its map in float32 on the CPU. What fails is told and left out.
"""

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import rasterio
import torch
from numpy.typing import NDArray

from geodeploy.demo import SCENE
from geodeploy.errors import GeodeployError
from geodeploy.export import export
from geodeploy.export.merge import merge
from geodeploy.export.options import ExportOptions
from geodeploy.export.parity import compare, logits_of
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


def machine(rehearse: bool) -> dict[str, object]:
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


def measure(path: Path, folder: Path, batch: int, seconds: float, rehearse: bool) -> dict[str, object]:
    """Each way to run the model of the RUN ``path``."""
    run = load_run(path)
    pixels = np.resize(run.tiles.pixels, (batch, *run.tiles.pixels.shape[1:]))
    device = "cpu" if rehearse else "cuda"
    runtimes = (
        ("onnxruntime", "openvino") if rehearse else ("onnxruntime", "onnxruntime-tensorrt", "tensorrt")
    )
    judge = None
    rows = []
    for precision in PRECISIONS:
        model = folder / f"{precision}.onnx"
        row: dict[str, object] = {"precision": precision}
        try:
            row["export"] = str(export(path, model, options=ExportOptions(precision=precision)))
        except GeodeployError as error:
            rows.append(row | {"error": str(error)})
            continue
        judge = judge or folder / "judge.tif"
        if not judge.exists():
            predict(SCENE, model, judge, options=PredictOptions(device="cpu"))
        for runtime in runtimes:
            rows.append({"precision": precision, "runtime": runtime})
            try:
                rows[-1] |= of_session(run, model, runtime, device, pixels, seconds)
                rows[-1] |= of_scene(model, runtime, device, judge, folder)
            except GeodeployError as error:
                rows[-1]["error"] = str(error)
            print(rows[-1], file=sys.stderr, flush=True)
    torch_rows = [of_torch(run, name, device, pixels, seconds) for name in IN_TORCH]
    return {"runtimes": rows, "torch": torch_rows}


def of_session(
    run: Run, model: Path, runtime: str, device: str, pixels: NDArray[np.float32], seconds: float
) -> dict[str, object]:
    """Whether it was taken, parity, speed and memory."""
    free, begun = free_memory(device), time.perf_counter()
    with closing(open_session(model, runtime=runtime, device=device)) as session:
        loading = time.perf_counter() - begun
        tiles, labels = run.tiles.pixels, run.tiles.labels
        found = compare(logits_of(run.model, tiles), logits_of(session, tiles), labels, run.spec)
        speed = images_per_second(session.run, pixels, seconds)
        used = free - free_memory(device)
        return {
            "name": session.name,
            "taken_in": session.precision,
            "load_s": loading,
            "parity": found.model_dump(),
            "images_per_s": speed,
            "gpu_bytes": used,
        }


def of_scene(model: Path, runtime: str, device: str, judge: Path, folder: Path) -> dict[str, object]:
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


def of_torch(
    run: Run, precision: str, device: str, pixels: NDArray[np.float32], seconds: float
) -> dict[str, object]:
    """The merged model in PyTorch, compiled where there is a GPU."""
    model = merge(run.model).to(device)
    compiled = torch.compile(model) if device == "cuda" else model
    kind = IN_TORCH[precision]

    def compute(tiles: NDArray[np.float32]) -> object:
        with torch.inference_mode(), torch.autocast(device, kind, enabled=precision != "fp32"):
            return compiled(torch.from_numpy(tiles).to(device)).float().cpu().numpy()

    speed = images_per_second(compute, pixels, seconds)
    return {"precision": precision, "compiled": device == "cuda", "images_per_s": speed}


def images_per_second(compute: Compute, pixels: NDArray[np.float32], seconds: float) -> float:
    """After a warm-up, tiles through ``compute`` by the clock."""
    for _ in range(3):
        compute(pixels)
    begun, done = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        compute(pixels)
        done += len(pixels)
    return done / (time.perf_counter() - begun)


def free_memory(device: str) -> int:
    """Bytes free on the GPU; 0 without one."""
    if device == "cpu":
        return 0
    cuda = Cuda()
    error, free, _ = cuda.api.cudaMemGetInfo()
    assert error == cuda.api.cudaError_t.cudaSuccess
    return int(free)


if __name__ == "__main__":
    main()
