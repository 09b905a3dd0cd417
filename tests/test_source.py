from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy import PredictOptions, predict
from geodeploy.errors import BandError, SourceError
from geodeploy.predict import map_paths
from geodeploy.raster import open_raster
from geodeploy.source import band_in_name, stem

MakeRaster = Callable[..., Path]
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]


def read_all(path: Path, names: list[str], **more: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    with open_raster(path, band_names=names, **more) as raster:
        return raster.read_pixels(Window(0, 0, raster.width, raster.height))


def one_band_files(make_raster: MakeRaster, scene: Path, folder: Path, name: str) -> Path:
    """The bands of ``scene``, each in a file of its own; ``name`` says how they are called."""
    folder.mkdir()
    with rasterio.open(scene) as dataset:
        for place, band in enumerate(SIX):
            about = {"crs": dataset.crs, "transform": dataset.transform, "names": []}
            scale = {"scales": dataset.scales[:1], "offsets": dataset.offsets[:1]}
            stored = dataset.read([place + 1])
            make_raster(folder / name.format(band=band, number=place + 2), stored, **about, **scale)
    return folder


@pytest.mark.parametrize(
    ("file", "band"),
    [
        ("LC08_L2SP_021039_20130422_20200912_02_T1_SR_B4", "SR_B4"),
        ("LC80330332013216LGN00_B10", "B10"),
        ("T33UUU_20200101T101031_B02_10m", "B02"),
        ("T33UUU_20200101T101031_B8A", "B8A"),
        ("HLS.L30.T33UUU.2020123T101031.v2.0.B05", "B05"),
        ("scene_red_edge_1", "red_edge_1"),
        ("scene-swir16", "swir16"),
        ("nir", "nir"),
        ("LC08_L1TP_QA_PIXEL", "LC08_L1TP_QA_PIXEL"),
        ("elevation", "elevation"),
    ],
)
def test_the_band_is_read_from_the_name_of_its_file(file: str, band: str) -> None:
    assert band_in_name(file) == band


def test_a_folder_of_one_band_files_is_the_same_scene_as_the_one_file(
    make_raster: MakeRaster, real_scene: Path, tmp_path: Path
) -> None:
    folder = one_band_files(make_raster, real_scene, tmp_path / "LC08_x", "LC08_L1TP_B{number}.TIF")
    (folder / "LC08_MTL.txt.aux.xml").write_text("")
    (folder / "thumbs.db").write_text("")
    for path in (folder, folder / "*_B?.TIF"):
        pixels, valid = read_all(path, SIX)
        judge, judge_valid = read_all(real_scene, SIX)
        np.testing.assert_array_equal(pixels, judge)
        np.testing.assert_array_equal(valid, judge_valid)


def test_the_map_of_a_folder_has_the_bytes_of_the_map_of_the_one_file(
    make_raster: MakeRaster, real_scene: Path, pointwise: Any, tmp_path: Path
) -> None:
    folder = one_band_files(make_raster, real_scene, tmp_path / "parts", "{number}_{band}.tif")
    options = PredictOptions(bands=tuple(SIX))
    whole = PredictOptions(bands=tuple("123456"))
    predict(folder, pointwise.path, tmp_path / "parts.tif", options=options)
    predict(real_scene, pointwise.path, tmp_path / "whole.tif", options=whole)
    assert (tmp_path / "parts.tif").read_bytes() == (tmp_path / "whole.tif").read_bytes()


def test_types_nodata_scales_and_masks_of_each_file_are_its_own(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    blue = random.integers(1, 900, (1, 40, 50)).astype(np.int16)
    green = random.random((1, 40, 50)).astype(np.float32)
    red = random.integers(0, 256, (1, 40, 50)).astype(np.uint8)
    blue[0, 3, 4], green[0, 5, 6] = -9999, np.nan
    mask = np.ones((40, 50), bool)
    mask[7, 8] = False
    make_raster(tmp_path / "blue.tif", blue, names=[], nodata=-9999, scales=[0.01])
    make_raster(tmp_path / "green.tif", green, names=[])
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        make_raster(tmp_path / "red.tif", red, names=[], mask=mask, offsets=[3.0])
    assert (tmp_path / "red.tif.msk").exists()
    pixels, valid = read_all(tmp_path, ["red", "blue", "green"])
    assert {tuple(place) for place in np.argwhere(~valid)} == {(3, 4), (5, 6), (7, 8)}
    np.testing.assert_allclose(pixels[0], red[0] + 3.0)
    np.testing.assert_allclose(pixels[1], blue[0] * 0.01, rtol=1e-6)
    np.testing.assert_array_equal(pixels[2][valid], green[0][valid])


def test_files_of_several_bands_are_taken_by_their_descriptions(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    stored = np.arange(4 * 9 * 8, dtype=np.uint16).reshape(4, 9, 8)
    make_raster(tmp_path / "a.tif", stored[:2], names=["B02", "B08"])
    make_raster(tmp_path / "b.tif", stored[2:], names=["B8A", "B11"])
    np.testing.assert_array_equal(
        read_all(tmp_path, ["swir16", "nir08", "nir", "blue"])[0], stored[[3, 2, 1, 0]]
    )


def test_coarser_bands_are_brought_to_the_grid_of_the_finest_that_the_model_needs(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    fine, coarse = Affine(10, 0, 4000, 0, -10, 9000), Affine(20, 0, 4000, 0, -20, 9000)
    slope = np.add.outer(np.arange(30), np.arange(20)).astype(np.float32)[np.newaxis]
    make_raster(tmp_path / "red.tif", np.zeros((1, 60, 40), np.uint16), names=[], transform=fine)
    make_raster(tmp_path / "nir.tif", slope, names=[], transform=coarse)
    pixels, valid = read_all(tmp_path, ["red", "nir"])
    assert pixels.shape == (2, 60, 40)
    assert valid.all()
    # Linear interpolation of a plane is the plane: half a step a pixel, a quarter in from the corner.
    plane = np.add.outer((np.arange(60) - 0.5) / 2, (np.arange(40) - 0.5) / 2)
    np.testing.assert_allclose(pixels[1][1:-1, 1:-1], plane[1:-1, 1:-1], atol=1e-5)
    # Alone it is on a grid of its own, as it is.
    np.testing.assert_array_equal(read_all(tmp_path, ["nir"])[0], slope)


def test_where_a_coarser_band_does_not_reach_there_is_no_data(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    fine, coarse = Affine(10, 0, 4000, 0, -10, 9000), Affine(20, 0, 4010, 0, -20, 9010)
    make_raster(tmp_path / "red.tif", np.ones((1, 60, 40), np.uint16), names=[], transform=fine)
    make_raster(tmp_path / "nir.tif", np.ones((1, 29, 20), np.uint8), names=[], transform=coarse)
    expected = np.ones((60, 40), bool)
    expected[:, 0] = expected[57:] = False
    np.testing.assert_array_equal(read_all(tmp_path, ["red", "nir"])[1], expected)


def test_the_stripes_of_mixed_sizes_make_the_same_scene_as_one_read(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    random = np.random.default_rng(0)
    sizes = {"red": 10.0, "nir": 20.0, "swir16": 60.0}
    for name, size in sizes.items():
        stored = random.integers(0, 99, (1, int(9000 / size), int(1200 / size))).astype(np.uint16)
        make_raster(
            tmp_path / f"{name}.tif",
            stored,
            names=[],
            nodata=7,
            transform=Affine(size, 0, 4000, 0, -size, 9000),
            tiled=True,
            blockxsize=128,
            blockysize=128,
        )
    with open_raster(tmp_path, band_names=list(sizes)) as raster:
        whole, valid = raster.read_pixels(Window(0, 0, raster.width, raster.height))
        windows = list(raster.stripes())
        assert len(windows) == 4
        parts = [raster.read_pixels(window) for window in windows]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts], axis=1), whole)
    np.testing.assert_array_equal(np.concatenate([part for _, part in parts]), valid)


def test_sentinel_2_bands_of_10_and_20_metres_make_one_scene(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    coarse = Affine(20, 0, 5e5, 0, -20, 4e6)
    make_raster(
        tmp_path / "T18_B04_10m.jp2", np.full((1, 60, 64), 500, np.uint16), names=[],
        driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES",
    )  # fmt: skip
    make_raster(
        tmp_path / "T18_B8A_20m.jp2", np.full((1, 30, 32), 900, np.uint16), names=[],
        driver="JP2OpenJPEG", QUALITY="100", REVERSIBLE="YES", transform=coarse,
    )  # fmt: skip
    with rasterio.open(tmp_path / "T18_B04_10m.jp2", "r+") as dataset:
        dataset.transform = Affine(10, 0, 5e5, 0, -10, 4e6)
    pixels, valid = read_all(tmp_path, ["red", "nir08"])
    assert (pixels[0] == 500).all()
    assert (pixels[1] == 900).all()
    assert valid.all()


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        (
            {"crs": CRS.from_epsg(32617)},
            r"nir\.tif is in EPSG:32617, other bands in EPSG:32616.*-t_srs",
        ),
        ({"crs": None}, r"nir\.tif is in no CRS"),
        ({"transform": Affine(30, 0, 5e5, 0, 30, 4e6)}, "turned or flipped"),
        ({"transform": Affine(30, 3, 5e5, 3, -30, 4e6)}, "turned or flipped"),
        ({"transform": Affine(30, 0, 9e5, 0, -30, 4e6)}, "shows another place"),
    ],
)
def test_files_that_do_not_fit_together_are_refused_in_one_line(
    make_raster: MakeRaster, tmp_path: Path, other: dict[str, Any], complaint: str
) -> None:
    grid = {"crs": CRS.from_epsg(32616), "transform": Affine(10, 0, 5e5, 0, -10, 4e6)}
    pixels = np.ones((1, 40, 40), np.uint8)
    make_raster(tmp_path / "red.tif", pixels, names=[], **grid)
    make_raster(tmp_path / "nir.tif", pixels, names=[], **(grid | other))
    with pytest.raises(SourceError, match=complaint) as caught:
        read_all(tmp_path, ["red", "nir"])
    assert "\n" not in str(caught.value)


def test_files_without_georeference_fit_together_only_if_they_have_one_size(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    bare: dict[str, Any] = {"crs": None, "transform": Affine.identity(), "names": []}
    make_raster(tmp_path / "red.tif", np.ones((1, 9, 9), np.uint8), **bare)
    make_raster(tmp_path / "nir.tif", np.ones((1, 9, 9), np.uint8), **bare)
    assert read_all(tmp_path, ["red", "nir"])[0].shape == (2, 9, 9)
    make_raster(tmp_path / "nir.tif", np.ones((1, 9, 8), np.uint8), **bare)
    with pytest.raises(SourceError, match="9 x 8 pixels, another band 9 x 9, and neither has a CRS"):
        read_all(tmp_path, ["red", "nir"])


def test_what_holds_no_scene_is_refused_in_one_line(make_raster: MakeRaster, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is a folder without a raster in it"):
        read_all(tmp_path, ["red"])
    with pytest.raises(SourceError, match=r"No file matches .*\*\.tif"):
        read_all(tmp_path / "*.tif", ["red"])
    make_raster(tmp_path / "a_red.tif", np.ones((1, 9, 9), np.uint8), names=[])
    make_raster(tmp_path / "b_red.tif", np.ones((1, 9, 9), np.uint8), names=[])
    with pytest.raises(BandError, match=r"has red more than once \(bands 1, 2"):
        read_all(tmp_path, ["red"])
    with pytest.raises(BandError, match="among which nir is not found"):
        read_all(tmp_path, ["nir"])


def test_a_file_of_several_that_breaks_off_is_named(make_raster: MakeRaster, tmp_path: Path) -> None:
    for name in ("red", "nir"):
        make_raster(tmp_path / f"{name}.tif", np.ones((1, 900, 900), np.uint8), names=[])
    content = (tmp_path / "nir.tif").read_bytes()
    (tmp_path / "nir.tif").write_bytes(content[: len(content) // 2])
    with (
        open_raster(tmp_path, band_names=["red", "nir"]) as raster,
        pytest.raises(SourceError, match=r"nir\.tif: rows 800 to 900 cannot be read"),
    ):
        raster.read(Window(0, 800, 900, 100))


def test_maps_are_named_after_files_folders_and_the_folder_of_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "scene.v2").mkdir()
    assert stem(Path("a/scene.tif")) == "scene"
    assert stem(tmp_path / "scene.v2" / "*_B?.tif") == "scene.v2"
    assert stem(tmp_path / "scene.v2") == "scene.v2"
    assert stem(Path("https:/host/scene.tif?key=a.b")) == "scene"
    assert map_paths([tmp_path / "scene.v2"], None) == [Path("scene.v2_map.tif")]
