"""Several dates in one NetCDF file, Zarr store or array: `--date`. The judge is one raster a date."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.windows import Window
from test_dates import BANDS, GRID, expected, make_dated

from geodeploy import PredictOptions, predict, predict_array
from geodeploy.errors import SourceError
from geodeploy.raster import open_raster
from geodeploy.train.data import open_scenes
from geodeploy.train.recipe import load_recipe

if any(find_spec(name) is None for name in ("xarray", "rioxarray", "netCDF4", "zarr")):
    pytest.skip("the extra xarray is not installed", allow_module_level=True)

import rioxarray  # noqa: F401
import xarray

pytestmark = pytest.mark.filterwarnings(
    "ignore::PendingDeprecationWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"
)
DAYS = ("2024-05-03", "2024-05-31", "2024-09-02")
WHOLE = Window(0, 0, 90, 70)
STORED = (2, 0, 1)
"""The cube holds the dates in this order."""


def pixels() -> NDArray[np.uint16]:
    """(dates, bands, y, x), the oldest date first."""
    found = np.random.default_rng(5).integers(600, 4500, (3, 2, 70, 90)).astype(np.uint16)
    found[1, :, :10, :20] = 0
    return found


def cube(days: Any = None) -> Any:
    days = np.array(DAYS, "datetime64[ns]") if days is None else days
    about = {"scale_factor": 1e-4, "_FillValue": np.uint16(0)}
    stored = pixels()[list(STORED)]
    coords = {
        "time": [days[place] for place in STORED],
        "x": GRID.c + 5 + 10 * np.arange(90.0),
        "y": GRID.f - 5 - 10 * np.arange(70.0),
    }
    variables = {
        band: (("time", "y", "x"), stored[:, place], about) for place, band in enumerate(BANDS)
    }
    slope = ("y", "x"), np.ones((70, 90), np.float32)
    return xarray.Dataset(variables | {"slope": slope}, coords=coords).rio.write_crs(32633)


@pytest.fixture(params=["scene.nc", "scene.zarr"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / request.param
    cube().to_netcdf(path) if path.suffix == ".nc" else cube().to_zarr(path, consolidated=False)
    return path


@pytest.fixture
def dates(tmp_path: Path, make_raster: Any) -> list[Path]:
    return [
        make_raster(
            tmp_path / f"{day}.tif", values, names=BANDS, transform=GRID, nodata=0, scales=[1e-4] * 2
        )
        for day, values in zip(DAYS, pixels(), strict=True)
    ]


@pytest.mark.parametrize(("said", "place"), [("2024-05-31", 1), ("2024-09", 2), ("2024-05-03", 0)])
def test_a_date_is_read_as_a_scene_of_its_own(store: Path, said: str, place: int) -> None:
    with open_raster(store, dates=[said], band_names=[*BANDS, "slope"]) as raster:
        values, valid = raster.read_pixels(WHOLE)
    np.testing.assert_allclose(values[:2], pixels()[place] * np.float32(1e-4), rtol=1e-6)
    np.testing.assert_array_equal(values[2], 1)  # what has no time is the same at every date
    np.testing.assert_array_equal(valid, (pixels()[place] > 0).all(axis=0))


def test_a_model_of_several_dates_takes_them_oldest_first(
    store: Path, dates: list[Path], make_spec: Any, tmp_path: Path
) -> None:
    model = make_dated(tmp_path / "dates.onnx", make_spec, layout="NCHW")
    for options in (PredictOptions(), PredictOptions(date=("2024-09", "2024-05-31", "2024-05-03"))):
        predict(store, model, tmp_path / "map.tif", options=options)
        with rasterio.open(tmp_path / "map.tif") as mapped:
            np.testing.assert_array_equal(mapped.read(1), expected(dates))
        (tmp_path / "map.tif").unlink()
    array = cube()[list(BANDS)].to_dataarray("band").transpose("time", "band", "y", "x")
    array.attrs = cube()["red"].attrs
    np.testing.assert_array_equal(predict_array(array, model).values, expected(dates))


def test_a_calendar_that_is_not_ours_and_times_of_the_day(tmp_path: Path) -> None:
    days = xarray.date_range("2024-02-27", periods=3, calendar="360_day", use_cftime=True)
    cube(days).to_netcdf(tmp_path / "model.nc")
    with open_raster(tmp_path / "model.nc", dates=["2024-02-29"], band_names=BANDS) as raster:
        np.testing.assert_array_equal(raster.read(WHOLE).stored, pixels()[2])
    hours = np.array(["2024-05-03T10:20", "2024-05-03T10:40", "2024-05-04T10:20"], "datetime64[ns]")
    cube(hours).to_netcdf(tmp_path / "hours.nc")
    with open_raster(tmp_path / "hours.nc", dates=["2024-05-03T10:4"], band_names=BANDS) as raster:
        np.testing.assert_array_equal(raster.read(WHOLE).stored, pixels()[1])


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ([], "red has 3 dates, 2024-05-03 to 2024-09-02. Choose one with --date, such as --date"),
        (["2024-05"], "red has 2 dates that begin with 2024-05: 2024-05-03, 2024-05-31. Say more"),
        (["2023"], "red has nothing of 2023. It has 2024-09-02, 2024-05-03, 2024-05-31."),
        (["2024-09", "2024-05-31"], "takes 1 date of a place, found 2 dates. Choose one with --date"),
    ],
)  # fmt: skip
def test_a_date_that_is_not_clear_is_asked_for_in_one_line(
    tmp_path: Path, make_model: Any, make_spec: Any, said: list[str], complaint: str
) -> None:
    cube().to_netcdf(tmp_path / "scene.nc")
    model = make_model(tmp_path / "two.onnx", make_spec(BANDS, range(4), tile=32, overlap=8))
    options = PredictOptions(date=tuple(said))
    with pytest.raises(SourceError) as caught:
        predict(tmp_path / "scene.nc", model.path, tmp_path / "map.tif", options=options)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "map.tif").exists()


def test_what_has_no_dates_has_none_to_choose_from(dates: list[Path], tmp_path: Path) -> None:
    cube().isel(time=0, drop=True).to_netcdf(tmp_path / "one.nc")
    for path in (dates[0], tmp_path / "one.nc"):
        with (
            pytest.raises(SourceError, match=rf"{path.name} has no dates to choose from"),
            open_raster(path, dates=["2024"], band_names=BANDS),
        ):
            pass
    red = cube().red.isel(time=0, drop=True)
    with pytest.raises(SourceError, match="The array has no dates to choose from"):
        predict_array(red, options=PredictOptions(date=("2024",)))


def test_a_recipe_names_the_date_of_a_scene(tmp_path: Path, recipe_file: Path) -> None:
    cube().to_netcdf(tmp_path / "scene.nc")
    place = "data.scene.0"
    overrides = [
        f"data.root={tmp_path}", 'data.bands=["red","nir"]',
        'data.scene=[{image="scene.nc", labels="labels.tif", split="train"}]',
    ]  # fmt: skip
    needed = re.escape(f'Choose one with {place}.date, such as {place}.date = "2024-09-02".')
    with pytest.raises(SourceError, match=needed), open_scenes(load_recipe(recipe_file, overrides)):
        pass
