import json
import math
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.errors import SourceError
from geodeploy.raster import open_raster
from geodeploy.source import find_source

MakeRaster = Callable[..., Path]
SUN = 38.25
Groups = dict[str, dict[str, str | float]]


def level_1(name: str, satellite: str, bands: list[str]) -> Groups:
    """The groups of a Collection 2 Level 1 file that tell files and values."""
    return {
        "PRODUCT_CONTENTS": {
            "PROCESSING_LEVEL": "L1TP",
            **{f"FILE_NAME_BAND_{band}": f"{name}_B{band}.TIF" for band in bands},
            "FILE_NAME_QUALITY_L1_PIXEL": f"{name}_QA_PIXEL.TIF",
        },
        "IMAGE_ATTRIBUTES": {"SPACECRAFT_ID": satellite, "SUN_ELEVATION": SUN, "SUN_AZIMUTH": 151.2},
        "LEVEL1_RADIOMETRIC_RESCALING": {
            **{f"RADIANCE_MULT_BAND_{band}": 0.0125 for band in bands},
            **{f"REFLECTANCE_MULT_BAND_{band}": 2e-5 for band in bands if band != "10"},
            **{f"REFLECTANCE_ADD_BAND_{band}": -0.1 for band in bands if band != "10"},
        },
    }


def level_2(name: str) -> Groups:
    """The groups of a Collection 2 Level 2 file, with those of the Level 1 it was made from."""
    bands = [str(number) for number in range(1, 8)]
    first = level_1(name.replace("L2SP", "L1TP"), "LANDSAT_8", bands)
    return {
        "PRODUCT_CONTENTS": {
            "PROCESSING_LEVEL": "L2SP",
            **{f"FILE_NAME_BAND_{band}": f"{name}_SR_B{band}.TIF" for band in bands},
            "FILE_NAME_BAND_ST_B10": f"{name}_ST_B10.TIF",
        },
        "IMAGE_ATTRIBUTES": first["IMAGE_ATTRIBUTES"],
        "LEVEL2_SURFACE_REFLECTANCE_PARAMETERS": {
            **{f"REFLECTANCE_MULT_BAND_{band}": 2.75e-05 for band in bands},
            **{f"REFLECTANCE_ADD_BAND_{band}": -0.2 for band in bands},
        },
        "LEVEL2_SURFACE_TEMPERATURE_PARAMETERS": {
            "TEMPERATURE_MULT_BAND_ST_B10": 0.00341802,
            "TEMPERATURE_ADD_BAND_ST_B10": 149.0,
        },
        "LEVEL1_PROCESSING_RECORD": dict(first["PRODUCT_CONTENTS"]),
        "LEVEL1_RADIOMETRIC_RESCALING": first["LEVEL1_RADIOMETRIC_RESCALING"],
    }


def collection_1(name: str) -> Groups:
    """What the same was called before Collection 2."""
    now = level_1(name, "LANDSAT_5", ["1", "2", "3", "4", "5", "7"])
    return {
        "METADATA_FILE_INFO": {"COLLECTION_NUMBER": "01"},
        "PRODUCT_METADATA": {**now["PRODUCT_CONTENTS"], "SPACECRAFT_ID": "LANDSAT_5"},
        "IMAGE_ATTRIBUTES": {"SUN_ELEVATION": SUN},
        "RADIOMETRIC_RESCALING": now["LEVEL1_RADIOMETRIC_RESCALING"],
    }


def as_odl(root: str, groups: Groups) -> str:
    lines = [f"GROUP = {root}"]
    for name, group in groups.items():
        lines.append(f"  GROUP = {name}")
        for key, value in group.items():
            lines.append(f"    {key} = " + (f'"{value}"' if isinstance(value, str) else f"{value}"))
        lines.append(f"  END_GROUP = {name}")
    return "\n".join([*lines, f"END_GROUP = {root}", "END", ""])


def build_scene(
    make_raster: MakeRaster, folder: Path, groups: Groups, *, kind: str = "txt", size: float = 30.0
) -> dict[str, NDArray[np.uint16]]:
    """The folder of a scene as the USGS delivers it; what each file holds, by its name."""
    folder.mkdir(parents=True)
    contents = groups.get("PRODUCT_CONTENTS") or groups["PRODUCT_METADATA"]
    stored = {}
    for seed, (key, file) in enumerate(contents.items()):
        if not key.startswith("FILE_NAME_BAND"):
            continue
        pixel = size / 2 if str(file).endswith("_B8.TIF") else size
        side = int(1800 / pixel)
        values = np.random.default_rng(seed).integers(7000, 30000, (1, side, side)).astype(np.uint16)
        values[0, : side // 6] = 0
        grid = Affine(pixel, 0, 3e5, 0, -pixel, 4e6)
        make_raster(folder / str(file), values, names=[], transform=grid)
        stored[str(file).removesuffix(".TIF").partition("T1_")[2]] = values[0]
    root = "LANDSAT_METADATA_FILE" if "PRODUCT_CONTENTS" in groups else "L1_METADATA_FILE"
    text = as_odl(root, groups) if kind == "txt" else json.dumps({root: groups})
    (folder / f"{folder.name}_MTL.{kind}").write_text(text)
    (folder / f"{folder.name}_ANG.txt").write_text("")
    return stored


def read_all(path: Path, names: list[str], **more: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    with open_raster(path, band_names=names, **more) as raster:
        return raster.read_pixels(Window(0, 0, raster.width, raster.height))


L2 = "LC08_L2SP_021039_20130422_20200912_02_T1"
L1 = "LC09_L1TP_021039_20220422_20220912_02_T1"


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_level_2_is_read_in_surface_reflectance_and_kelvin(
    make_raster: MakeRaster, tmp_path: Path, kind: str
) -> None:
    stored = build_scene(make_raster, tmp_path / L2, level_2(L2), kind=kind)
    pixels, valid = read_all(tmp_path / L2, ["red", "nir08", "lwir11"])
    np.testing.assert_allclose(pixels[0], stored["SR_B4"] * 2.75e-5 - 0.2, atol=1e-6)
    np.testing.assert_allclose(pixels[1], stored["SR_B5"] * 2.75e-5 - 0.2, atol=1e-6)
    np.testing.assert_allclose(pixels[2], stored["ST_B10"] * 0.00341802 + 149, rtol=1e-6)
    np.testing.assert_array_equal(valid, stored["SR_B4"] > 0)


@pytest.mark.parametrize("kind", ["txt", "json"])
def test_level_1_is_read_in_reflectance_at_the_top_of_the_atmosphere(
    make_raster: MakeRaster, tmp_path: Path, kind: str
) -> None:
    groups = level_1(L1, "LANDSAT_9", [str(number) for number in range(1, 11)])
    stored = build_scene(make_raster, tmp_path / L1, groups, kind=kind)
    pixels, valid = read_all(tmp_path / L1, ["swir16"])
    judge = (stored["B6"] * 2e-5 - 0.1) / math.sin(math.radians(SUN))
    np.testing.assert_allclose(pixels[0], judge, atol=1e-6)
    np.testing.assert_array_equal(valid, stored["B6"] > 0)
    names = [asset.name for asset in find_source(tmp_path / L1).assets]
    assert "B10" not in names  # thermal: no factor makes reflectance of it


def test_the_panchromatic_band_sets_the_grid_only_where_the_model_needs_it(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    groups = level_1(L1, "LANDSAT_9", ["2", "3", "8"])
    stored = build_scene(make_raster, tmp_path / L1, groups)
    assert read_all(tmp_path / L1, ["blue", "green"])[0].shape == (2, 60, 60)
    pixels, valid = read_all(tmp_path / L1, ["blue", "pan"])
    assert pixels.shape == (2, 120, 120)
    judge = (stored["B8"] * 2e-5 - 0.1) / math.sin(math.radians(SUN))
    np.testing.assert_allclose(pixels[1], judge, atol=1e-6)
    np.testing.assert_array_equal(valid, stored["B8"] > 0)


def test_collection_1_and_the_bands_of_landsat_5_are_known(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    name = "LT05_L1TP_021039_20050422_20160912_01_T1"
    stored = build_scene(make_raster, tmp_path / name, collection_1(name))
    pixels, _ = read_all(tmp_path / name, ["blue", "nir08", "swir22"])
    for place, band in enumerate(("B1", "B4", "B7")):
        judge = (stored[band] * 2e-5 - 0.1) / math.sin(math.radians(SUN))
        np.testing.assert_allclose(pixels[place], judge, atol=1e-6)


def test_the_tar_and_the_metadata_file_are_the_same_scene(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    build_scene(make_raster, tmp_path / L2, level_2(L2))
    with tarfile.open(tmp_path / f"{L2}.tar", "w") as archive:
        for file in sorted((tmp_path / L2).iterdir()):
            archive.add(file, file.name)
    pixels, valid = read_all(tmp_path / L2, ["red", "swir22"])
    for path in (tmp_path / f"{L2}.tar", tmp_path / L2 / f"{L2}_MTL.txt"):
        again, valid_again = read_all(path, ["red", "swir22"])
        np.testing.assert_array_equal(again, pixels)
        np.testing.assert_array_equal(valid_again, valid)


def test_files_that_are_missing_are_bands_that_are_missing(
    make_raster: MakeRaster, tmp_path: Path
) -> None:
    build_scene(make_raster, tmp_path / L2, level_2(L2))
    for file in (tmp_path / L2).glob("*_SR_B[1235].TIF"):
        file.unlink()
    assert [asset.name for asset in find_source(tmp_path / L2).assets] == ["B4", "B6", "B7", "ST_B10"]
    for file in (tmp_path / L2).glob("*.TIF"):
        file.unlink()
    with pytest.raises(SourceError, match=r"holds none of the bands that .*_MTL\.txt names"):
        find_source(tmp_path / L2)


@pytest.mark.parametrize("sun", ["-3.5", "unknown", None])
def test_a_scene_without_sun_is_refused(
    make_raster: MakeRaster, tmp_path: Path, sun: str | None
) -> None:
    groups = level_1(L1, "LANDSAT_9", ["2"])
    del groups["IMAGE_ATTRIBUTES"]["SUN_ELEVATION"]
    if sun is not None:
        groups["IMAGE_ATTRIBUTES"]["SUN_ELEVATION"] = sun
    build_scene(make_raster, tmp_path / L1, groups)
    with pytest.raises(SourceError, match="gives no elevation of the sun above the horizon"):
        find_source(tmp_path / L1)


def test_metadata_that_cannot_be_read_are_refused(make_raster: MakeRaster, tmp_path: Path) -> None:
    build_scene(make_raster, tmp_path / L1, level_1(L1, "LANDSAT_9", ["2"]), kind="json")
    path = tmp_path / L1 / f"{L1}_MTL.json"
    path.write_text(path.read_text()[:300])
    with pytest.raises(SourceError, match=r"_MTL\.json is not the metadata of a Landsat scene"):
        find_source(tmp_path / L1)
