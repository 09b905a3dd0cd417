"""Scenes resampled as they are read: `--gsd`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from pydantic import ValidationError
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.warp import reproject
from rasterio.windows import Window

from geodeploy import PredictOptions, evaluate, predict
from geodeploy.errors import GridError
from geodeploy.raster import Raster, open_raster

MakeRaster = Callable[..., Path]
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


def whole(raster: Raster) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    return raster.read_pixels(Window(0, 0, raster.width, raster.height))


@pytest.mark.parametrize("gsd_m", [10, 15.0, 37.5, 60, 90, 300])
def test_the_real_scene_is_resampled_as_gdal_would_whatever_the_stripes(
    real_scene: Path, gsd_m: float
) -> None:
    with open_raster(real_scene, band_names=SIX, gsd_m=gsd_m) as raster:
        pixels, valid = whole(raster)
        stripes = [raster.read_pixels(window) for window in raster.stripes()]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in stripes], axis=1), pixels)
    assert valid.all()
    with rasterio.open(real_scene) as dataset:
        assert (raster.height, raster.width) == (
            int(dataset.height * 30 / gsd_m),
            int(dataset.width * 30 / gsd_m),
        )
        assert (raster.transform.c, raster.transform.f) == (dataset.transform.c, dataset.transform.f)
        assert raster.transform.a == pytest.approx(gsd_m)
        judge = np.zeros((1, raster.height, raster.width), np.float32)
        stored = dataset.read([4]).astype(np.float32)
        grid: dict[str, Any] = {"src_crs": dataset.crs, "dst_crs": dataset.crs}
        reproject(
            stored, judge, src_transform=dataset.transform, dst_transform=raster.transform,
            resampling=Resampling.bilinear, tolerance=0, **grid,
        )  # fmt: skip
        judge = judge * dataset.scales[3] + dataset.offsets[3]
    inside = np.s_[4:-4, 4:-4] if gsd_m < 30 else np.s_[1:-1, 1:-1]
    # Values are stored in whole numbers, of 2e-5 here.
    np.testing.assert_allclose(pixels[3][inside], judge[0][inside], atol=5e-5)


def test_the_map_lies_on_the_grid_that_was_asked_for(
    real_scene: Path, pointwise: Any, tmp_path: Path
) -> None:
    report = predict(real_scene, pointwise.path, tmp_path / "m.tif", options=PredictOptions(gsd=75))
    with rasterio.open(tmp_path / "m.tif") as mapped, rasterio.open(real_scene) as scene:
        assert mapped.transform.almost_equals(scene.transform @ Affine.scale(2.5), 1e-9)
        assert mapped.crs == scene.crs
        assert mapped.shape == (report.height, report.width)
        assert mapped.tags()["GEODEPLOY_GSD"] == "75.0"
        with open_raster(real_scene, band_names=SIX, gsd_m=75) as raster:
            scores = pointwise.on_the_whole(whole(raster)[0])
        best = np.sort(scores, axis=0)
        sure = best[-1] - best[-2] > 1e-5
        values = np.array(pointwise.spec.class_values)[scores.argmax(axis=0)]
        np.testing.assert_array_equal(mapped.read(1)[sure], values[sure])


def test_the_size_that_the_model_was_trained_on_need_not_be_typed(
    real_scene: Path, make_model: Callable[..., Any], make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    model = make_model(tmp_path / "m.onnx", make_spec(gsd_m=120.0))
    native = predict(real_scene, model.path, tmp_path / "native.tif")
    assert any("--gsd model" in warning for warning in native.warnings)
    report = predict(real_scene, model.path, tmp_path / "m.tif", options=PredictOptions(gsd="model"))
    assert not any("--gsd" in warning for warning in report.warnings)
    assert report.width == native.width // 4
    silent = make_model(tmp_path / "silent.onnx", make_spec(gsd_m=None))
    with pytest.raises(GridError, match=r"--gsd model: the model .* does not say"):
        predict(real_scene, silent.path, tmp_path / "x.tif", options=PredictOptions(gsd="model"))


def test_labels_are_brought_to_the_grid_that_was_asked_for(
    real_scene: Path, pointwise: Any, tmp_path: Path
) -> None:
    options = PredictOptions(gsd=60)
    predict(real_scene, pointwise.path, tmp_path / "m.tif", options=options)
    scores = evaluate(pointwise.path, real_scene, tmp_path / "m.tif", options=options)
    assert scores.accuracy == 1


def test_mixed_sizes_come_to_a_third_one_and_nodata_with_them(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    for name, size in (("red", 10.0), ("nir", 20.0)):
        side = int(1200 / size)
        stored = np.full((1, side, side), 500, np.uint16)
        stored[0, : int(300 / size)] = 7
        grid = Affine(size, 0, 4000, 0, -size, 9000)
        make_raster(tmp_path / f"{name}.tif", stored, names=[], nodata=7, transform=grid)
    with open_raster(tmp_path, band_names=["red", "nir"], gsd_m=30) as raster:
        pixels, valid = whole(raster)
    assert pixels.shape == (2, 40, 40)
    assert (pixels[:, valid] == 500).all()
    np.testing.assert_array_equal(valid, np.repeat(np.arange(40) >= 10, 40).reshape(40, 40))


def test_feet_are_metres_too_and_oblong_pixels_become_square(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    feet = CRS.from_epsg(2229)  # California, US survey feet
    grid = Affine(100, 0, 6.5e6, 0, -50, 1.9e6)
    path = make_raster(tmp_path / "a.tif", np.ones((1, 80, 40), np.uint8), crs=feet, transform=grid)
    with open_raster(path, band_names=["blue"], gsd_m=100 * 1200 / 3937) as raster:
        assert (raster.height, raster.width) == (40, 40)
        assert raster.transform.a == pytest.approx(100)
        assert raster.transform.e == pytest.approx(-100)


def test_the_size_of_the_scene_itself_changes_nothing(real_scene: Path) -> None:
    with (
        open_raster(real_scene, band_names=SIX, gsd_m=30) as raster,
        open_raster(real_scene, band_names=SIX) as native,
    ):
        assert raster.layers == native.layers
        assert raster.transform == native.transform


@pytest.mark.parametrize(
    ("crs", "gsd_m", "complaint"),
    [
        (CRS.from_epsg(4326), 30, "is in EPSG:4326, where pixels have no size in metres"),
        (None, 30, "is in no CRS, where pixels have no size in metres"),
        (CRS.from_epsg(32616), 5000, r"is smaller than one pixel of --gsd 5000 m"),
        (CRS.from_epsg(32616), 0.01, r"100 times finer than the pixels of a.tif \(30 x 30 m\)"),
    ],
)
def test_a_size_that_a_scene_cannot_have_is_refused(
    make_raster: MakeRaster, tmp_path: Path, crs: CRS | None, gsd_m: float, complaint: str
) -> None:
    path = make_raster(tmp_path / "a.tif", np.ones((1, 40, 40), np.uint8), crs=crs)
    with (
        pytest.raises(GridError, match=complaint),
        open_raster(path, band_names=["blue"], gsd_m=gsd_m),
    ):
        pass


@pytest.mark.parametrize("gsd", ["wide", "0", -3, float("nan"), float("inf"), None])
def test_no_other_word_and_no_number_that_is_no_size_is_taken(gsd: Any) -> None:
    with pytest.raises(ValidationError, match="native, model or a number of metres above 0"):
        PredictOptions(gsd=gsd)


def test_numbers_may_come_as_text() -> None:
    assert PredictOptions(gsd="12.5").gsd == 12.5
    assert PredictOptions().gsd == "native"
