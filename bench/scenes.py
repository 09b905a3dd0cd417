"""Big scenes of real imagery for the benchmarks: the sample scene, mirrored and repeated."""

from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from geodeploy.demo import SCENE

BLOCK = 512


def make_mosaic(output: Path, height: int, width: int, *, scene: Path = SCENE) -> Path:
    """Write a raster of ``height`` x ``width`` pixels that repeats ``scene``; nothing if it is there.

    Every other copy is mirrored, so that the picture has no breaks. Each row of blocks is made on its
    own: memory stays small whatever the size.
    """
    if output.exists():
        return output
    with rasterio.open(scene) as source:
        pixels = source.read()
        profile = source.profile | {
            "driver": "GTiff", "height": height, "width": width, "tiled": True, "blockxsize": BLOCK,
            "blockysize": BLOCK, "compress": "deflate", "predictor": 2, "zlevel": 1, "bigtiff": "yes",
            "interleave": "pixel", "num_threads": "all_cpus",
        }  # fmt: skip
        names, scales, offsets = source.descriptions, source.scales, source.offsets
    cell = np.concatenate([pixels, pixels[:, :, ::-1]], axis=2)
    cell = np.concatenate([cell, cell[:, ::-1]], axis=1)
    cols = np.arange(width) % cell.shape[2]
    draft = output.with_name(output.name + ".part")
    with rasterio.open(draft, "w", **profile) as target:
        target.scales, target.offsets = scales, offsets
        for index, name in enumerate(names, 1):
            target.set_band_description(index, name)
        for row in range(0, height, BLOCK):
            rows = np.arange(row, min(row + BLOCK, height)) % cell.shape[1]
            target.write(cell[:, rows][:, :, cols], window=Window(0, row, width, len(rows)))
    draft.replace(output)
    return output
