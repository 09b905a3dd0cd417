"""How fast each runtime is, beside how far its outputs drift from the reference.

    python bench/runtimes.py                          the model that comes with geodeploy
    python bench/runtimes.py RUN model.onnx ...       others; a RUN is exported first,
        --precision fp32 bf16 int8                    in each of these
    python bench/runtimes.py --threads 1 2 --batch 1 4 8

The reference, and what speed is compared with, is PyTorch (eager, fp32, adapter unmerged) for a RUN
and ONNX Runtime for an ONNX file. Each runtime is loaded and warmed up in a process of its own, and
they take turns, so that a machine that slows down slows all: a ratio is taken for each turn and the
median is quoted. On a machine that does other work too, trust the CPU time rather than the clock. Drift
is on real tiles, of a RUN those that int8 took no ranges from; against their labels it says by how many
points the mean IoU changes.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import rasterio

from geodeploy.demo import SCENE
from geodeploy.predict import default_model
from geodeploy.runtime.graph import read_onnx
from geodeploy.spec import ModelSpec

WORKER = """
import json, sys, time
from pathlib import Path
import numpy as np
from geodeploy.machine import peak_memory_bytes
from geodeploy.runtime.graph import read_onnx
runtime, model, outputs_file = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
threads, batch = int(sys.argv[4]), int(sys.argv[5])
tiles = np.load(outputs_file.with_name("tiles.npy"))
begun = time.process_time()
if runtime == "torch":
    from geodeploy.runtime.torch import TorchSession
    session = TorchSession(model, device="cpu", threads=threads)
elif runtime.startswith("openvino"):
    from geodeploy.runtime.openvino import IN_BF16, OpenVinoSession
    session = OpenVinoSession(read_onnx(model), threads=threads, bf16=runtime == IN_BF16, batch=batch)
else:
    from geodeploy.runtime.onnx import OnnxSession
    session = OnnxSession(read_onnx(model), device="cpu", threads=threads, batch=batch)
load = time.process_time() - begun
outputs = [session.run(tiles[place : place + batch]) for place in range(0, len(tiles), batch)]
np.save(outputs_file, np.concatenate(outputs))
print(json.dumps([session.name, load]), flush=True)
pixels = np.resize(tiles, (batch, *tiles.shape[1:]))
for line in sys.stdin:
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(int(line)):
        session.run(pixels)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    print(json.dumps([cpu, wall, peak_memory_bytes()]), flush=True)
"""
HEADER = (
    "| model | threads | batch | precision | runtime | load, CPU s | CPU ms a tile | ratio | tiles/s | "
    "ratio | peak MiB | max diff | argmax agreement | mean IoU, points |\n" + "|---" * 14 + "|"
)
Form = tuple[str, str]
"""Precision and runtime."""


def main() -> None:
    """Print one table over all models, threads and batches."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, default=[default_model()])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 4, 8])
    parser.add_argument("--precision", nargs="+", default=["fp32"], help="of what a RUN becomes")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=1.0, help="about so long a turn")
    arguments = parser.parse_args()
    print(HEADER)
    for model in arguments.models:
        with tempfile.TemporaryDirectory(prefix="geodeploy-") as folder:
            files = prepare(model, Path(folder), arguments.precision)
            for threads in arguments.threads:
                for batch in arguments.batch:
                    rows = measure(
                        files, Path(folder), threads, batch, arguments.turns, arguments.seconds
                    )
                    for row in rows:
                        print(f"| {model.name} | {threads} | {batch} | {row} |", flush=True)


def prepare(model: Path, folder: Path, precisions: list[str]) -> dict[Form, Path]:
    """What each runtime loads, the reference first; real tiles are left in ``folder``."""
    files = {}
    if model.is_dir():
        from geodeploy.export import export
        from geodeploy.export.options import ExportOptions

        files["fp32", "torch"] = model
        kept = np.load(model / "tiles.npz")
        tiles = kept["pixels"][1::2]
        np.save(folder / "labels.npy", kept["labels"][1::2])
        for precision in precisions:
            path = folder / f"{precision}.onnx"
            report = export(model, path, options=ExportOptions(precision=precision))
            print(report, file=sys.stderr)
            files |= {(precision, runtime): path for runtime in report.covered}
    else:
        spec = read_onnx(model).spec
        tiles = cut_scene(spec)
        files[spec.precision, "onnxruntime"] = model
        if find_spec("openvino"):
            files[spec.precision, "openvino"] = model
    np.save(folder / "tiles.npy", tiles)
    return files


def cut_scene(spec: ModelSpec) -> np.ndarray:
    """Tiles (N, C, tile, tile) of the scene that comes with geodeploy."""
    with rasterio.open(SCENE) as scene:
        indexes = [scene.descriptions.index(name) + 1 for name in spec.band_names]
        pixels = scene.read(indexes).astype(np.float32)
        scale, offset = (
            np.reshape([values[index - 1] for index in indexes], (-1, 1, 1)).astype(np.float32)
            for values in (scene.scales, scene.offsets)
        )
    pixels = pixels * scale + offset
    places = [range(0, size - spec.tile + 1, spec.tile) for size in pixels.shape[1:]]
    return np.stack(
        [
            pixels[:, row : row + spec.tile, col : col + spec.tile]
            for row in places[0]
            for col in places[1]
        ][:8]
    )


def measure(
    files: dict[Form, Path], folder: Path, threads: int, batch: int, turns: int, seconds: float
) -> list[str]:
    """A row for each precision in each runtime."""
    outputs = {form: folder / f"{form[0]}-{form[1]}.npy" for form in files}
    workers = {
        form: subprocess.Popen(
            [sys.executable, "-c", WORKER, form[1], path, outputs[form], str(threads), str(batch)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for form, path in files.items()
    }
    loaded = {form: json.loads(worker.stdout.readline()) for form, worker in workers.items()}
    first, *_ = workers
    repeats = max(1, round(seconds / ask(workers[first], 1)[1]))
    found = {form: [] for form in workers}
    for _ in range(turns):
        for form, worker in workers.items():
            found[form].append(ask(worker, repeats))
    for worker in workers.values():
        worker.communicate()
    reference = np.load(outputs[first])
    rows = []
    for form, (name, load) in loaded.items():
        cpu, wall, memory = (np.array(values) for values in zip(*found[form], strict=True))
        base_cpu, base_wall, _ = (np.array(values) for values in zip(*found[first], strict=True))
        logits = np.load(outputs[form])
        agreement = (logits.argmax(axis=1) == reference.argmax(axis=1)).mean()
        rows.append(
            f"{form[0]} | {name} | {load:.2f} | {1000 * np.median(cpu) / repeats / batch:.1f} | "
            f"{np.median(base_cpu / cpu):.2f} | {repeats * batch / np.median(wall):.1f} | "
            f"{np.median(base_wall / wall):.2f} | {memory.max() / 2**20:.0f} | "
            f"{np.abs(logits - reference).max():.1e} | {agreement:.4%} | "
            f"{iou_change(folder, files[form], reference, logits)}"
        )
    return rows


def iou_change(folder: Path, model: Path, reference: np.ndarray, logits: np.ndarray) -> str:
    """By how many points ``logits`` change the mean IoU of ``reference`` on the RUN's own labels."""
    labels = folder / "labels.npy"
    if not labels.exists() or model.is_dir():  # no RUN, or the reference itself
        return ""
    from geodeploy.export.parity import compare

    found = compare(reference, logits, np.load(labels), read_onnx(model).spec)
    if found.miou_reference is None or found.miou_exported is None:
        return ""
    return f"{100 * (found.miou_exported - found.miou_reference):+.2f}"


def ask(worker: subprocess.Popen, repeats: int) -> list[float]:
    """CPU seconds, seconds on the clock and peak memory of so many batches."""
    worker.stdin.write(f"{repeats}\n")
    worker.stdin.flush()
    return json.loads(worker.stdout.readline())


if __name__ == "__main__":
    main()
