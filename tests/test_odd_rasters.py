"""Rasters that lie oddly on the earth, or say oddly what is no data: mapped right, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from geodeploy import PredictOptions, predict
from geodeploy.errors import SourceError
from geodeploy.raster import open_raster

MakeRaster = Callable[..., Path]
NORTH_UP = Affine(30, 0, 5e5, 0, -30, 4e6)
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


@pytest.fixture(scope="module")
def reflectance() -> NDArray[np.float32]:
    return np.random.default_rng(5).uniform(0.0, 0.6, (6, 100, 130)).astype(np.float32)


def mapped(path: Path) -> tuple[NDArray[np.uint8], Affine, CRS | None]:
    with rasterio.open(path) as dataset:
        return dataset.read(1), dataset.transform, dataset.crs


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        ("EPSG:32616", Affine(30, 0, 5e5, 0, 30, 4e6)),
        ("EPSG:32616", Affine(-30, 0, 5e5, 0, -30, 4e6)),
        ("EPSG:32616", NORTH_UP @ Affine.rotation(25)),
        ("EPSG:32616", NORTH_UP @ Affine.shear(10, 5)),
        ("EPSG:4326", Affine(0.01, 0, 179.4, 0, -0.01, -16)),
        ("EPSG:32601", Affine(3000, 0, 1e5, 0, -3000, 4e6)),
        ("EPSG:3031", Affine(300, 0, -3000, 0, -300, 3000)),
        ("EPSG:3857", Affine(30, 0, 20037000, 0, -30, 4e6)),
    ],
    ids=["south-up", "mirrored", "rotated", "sheared", "antimeridian", "UTM 1", "pole", "web edge"],
)
def test_the_map_lies_where_the_scene_does_pixel_by_pixel(
    make_raster: MakeRaster,
    pointwise: Any,
    reflectance: NDArray[np.float32],
    tmp_path: Path,
    crs: str,
    transform: Affine,
) -> None:
    scene = make_raster(
        tmp_path / "scene.tif", reflectance, crs=CRS.from_user_input(crs), transform=transform
    )
    judge = make_raster(tmp_path / "judge.tif", reflectance, transform=NORTH_UP)
    predict(scene, pointwise.path, tmp_path / "map.tif")
    predict(judge, pointwise.path, tmp_path / "judge_map.tif")
    classes, lies, found = mapped(tmp_path / "map.tif")
    np.testing.assert_array_equal(classes, mapped(tmp_path / "judge_map.tif")[0])
    assert lies.almost_equals(transform, 1e-9)
    assert found == CRS.from_user_input(crs)
    assert cog_validate(tmp_path / "map.tif", quiet=True)[0]


@pytest.mark.parametrize("transform", [Affine(30, 0, 5e5, 0, 30, 4e6), NORTH_UP @ Affine.rotation(25)])
def test_odd_rasters_are_resampled_along_their_own_axes(
    make_raster: MakeRaster, reflectance: NDArray[np.float32], tmp_path: Path, transform: Affine
) -> None:
    straight = make_raster(tmp_path / "straight.tif", reflectance, transform=NORTH_UP)
    odd = make_raster(tmp_path / "odd.tif", reflectance, transform=transform)
    seen = []
    for path in (straight, odd):
        with open_raster(path, band_names=SIX, gsd_m=45) as raster:
            seen.append(raster.read_pixels(Window(0, 0, raster.width, raster.height))[0])
    assert raster.transform.almost_equals(transform @ Affine.scale(1.5), 1e-9)
    np.testing.assert_allclose(*seen, atol=1e-6)


def test_a_scene_that_only_control_points_place_is_refused_in_one_line(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    path = make_raster(
        tmp_path / "scene.tif", np.ones((1, 40, 40), np.uint8), crs=None, transform=Affine.identity()
    )
    corners = ((0, 0), (0, 40), (40, 0), (40, 40))
    points = [GroundControlPoint(row, col, 5e5 + 30 * col, 4e6 - 30 * row) for row, col in corners]
    with rasterio.open(path, "r+") as dataset:
        dataset.gcps = points, CRS.from_epsg(32616)
    with (
        pytest.raises(
            SourceError, match=r"by 4 control points alone\. Rectify it .*gdalwarp"
        ) as caught,
        open_raster(path, band_names=["blue"]),
    ):
        pass
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("gsd", ["native", 45])
@pytest.mark.parametrize("kind", ["alpha", "internal mask", "mask beside", "nodata of a band", "NaN"])
def test_every_way_to_say_no_data_holds_at_every_size_of_pixel(
    make_raster: MakeRaster,
    pointwise: Any,
    reflectance: NDArray[np.float32],
    tmp_path: Path,
    kind: str,
    gsd: Any,
) -> None:
    valid = np.ones((100, 130), bool)
    valid[:40, :60] = False
    stored, path = reflectance.copy(), tmp_path / "scene.tif"
    if kind == "alpha":
        seven = np.concatenate([stored, valid[np.newaxis].astype(np.float32)])
        make_raster(path, seven)
        with rasterio.open(path, "r+") as dataset:
            dataset.colorinterp = [ColorInterp.undefined] * 6 + [ColorInterp.alpha]
    elif kind == "NaN":
        make_raster(path, np.where(valid, stored, np.nan))
    elif kind == "nodata of a band":
        stored[3][~valid] = -9999
        make_raster(path, stored, nodata=-9999)
    else:
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=kind == "internal mask"):
            make_raster(path, stored, mask=valid)
    predict(path, pointwise.path, tmp_path / "map.tif", options=PredictOptions(gsd=gsd))
    classes, transform, _ = mapped(tmp_path / "map.tif")
    rows, cols = (np.arange(length) + 0.5 for length in classes.shape)
    factor = transform.a / 30
    # A pixel has data where the scene's pixel under its centre has.
    judge = valid[np.ix_((rows * factor).astype(int), (cols * factor).astype(int))]
    np.testing.assert_array_equal(classes != 255, judge)
    assert (~judge).any()


def test_bands_with_nodata_values_of_their_own_are_each_taken_at_their_word(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    # A GeoTIFF has one value for all bands; files side by side, and VRTs, have one each.
    for place, name in enumerate(("red", "nir")):
        stored = np.full((1, 20, 20), 50, np.uint8)
        stored[0, place], stored[0, 10 + place] = place, 1 - place
        make_raster(tmp_path / f"{name}.tif", stored, names=[], nodata=place)
    with open_raster(tmp_path, band_names=["red", "nir"]) as raster:
        _, valid = raster.read_pixels(Window(0, 0, 20, 20))
    # Row 10 of red holds 1, which is no data in nir alone; row 11 of nir holds 0, of red alone.
    assert np.flatnonzero(~valid.all(axis=1)).tolist() == [0, 1]
