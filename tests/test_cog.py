"""Overviews of class maps, against GDAL's own."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.enums import Resampling
from rasterio.windows import Window

from geodeploy.cog import Frame, encode, halve, join, make_cog
from geodeploy.products import ClassMap
from geodeploy.tally import Counts

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


@pytest.mark.parametrize("absent", [0.0, 0.3, 0.8])
def test_the_most_frequent_of_four_is_that_of_gdal(tmp_path: Path, absent: float) -> None:
    random = np.random.default_rng(0)
    values = random.integers(0, 4, (256, 320)).astype(np.uint8)
    values[random.random(values.shape) < absent] = 255
    path = tmp_path / "map.tif"
    profile = {"driver": "GTiff", "count": 1, "dtype": "uint8", "height": 256, "width": 320}
    with rasterio.open(path, "w", nodata=255, **profile) as dataset:
        dataset.write(values, 1)
    with rasterio.open(path, "r+") as dataset:
        dataset.build_overviews([2], Resampling.mode)
    with rasterio.open(path, overview_level=0) as dataset:
        np.testing.assert_array_equal(halve(values, 255), dataset.read(1))


@pytest.mark.parametrize(("height", "width"), [(3, 1026), (1026, 3), (2, 1026), (1, 513), (9, 4200)])
def test_a_strip_a_few_pixels_wide_becomes_a_map_too(tmp_path: Path, height: int, width: int) -> None:
    values = np.random.default_rng(0).integers(0, 3, (1, height, width)).astype(np.uint8)
    (tmp_path / "part.tif").write_bytes(encode(values))
    tallies = [Counts.of(values)]
    product = ClassMap([0, 1, 2])
    frame = Frame(Window(0, 0, width, height), None, Affine.identity())
    joined, cog = tmp_path / "map.vrt", tmp_path / "map.tif"
    join(joined, product, frame, {"part.tif": frame.window}, first=1, tallies=tallies, tags={})
    make_cog(joined, cog, product, tallies)
    with rasterio.open(cog) as dataset:
        np.testing.assert_array_equal(dataset.read(), values)
        assert dataset.overviews(1)
