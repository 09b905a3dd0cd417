import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.windows import Window

from geodeploy.bands import match_bands
from geodeploy.errors import SourceError
from geodeploy.raster import open_raster
from geodeploy.source import find_source

BANDS = ["B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B10", "B11", "B12"]
SIZES = dict(zip(BANDS, [60, 10, 10, 10, 20, 20, 20, 10, 20, 60, 60, 20, 20], strict=True))
SIX = ["blue", "green", "red", "nir", "swir16", "swir22"]
SPECTRA = "".join(
    f'<Spectral_Information bandId="{number}" physicalBand="{band.replace("B0", "B")}"/>'
    for number, band in enumerate(BANDS)
)


def write_band(path: Path, size: int, seed: int) -> NDArray[np.uint16]:
    """A lossless JP2 of 2400 x 2400 m; without data in its upper left corner of 120 x 120 m."""
    side = 2400 // size
    stored = np.random.default_rng(seed).integers(1000, 5000, (side, side)).astype(np.uint16)
    stored[: 120 // size, : 120 // size] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="JP2OpenJPEG", width=side, height=side, count=1, dtype="uint16",
        crs="EPSG:32633", transform=Affine(size, 0, 399960, 0, -size, 5800020), QUALITY="100",
        REVERSIBLE="YES", BLOCKXSIZE="64", BLOCKYSIZE="64", RESOLUTIONS="1",
    ) as dataset:  # fmt: skip
        dataset.write(stored, 1)
    return stored


def metadata(level: str, offset: int | None) -> str:
    """As much of a product's metadata as tells its values, in its own structure."""
    product = {"L1C": "Level-1C", "L2A": "Level-2A"}[level]
    added = {"L1C": "RADIO", "L2A": "BOA"}[level]
    offsets = "".join(
        f'<{added}_ADD_OFFSET band_id="{number}">{offset}</{added}_ADD_OFFSET>'
        for number in range(13)
        if offset is not None
    )
    listed = {
        "L1C": f"<Radiometric_Offset_List>{offsets}</Radiometric_Offset_List>",
        "L2A": f"<BOA_ADD_OFFSET_VALUES_LIST>{offsets}</BOA_ADD_OFFSET_VALUES_LIST>",
    }[level]
    quantification = {
        "L1C": '<QUANTIFICATION_VALUE unit="none">10000</QUANTIFICATION_VALUE>',
        "L2A": '<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">10000'
        '</BOA_QUANTIFICATION_VALUE><AOT_QUANTIFICATION_VALUE unit="none">1000.0'
        "</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>",
    }[level]
    return (
        '<?xml version="1.0" encoding="UTF-8" standalone="no"?>\n'
        f'<n1:{product}_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/PSD/User_Product_'
        f'{product}.xsd"><n1:General_Info><Product_Info><PROCESSING_BASELINE>04.00'
        "</PROCESSING_BASELINE></Product_Info><Product_Image_Characteristics><Special_Values>"
        "<SPECIAL_VALUE_TEXT>NODATA</SPECIAL_VALUE_TEXT><SPECIAL_VALUE_INDEX>0</SPECIAL_VALUE_INDEX>"
        f"</Special_Values>{quantification}{listed if offset is not None else ''}"
        f"<Spectral_Information_List>{SPECTRA}</Spectral_Information_List>"
        f"</Product_Image_Characteristics></n1:General_Info></n1:{product}_User_Product>"
    )


def build_safe(
    folder: Path, level: str, offset: int | None
) -> tuple[Path, dict[str, NDArray[np.uint16]]]:
    """A product of level L1C or L2A, named as ESA does, and what its finest bands hold."""
    sense = "20220301T101031_N0400_R022_T33UUU_20220301T120501"
    safe = folder / f"S2A_MSI{level}_{sense}.SAFE"
    images = safe / "GRANULE" / f"{level}_T33UUU_A034956_20220301T101030" / "IMG_DATA"
    stored: dict[str, NDArray[np.uint16]] = {}
    for seed, (band, finest) in enumerate(SIZES.items()):
        if level == "L1C":
            stored[band] = write_band(images / f"T33UUU_20220301T101031_{band}.jp2", finest, seed)
        elif band != "B10":  # which sees nothing of the ground
            # As in the products, 8A takes the place of 8 from 20 m on.
            sizes = [10] if band == "B08" else [size for size in (10, 20, 60) if size >= finest]
            for size in sizes:
                file = images / f"R{size}m" / f"T33UUU_20220301T101031_{band}_{size}m.jp2"
                written = write_band(file, size, seed)
                stored.setdefault(band, written)
    write_band(images / "T33UUU_20220301T101031_TCI.jp2", 10, 99)
    (safe / f"MTD_MSI{level}.xml").write_text(metadata(level, offset))
    (safe / "GRANULE" / images.parent.name / "MTD_TL.xml").write_text("<tile/>")
    return safe, stored


@pytest.fixture(scope="module", params=["L1C", "L2A"])
def product(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, NDArray[np.uint16]]]:
    return build_safe(tmp_path_factory.mktemp("products"), request.param, -1000)


def read_all(path: Path, names: list[str], **more: Any) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    with open_raster(path, band_names=names, **more) as raster:
        return raster.read_pixels(Window(0, 0, raster.width, raster.height))


def zipped(safe: Path, folder: Path) -> Path:
    path = folder / f"{safe.name}.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(safe.rglob("*")):
            archive.write(file, f"{safe.name}/{file.relative_to(safe)}")
    return path


def test_a_product_is_read_in_reflectance_with_the_offset_of_its_processing_baseline(
    product: Any,
) -> None:
    safe, stored = product
    pixels, valid = read_all(safe, ["red", "nir"])
    for place, band in enumerate(("B04", "B08")):
        # Reflectance = (stored + offset) / quantification value.
        np.testing.assert_allclose(
            pixels[place], (stored[band].astype(float) - 1000) / 10000, atol=1e-6
        )
    np.testing.assert_array_equal(valid, stored["B04"] > 0)
    assert not valid[:12, :12].any()


def test_bands_of_20_metres_come_on_the_grid_of_those_of_10(product: Any) -> None:
    safe, stored = product
    pixels, valid = read_all(safe, ["nir", "swir16"])
    assert pixels.shape == (2, 240, 240)
    assert not valid[:12, :12].any()
    assert valid[12:].all()
    inside = np.s_[20:220, 20:220]
    block = pixels[1].reshape(120, 2, 120, 2).mean(axis=(1, 3))
    expected = (stored["B11"].astype(float) - 1000) / 10000
    around = np.pad(expected, 1, mode="edge")
    # Centres lie a quarter from that of the pixel: in the mean of two it weighs 3/4, neighbours 1/8.
    rows = 0.125 * around[:-2] + 0.75 * around[1:-1] + 0.125 * around[2:]
    judge = 0.125 * rows[:, :-2] + 0.75 * rows[:, 1:-1] + 0.125 * rows[:, 2:]
    np.testing.assert_allclose(block[inside], judge[inside], atol=1e-4)


def test_each_band_comes_from_where_its_pixels_are_smallest(product: Any) -> None:
    safe, stored = product
    for name, band in (("rededge071", "B05"), ("coastal", "B01"), ("nir09", "B09"), ("nir08", "B8A")):
        pixels, _ = read_all(safe, [name])
        np.testing.assert_allclose(pixels[0], (stored[band].astype(float) - 1000) / 10000, atol=1e-6)


def test_the_zip_and_the_metadata_file_are_the_same_scene(product: Any, tmp_path: Path) -> None:
    safe, _ = product
    pixels, valid = read_all(safe, SIX)
    for other in (zipped(safe, tmp_path), next(safe.glob("MTD_*.xml"))):
        again, valid_again = read_all(other, SIX)
        np.testing.assert_array_equal(again, pixels)
        np.testing.assert_array_equal(valid_again, valid)


def test_products_before_the_offset_have_none(tmp_path: Path) -> None:
    safe, stored = build_safe(tmp_path, "L2A", None)
    np.testing.assert_allclose(read_all(safe, ["blue"])[0][0], stored["B02"] / 10000, atol=1e-6)


def test_the_offset_is_that_of_the_band_and_not_of_its_place(tmp_path: Path) -> None:
    safe, stored = build_safe(tmp_path, "L1C", 0)
    path = safe / "MTD_MSIL1C.xml"
    # Band 8 of the list is 8A, band 9 is 9.
    text = path.read_text().replace('band_id="8">0', 'band_id="8">-500')
    path.write_text(text)
    assert read_all(safe, ["nir08"])[0][0, -1, -1] == pytest.approx(
        (stored["B8A"][-1, -1] - 500) / 10000
    )
    assert read_all(safe, ["nir09"])[0][0, -1, -1] == pytest.approx(stored["B09"][-1, -1] / 10000)


def test_bands_are_asked_for_by_their_own_names_too(product: Any) -> None:
    safe, stored = product
    pixels, _ = read_all(safe, ["red"], select=["B03"])
    np.testing.assert_allclose(pixels[0], (stored["B03"].astype(float) - 1000) / 10000, atol=1e-6)


def test_a_pattern_over_the_images_takes_them_bare(product: Any) -> None:
    safe, stored = product
    pattern = "GRANULE/*/IMG_DATA/" + ("R10m/" if "L2A" in safe.name else "") + "*_B0[24]*.jp2"
    pixels, valid = read_all(safe / pattern, ["red"])
    np.testing.assert_array_equal(pixels[0], stored["B04"])
    assert valid.all()  # nothing in the file says that 0 is no data


def test_what_is_no_whole_product_is_refused_in_one_line(product: Any, tmp_path: Path) -> None:
    safe = tmp_path / product[0].name
    shutil.copytree(product[0], safe)
    path = next(safe.glob("MTD_*.xml"))
    text = path.read_text()
    path.write_text(text[: len(text) // 2])
    with pytest.raises(SourceError, match=r"MTD_MSIL..\.xml is not the metadata of a Sentinel-2"):
        find_source(safe)
    path.write_text(text.replace("QUANTIFICATION_VALUE", "ANOTHER"))
    with pytest.raises(SourceError, match="names no quantification value"):
        find_source(safe)
    path.write_text(text)
    granule = next((safe / "GRANULE").iterdir())
    shutil.copytree(granule, granule.with_name("L1C_T33UVU_A034956_20220301T101030"))
    with pytest.raises(SourceError, match="holds 2 tiles"):
        find_source(safe)
    shutil.rmtree(safe / "GRANULE")
    with pytest.raises(SourceError, match="holds no image of a band"):
        find_source(safe)
    whole = zipped(product[0], tmp_path)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(SourceError, match=r"cannot be listed .*Fetch it again"):
        find_source(whole)
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "")
    with pytest.raises(SourceError, match="neither a Sentinel-2 product nor a Landsat scene"):
        find_source(tmp_path / "other.zip")


@pytest.mark.parametrize(
    "names",
    [
        ["B4, central wavelength 665 nm", "B3, central wavelength 560 nm"],
        ["B8A, central wavelength 865 nm", "B4, central wavelength 665 nm"],
    ],
)
def test_bands_are_known_by_what_gdals_own_driver_calls_them(names: list[str]) -> None:
    indexes, notes = match_bands(names, ["red"], source="SENTINEL2_L1C:MTD.xml:10m:EPSG_32633")
    assert notes == []
    assert names[indexes[0] - 1].startswith("B4,")
