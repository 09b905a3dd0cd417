"""What other tools get wrong over whole scenes, as their issues and sources tell: it must not be ours.

Those that have a test of their own elsewhere:

- part of a run fails in silence, and the map has holes that nobody hears of (geoai): test_holes.py
- a map is written with no CRS, upside down or turned (several): test_odd_rasters.py
- memory grows with the scene (MONAI, DeepForest, TerraTorch, ...): test_memory.py, test_predict.py
- the file is read several times over (TerraTorch): test_decoding.py
- a GPU is asked for and the CPU computes (Deepness): runtime/test_onnx.py
- two scenes of one name become one map (TerraTorch): cli/test_bad_input.py
- what is asked for changes what is mapped (samgeo): test_aoi_maps.py
- Sentinel-2's offset of 2022 is forgotten (ftw-tools): test_sentinel2.py
- an export that fails spoils the adapter (libreyolo): export/test_export.py
- an engine for another model is taken out of the cache (Torch-TensorRT): runtime/test_reference.py
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from numpy.typing import NDArray
from rasterio.shutil import copy

from geodeploy import PredictOptions, predict

Make = Callable[..., Any]
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


@pytest.fixture(scope="module")
def bytewise(tmp_path_factory: pytest.TempPathFactory, make_model: Make, make_spec: Make) -> Any:
    """Takes three bands of bytes as they are, in whole numbers: float32 makes no error."""
    spec = make_spec(SIX[:3], tile=224, overlap=16, mean=90.0, valid_range=(0.0, 255.0))
    return make_model(tmp_path_factory.mktemp("model") / "m.onnx", spec, whole_numbers=True)


def noise(*shape: int) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)


def expected(model: Any, pixels: NDArray[Any], valid: Any = True) -> NDArray[np.uint8]:
    """The map of a model that looks at each pixel alone, in float64 over the whole array."""
    best = model.on_the_whole(pixels).argmax(axis=0)
    return np.where(valid, np.array(model.spec.class_values, np.uint8)[best], 255)


def mapped(scene: Path, model: Any, folder: Path, **options: Any) -> NDArray[np.uint8]:
    given = PredictOptions(overwrite=True, device="cpu", **options)
    predict(scene, model.path, folder / "map.tif", options=given)
    with rasterio.open(folder / "map.tif") as file:
        assert (file.driver, file.nodata, file.dtypes) == ("GTiff", 255, ("uint8",))
        return file.read(1)


@pytest.mark.parametrize(
    ("height", "width", "why"),
    [
        (417, 625, "TerraTorch leaves a gap of a pixel where tiles just fail to fit"),
        (833, 417, "the same"),
        (209, 209, "the same, for images a little smaller than a tile"),
        (100, 700, "TerraTorch's slices begin before the image where one side alone is below a tile"),
        (700, 100, "the same"),
        (60, 50, "TorchGeo's sampler passes over scenes smaller than a tile"),
        (225, 449, "tcd leaves out a strip where sizes round down"),
    ],
)
def test_every_pixel_of_awkward_sizes_is_mapped(
    bytewise: Any, make_raster: Make, tmp_path: Path, height: int, width: int, why: str
) -> None:
    pixels = noise(3, height, width)
    scene = make_raster(tmp_path / "scene.tif", pixels)
    for overlap in (16, 0):  # TerraTorch's answer without a margin is an empty array
        found = mapped(scene, bytewise, tmp_path, overlap=overlap)
        np.testing.assert_array_equal(found, expected(bytewise, pixels), why)


def test_a_pixel_without_a_number_spoils_itself_alone(
    bytewise: Any, make_raster: Make, tmp_path: Path
) -> None:
    # In TerraTorch it spoils its tile, and by the sums all tiles around; ftw-tools maps it as zero.
    pixels = noise(3, 300, 300).astype(np.float32)
    pixels[1, 150, 150] = np.nan
    found = mapped(make_raster(tmp_path / "scene.tif", pixels), bytewise, tmp_path)
    valid = ~np.isnan(pixels).any(axis=0)
    np.testing.assert_array_equal(found, expected(bytewise, np.nan_to_num(pixels), valid))


@pytest.mark.parametrize("nodata", [np.nan, -9999.0, 7.0, 1.0])
def test_any_nodata_value_is_nodata(
    bytewise: Any, make_raster: Make, tmp_path: Path, nodata: float
) -> None:
    # TerraTorch and OmniCloudMask never find NaN, ukis-csmask heeds 0 alone.
    pixels = noise(3, 240, 240).astype(np.float32)
    pixels[pixels == nodata] += 1
    pixels[:, 30:60, 200:] = nodata
    found = mapped(make_raster(tmp_path / "scene.tif", pixels, nodata=nodata), bytewise, tmp_path)
    valid = np.ones(found.shape, bool)
    valid[30:60, 200:] = False
    np.testing.assert_array_equal(found, expected(bytewise, np.nan_to_num(pixels), valid))


def test_zero_is_data_and_no_class_is_nodata_in_the_map(
    bytewise: Any, make_raster: Make, tmp_path: Path
) -> None:
    # TerraTorch's service and ftw-tools write the first class, 0, as nodata.
    pixels = np.zeros((3, 240, 240), np.uint8)
    found = mapped(make_raster(tmp_path / "scene.tif", pixels), bytewise, tmp_path)
    np.testing.assert_array_equal(found, expected(bytewise, pixels))
    assert found.max() < 255


def test_class_values_up_to_254_come_out_as_they_are(
    make_model: Make, make_spec: Make, make_raster: Make, tmp_path: Path
) -> None:
    # TerraTorch's service writes 255 times the class, modulo 256; geoai the mean of class numbers.
    bytes_of = {"mean": 90.0, "valid_range": (0.0, 255.0), "tile": 64, "overlap": 16}
    spec = make_spec(SIX[:3], (0, 2, 101, 254), **bytes_of)
    each_wins = np.array([[2, 0, 0], [0, 2, 0], [0, 0, 2], [1, 1, 1]], np.float32)
    model = make_model(tmp_path / "m.onnx", spec, weights=[each_wins[:, :, None, None]])
    pixels = noise(3, 150, 150)
    pixels[:, 60:90] = 200
    found = mapped(make_raster(tmp_path / "scene.tif", pixels), model, tmp_path)
    np.testing.assert_array_equal(found, expected(model, pixels))
    assert set(np.unique(found)) == {0, 2, 101, 254}


@pytest.mark.parametrize("driver", ["VRT", "ENVI", "JP2OpenJPEG"])
def test_the_map_is_a_geotiff_whatever_the_scene_is(
    bytewise: Any, make_raster: Make, tmp_path: Path, driver: str
) -> None:
    # TerraTorch and geoai write with the driver of the scene.
    pixels = noise(3, 240, 240)
    make_raster(tmp_path / "first.tif", pixels)
    lossless = {"QUALITY": "100", "REVERSIBLE": "YES"} if driver == "JP2OpenJPEG" else {}
    copy(tmp_path / "first.tif", tmp_path / "scene", driver=driver, **lossless)
    found = mapped(tmp_path / "scene", bytewise, tmp_path, bands=("1", "2", "3"))
    np.testing.assert_array_equal(found, expected(bytewise, pixels))


def test_a_pixel_that_hundreds_of_tiles_cover_is_their_mean(
    make_model: Make, make_spec: Make, make_raster: Make, tmp_path: Path
) -> None:
    # Raster Vision counts them in a byte and adds them up in half precision.
    bytes_of = {"mean": 90.0, "valid_range": (0.0, 255.0), "tile": 64, "overlap": 62}
    model = make_model(tmp_path / "m.onnx", make_spec(SIX[:3], **bytes_of), whole_numbers=True)
    pixels = noise(3, 102, 102)
    found = mapped(make_raster(tmp_path / "scene.tif", pixels), model, tmp_path, blend="flat")
    np.testing.assert_array_equal(found, expected(model, pixels))


def test_scores_beyond_half_precision_overflow_nowhere(
    make_model: Make, make_spec: Make, make_raster: Make, tmp_path: Path
) -> None:
    # nnU-Net adds up in half precision, and its sums become infinite.
    spec = make_spec(SIX[:3], tile=64, overlap=32, mean=90.0, valid_range=(0.0, 255.0))
    weights = [np.random.default_rng(1).integers(-3, 4, (4, 3, 1, 1)).astype(np.float32) * 1e4]
    model = make_model(tmp_path / "m.onnx", spec, weights=weights)
    pixels = noise(3, 150, 150)
    found = mapped(make_raster(tmp_path / "scene.tif", pixels), model, tmp_path)
    np.testing.assert_array_equal(found, expected(model, pixels))


def test_what_is_bright_in_one_place_changes_no_other(
    bytewise: Any, make_raster: Make, tmp_path: Path
) -> None:
    # geoai, OmniCloudMask and others stretch each tile by its own values.
    pixels = noise(3, 500, 500) // 4 + 1
    bright = pixels.copy()
    bright[:, 100:110, 100:110] = 255
    maps = [
        mapped(make_raster(tmp_path / f"{name}.tif", values), bytewise, tmp_path)
        for name, values in (("plain", pixels), ("bright", bright))
    ]
    maps[0][100:110, 100:110] = maps[1][100:110, 100:110]
    np.testing.assert_array_equal(*maps)


def test_the_caller_s_array_stays_as_it_was(bytewise: Any) -> None:
    # geoai stretches it in place.
    xarray = pytest.importorskip("xarray", reason="needs the extra xarray")
    pytest.importorskip("rioxarray", reason="needs the extra xarray")
    from geodeploy import predict_array

    pixels = noise(3, 240, 240)
    array = xarray.DataArray(
        pixels.copy(),
        dims=("band", "y", "x"),
        coords={"band": SIX[:3], "y": 3e6 - 10.0 * np.arange(240), "x": 5e5 + 10.0 * np.arange(240)},
    ).rio.write_crs(32616)
    found = predict_array(array, bytewise.path, options=PredictOptions(device="cpu"))
    np.testing.assert_array_equal(array.values, pixels)
    np.testing.assert_array_equal(np.squeeze(found.values), expected(bytewise, pixels))
