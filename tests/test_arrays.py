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
from geodeploy.derived import DerivedOptions
from geodeploy.errors import BandError, MissingExtraError, OutputError, SourceError
from geodeploy.raster import open_raster
from geodeploy.source import find_sources
from geodeploy.spec import Target

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


def test_quantities_come_in_one_dataset_with_their_units(
    make_model: Callable[..., Any], make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    targets = (Target(name="height", unit="m"), Target(name="biomass", unit="t"))
    spec = make_spec(("red", "nir"), tile=64, overlap=16, targets=targets)
    model, options = make_model(tmp_path / "model.onnx", spec).path, PredictOptions(disagreement=True)
    found = predict_array(as_array(), model, options=options)
    with held(as_array()) as name:
        report = predict(name, model, tmp_path / "map.tif", options=options)
    for path, kind in ((report.map, ""), (report.beside[0], "_disagreement")):
        with rasterio.open(path) as judge:
            for band, target in enumerate(targets, 1):
                variable = found[target.name + kind]
                np.testing.assert_array_equal(variable.values, judge.read(band))
                assert variable.attrs["units"] == target.unit
                assert variable.rio.crs == judge.crs
    assert np.isnan(found.height.rio.nodata)


def test_a_variable_that_can_be_no_band_is_left_out(tmp_path: Path) -> None:
    store = cube()
    store["quality"] = store["red"].drop_attrs().expand_dims(time=[1, 2])
    store.to_netcdf(tmp_path / "scene.nc")
    with open_raster(tmp_path / "scene.nc", band_names=SIX) as raster:
        np.testing.assert_array_equal(raster.read(Window(0, 0, 130, 100)).stored, stored_bands())
    for name, kind, complaint in (
        ("quality", SourceError, r"scene\.nc: quality has 2 dates, 1 to 2\. Choose one"),
        ("pan", BandError, r"scene\.nc, quality left out, has 6 bands"),
    ):
        with (
            pytest.raises(kind, match=complaint),
            open_raster(tmp_path / "scene.nc", band_names=[name]),
        ):
            pass


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


@pytest.mark.filterwarnings("ignore:Scales differ across bands")
def test_bands_chosen_from_an_array_of_rioxarrays_keep_their_names_and_scales(
    make_raster: Callable[..., Path], tmp_path: Path
) -> None:
    scene = make_raster(tmp_path / "scene.tif", stored_bands(), scales=[1e-4 * n for n in range(1, 7)])
    with open_raster(scene, band_names=["nir", "red"]) as judge:
        expected = judge.read_pixels(Window(0, 0, 130, 100))[0]
    with rioxarray.open_rasterio(scene) as array:
        with (
            held(array.sel(band=[3, 6, 4])) as name,
            open_raster(name, band_names=["nir", "red"]) as raster,
        ):
            np.testing.assert_array_equal(raster.read_pixels(Window(0, 0, 130, 100))[0], expected)
        turned = array.isel(band=slice(None, None, -1))
        with (
            pytest.raises(SourceError, match="the bands 6, 5, 4, 3, 2, 1; whether its long_name"),
            held(turned) as name,
            open_raster(name, band_names=["nir", "red"]),
        ):
            pass
        array.to_netcdf(tmp_path / "scene.nc")
    with open_raster(tmp_path / "scene.nc", band_names=["nir", "red"]) as raster:
        np.testing.assert_array_equal(raster.read_pixels(Window(0, 0, 130, 100))[0], expected)


@pytest.mark.parametrize("kind", ["turned", "one row", "no coordinates"])
def test_an_array_lies_where_rioxarray_says(
    make_raster: Callable[..., Path], pointwise: Any, tmp_path: Path, kind: str
) -> None:
    place = rasterio.Affine(30, 0, 5e5, 0, -30, 4e6)
    if kind == "turned":
        place @= rasterio.Affine.rotation(20)
    stored = stored_bands()[:, :1] if kind == "one row" else stored_bands()
    scene = make_raster(tmp_path / "scene.tif", stored, scales=[1e-4] * 6, transform=place)
    with rioxarray.open_rasterio(scene, parse_coordinates=kind != "no coordinates") as array:
        mapped = predict_array(array, pointwise.path)
        if kind == "turned":
            with pytest.raises(SourceError, match="was cut out of a turned raster"):
                predict_array(array.isel(x=slice(20, None)), pointwise.path)
    predict(scene, pointwise.path, tmp_path / "map.tif")
    with rasterio.open(tmp_path / "map.tif") as map_:
        np.testing.assert_array_equal(mapped.values, map_.read(1))
        assert mapped.rio.transform().almost_equals(map_.transform, 1e-6)
        assert mapped.rio.crs == map_.crs


def test_no_data_is_what_rioxarray_says(pointwise: Any) -> None:
    expected = predict_array(as_array(), pointwise.path)
    filled = as_array().fillna(-9999)
    for array in (filled.rio.set_nodata(-9999), filled.assign_attrs(nodata=-9999)):
        xarray.testing.assert_equal(predict_array(array, pointwise.path), expected)


def test_stripes_are_whole_chunks_of_dasks(pointwise: Any) -> None:
    dask = pytest.importorskip("dask.array", reason="dask is not installed")
    computed = []

    def note(block: Any, block_info: Any = None) -> Any:
        computed.append(block_info)
        return block

    pixels = np.full((6, 1500, 70), 0.3, np.float32)
    array = xarray.DataArray(
        dask.from_array(pixels, chunks=(6, 1500, 70)).map_blocks(note, dtype=np.float32),
        dims=("band", "y", "x"),
        coords={"band": SIX},
    )
    with held(array) as name, open_raster(name, band_names=SIX) as raster:
        computed.clear()
        for stripe in raster.stripes():
            raster.read(stripe)
    assert len(computed) == 1


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
        (dates, r"has 2 dates, 1 to 2\. Choose one with --date"),
        (both, r"has 2 dates, 1 to 2\. Choose one"),
        (as_array().rename(x="a", y="b"), r"does not lie on a grid of x and y: band, b, a"),
    ):
        with pytest.raises(SourceError, match=complaint) as caught:
            predict_array(array, pointwise.path)
        assert "\n" not in str(caught.value)
    for attributes, complaint in (
        ({"missing_value": [1.0, 2.0]}, "its fill value is no single number"),
        ({"scale_factor": "ten"}, "its scale_factor, 'ten', is no single number"),
        ({"scales": (1.0, 2.0)}, "has 6 bands, and its scales are not of those"),
    ):
        with pytest.raises(SourceError, match=complaint):
            predict_array(as_array().assign_attrs(attributes), pointwise.path)
    astray = as_array()
    astray["spatial_ref"].attrs = {"crs_wkt": "nowhere"}
    with pytest.raises(SourceError, match="its CRS or transform cannot be read"):
        predict_array(astray, pointwise.path)
    (tmp_path / "broken.zarr").mkdir()
    (tmp_path / "broken.zarr" / "zarr.json").write_text("[]")
    with pytest.raises(SourceError, match=r"broken\.zarr cannot be opened by xarray"):
        find_sources(tmp_path / "broken.zarr")
    (tmp_path / "broken.nc").write_bytes(b"CDF\x01 and no more")
    with pytest.raises(SourceError, match=r"broken\.nc cannot be opened by xarray"):
        find_sources(tmp_path / "broken.nc")
    xarray.Dataset({"a": ("t", [1.0, 2.0])}).to_netcdf(tmp_path / "line.nc")
    with pytest.raises(SourceError, match="has no variable on a grid"):
        find_sources(tmp_path / "line.nc")


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (cube(), r"takes an xarray\.DataArray, found xarray\.Dataset\. Make one .*to_dataarray"),
        (stored_bands(), r"takes an xarray\.DataArray, found numpy\.ndarray\. Name its axes"),
        ([[1.0]], r"takes an xarray\.DataArray, found builtins\.list"),
        (as_array() > 0, "The array holds bool; a model takes numbers"),
        (as_array().astype(object), "The array holds object; a model takes numbers"),
        (
            as_array().copy(data=stored_bands().astype("datetime64[ns]")),
            r"holds datetime64\[ns\]; a model",
        ),
        (as_array().astype(complex), "complex numbers; a model takes real ones"),
    ],
)
def test_what_is_no_array_of_numbers_is_refused_in_one_line(
    pointwise: Any, given: Any, complaint: str
) -> None:
    with pytest.raises(SourceError, match=complaint) as caught:
        predict_array(given, pointwise.path)
    assert "\n" not in str(caught.value)


def test_a_dataset_is_mapped_once_it_is_made_an_array_as_the_message_says(pointwise: Any) -> None:
    values = as_array().to_dataset("band").to_dataarray("band")
    xarray.testing.assert_identical(
        predict_array(values, pointwise.path).drop_attrs(),
        predict_array(as_array(), pointwise.path).drop_attrs(),
    )


def test_files_beside_the_map_of_an_array_are_refused_not_forgotten(pointwise: Any) -> None:
    options = PredictOptions(derived=DerivedOptions(area=".csv"))
    with pytest.raises(OutputError, match=r"options\.derived .*Leave it out"):
        predict_array(as_array(), pointwise.path, options=options)


def test_without_the_extra_its_name_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pointwise: Any
) -> None:
    path = write(tmp_path, "NetCDF")
    monkeypatch.setattr("geodeploy.errors.find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"geodeploy-eo\[xarray\]"):
        find_sources(path)
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
