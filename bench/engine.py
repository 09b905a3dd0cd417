"""What the engine costs: the best bare session on the same batches, over the wall time of `predict`.

    python bench/engine.py                  a ViT-S/14 with a UNet decoder, 2240 x 2240 pixels
    python bench/engine.py --model m.onnx   another model

The bare session runs as many batches of the same shape in a process of its own, with nothing around;
the fastest of several settings counts. Bare and predict take turns, so that a machine that slows down
slows both; a ratio is taken for each turn and the median is quoted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from scenes import make_mosaic

BARE = """
import json, sys, time
import numpy as np
import onnxruntime
path, batches, size, threads, spin = sys.argv[1], *map(int, sys.argv[2:6])
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.add_session_config_entry("session.intra_op.allow_spinning", str(spin))
session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
shape = session.get_inputs()[0].shape[1:]
pixels = np.random.default_rng(0).uniform(0.02, 0.5, (size, *shape)).astype(np.float32)
session.run(None, {"pixels": pixels})
begun = time.perf_counter()
for _ in range(batches):
    session.run(None, {"pixels": pixels})
print(json.dumps(time.perf_counter() - begun))
"""
PREDICT = """
import sys
from geodeploy import PredictOptions, predict
print(predict(sys.argv[2], sys.argv[1], sys.argv[3],
              options=PredictOptions(overwrite=True, batch=int(sys.argv[4]))).model_dump_json())
"""


def main() -> None:
    """Build the model and the scene, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--side", type=int, default=2240)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    model = arguments.model or make_vit_small(arguments.folder / "vit_small.onnx")
    scene = make_mosaic(
        arguments.folder / f"mosaic_{arguments.side}_{arguments.side}.tif",
        arguments.side,
        arguments.side,
    )
    cores = len(os.sched_getaffinity(0))
    settings = [(cores, 1), (cores, 0)]
    ratios = []
    print("| turn | predict s | model share | bare s, best of settings | bare / predict |")
    print("|---|---|---|---|---|")
    for turn in range(1, arguments.turns + 1):
        report = json.loads(
            call(PREDICT, model, scene, arguments.folder / "engine_map.tif", arguments.batch)
        )
        batches = -(-report["tiles_run"] // report["batch"])
        bare = min(
            json.loads(call(BARE, model, batches, report["batch"], threads, spin))
            for threads, spin in settings
        )
        ratios.append(bare / report["seconds"])
        print(
            f"| {turn} | {report['seconds']:.2f} | {report['busy']['model']:.1%} | {bare:.2f} | "
            f"{ratios[-1]:.3f} |",
            flush=True,
        )
    print(f"\nmedian {statistics.median(ratios):.3f} over {report['tiles_run']} tiles")
    print(f"busy in the last turn: {report['busy']}")


def make_vit_small(path: Path) -> Path:
    """A ViT-S/14 for six bands with a UNet decoder and a stem, random weights, as ONNX."""
    if path.exists():
        return path
    import timm

    from geodeploy.export.onnx import write_onnx
    from geodeploy.spec import Band, ModelSpec, SegmentationClass
    from geodeploy.train.decoder import UnetDecoder
    from geodeploy.train.model import TunedModel

    names = ("blue", "green", "red", "nir", "swir16", "swir22")
    spec = ModelSpec(
        name="vit-small-random",
        bands=tuple(Band(name=name, mean=0.2, std=0.1, valid_range=(-0.1, 1.6)) for name in names),
        tile=224,
        overlap=32,
        classes=tuple(
            SegmentationClass(value=value, name=f"class {value}", color=f"#{value * 60:02x}4080")
            for value in range(4)
        ),
    )
    vit = timm.create_model(
        "vit_small_patch14_dinov2", img_size=224, in_chans=6, num_classes=0, global_pool=""
    )
    decoder = UnetDecoder(384, 4, 4, 224, channels=(128, 96, 64, 32), bands=6, stem=True)
    model = TunedModel(
        vit, decoder, blocks=(2, 5, 8, 11), mean=[0.2] * 6, std=[0.1] * 6, scaling="log"
    ).eval()
    write_onnx(model, spec, path)
    return path


def call(code: str, *arguments: object) -> str:
    """What ``code`` prints, run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], check=True, capture_output=True, text=True
    )
    return done.stdout


if __name__ == "__main__":
    main()
