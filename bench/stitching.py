"""Which stitching is right? Accuracy near the seams between tiles and overall, by blend and overlap.

    python bench/stitching.py MODEL IMAGE LABELS [IMAGE LABELS ...]

MODEL is an ONNX file or a RUN that was tuned on other pixels than those scored, or the figures flatter
every policy alike. A pixel is near a seam if it lies within a sixteenth of a tile of the middle of one.
Agreement is with the map of the same model at the widest overlap, cosine.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray

from geodeploy import PredictOptions, predict
from geodeploy.runtime import open_session
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid

BLENDS = ("crop", "flat", "cosine")
SHARES = (0, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Overlaps, in tiles."""


def main() -> None:
    """Map every image every way, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("pairs", type=Path, nargs="+", metavar="IMAGE LABELS")
    parser.add_argument("--json", type=Path, help="where to write the figures too")
    arguments = parser.parse_args()
    pairs = list(zip(arguments.pairs[::2], arguments.pairs[1::2], strict=True))
    session = open_session(arguments.model, device="cpu")
    spec = session.spec
    session.close()
    ways = [("cosine", 1 / 2)] + [
        (blend, share)
        for share in SHARES
        for blend in (BLENDS if share else ("crop",))
        if (blend, share) != ("cosine", 1 / 2)
    ]
    found = []
    print("| overlap, pixels | blend | accuracy | near seams | elsewhere | same as the first |")
    print("|---|---|---|---|---|---|")
    best: list[NDArray[np.uint8]] = []
    for blend, share in ways:
        overlap = round(spec.tile * share)
        options = PredictOptions(blend=blend, overlap=overlap, overwrite=True, device="cpu")
        maps = [map_of(arguments.model, image, options) for image, _ in pairs]
        best = best or maps
        row = {"overlap": overlap, "blend": blend, **score(maps, best, pairs, spec, overlap)}
        found.append(row)
        print(
            f"| {overlap} | {blend} | {row['accuracy']:.4f} | {row['near']:.4f} | "
            f"{row['elsewhere']:.4f} | {row['agreement']:.4f} |",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def map_of(model: Path, image: Path, options: PredictOptions) -> NDArray[np.uint8]:
    """The class map (H, W)."""
    with tempfile.TemporaryDirectory() as folder:
        predict(image, model, Path(folder) / "map.tif", options=options)
        with rasterio.open(Path(folder) / "map.tif") as mapped:
            return mapped.read(1)


def score(
    maps: list[NDArray[np.uint8]],
    best: list[NDArray[np.uint8]],
    pairs: list[tuple[Path, Path]],
    spec: ModelSpec,
    overlap: int,
) -> dict[str, float]:
    """Accuracy near the seams, elsewhere and overall, and agreement with ``best``."""
    counts = np.zeros((2, 2))  # elsewhere or near; wrong or right
    same = total = 0
    for mapped, first, (_, labels) in zip(maps, best, pairs, strict=True):
        with rasterio.open(labels) as file:
            truth = file.read(1)
        known = np.isin(truth, spec.class_values) & (mapped != spec.nodata)
        near = near_seams(TileGrid(*mapped.shape, spec.tile, overlap))
        for place, where in enumerate((known & ~near, known & near)):
            right = int((mapped[where] == truth[where]).sum())
            counts[place] += int(where.sum()) - right, right
        same += int((mapped == first)[known].sum())
        total += int(known.sum())
    shares = counts[:, 1] / np.maximum(counts.sum(axis=1), 1)
    return {
        "accuracy": float(counts[:, 1].sum() / counts.sum()),
        "near": float(shares[1]),
        "elsewhere": float(shares[0]),
        "agreement": same / max(total, 1),
    }


def near_seams(grid: TileGrid) -> NDArray[np.bool_]:
    """The pixels (H, W) within a sixteenth of a tile of the middle of a seam."""

    def along(begins: list[int], length: int) -> NDArray[np.bool_]:
        middles = np.array(begins[1:]) + grid.overlap / 2
        places = np.arange(length)[:, np.newaxis] + 0.5
        return (np.abs(places - middles) <= grid.tile / 16).any(axis=1)

    rows = along([span.begin for span in grid.rows], grid.height)
    cols = along([span.begin for span in grid.cols], grid.width)
    return rows[:, np.newaxis] | cols


if __name__ == "__main__":
    main()
