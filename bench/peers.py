"""The same scene mapped by geodeploy and by what else there is, with the same weights, on one machine.

    python bench/peers.py                             10980 x 10980 x 6, every way three times
    python bench/peers.py --side 2196 --turns 1       a smaller scene
    python bench/peers.py --ways geodeploy prototype  some of the ways
    python bench/peers.py --table                     the table of what has been run so far

The peers (TerraTorch, TorchGeo) need an environment of their own; with Python 3.11,

    python3.11 -m venv peersvenv
    peersvenv/bin/pip install --no-deps -r bench/peers-requirements.txt
    python bench/peers.py --python peersvenv/bin/python

makes it (7 GB) from the versions that were resolved for this bench, and uses it. Without --python the
ways that need it are left out. geodeploy's own needs the extras ``cpu`` and ``export``.

The model is a tiny one, two convolutions with random weights from a fixed seed, so that what is
compared is all that lies around a model. All cut tiles of 224 pixels every 192, on every usable core;
TerraTorch and geodeploy blend. Each run is a process of its own, one after the other. The clock starts
after the imports (TerraTorch's alone take 20 s) and includes loading the model. Memory is resident at
its peak, with the imports and beyond what was resident after them. A process that takes more than
--limit GiB is ended, and the table says so. Every run writes one JSON file into bench/results/peers and
is not run again while that file is there.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
from rasterio.windows import Window
from scenes import BLOCK, make_mosaic
from ways import THREADS, WAYS

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "peers"
COMMAND = "python bench/peers.py --python peersvenv/bin/python"
CHANNELS = (16,)
"""Of the tiny model between its convolutions."""


def main() -> None:
    """Run what has not been run, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=10980)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--python", type=Path, help="of the peers' environment")
    parser.add_argument("--limit", type=float, default=18, help="GiB that a process may take")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "geodeploy-bench")
    parser.add_argument("--table", action="store_true", help="only write the table")
    arguments = parser.parse_args()
    RESULTS.mkdir(parents=True, exist_ok=True)
    arguments.folder.mkdir(exist_ok=True)
    if not arguments.table:
        for turn in range(1, arguments.turns + 1):
            for name in arguments.ways:
                if arguments.python or not WAYS[name].peer:
                    run(name, turn, arguments)
    table = write_table()
    (RESULTS.parent / "peers.md").write_text(table, encoding="utf-8")
    print(table)


def run(name: str, turn: int, arguments: argparse.Namespace) -> None:
    """One way, once; nothing if it was done before, or failed in an earlier turn."""
    side = arguments.side
    record = RESULTS / f"{name}-{side}-{turn}.json"
    failed = [each for each in records(name, side) if "failed" in each]
    if record.exists() or failed:
        return
    from models import make_convolutions

    model = make_convolutions(arguments.folder / "convolutions.onnx", CHANNELS)
    scene = make_mosaic(arguments.folder / f"mosaic_{side}_{side}.tif", side, side)
    output = arguments.folder / f"map_{name}_{side}.tif"
    python = arguments.python.absolute() if WAYS[name].peer else Path(sys.executable)
    command = [python, HERE / "ways.py", name, scene, model, output]
    failure = watched(command, arguments.limit, arguments.folder / f"{name}.log")
    found = {"failed": failure} if failure else json.loads(output.with_suffix(".json").read_text())
    if not failure:
        found["beyond_mib"] = found["peak_mib"] - found["imported_mib"]
        found["agreement"] = agreement(output, arguments.folder / f"map_geodeploy_{side}.tif")
    found = {"way": name, "side": side, "turn": turn, "threads": THREADS, **found}
    record.write_text(json.dumps(found) + "\n", encoding="utf-8")
    print(found, flush=True)


def watched(command: list[Any], limit_gib: float, log: Path) -> str | None:
    """Run ``command``; why it has failed, if it has."""
    begun, peak_gib = time.perf_counter(), 0.0
    with log.open("w", encoding="utf-8") as said:
        process = subprocess.Popen(list(map(str, command)), stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None and peak_gib <= limit_gib:
            peak_gib = max(peak_gib, resident_gib(process.pid))
            time.sleep(0.05)
    if process.poll() is None:
        process.kill()
        process.wait()
        seconds = time.perf_counter() - begun
        return f"out of memory at {limit_gib:g} GiB, after {seconds:.0f} s with the imports"
    if process.returncode:
        lines = log.read_text(encoding="utf-8").strip().splitlines()
        return lines[-1] if lines and process.returncode > 0 else f"ended with {process.returncode}"
    return None


def resident_gib(process: int) -> float:
    """Resident memory of ``process``, as the kernel has it; 0 when it has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0.0
    kib = (int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return next(kib, 0) / 2**20


def agreement(found: Path, reference: Path) -> float | None:
    """The share of pixels that are the same in two maps; None where there is no ``reference``."""
    if not reference.exists():
        return None
    equal = 0
    with rasterio.open(found) as one, rasterio.open(reference) as other:
        for row in range(0, one.height, BLOCK):
            window = Window(0, row, one.width, min(BLOCK, one.height - row))
            equal += int(np.count_nonzero(one.read(1, window=window) == other.read(1, window=window)))
        return equal / (one.height * one.width)


def records(name: str = "*", side: int | str = "*") -> list[dict[str, Any]]:
    """What the runs have left."""
    return [json.loads(file.read_text()) for file in sorted(RESULTS.glob(f"{name}-{side}-?.json"))]


def write_table() -> str:
    """All that has been run, in Markdown."""
    lines = ["# The same map, made in other ways", ""]
    lines += [f"`{COMMAND}` and, from its docstring:", "", *__doc__.split("\n\n")[-1].splitlines()]
    for side in sorted({record["side"] for record in records()}, reverse=True):
        threads = records(side=side)[0]["threads"]
        lines += [
            "",
            f"## {side} x {side} x 6, uint16",
            "",
            f"Medians of the turns, on {threads} threads; in brackets how many times "
            "as much as geodeploy. Equal pixels: the share that is as in geodeploy's map.",
            "",
            "| way | wall s | CPU s | peak MiB | beyond the imports, MiB | equal pixels | turns |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(name, side) for name in WAYS if records(name, side)]
        stages = [_stages(name, side) for name in WAYS]
        lines += [line for line in stages if line]
    return "\n".join(lines) + "\n"


def _row(name: str, side: int) -> str:
    found = records(name, side)
    failed = [record["failed"] for record in found if "failed" in record]
    if failed:
        return f"| {WAYS[name].title} | failed: {failed[0]} | | | | | {len(found)} |"
    ours = records("geodeploy", side)
    cells = []
    for key, digits in (("seconds", 1), ("cpu_seconds", 1), ("peak_mib", 0), ("beyond_mib", 0)):
        value, our = (
            statistics.median(each[key] for each in which) for which in (found, ours or found)
        )
        cells.append(f"{value:.{digits}f} ({value / our:.1f})")
    equal = found[0]["agreement"]
    return (
        f"| {WAYS[name].title} | {' | '.join(cells)} | {'' if equal is None else f'{equal:.4f}'} "
        f"| {len(found)} |"
    )


def _stages(name: str, side: int) -> str:
    found = [record for record in records(name, side) if record.get("stages")]
    if not found or name == "geodeploy":
        return ""
    parts = (
        f"{stage} {statistics.median(record['stages'][stage] for record in found):.1f} s"
        for stage in found[0]["stages"]
    )
    return f"\n{WAYS[name].title}: {', '.join(parts)}."


if __name__ == "__main__":
    main()
