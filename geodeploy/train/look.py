"""One image of a recipe, read once from top to bottom: what it holds, and what is odd about it."""

# C band, K class

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from rasterio.crs import CRS

from geodeploy.bands import WAVELENGTH_UM, common_names, landsat_number
from geodeploy.errors import GeodeployError
from geodeploy.labels import IGNORED
from geodeploy.raster import Raster, ground_sample_distance_m
from geodeploy.source import find_source
from geodeploy.train.data import check_units, scene_codes, split
from geodeploy.train.findings import Findings
from geodeploy.train.recipe import Recipe, Scene

_REFLECTANCE = (-0.05, 1.6)
"""What nearly all reflectance lies in: clouds reach above 1, a correction of the air below 0."""
_ODD_SHARE = 0.01
"""Of the pixels that are outside of it, or 0 in all bands, beyond which it is told."""
_DARK = 0.01
"""Mean reflectance of the brightest band below which a scale was likely applied twice."""
_EMPTY_SHARE = 0.5
"""Of an image's pixels without data, beyond which it is told."""


class Moments:
    """Number, sums and products of the pixels of one or more images."""

    def __init__(self, bands: int) -> None:
        self.count = 0
        self._total = np.zeros(bands)
        self._products = np.zeros((bands, bands))

    def add(self, pixels: NDArray[np.float32]) -> None:
        """Take in pixels (C, n)."""
        values = pixels.astype(np.float64)
        self.count += values.shape[1]
        self._total += values.sum(axis=1)
        self._products += values @ values.T

    def join(self, other: "Moments") -> None:
        """Take in the pixels of ``other``."""
        self.count += other.count
        self._total += other._total
        self._products += other._products

    @property
    def mean(self) -> NDArray[np.float64]:
        """(C,)."""
        return self._total / max(self.count, 1)

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(C, C)."""
        return np.asarray(self._products / max(self.count, 1) - np.outer(self.mean, self.mean))


@dataclass(slots=True)
class Look:
    """What one image was found to be, and what the comparison with others needs."""

    where: str
    place: str
    split: str
    bounds: tuple[float, float, float, float]
    crs: CRS | None
    height: int
    width: int
    gsd_m: float | None
    moments: Moments
    outside: NDArray[np.int64]
    """(C,): pixels that are no plausible reflectance."""
    counts: NDArray[np.int64]
    """(4, K): labelled pixels with data of each part and class."""
    digest: str = ""
    """Of the pixels, wherever they lie; empty where they are all alike."""


def look_at(raster: Raster, recipe: Recipe, scene: Scene, place: str, findings: Findings) -> Look:
    """Read the image once, from top to bottom.

    Raises:
        SourceError: it breaks off.
    """
    where = f"{place} ({scene.image.name})"
    try:
        check_units(raster, recipe.data, place)
    except GeodeployError as error:
        findings.say("error", "range", where, str(error))
    codes, part = _labels(raster, recipe, scene, where, findings)
    bands = len(recipe.data.bands)
    corners = [
        raster.transform @ corner
        for corner in ((0, 0), (raster.width, 0), (0, raster.height), (raster.width, raster.height))
    ]
    xs, ys = zip(*corners, strict=True)
    look = Look(
        where=where,
        place=place,
        split=scene.split,
        bounds=(min(xs), min(ys), max(xs), max(ys)),
        crs=raster.crs,
        height=raster.height,
        width=raster.width,
        gsd_m=ground_sample_distance_m(raster.crs, raster.transform),
        moments=Moments(bands),
        outside=np.zeros(bands, np.int64),
        counts=np.zeros((4, len(recipe.classes)), np.int64),
    )
    digests = [blake2b(digest_size=16) for _ in range(bands)]
    zeros = 0
    for window in raster.stripes():
        stripe = raster.read(window)
        pixels, valid = raster.to_units(stripe.stored), stripe.valid
        zeros += int((valid & (stripe.stored == 0).all(axis=0)).sum())
        valid &= np.isfinite(pixels).all(axis=0)
        known = pixels[:, valid]
        look.moments.add(known)
        look.outside += ((known < _REFLECTANCE[0]) | (known > _REFLECTANCE[1])).sum(axis=1)
        area = window.toslices()
        labelled = valid & (codes[area] != IGNORED)
        np.add.at(look.counts, (part[area][labelled], codes[area][labelled]), 1)
        for digest, band in zip(digests, np.where(valid, pixels, np.float32(np.nan)), strict=True):
            digest.update(band.tobytes())
    if look.moments.covariance.diagonal().max() > 0:
        shape = f"{raster.height} {raster.width} "
        look.digest = shape + " ".join(digest.hexdigest() for digest in digests)
    if scene.labels is not None and part.any() and not look.counts.any():
        findings.say("warning", "labels", where, "no pixel with data has a label.")
    if bands > 1 and zeros > _ODD_SHARE * look.height * look.width:
        message = f"{zeros / (look.height * look.width):.0%} of the pixels are 0 in all bands: no data?"
        findings.say("warning", "nodata", where, f"{message} Then mark it: gdal_edit.py -a_nodata 0.")
    _judge(look, recipe, findings)
    return look


def _labels(
    raster: Raster, recipe: Recipe, scene: Scene, where: str, findings: Findings
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The codes and the part of each pixel, (H, W); no code where the labels are no good."""
    try:
        codes = scene_codes(scene, raster, recipe)
        part = split(codes, scene, recipe.data.blocks, len(recipe.classes))
    except GeodeployError as error:
        findings.say("error", "labels", where, str(error))
        codes = np.full((raster.height, raster.width), IGNORED, np.uint8)
        part = np.zeros_like(codes)
    return codes, part


def _judge(look: Look, recipe: Recipe, findings: Findings) -> None:
    """Say what is odd about one image."""
    share = look.moments.count / (look.height * look.width)
    if not share:
        findings.say("error", "nodata", look.where, "no pixel holds data.")
        return
    if 1 - share > _EMPTY_SHARE:
        findings.say("warning", "nodata", look.where, f"{1 - share:.0%} of the pixels hold no data.")
    if recipe.data.units != "reflectance":
        return
    for name, outside in zip(recipe.data.bands, look.outside / look.moments.count, strict=True):
        if outside > _ODD_SHARE:
            findings.say(
                "warning",
                "range",
                look.where,
                f"{outside:.0%} of {name} lies outside {_REFLECTANCE[0]:g} to {_REFLECTANCE[1]:g}: is "
                "the scale right, and nodata marked?",
            )
    brightest = look.moments.mean.max()
    if brightest < _DARK:
        findings.say(
            "warning",
            "range",
            look.where,
            f"the mean of the brightest band is {brightest:.2g}: is the scale applied twice?",
        )


def check_names(raster: Raster, recipe: Recipe, scene: Scene, where: str, findings: Findings) -> None:
    """Say where the file names a band otherwise than the recipe takes it."""
    source = find_source(recipe.data.root / scene.image, with_alpha=scene.bands is not None)
    guessed = common_names(
        [asset.name for asset in source.assets], landsat=landsat_number(*source.hints)
    )
    named = [asset.common_name or name for asset, name in zip(source.assets, guessed, strict=True)]
    for want, index in zip(recipe.data.bands, raster.indexes, strict=True):
        found = named[index - 1]
        if found is not None and want in WAVELENGTH_UM and found != want and {found, want} != {
            "nir", "nir08",
        }:  # fmt: skip
            findings.say(
                "warning",
                "bands",
                where,
                f"{want} is taken from band {index}, which the file calls "
                f"{source.assets[index - 1].name}, {found}. Are the bands in the right order?",
            )
