"""Overviews of class maps, against GDAL's own."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.enums import Resampling

from geodeploy.cog import halve

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
