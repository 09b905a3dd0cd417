"""What a base with an adapter costs beside the merged model, and what a swap of adapters costs.

    python bench/adapters.py RUN [RUN ...]        tuned with LoRA on one backbone

Both are made of the first RUN and run its real tiles in ONNX Runtime, in turns, so that a machine that
slows down slows both: the ratio is taken for each turn and the median is quoted. On a machine that
does other work too, trust the CPU time rather than the clock.
"""

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from geodeploy.export import export, export_adapters
from geodeploy.runtime.adapter import Base
from geodeploy.runtime.graph import read_onnx
from geodeploy.runtime.onnx import OnnxSession


def main() -> None:
    """Print two tables: of speed and differences, and of swaps."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--turns", type=int, default=11)
    arguments = parser.parse_args()
    first = arguments.runs[0]
    tiles = np.load(first / "tiles.npz")["pixels"].astype(np.float32)
    pixels = np.resize(tiles, (arguments.batch, *tiles.shape[1:]))
    with tempfile.TemporaryDirectory(prefix="geodeploy-") as folder:
        merged, adapters = Path(folder) / "merged.onnx", Path(folder) / "adapters"
        export(first, merged)
        export_adapters(arguments.runs, adapters)
        print("| threads | merged, CPU ms a tile | base + adapter | ratio | max diff | largest logit |")
        print("|---|---|---|---|---|---|")
        for threads in arguments.threads:
            asked = {"device": "cpu", "threads": threads, "batch": arguments.batch}
            whole = OnnxSession(read_onnx(merged), **asked)
            base = Base(adapters / "base.onnx", **asked)
            adapted = base.session(adapters / f"{first.resolve().name}.onnx_adapter")
            judge, found = whole.run(pixels), adapted.run(pixels)
            one, other, ratio = in_turns(
                lambda run=whole.run: run(pixels), lambda run=adapted.run: run(pixels), arguments.turns
            )
            print(
                f"| {threads} | {1e3 * one / len(pixels):.0f} | {1e3 * other / len(pixels):.0f} "
                f"| {ratio:.3f} | {np.abs(found - judge).max():.1e} | {np.abs(judge).max():.1f} |",
                flush=True,
            )
        swaps(base, adapters)


def in_turns(
    one: Callable[[], object], other: Callable[[], object], turns: int
) -> tuple[float, float, float]:
    """Median CPU seconds of each, and the median of their ratios."""
    pairs = [(cpu(one), cpu(other)) for _ in range(turns)]
    ratios = [second / first for first, second in pairs]
    firsts, seconds = zip(*pairs, strict=True)
    return statistics.median(firsts), statistics.median(seconds), statistics.median(ratios)


def swaps(base: Base, folder: Path) -> None:
    """What it takes to read an adapter, and to change between two that are read."""
    paths = sorted(folder.glob("*.onnx_adapter"))
    loads = [
        cpu(lambda path=path: base.session(path))
        for path in itertools.islice(itertools.cycle(paths), 9)
    ]
    sizes = [path.stat().st_size / 1e6 for path in paths]
    begun = time.process_time()
    Base(base.graph.path, device="cpu", threads=1)
    loading = time.process_time() - begun
    print("\n| | |\n|---|---|")
    print(f"| base, MB | {base.graph.path.stat().st_size / 1e6:.1f} |")
    print(f"| adapters, MB | {', '.join(f'{size:.1f}' for size in sizes)} |")
    print(f"| load the base, CPU ms | {1e3 * loading:.0f} |")
    print(f"| read an adapter, CPU ms | {1e3 * statistics.median(loads):.1f} |")


def cpu(work: Callable[[], object]) -> float:
    """CPU seconds of ``work``."""
    begun = time.process_time()
    work()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
