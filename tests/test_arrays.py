"""NetCDF, Zarr and xarray's arrays. The judge is the GeoTIFF of the same pixels."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy import PredictOptions, predict, predict_array
from geodeploy.arrays import held
from geodeploy.errors import MissingExtraError, SourceError
from geodeploy.raster import open_raster
from geodeploy.source import find_source

if any(find_spec(name) is None for name in ("xarray", "rioxarray", "netCDF4", "zarr")):
    pytest.skip("the extra xarray is not installed", allow_module_level=True)

import rioxarray
import xarray

pytestmark = pytest.mark.filterwarnings(
    # rioxarray multiplies transforms as affine no longer likes it; Zarr 3 has no word for CF's fill.
    "ignore::PendingDeprecationWarning",
    "ignore::DeprecationWarning",
    "ignore::FutureWarning",
)
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]
GRID: dict[str, Any] = {
    "x": 5e5 + 15 + 30 * np.arange(130.0),
    "y": 4e6 - 15 - 30 * np.arange(100.0),
}


def stored_bands() -> NDArray[np.uint16]:
    stored = np.random.default_rng(3).integers(1, 6000, (6, 100, 130)).astype(np.uint16)
    stored[2, :20, :30] = 0
    return stored


def cube() -> Any:
    """Six variables as CF has them: stored whole numbers with scale, offset and fill value."""
    variables = {}
    for name, values in zip(SIX, stored_bands(), strict=True):
        about = {"scale_factor": 1e-4, "add_offset": -0.01, "_FillValue": np.uint16(0)}
        variables[name] = (("y", "x"), values, about)
    return xarray.Dataset(variables, coords=GRID).rio.write_crs(32616)


def write(folder: Path, kind: str) -> Path:
    if kind == "NetCDF":
        cube().to_netcdf(folder / "scene.nc")
        return folder / "scene.nc"
    cube().to_zarr(folder / "scene.zarr", zarr_format=int(kind[-1]), consolidated=False)
    return folder / "scene.zarr"


@pytest.fixture
def judge(make_raster: Callable[..., Path], tmp_path: Path) -> Path:
    return make_raster(
        tmp_path / "judge.tif", stored_bands(), nodata=0, scales=[1e-4] * 6, offsets=[-0.01] * 6,
        transform=rasterio.Affine(30, 0, 5e5, 0, -30, 4e6), crs=CRS.from_epsg(32616),
    )  # fmt: skip


def as_array() -> Any:
    """The same as one array of reflectance with NaN, its bands named by a coordinate."""
    stored = stored_bands()
    values = np.where(stored == 0, np.nan, stored * 1e-4 - 0.01).astype(np.float32)
    return xarray.DataArray(
        values, dims=("band", "y", "x"), coords=GRID | {"band": SIX}, name="reflectance"
    ).rio.write_crs(32616)


@pytest.mark.parametrize("kind", ["NetCDF", "Zarr 2", "Zarr 3"])
def test_a_store_is_read_and_mapped_as_the_geotiff_is(
    judge: Path, pointwise: Any, tmp_path: Path, kind: str
) -> None:
    path = write(tmp_path, kind)
    with (
        open_raster(path, band_names=["red", "nir"]) as raster,
        open_raster(judge, band_names=["red", "nir"]) as expected,
    ):
        window = Window(11, 13, 70, 60)
        for ours, theirs in zip(raster.read_pixels(window), expected.read_pixels(window), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert raster.crs == expected.crs
        assert raster.transform.almost_equals(expected.transform, 1e-6)
        assert raster.dtype == np.uint16
    predict(path, pointwise.path, tmp_path / "map.tif")
    predict(judge, pointwise.path, tmp_path / "judge_map.tif")
    with rasterio.open(tmp_path / "map.tif") as ours, rasterio.open(tmp_path / "judge_map.tif") as map_:
        np.testing.assert_array_equal(ours.read(), map_.read())


@pytest.mark.parametrize("kind", ["NetCDF", "Zarr 2", "Zarr 3"])
def test_a_damaged_chunk_ends_the_run_in_one_line_or_is_left_out(
    pointwise: Any, tmp_path: Path, kind: str
) -> None:
    if kind == "NetCDF":
        path = tmp_path / "scene.nc"
        packed = {name: {"zlib": True, "chunksizes": (50, 65)} for name in SIX}
        cube().to_netcdf(path, encoding=packed)
        damage(path, slice(-30_000, -20_000))
    else:
        path = write(tmp_path, kind)
        (*_, chunk) = sorted(file for file in (path / "nir").rglob("*") if file.stat().st_size > 5000)
        damage(chunk, slice(0, 200))
    output = tmp_path / "map.tif"
    with pytest.raises(SourceError, match="cannot be read") as caught:
        predict(path, pointwise.path, output)
    assert "\n" not in str(caught.value)
    assert not output.exists()
    report = predict(path, pointwise.path, output, options=PredictOptions(on_error="skip"))
    assert report.holes
    assert not report.is_whole


@pytest.mark.parametrize("kind", ["NetCDF", "Zarr 3"])
def test_only_the_chunks_that_are_asked_for_are_read(tmp_path: Path, kind: str) -> None:
    counter = Path("/proc/self/io")
    if not counter.exists():
        pytest.skip("only Linux counts what a process reads")
    noise = np.random.default_rng(0).integers(0, 2**16, (4000, 4000), np.uint16)
    made = xarray.Dataset({"red": (("y", "x"), noise)})
    path = tmp_path / kind
    if kind == "NetCDF":
        path = path.with_suffix(".nc")
        made.to_netcdf(path, encoding={"red": {"chunksizes": (200, 200)}})
    else:
        made.to_zarr(
            path.with_suffix(".zarr"), consolidated=False, encoding={"red": {"chunks": (200, 200)}}
        )
        path = path.with_suffix(".zarr")
    with open_raster(path, band_names=["red"]) as raster:
        raster.read(Window(0, 0, 10, 10))  # the libraries, too, are read
    before = counter.read_text()
    with open_raster(path, band_names=["red"]) as raster:
        np.testing.assert_array_equal(
            raster.read(Window(300, 400, 100, 100)).stored[0], noise[400:500, 300:400]
        )
    read = [int(text.split("rchar:")[1].split()[0]) for text in (before, counter.read_text())]
    assert read[1] - read[0] < noise.nbytes / 2


def damage(file: Path, part: slice) -> None:
    content = bytearray(file.read_bytes())
    content[part] = b"\xff" * len(content[part])
    file.write_bytes(content)


def test_an_array_goes_in_and_one_comes_out(judge: Path, pointwise: Any, tmp_path: Path) -> None:
    array = as_array()
    before = array.copy(deep=True)
    mapped = predict_array(array, pointwise.path)
    predict(judge, pointwise.path, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as dataset:
        np.testing.assert_array_equal(mapped.values, dataset.read(1))
        assert mapped.rio.transform().almost_equals(dataset.transform, 1e-6)
        assert mapped.rio.crs == dataset.crs
    assert mapped.dims == ("y", "x")
    assert mapped.rio.nodata == 255
    xarray.testing.assert_identical(array, before)
    xarray.testing.assert_equal(mapped.x, array.x)
    values = pointwise.spec.class_values
    assert mapped.attrs["flag_values"].tolist() == list(values)
    assert len(mapped.attrs["flag_meanings"].split()) == len(values)


def test_an_array_may_name_its_bands_in_long_name_or_not_at_all(pointwise: Any) -> None:
    expected = predict_array(as_array(), pointwise.path)
    array = as_array().drop_vars("band").assign_attrs(long_name=tuple(SIX))
    xarray.testing.assert_equal(predict_array(array, pointwise.path), expected)
    reversed_bands = as_array().isel(band=slice(None, None, -1))
    xarray.testing.assert_equal(predict_array(reversed_bands, pointwise.path), expected)
    bare = as_array().drop_vars("band")
    xarray.testing.assert_equal(predict_array(bare, pointwise.path), expected)


@pytest.mark.filterwarnings("ignore:Scales differ across bands")
def test_an_array_that_rioxarray_opened_keeps_the_scales_of_its_bands(
    make_raster: Callable[..., Path], pointwise: Any, tmp_path: Path
) -> None:
    for number, scales in enumerate(([1e-4] * 6, [1e-4, 2e-4, 1e-4, 1e-4, 1e-4, 1e-4])):
        scene = make_raster(tmp_path / f"{number}.tif", stored_bands(), nodata=0, scales=scales)
        predict(scene, pointwise.path, tmp_path / f"{number}_map.tif")
        with (
            rioxarray.open_rasterio(scene) as array,
            rasterio.open(tmp_path / f"{number}_map.tif") as map_,
        ):
            np.testing.assert_array_equal(predict_array(array, pointwise.path), map_.read(1))


def test_an_array_with_the_time_last_or_one_date_is_turned_round(pointwise: Any) -> None:
    expected = predict_array(as_array(), pointwise.path)
    turned = as_array().expand_dims(time=[0]).transpose("y", "x", "band", "time")
    np.testing.assert_array_equal(predict_array(turned, pointwise.path).values, expected.values)


def test_an_array_resampled_on_the_way_has_new_coordinates(pointwise: Any) -> None:
    mapped = predict_array(as_array(), pointwise.path, options=PredictOptions(gsd=60))
    assert mapped.shape == (50, 65)
    np.testing.assert_allclose(mapped.x[:2], [5e5 + 30, 5e5 + 90])
    np.testing.assert_allclose(mapped.y[:2], [4e6 - 30, 4e6 - 90])


def test_plain_latitude_and_longitude_are_understood(tmp_path: Path, pointwise: Any) -> None:
    array = as_array().drop_vars("spatial_ref").rename(y="lat", x="lon")
    array = array.assign_coords(lat=50 - 0.01 * np.arange(100), lon=0.01 * np.arange(130))
    mapped = predict_array(array, pointwise.path)
    assert mapped.dims == ("lat", "lon")
    assert mapped.rio.crs == CRS.from_epsg(4326)
    assert mapped.rio.transform().almost_equals(
        rasterio.Affine(0.01, 0, -0.005, 0, -0.01, 50.005), 1e-9
    )


def test_what_is_no_scene_is_refused_in_one_line(tmp_path: Path, pointwise: Any) -> None:
    irregular = as_array().assign_coords(x=np.cumsum(np.arange(130.0)))
    dates = as_array().isel(band=0, drop=True).expand_dims(time=[1, 2])
    both = as_array().expand_dims(time=[1, 2])
    for array, complaint in (
        (irregular, "lies on an irregular grid: its x"),
        (dates, r"has 2 of time\. Choose one date"),
        (both, "has 2 of time, 6 of band"),
        (as_array().rename(x="a", y="b"), r"does not lie on a grid of x and y: band, b, a"),
    ):
        with pytest.raises(SourceError, match=complaint) as caught:
            predict_array(array, pointwise.path)
        assert "\n" not in str(caught.value)
    (tmp_path / "broken.nc").write_bytes(b"CDF\x01 and no more")
    with pytest.raises(SourceError, match=r"broken\.nc cannot be opened by xarray"):
        find_source(tmp_path / "broken.nc")
    xarray.Dataset({"a": ("t", [1.0, 2.0])}).to_netcdf(tmp_path / "line.nc")
    with pytest.raises(SourceError, match="has no variable on a grid"):
        find_source(tmp_path / "line.nc")


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointwise: Any
) -> None:
    path = write(tmp_path, "NetCDF")
    monkeypatch.setattr("geodeploy.errors.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"geodeploy-eo\[xarray\]"):
        find_source(path)
    with pytest.raises(MissingExtraError, match=r"geodeploy-eo\[xarray\]"):
        predict_array(as_array(), pointwise.path)


def test_an_array_is_held_no_longer_than_it_is_used() -> None:
    with held(as_array()) as name, open_raster(name, band_names=["red"]):
        pass
    with pytest.raises((SourceError, OSError)), open_raster(name, band_names=["red"]):
        pass


def test_what_lies_beside_the_map_comes_in_one_dataset_with_it(pointwise: Any, tmp_path: Path) -> None:
    array = as_array()
    options = PredictOptions(confidence=True, probabilities=True, disagreement=True)
    found = predict_array(array, pointwise.path, options=options)
    xarray.testing.assert_identical(found["class"], predict_array(array, pointwise.path))
    assert list(found["class_name"].values) == [f"class {n}" for n in (0, 1, 3, 4)]
    with held(array) as name:
        report = predict(name, pointwise.path, tmp_path / "map.tif", options=options)
    for path, variable in zip(report.beside, options.beside, strict=True):
        judge = rioxarray.open_rasterio(path, mask_and_scale=True)
        np.testing.assert_allclose(np.atleast_3d(found[variable].values.T).T, judge.values, rtol=1e-6)
    # No pixel of the data lies outside the map, and none of the map outside the data.
    assert (np.isnan(found["confidence"]) == (found["class"] == 255)).all()
