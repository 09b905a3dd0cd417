"""What the engine costs: the least that a map can take, over what `predict` takes.

    python bench/engine.py                       a ViT-S/14 with a UNet decoder, 2240 x 2240 pixels
    python bench/engine.py --model light         a few convolutions, at a tenth of the ViT's cost
    python bench/engine.py --model null          a model that costs nothing
    python bench/engine.py --model FILE.onnx     another one
    python bench/engine.py --model null --profile    and what the main thread's processor time goes into

Two limits. The first is the bare session: as many batches of the same shape in a process of its own,
with nothing around; the fastest of several settings counts, one thread a stream among them. Where the
model is dear, all else hides behind it. Where it is cheap, reading and writing want the same cores: the
second limit is the processor time of reading the whole scene, of the bare session and of writing the
map as a COG, each alone in a process, divided by the cores.

All take turns, so that a machine that slows down slows all; a ratio is taken for each turn and the
median is quoted. Loading the model is left out on both sides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import make_convolutions, make_null, make_vit_small
from scenes import make_mosaic

MODELS: dict[str, Callable[[Path], Path]] = {
    "vit": make_vit_small,
    "light": lambda path: make_convolutions(path, (32, 32)),
    "null": make_null,
}
BARE = """
import json, sys, time
from concurrent.futures import ThreadPoolExecutor
import numpy as np
import onnxruntime
path, batches, size, threads, spin, streams = sys.argv[1], *map(int, sys.argv[2:7])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads // streams
options.add_session_config_entry("session.intra_op.allow_spinning", str(spin))
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
shape = session.get_inputs()[0].shape[1:]
share = -(-size // streams)
pixels = np.random.default_rng(0).uniform(0.02, 0.5, (share, *shape)).astype(np.float32)
session.run(None, {"pixels": pixels})
def work(_):
    for _ in range(batches):
        session.run(None, {"pixels": pixels})
begun, begun_cpu = time.perf_counter(), time.process_time()
if streams == 1:
    work(0)
else:
    with ThreadPoolExecutor(streams) as pool:
        list(pool.map(work, range(streams)))
print(json.dumps([time.perf_counter() - begun, time.process_time() - begun_cpu]))
"""
PREDICT = """
import cProfile, io, json, pstats, sys, time
from pathlib import Path
from geodeploy import PredictOptions
from geodeploy.engine import map_scene
from geodeploy.runtime import open_session
model, scene, output, batch, profiled = sys.argv[1:]
session = open_session(Path(model))
options = PredictOptions(overwrite=True, batch=int(batch))
profile, told = cProfile.Profile(time.thread_time), io.StringIO()
begun_cpu = time.process_time()
run = profile.runcall if profiled == "True" else lambda ask, *given, **more: ask(*given, **more)
report = run(map_scene, Path(scene), session, Path(output), options, None, keep=False)
cpu_seconds = time.process_time() - begun_cpu
if profiled == "True":
    pstats.Stats(profile, stream=told).strip_dirs().sort_stats("tottime").print_stats(16)
more = {"cpu_seconds": cpu_seconds, "profile": told.getvalue()}
print(json.dumps(report.model_dump(mode="json") | more))
"""
READ = """
import sys, time
from pathlib import Path
import rasterio
from geodeploy.engine import GDAL_CACHE_BYTES
from geodeploy.raster import open_raster
names = ("blue", "green", "red", "nir", "swir16", "swir22")
begun_cpu = time.process_time()
with rasterio.Env(GDAL_CACHEMAX=GDAL_CACHE_BYTES):
    with open_raster(Path(sys.argv[1]), band_names=names) as raster:
        for window in raster.stripes():
            raster.read(window)
print(time.process_time() - begun_cpu)
"""
WRITE = """
import os, sys, time
import rasterio
from rasterio.shutil import copy
begun_cpu = time.process_time()
copy(sys.argv[1], sys.argv[2], driver="COG", blocksize=512, compress="deflate", num_threads="all_cpus",
     overviews="ignore_existing", overview_resampling="mode")
print(time.process_time() - begun_cpu)
"""


def main() -> None:
    """Build the model and the scene, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit", help=f"{', '.join(MODELS)} or an ONNX file")
    parser.add_argument("--side", type=int, default=2240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    parser.add_argument("--profile", action="store_true")
    arguments = parser.parse_args()
    folder, side, name = arguments.folder, arguments.side, arguments.model
    folder.mkdir(exist_ok=True)
    model = MODELS[name](folder / f"engine_{name}.onnx") if name in MODELS else Path(name)
    scene = make_mosaic(folder / f"mosaic_{side}_{side}.tif", side, side)
    cores = len(os.sched_getaffinity(0))
    of_bare, of_limit = [], []
    print(
        "| turn | predict s | predict CPU s | bare s | bare / predict | CPU s: read | session | write "
        "| their sum / cores | that / predict |\n" + "|---" * 10 + "|"
    )
    for turn in range(1, arguments.turns + 1):
        output = folder / "engine_map.tif"
        report = call(PREDICT, model, scene, output, arguments.batch, False)
        batches = -(-report["tiles_run"] // report["batch"])
        settings = [(cores, 1, 1), (cores, 0, 1), (cores, 0, cores)]
        bare = [call(BARE, model, batches, report["batch"], *setting) for setting in settings]
        session, session_cpu = (min(values) for values in zip(*bare, strict=True))
        read_cpu, write_cpu = call(READ, scene), call(WRITE, output, folder / "engine_copy.tif")
        least = (read_cpu + session_cpu + write_cpu) / cores
        of_bare.append(session / report["seconds"])
        of_limit.append(least / report["seconds"])
        print(
            f"| {turn} | {report['seconds']:.2f} | {report['cpu_seconds']:.2f} | {session:.2f} "
            f"| {of_bare[-1]:.3f} | {read_cpu:.2f} | {session_cpu:.2f} | {write_cpu:.2f} | {least:.2f} "
            f"| {of_limit[-1]:.3f} |",
            flush=True,
        )
    print(
        f"\n{name}, {side} x {side}, {report['tiles_run']} tiles, {cores} cores: "
        f"median of bare / predict {statistics.median(of_bare):.3f}, "
        f"of the limit with reading and writing / predict {statistics.median(of_limit):.3f}"
    )
    print(f"busy in the last turn: {report['busy']}")
    if arguments.profile:
        print(call(PREDICT, model, scene, output, arguments.batch, True)["profile"])


def call(code: str, *arguments: object) -> Any:
    """What ``code`` prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
