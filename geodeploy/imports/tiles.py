"""Tiles of real images, without labels, on which an export of an imported model is proved."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from geodeploy.errors import RecipeError
from geodeploy.imports.config import Config, listed
from geodeploy.imports.options import ImportOptions
from geodeploy.imports.recipe import stored_scale
from geodeploy.labels import IGNORED
from geodeploy.raster import Raster, check_range, open_raster
from geodeploy.spec import ModelSpec
from geodeploy.tiles import TileGrid
from geodeploy.train.data import LabelledTile, read_filled

_TILES = 16


@dataclass(frozen=True, slots=True)
class Images:
    """Where pixels are, and how they are read."""

    files: Sequence[Path]
    numbers: tuple[str, ...] | None
    """Of the model's bands, date by date, among those of a file; None goes by their names."""
    scale: float


def find_images(config: Config, spec: ModelSpec, options: ImportOptions) -> Images:
    """The images that are given, or else those that the configuration names for validation or so.

    Those are read as TerraTorch reads them, by the places of their bands and whatever their tags say.
    """
    scale = stored_scale(config, options)
    if options.scenes:
        return Images(options.scenes, None, scale)
    for split in ("val", "test", "train"):
        root = config.told(f"{split}_data_root")
        for folder in (Path(root), config.path.parent / root) if root else ():
            if files := sorted(folder.glob(str(config.told("img_grep") or "*"))):
                return Images(files, _numbers(config, spec), scale)
    return Images((), None, scale)


def _numbers(config: Config, spec: ModelSpec) -> tuple[str, ...]:
    there = listed(config.told("dataset_bands", "output_bands") or list(spec.band_names))
    chosen = listed(config.told("output_bands") or there)
    if absent := [band for band in chosen if band not in there]:
        raise RecipeError(
            f"{config.path}: output_bands has {absent[0]}, which is none of dataset_bands "
            f"({', '.join(map(str, there))}). Mend the YAML, or name an image with --scene."
        )
    count, dates = len(there), spec.timesteps
    apart, step = (1, dates) if config.told("temporal_channel_major") else (count, 1)
    return tuple(
        str(date * apart + there.index(band) * step + 1) for date in range(dates) for band in chosen
    )


def cut_real_tiles(images: Images, spec: ModelSpec) -> list[LabelledTile]:
    """Up to 16 tiles with a valid pixel, drawn by the hash of their place.

    Raises:
        SourceError, BandError, RangeError: an image is not what the model takes.
        RecipeError: there is no image, or none with a valid pixel.
    """
    mean = np.array([band.mean for band in spec.planes], np.float32)
    found = []
    for file in sorted(images.files, key=lambda file: _hash(file.name))[:_TILES]:
        with _opened(file, images, spec) as raster:
            check_range(raster, spec.planes)
            drawn = {
                _hash(f"{file.name} {place.rows.start} {place.cols.start}"): place
                for place in TileGrid(raster.height, raster.width, spec.tile, 0)
            }
            for key, place in sorted(drawn.items())[:_TILES]:
                pixels, valid = read_filled(raster.read_pixels, place.window, spec.tile, mean)
                if valid.any():
                    codes = np.full(valid.shape, IGNORED, np.uint8)
                    values = np.full((len(spec.targets), *codes.shape), np.nan, np.float32)
                    quantities = values if spec.targets else None
                    found.append((key, LabelledTile(pixels, codes, place, quantities)))
    if not found:
        raise RecipeError(
            "An export is proved on real pixels, and there are none: the configuration's images are "
            "elsewhere or empty. Name one with --scene."
        )
    return [tile for _, tile in sorted(found, key=lambda item: item[0])[:_TILES]]


@contextmanager
def _opened(file: Path, images: Images, spec: ModelSpec) -> Iterator[Raster]:
    if images.numbers is not None:
        names = [band.name for band in spec.planes]
        with open_raster(file, band_names=names, select=images.numbers, scale=images.scale) as raster:
            yield raster
        return
    dates = [file] * (spec.timesteps - 1)
    with open_raster(file, earlier=dates, band_names=spec.band_names) as raster:
        stored = raster.is_bare and raster.dtype.kind in "iu"
    scale = images.scale if stored else 1.0
    with open_raster(file, earlier=dates, band_names=spec.band_names, scale=scale) as raster:
        yield raster


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()
