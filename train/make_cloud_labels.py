"""Label rasters for four scenes that come without any: what is plain to the eye, and nothing else.

Land is told from water by a rule on the scene's own pixels; where there is no cloud, where there is
one, and where its shadow falls was drawn by hand on an enlarged picture of each scene. What is not
plainly one or the other stays unlabelled (255). No mask that anybody publishes was used or looked at,
the quality band that comes with one of the scenes included.

    python train/make_cloud_labels.py FOLDER_OF_THE_SCENES -o train/labels
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import rasterio
from numpy.typing import NDArray
from rasterio.features import rasterize

SHADOW, WATER, LAND, CLOUD, UNLABELLED = 0, 1, 3, 4, 255

Polygon = Sequence[tuple[float, float]]
"""Corners (column, row) in pixels."""
EVERYWHERE: Polygon = ((0, 0), (1e5, 0), (1e5, 1e5), (0, 1e5))


@dataclass(frozen=True)
class Drawing:
    """One scene and what was drawn on it."""

    image: str
    bands: tuple[int, ...]
    """Of green, red, near infrared and 1.6 micrometres in the file."""
    scale: tuple[float, ...]
    """From the file's numbers to reflectance, one a band."""
    offset: tuple[float, ...]
    clear: tuple[Polygon, ...] = ()
    shadow: tuple[Polygon, ...] = ()
    cloud: tuple[Polygon, ...] = ()
    brightest: float = 0.0
    """In red, below which a pixel inside ``cloud`` is a gap."""


SENTINEL, LANDSAT_8 = (1e-4,) * 4, (2e-5,) * 4
DRAWINGS = {
    "virginia-coast": Drawing(
        "s2-virginia-coast/s2_l1c_6band_10m.tif", (2, 3, 4, 5), SENTINEL, (0.0,) * 4, (EVERYWHERE,)
    ),
    # Eight bits without gains: those of ETM+ in high gain, for a sun at 50 degrees.
    "olinda": Drawing(
        "l7-olinda/L7_ETMs.tif",
        (2, 3, 4, 5),
        (0.00176, 0.00163, 0.0025, 0.00227),
        (-0.0142, -0.0132, -0.02, -0.018),
        (EVERYWHERE,),
    ),
    "brandenburg": Drawing(
        "s2-brandenburg-osm/s2_l1c_13band_10m.tif",
        (3, 4, 8, 12),
        SENTINEL,
        (0.0,) * 4,
        clear=(
            ((0, 0), (400, 0), (430, 380), (380, 480), (380, 768), (0, 768)),
            ((880, 600), (1024, 600), (1024, 768), (880, 768)),
            ((720, 390), (850, 385), (880, 440), (980, 380), (1010, 420), (900, 470), (720, 440)),
        ),
        shadow=(
            ((505, 405), (555, 395), (590, 440), (570, 463), (512, 455)),
            ((755, 325), (785, 325), (785, 352), (758, 355)),
        ),
        cloud=(
            (
                (880, 140),
                (930, 80),
                (975, 60),
                (985, 110),
                (960, 170),
                (925, 220),
                (880, 270),
                (845, 265),
            ),
            ((545, 745), (565, 712), (605, 705), (598, 768), (535, 768)),
        ),
    ),
    "bqa": Drawing(
        "l8-cloudy-bqa/l8_l1_10band_30m.tif",
        (3, 4, 5, 6),
        LANDSAT_8,
        (-0.1,) * 4,
        clear=(((200, 505), (480, 505), (520, 540), (627, 545), (627, 603), (200, 603)),),
        cloud=(((0, 190), (330, 200), (330, 390), (0, 390)),),
        brightest=0.105,
    ),
}


def label(drawing: Drawing, root: Path) -> tuple[NDArray[np.uint8], dict[str, object]]:
    """The labels (H, W) of one scene, and the profile of the raster to hold them."""
    with rasterio.open(root / drawing.image) as scene:
        values = scene.read(drawing.bands).astype(np.float32)
        empty = (values == 0).any(axis=0)
        profile = {"crs": scene.crs, "transform": scene.transform}
    scale, offset = np.array(drawing.scale), np.array(drawing.offset)
    green, red, nir, swir = values * scale[:, None, None] + offset[:, None, None]
    # Water is dark beyond the red. Tidal flats, marsh and wet sand lie between, and stay unlabelled.
    wetness = (green - swir) / np.maximum(green + swir, 1e-3)
    greenness = (nir - red) / np.maximum(nir + red, 1e-3)
    water = (wetness > 0.35) & (greenness < 0.1) & (swir < 0.09)
    land = (wetness < 0.0) | (greenness > 0.35)

    def inside(polygons: Sequence[Polygon]) -> NDArray[np.bool_]:
        shapes = [{"type": "Polygon", "coordinates": [[*corners, corners[0]]]} for corners in polygons]
        if not shapes:
            return np.zeros(red.shape, bool)
        return rasterize(shapes, out_shape=red.shape).astype(bool)

    labels = np.full(red.shape, UNLABELLED, np.uint8)
    clear = inside(drawing.clear)
    labels[clear & land] = LAND
    labels[clear & water] = WATER
    labels[inside(drawing.shadow) & ~water] = SHADOW
    labels[inside(drawing.cloud) & (red > drawing.brightest)] = CLOUD
    labels[empty] = UNLABELLED
    return labels, profile


def main() -> None:
    """Write one label raster a scene."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("train/labels"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, drawing in DRAWINGS.items():
        labels, profile = label(drawing, arguments.root)
        path = arguments.output / f"{name}.tif"
        with rasterio.open(
            path, "w", driver="GTiff", count=1, dtype="uint8", nodata=UNLABELLED, compress="deflate",
            height=labels.shape[0], width=labels.shape[1], predictor=2, tiled=True, zlevel=9, **profile
        ) as written:  # fmt: skip
            written.write(labels, 1)
        counts = np.bincount(labels.ravel(), minlength=256)
        print(path, {value: int(counts[value]) for value in (SHADOW, WATER, LAND, CLOUD, UNLABELLED)})


if __name__ == "__main__":
    main()
