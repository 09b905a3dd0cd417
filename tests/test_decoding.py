"""How often the blocks of a scene are read: the bytes, as the operating system counts them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine

from geodeploy import PredictOptions
from geodeploy.ahead import read_ahead
from geodeploy.engine import _AHEAD, _plan
from geodeploy.raster import Raster, open_raster

COUNTER = Path("/proc/self/io")
pytestmark = pytest.mark.skipif(not COUNTER.exists(), reason="only Linux counts what a process reads")
SIDE = 1920


def bytes_read() -> int:
    """By this process so far, from files or the system's cache of them."""
    return int(COUNTER.read_text().split("rchar:")[1].split()[0])


def make_bands(path: Path, gsd_m: int, *, count: int = 1, **options: Any) -> int:
    """A file of noise, which no compression makes small; its bytes."""
    side = SIDE * 10 // gsd_m
    noise = np.random.default_rng(gsd_m).integers(0, 2**16, (count, side, side), np.uint16)
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": count, "dtype": "uint16", "height": side, "width": side,
        "crs": "EPSG:32616", "transform": Affine(gsd_m, 0, 4e5, 0, -gsd_m, 3e6), "compress": "deflate",
    }  # fmt: skip
    with rasterio.open(path, "w", **profile | options) as dataset:
        dataset.write(noise)
    return path.stat().st_size


def times_read(raster: Raster, size: int) -> float:
    """How often the files, of ``size`` bytes, are read while all stripes are, by two threads."""
    with rasterio.Env(GDAL_CACHEMAX=2**20):  # GDAL shall not keep what it decoded
        before = bytes_read()
        for _ in read_ahead(raster.read, raster.stripes(), workers=2, ahead=_AHEAD):
            pass
        return (bytes_read() - before) / size


BLOCKS = [
    {"tiled": True, "blockxsize": 256, "blockysize": 256},
    {"tiled": True, "blockxsize": 512, "blockysize": 512},
    {"blockysize": 3},
]


@pytest.mark.parametrize("blocks", BLOCKS)
def test_each_block_of_a_scene_in_three_resolutions_is_read_once(
    tmp_path: Path, blocks: dict[str, Any]
) -> None:
    bands = {"blue": 10, "swir16": 20, "coastal": 60}
    size = sum(make_bands(tmp_path / f"{name}.tif", gsd, **blocks) for name, gsd in bands.items())
    with open_raster(tmp_path, band_names=list(bands)) as raster:
        assert len({layer.held_bytes for layer in raster.layers}) == 3
        assert times_read(raster, size) < 1.03  # their directories, once a thread


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("gsd_m", [4, 13, 50])
def test_each_block_is_read_once_whatever_the_map_s_pixels(
    tmp_path: Path, gsd_m: float, blocks: dict[str, Any]
) -> None:
    size = make_bands(tmp_path / "blue.tif", 10, **blocks)
    with open_raster(tmp_path / "blue.tif", band_names=["blue"], gsd_m=gsd_m) as raster:
        assert times_read(raster, size) < 1.03


def test_alpha_in_the_same_blocks_is_not_read_apart(tmp_path: Path) -> None:
    rgba = {"interleave": "pixel", "photometric": "rgb", "alpha": "yes"}
    size = make_bands(tmp_path / "rgba.tif", 10, count=4, **rgba)
    with open_raster(tmp_path / "rgba.tif", band_names=["red", "green", "blue"]) as raster:
        assert raster.layers[0].alpha == [4]
        assert times_read(raster, size) < 1.03


def test_strips_as_wide_as_a_scene_of_40_000_columns_are_not_cut_into_panels(
    tmp_path: Path, make_spec: Callable[..., Any]
) -> None:
    spec = make_spec(tile=224, overlap=32)
    profile: dict[str, Any] = {
        "driver": "GTiff", "count": 6, "dtype": "uint16", "height": 2000, "width": 40_000,
        "crs": "EPSG:32616", "transform": Affine(10, 0, 4e5, 0, -10, 3e6), "sparse_ok": True,
    }  # fmt: skip
    panels = {}
    for kind, blocks in (("strips", {"blockysize": 1}), ("tiles", BLOCKS[1])):
        with rasterio.open(tmp_path / f"{kind}.tif", "w", **profile | blocks):
            pass
        with open_raster(tmp_path / f"{kind}.tif", band_names=spec.band_names) as raster:
            plan = _plan(raster, spec, PredictOptions())
        panels[kind] = len({part.cols for part in plan.parts})
    assert panels == {
        "strips": 1,
        "tiles": 3,
    }  # panels decode no more than the tiles at their edges twice
