"""What blending costs: the processor time of `predict` with ``--blend cosine`` over that with ``crop``.

    python bench/blending.py                a ViT-S/14 with a UNet decoder, 4 and 20 classes
    python bench/blending.py --model null   a model that costs nothing: what blending takes by itself

Both ways take turns in one process with one session on one thread, so that a machine that slows down
slows both and no second is spent on waiting; the median of the turns' ratios is quoted.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

from engine import call
from models import make_null, make_vit_small
from scenes import make_mosaic

MODELS: dict[str, Callable[[Path, int], Path]] = {"vit": make_vit_small, "null": make_null}
TAKE_TURNS = """
import json, sys, time
from pathlib import Path
from geodeploy import PredictOptions
from geodeploy.engine import map_scene
from geodeploy.runtime import open_session
model, scene, output, turns = sys.argv[1:]
session = open_session(Path(model), device="cpu", threads=1)
found = []
for turn in range(int(turns) + 1):
    seconds = {}
    for blend in ("crop", "cosine"):
        options = PredictOptions(overwrite=True, device="cpu", blend=blend)
        begun = time.process_time()
        report = map_scene(Path(scene), session, Path(output), options, None)
        seconds[blend] = (time.process_time() - begun) / report.tiles_run
    found.append(seconds)
print(json.dumps(found[1:]))  # the first turn warms up
"""


def main() -> None:
    """Build the models and the scene, take turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="vit")
    parser.add_argument("--classes", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--side", type=int, default=1376)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    side = arguments.side
    scene = make_mosaic(arguments.folder / f"mosaic_{side}_{side}.tif", side, side)
    print("| classes | crop, CPU ms a tile | cosine | cosine / crop |\n|---|---|---|---|")
    for classes in arguments.classes:
        path = arguments.folder / f"blending_{arguments.model}_{classes}.onnx"
        model = MODELS[arguments.model](path, classes)
        output = arguments.folder / "blending_map.tif"
        turns = call(TAKE_TURNS, model, scene, output, arguments.turns)
        crop, cosine = (
            1000 * statistics.median(turn[blend] for turn in turns) for blend in ("crop", "cosine")
        )
        ratio = statistics.median(turn["cosine"] / turn["crop"] for turn in turns)
        print(f"| {classes} | {crop:.1f} | {cosine:.1f} | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
