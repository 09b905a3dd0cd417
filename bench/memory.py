"""How much memory `predict` takes, and that it does not grow with the scene's height.

    python bench/memory.py                        the gates: 10980 x 10980, and 8000 against 32000 rows
    python bench/memory.py --model other.onnx     with another model

Every run is a process of its own and reports its own peak resident memory (VmHWM on Linux; what the
system says of a process that has ended counts what its parent held before, too).
The bare process loads the same model and runs three batches of it: what no engine can do without.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scenes import make_mosaic

from geodeploy.predict import default_model

SIZES = ((10980, 10980), (8000, 4096), (32000, 4096))
BARE = """
import sys
from pathlib import Path
import numpy as np
from geodeploy.machine import peak_memory_bytes
from geodeploy.runtime import open_session
session = open_session(Path(sys.argv[1]), device="cpu")
pixels = np.zeros((8, len(session.spec.bands), session.spec.tile, session.spec.tile), np.float32)
for _ in range(3):
    session.run(pixels)
print(peak_memory_bytes())
"""
PREDICT = """
import sys
from geodeploy import PredictOptions, predict
report = predict(sys.argv[2], sys.argv[1], sys.argv[3], options=PredictOptions(overwrite=True))
print(report.peak_memory_bytes, report.planned_memory_bytes)
"""


def main() -> None:
    """Make the mosaics, run, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=default_model())
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    arguments = parser.parse_args()
    arguments.folder.mkdir(exist_ok=True)
    (bare,), bare_s = run(BARE, str(arguments.model))
    print("| scene | peak MiB | beyond the bare process | planned | wall s |\n|---|---|---|---|---|")
    print(f"| bare process, three batches | {bare:.0f} | | | {bare_s:.1f} |")
    for height, width in SIZES:
        scene = make_mosaic(arguments.folder / f"mosaic_{height}_{width}.tif", height, width)
        output = arguments.folder / "map.tif"
        (peak, planned), seconds = run(PREDICT, str(arguments.model), str(scene), str(output))
        print(
            f"| {height} x {width} x 6 | {peak:.0f} | {peak - bare:.0f} | {planned:.0f} | "
            f"{seconds:.1f} |",
            flush=True,
        )


def run(code: str, *arguments: str) -> tuple[list[float], float]:
    """The bytes that ``code`` prints, in MiB, and its wall seconds in a process of its own."""
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return [int(number) / 2**20 for number in done.stdout.split()], time.perf_counter() - begun


if __name__ == "__main__":
    main()
