"""Pictures of a cloud model on places that are hard for one: what the model card shows.

    python train/draw_cloud_looks.py MODEL FOLDER_OF_THE_SCENES -o docs/cloud

Snow is not among them: none of the scenes has any.
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib.image
import numpy as np
import rasterio
from rasterio.windows import Window

from geodeploy import PredictOptions, predict
from geodeploy.pictures import coloured, true_colour
from geodeploy.runtime import open_session

SIX = ("blue", "green", "red", "nir", "swir16", "swir22")


@dataclass(frozen=True)
class Scene:
    """One file and what turns it into reflectance."""

    image: str
    bands: tuple[str, ...]
    scale: float
    offset: float = 0.0


SCENES = {
    "virginia": Scene("s2-virginia-coast/s2_l1c_6band_10m.tif", ("1", "2", "3", "4", "5", "6"), 1e-4),
    "brandenburg": Scene(
        "s2-brandenburg-osm/s2_l1c_13band_10m.tif", ("2", "3", "4", "8", "12", "13"), 1e-4
    ),
    "bqa": Scene("l8-cloudy-bqa/l8_l1_10band_30m.tif", ("2", "3", "4", "5", "6", "7"), 2e-5, -0.1),
    # Eight bits and no gains: a mean of those of the six bands.
    "olinda": Scene("l7-olinda/L7_ETMs.tif", ("1", "2", "3", "4", "5", "6"), 0.002, -0.015),
}
LOOKS = {
    "beach": ("virginia", Window(1150, 300, 512, 512)),
    "marsh": ("virginia", Window(750, 850, 512, 512)),
    "open-sea": ("virginia", Window(1400, 1300, 512, 512)),
    "farmland": ("virginia", Window(150, 250, 512, 512)),
    "cirrus": ("brandenburg", Window(512, 0, 512, 512)),
    "dark-forest-and-lakes": ("brandenburg", Window(0, 256, 512, 512)),
    "altocumulus": ("bqa", Window(0, 100, 512, 400)),
    "haze-and-clearings": ("bqa", Window(115, 203, 512, 400)),
    "town-and-turbid-water": ("olinda", Window(0, 0, 349, 352)),
}


def main() -> None:
    """Map the scenes and draw each place."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("root", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=Path("docs/cloud"))
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    session = open_session(arguments.model, device="cpu")
    classes = session.spec.classes
    session.close()
    with tempfile.TemporaryDirectory() as folder:
        for name, scene in SCENES.items():
            options = PredictOptions(
                bands=scene.bands, scale=scene.scale, offset=scene.offset, device="cpu"
            )
            mapped = Path(folder) / f"{name}.tif"
            predict(arguments.root / scene.image, arguments.model, mapped, options=options)
        for name, (place, window) in LOOKS.items():
            with rasterio.open(arguments.root / SCENES[place].image) as file:
                indexes = [int(band) for band in SCENES[place].bands]
                pixels = file.read(indexes, window=window).astype(np.float32)
            with rasterio.open(Path(folder) / f"{place}.tif") as file:
                values = file.read(1, window=window)
            natural = true_colour(pixels, SIX, values != 255)
            swapped = ("", "", "blue", "green", "red", "")  # red, nir and swir16 shown
            infrared = true_colour(pixels, swapped, values != 255)
            beside = [natural, infrared, coloured(values, classes) / 255]
            drawn = np.concatenate(beside, axis=1)[::2, ::2]
            matplotlib.image.imsave(arguments.output / f"{name}.jpg", drawn)
            shares = {item.name: f"{(values == item.value).mean():.1%}" for item in classes}
            print(name, shares)


if __name__ == "__main__":
    main()
