import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.enums import ColorInterp
from rasterio.shutil import copy
from rasterio.windows import Window

from geodeploy.errors import BandError, RangeError, SourceError
from geodeploy.raster import Raster, check_range, ground_sample_distance_m, open_raster

MakeRaster = Callable[..., Path]
THREE = ["blue", "green", "red"]


def read_all(path: Path, names: list[str] = THREE, **more: Any) -> tuple[NDArray, NDArray]:
    with open_raster(path, band_names=names, **more) as raster:
        return raster.read_pixels(Window(0, 0, raster.width, raster.height))


def numbers(dtype: str, shape: tuple[int, ...] = (3, 40, 50)) -> NDArray[Any]:
    random = np.random.default_rng(0)
    if np.dtype(dtype).kind == "f":
        return random.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(max(info.min, -30000), min(info.max, 30000), shape).astype(dtype)


def by_rasterio(path: Path, indexes: list[int]) -> NDArray[np.bool_]:
    """Valid where rasterio's own mask of every band says so and the values are numbers."""
    with rasterio.open(path) as dataset:
        return (dataset.read_masks(indexes) > 0).all(axis=0) & np.isfinite(dataset.read(indexes)).all(
            axis=0
        )


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "int32", "float32", "float64"])
def test_values_are_those_that_rasterio_reads(
    make_raster: MakeRaster, tmp_path: Path, dtype: str
) -> None:
    stored = numbers(dtype)
    pixels, valid = read_all(make_raster(tmp_path / "scene.tif", stored, names=THREE))
    assert pixels.dtype == np.float32
    np.testing.assert_array_equal(pixels, stored.astype(np.float32))
    assert valid.all()


def test_bands_come_in_the_models_order(make_raster: MakeRaster, tmp_path: Path) -> None:
    stored = numbers("uint16")
    path = make_raster(tmp_path / "scene.tif", stored, names=["red", "blue", "green"])
    np.testing.assert_array_equal(read_all(path)[0], stored[[1, 2, 0]])
    np.testing.assert_array_equal(read_all(path, select=["3", "1", "2"])[0], stored[[2, 0, 1]])


def test_the_files_own_scale_and_offset_come_first_then_the_users(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint16")
    scales, offsets = (2e-5, 1e-4, 1.0), (-0.1, 0.0, 5.0)
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE, scales=scales, offsets=offsets)
    columns = (np.array(scales).reshape(3, 1, 1), np.array(offsets).reshape(3, 1, 1))
    in_units = stored * columns[0] + columns[1]
    # One rounding to float32 in each factor: seven digits.
    np.testing.assert_allclose(read_all(path)[0], in_units, rtol=1e-6, atol=1e-6)
    both = read_all(path, scale=3.0, offset=-0.5)[0]
    np.testing.assert_allclose(both, in_units * 3 - 0.5, rtol=1e-6, atol=1e-5)


def test_scale_and_offset_may_be_one_a_band_in_the_models_order(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint16")
    path = make_raster(
        tmp_path / "scene.tif",
        stored,
        names=["red", "blue", "green"],
        scales=(2.0, 3.0, 4.0),
        offsets=(0.0, 1.0, 0.0),
    )
    # Blue, green, red: in the file the second, the third, the first.
    found = read_all(path, scale=[0.1, 1, 10], offset=(0, 5, -7))[0]
    needed = [(stored[1] * 3.0 + 1) * 0.1, stored[2] * 4.0 + 5, stored[0] * 2.0 * 10 - 7]
    np.testing.assert_allclose(found, needed, rtol=1e-6)


@pytest.mark.parametrize(
    ("scale", "offset", "bare"),
    [(1.0, 0.0, True), ([1, 1, 1], [0, 0, 0], True), ([1, 2, 1], 0.0, False), (1.0, [0, 0, 1], False)],
)
def test_numbers_are_bare_while_no_band_has_a_scale(
    make_raster: MakeRaster, tmp_path: Path, scale: Any, offset: Any, bare: bool
) -> None:
    path = make_raster(tmp_path / "scene.tif", numbers("uint16"), names=THREE)
    with open_raster(path, band_names=THREE, scale=scale, offset=offset) as raster:
        assert raster.is_bare is bare


def test_the_real_scene_is_read_in_reflectance(real_scene: Path) -> None:
    six = ["blue", "green", "red", "nir", "swir16", "swir22"]
    pixels, valid = read_all(real_scene, six)
    with rasterio.open(real_scene) as dataset:
        judge = dataset.read() * np.reshape(dataset.scales, (6, 1, 1))
        judge += np.reshape(dataset.offsets, (6, 1, 1))
    np.testing.assert_allclose(pixels, judge, atol=1e-6)
    assert valid.all()
    assert -0.1 < np.median(pixels) < 1


@pytest.mark.parametrize(
    ("dtype", "nodata"),
    [("uint8", 0), ("int16", -9999), ("uint16", 65535), ("float32", -3.4e38), ("float32", np.nan)],
)
def test_a_pixel_without_data_in_one_band_is_not_valid(
    make_raster: MakeRaster, tmp_path: Path, dtype: str, nodata: float
) -> None:
    stored = np.clip(numbers(dtype), 1, 200)
    stored[0, :5], stored[2, 10, 20:] = nodata, nodata
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE, nodata=nodata)
    valid = read_all(path)[1]
    np.testing.assert_array_equal(valid, by_rasterio(path, [1, 2, 3]))
    assert not valid[:5].any()
    assert valid[10, :20].all()
    # A band that the model does not need has no say.
    assert read_all(path, ["green"])[1].all()


def test_nan_and_infinity_are_not_valid_without_any_tag(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("float32")
    stored[0, 3, 4], stored[1, 5, 6], stored[2, 7, 8] = np.nan, np.inf, -np.inf
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE)
    np.testing.assert_array_equal(read_all(path)[1], by_rasterio(path, [1, 2, 3]))
    assert (~read_all(path)[1]).sum() == 3


def test_zero_is_data_unless_the_file_says_otherwise(make_raster: MakeRaster, tmp_path: Path) -> None:
    path = make_raster(tmp_path / "scene.tif", np.zeros((3, 9, 9), np.uint16), names=THREE)
    assert read_all(path)[1].all()


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_of_the_whole_dataset_is_respected(
    make_raster: MakeRaster, tmp_path: Path, internal: bool
) -> None:
    mask = np.random.default_rng(1).random((40, 50)) > 0.4
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        path = make_raster(tmp_path / "scene.tif", numbers("uint16"), names=THREE, mask=mask)
    assert (tmp_path / "scene.tif.msk").exists() is not internal
    np.testing.assert_array_equal(read_all(path)[1], mask)
    np.testing.assert_array_equal(by_rasterio(path, [1, 2, 3]), mask)


def with_alpha(path: Path, name: str | None) -> None:
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [ColorInterp.undefined] * 3 + [ColorInterp.alpha]
        if name:
            dataset.set_band_description(4, name)


def test_an_alpha_band_says_what_is_valid_and_is_no_band(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint8", (4, 40, 50))
    stored[3] = np.random.default_rng(1).integers(0, 3, (40, 50)) * 127
    path = make_raster(tmp_path / "scene.tif", stored, names=[])
    with_alpha(path, None)
    with open_raster(path, band_names=THREE) as raster:
        assert raster.indexes == [1, 2, 3]
        stripe = raster.read(Window(0, 0, 50, 40))
    np.testing.assert_array_equal(stripe.valid, stored[3] > 0)
    np.testing.assert_array_equal(stripe.valid, by_rasterio(path, [1, 2, 3]))


def test_a_near_infrared_band_that_gdal_took_for_alpha_is_data(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint8", (4, 40, 50))
    stored[3, :20] = 0
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE)
    with_alpha(path, "nir")
    pixels, valid = read_all(path, [*THREE, "nir"])
    np.testing.assert_array_equal(pixels, stored)
    assert valid.all()


def test_an_unnamed_band_taken_for_alpha_is_spoken_of_and_can_be_asked_for(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint8", (4, 40, 50))
    stored[3, :20] = 0
    path = make_raster(tmp_path / "scene.tif", stored, names=[])
    with_alpha(path, None)
    with pytest.raises(BandError, match=r"scene\.tif without its alpha band 4 has 3 bands"):
        read_all(path, [*THREE, "nir"])
    pixels, valid = read_all(path, [*THREE, "nir"], select=["1", "2", "3", "4"])
    np.testing.assert_array_equal(pixels, stored)
    assert valid.all()


def virtual(path: Path, bands: list[str], size: tuple[int, int] = (50, 40)) -> Path:
    body = "".join(bands)
    path.write_text(
        f'<VRTDataset rasterXSize="{size[0]}" rasterYSize="{size[1]}"><SRS>EPSG:32616</SRS>'
        f"<GeoTransform>0,10,0,0,0,-10</GeoTransform>{body}</VRTDataset>"
    )
    return path


def virtual_band(source: Path, kind: str, name: str, more: str = "") -> str:
    return (
        f'<VRTRasterBand dataType="{kind}"><Description>{name}</Description>{more}<SimpleSource>'
        f"<SourceFilename>{source}</SourceFilename><SourceBand>1</SourceBand>"
        f"</SimpleSource></VRTRasterBand>"
    )


def test_bands_of_several_files_types_scales_and_nodata_values_are_one_raster(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    kinds = {
        "blue": ("uint16", "UInt16", 7),
        "green": ("float32", "Float32", -1),
        "red": ("int16", "Int16", 9),
    }
    stored, bands = {}, []
    for place, (name, (dtype, kind, nodata)) in enumerate(kinds.items()):
        stored[name] = numbers(dtype, (1, 40, 50))
        stored[name][0, place] = nodata
        source = make_raster(tmp_path / f"{name}.tif", stored[name], names=[])
        more = f"<NoDataValue>{nodata}</NoDataValue><Scale>{place + 1}</Scale>"
        bands.append(virtual_band(source, kind, name, more))
    path = virtual(tmp_path / "stack.vrt", bands)
    pixels, valid = read_all(path)
    for place, name in enumerate(THREE):
        np.testing.assert_allclose(
            pixels[place], stored[name][0].astype(np.float64) * (place + 1), rtol=1e-6
        )
        assert not valid[place].any()
    judge = np.all([stored[name][0] != kinds[name][2] for name in THREE], axis=0)
    np.testing.assert_array_equal(valid, judge)


def test_a_file_that_a_vrt_misses_is_told_to_every_thread(tmp_path: Path) -> None:
    path = virtual(tmp_path / "a.vrt", [virtual_band(tmp_path / "gone.tif", "Byte", "blue")])

    def read(col: int) -> bool:
        try:
            raster.read(Window(col, 0, 8, 8))
        except SourceError:
            return False
        return True

    with open_raster(path, band_names=["blue"]) as raster, ThreadPoolExecutor(2) as threads:
        assert not any(threads.map(read, [*range(40)] * 5))


def test_an_alpha_band_of_another_type_is_respected(make_raster: MakeRaster, tmp_path: Path) -> None:
    stored = numbers("uint16", (1, 40, 50))
    pixels = make_raster(tmp_path / "pixels.tif", stored, names=[])
    shown = np.random.default_rng(1).integers(0, 2, (1, 40, 50)).astype(np.uint8) * 255
    alpha = make_raster(tmp_path / "alpha.tif", shown, names=[])
    bands = [virtual_band(pixels, "UInt16", name) for name in THREE]
    bands.append(virtual_band(alpha, "Byte", "", "<ColorInterp>Alpha</ColorInterp>"))
    found, valid = read_all(virtual(tmp_path / "stack.vrt", bands))
    np.testing.assert_array_equal(found, np.repeat(stored, 3, axis=0))
    np.testing.assert_array_equal(valid, shown[0] > 0)


def test_a_mask_that_one_band_has_for_itself_is_respected(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    pixels = make_raster(tmp_path / "pixels.tif", numbers("uint16", (1, 40, 50)), names=[])
    shown = np.random.default_rng(1).integers(0, 2, (1, 40, 50)).astype(np.uint8) * 255
    mask = make_raster(tmp_path / "mask.tif", shown, names=[])
    band = virtual_band(
        pixels, "UInt16", "blue", f"<MaskBand>{virtual_band(mask, 'Byte', '')}</MaskBand>"
    )
    path = virtual(tmp_path / "masked.vrt", [band, virtual_band(pixels, "UInt16", "green")])
    valid = read_all(path, ["blue", "green"])[1]
    np.testing.assert_array_equal(valid, by_rasterio(path, [1, 2]))
    np.testing.assert_array_equal(valid, shown[0] > 0)


@pytest.mark.parametrize(
    "layout",
    [
        {"tiled": True, "blockxsize": 128, "blockysize": 128},
        {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "deflate"},
        {"blockysize": 7, "interleave": "pixel"},
        {"blockysize": 1},
        {"blockysize": 700},
    ],
)
def test_stripes_are_whole_blocks_and_cover_each_row_once(
    make_raster: MakeRaster, tmp_path: Path, layout: dict[str, Any]
) -> None:
    stored = numbers("uint16", (3, 700, 60))
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE, **layout)
    with open_raster(path, band_names=THREE) as raster:
        windows = list(raster.stripes())
        parts = [raster.read(window) for window in windows]
        assert all(window.row_off % raster.layers[0].block_rows == 0 for window in windows)
        assert all(part.stored.dtype == np.uint16 for part in parts)
    assert [part.row for part in parts] == [window.row_off for window in windows]
    np.testing.assert_array_equal(np.concatenate([part.stored for part in parts], axis=1), stored)


def test_many_threads_read_through_handles_of_their_own(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = numbers("uint16", (3, 512, 40))
    path = make_raster(tmp_path / "scene.tif", stored, names=THREE, blockysize=8)
    with open_raster(path, band_names=THREE) as raster:
        together = threading.Barrier(4)

        def read(window: Window) -> NDArray[Any]:
            together.wait(timeout=20)
            return raster.read(window).stored

        windows = [Window(0, row, 40, 8) for row in range(0, 512, 8)]
        with ThreadPoolExecutor(4) as pool:
            parts = list(pool.map(read, windows))
        assert len(raster._handles) == 4
    assert raster._handles == []
    np.testing.assert_array_equal(np.concatenate(parts, axis=1), stored)


def test_a_scene_without_crs_is_opened_with_a_note_of_ours_and_no_warning_of_rasterio(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    path = make_raster(
        tmp_path / "bare.tif", numbers("uint8"), names=THREE, crs=None, transform=Affine.identity()
    )
    with open_raster(path, band_names=THREE) as raster:
        raster.read(Window(0, 0, 5, 5))
        assert raster.crs is None
        assert raster.notes == [
            "bare.tif has no CRS: the map will have none either, and no areas in square metres."
        ]


def test_what_is_no_raster_is_told_apart(make_raster: MakeRaster, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"gone\.tif does not exist"):
        read_all(tmp_path / "gone.tif")
    text = tmp_path / "text.tif"
    text.write_text("not a raster")
    with pytest.raises(SourceError, match=r"text\.tif is not a raster that GDAL .* can open"):
        read_all(text)
    radar = make_raster(tmp_path / "radar.tif", np.ones((1, 9, 9), np.complex64), names=["blue"])
    with pytest.raises(SourceError, match="complex numbers"):
        read_all(radar, ["blue"])
    with pytest.raises(SourceError, match=r"NETCDF:gone\.nc:red is not a raster"):
        read_all(Path("NETCDF:gone.nc:red"))


def test_a_file_that_breaks_off_is_told_with_the_rows_that_are_missing(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    whole = make_raster(tmp_path / "whole.tif", numbers("uint16", (3, 600, 90)), names=THREE)
    path = tmp_path / "scene.tif"
    copy(whole, path, driver="COG", blocksize=128)  # which has its directory at the beginning
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with open_raster(path, band_names=THREE) as raster:
        raster.read(Window(0, 0, 90, 10))
        with pytest.raises(SourceError, match=r"rows 590 to 600 cannot be read .*truncated") as caught:
            raster.read(Window(0, 590, 90, 10))
    assert "\n" not in str(caught.value)


def opened(make_raster: MakeRaster, path: Path, pixels: NDArray[Any], **more: Any) -> Raster:
    with open_raster(make_raster(path, pixels, **more), band_names=["blue", "green"]) as raster:
        return raster


@pytest.mark.parametrize(
    ("dtype", "factor", "offset", "advice"),
    [
        ("uint16", 10_000, 0, "--scale 0.0001 (Sentinel-2"),
        ("int16", 10_000, 0, "--scale 0.0001 (Sentinel-2"),
        ("uint16", 1 / 2.75e-5, 0.2 / 2.75e-5, "--scale 2.75e-05 --offset -0.2 (Landsat Collection 2"),
        ("uint8", 255, 0, "--scale 0.00392157 (8-bit"),
        ("float32", 100, 0, "--scale 0.01 (percent"),
    ],
)
def test_values_outside_the_range_name_what_was_seen_and_the_flags_that_mend_it(
    make_raster: MakeRaster,
    make_spec: Callable[..., Any],
    tmp_path: Path,
    dtype: str,
    factor: float,
    offset: float,
    advice: str,
) -> None:
    reflectance = np.random.default_rng(0).uniform(0.02, 0.5, (2, 60, 60))
    stored = (reflectance * factor + offset).astype(dtype)
    raster = opened(make_raster, tmp_path / "scene.tif", stored)
    bands = make_spec(["blue", "green"], valid_range=(-0.05, 1.2)).bands
    with pytest.raises(RangeError, match=r"band (blue|green) holds values from .* to 1\.2") as caught:
        check_range(raster, bands)
    assert advice in str(caught.value)
    flags = dict(re.findall(r"--(\w+) (\S+)", advice))
    with open_raster(
        tmp_path / "scene.tif",
        band_names=["blue", "green"],
        scale=float(flags["scale"]),
        offset=float(flags.get("offset", 0)),
    ) as mended:
        check_range(mended, bands)


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("LC08_L1TP_021039_20130416_01_T1.tif", r"--scale 2e-05 --offset -0\.1 \(Landsat Level 1"),
        ("scene.tif", r"--scale \S+ --offset \S+ \(Landsat"),
    ],
)
def test_landsat_s_numbers_are_not_taken_for_sentinel_2_s_which_would_be_bright_cloud(
    make_raster: MakeRaster, make_spec: Callable[..., Any], tmp_path: Path, name: str, advice: str
) -> None:
    reflectance = np.random.default_rng(0).uniform(0.05, 0.2, (2, 60, 60))
    raster = opened(make_raster, tmp_path / name, ((reflectance + 0.1) / 2e-5).astype(np.uint16))
    bands = make_spec(["blue", "green"], valid_range=(-0.1, 1.6)).bands
    with pytest.raises(RangeError, match=advice):
        check_range(raster, bands)


@pytest.mark.parametrize(
    ("tags", "found"),
    [({"scales": (1, np.nan)}, "a scale of nan"), ({"offsets": (0, np.inf)}, "an offset of inf")],
)
def test_tags_that_leave_nothing_of_the_pixels_are_refused(
    make_raster: MakeRaster, tmp_path: Path, tags: dict[str, Any], found: str
) -> None:
    with pytest.raises(SourceError, match=rf"scene.tif: {found}, .* Mend the tags \(gdal_edit.py\)"):
        opened(make_raster, tmp_path / "scene.tif", np.ones((2, 48, 48), np.float32), **tags)


def test_half_the_pixels_may_lie_outside_the_range_and_nodata_has_no_say(
    make_raster: MakeRaster, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    pixels = np.full((2, 48, 48), 0.3, np.float32)
    pixels[:, :24] = 50.0
    bands = make_spec(["blue", "green"]).bands
    check_range(opened(make_raster, tmp_path / "half.tif", pixels), bands)
    pixels[:, :25] = 50.0
    with pytest.raises(RangeError):
        check_range(opened(make_raster, tmp_path / "more.tif", pixels), bands)
    check_range(opened(make_raster, tmp_path / "nodata.tif", pixels, nodata=50), bands)
    pixels[:] = 50.0
    check_range(opened(make_raster, tmp_path / "empty.tif", pixels, nodata=50), bands)


def test_no_scale_is_guessed_where_none_would_help(
    make_raster: MakeRaster, make_spec: Callable[..., Any], tmp_path: Path
) -> None:
    raster = opened(make_raster, tmp_path / "scene.tif", np.full((2, 48, 48), -1e6, np.float32))
    with pytest.raises(RangeError, match="with --scale and --offset"):
        check_range(raster, make_spec(["blue", "green"]).bands)


def test_metres_a_pixel_follow_from_its_area_in_any_projected_crs() -> None:
    utm, feet = CRS.from_epsg(32616), CRS.from_epsg(2263)
    assert ground_sample_distance_m(utm, Affine.scale(30, -30)) == pytest.approx(30)
    assert ground_sample_distance_m(utm, Affine(24.0, 18.0, 0.0, 18.0, -24.0, 0.0)) == pytest.approx(30)
    assert ground_sample_distance_m(feet, Affine.scale(10, 10)) == pytest.approx(3.048, rel=1e-5)
    assert ground_sample_distance_m(CRS.from_epsg(4326), Affine.scale(1e-4, -1e-4)) is None
    assert ground_sample_distance_m(None, Affine.identity()) is None
