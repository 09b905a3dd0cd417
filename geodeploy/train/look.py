"""One image of a recipe, read from top to bottom: what it holds, and what is odd about it."""

# C band, K class

from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from geodeploy.bands import WAVELENGTH_UM, common_names, landsat_number
from geodeploy.errors import GeodeployError, RangeError, RecipeError
from geodeploy.labels import IGNORED
from geodeploy.raster import Raster, ground_sample_distance_m
from geodeploy.source import find_sources
from geodeploy.tally import Moments as Values
from geodeploy.train.data import (
    NEITHER,
    TRAINING,
    LabelledScene,
    check_units,
    dates_of,
    divide,
    join_dates,
    scene_labels,
    statistics_of,
)
from geodeploy.train.findings import Findings
from geodeploy.train.limits import Limits, limits_of
from geodeploy.train.recipe import Recipe, Scene, Split, Statistics

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

    def statistics(self) -> Statistics:
        """Mean and deviation of each band.

        Raises:
            LabelError, RecipeError: as `statistics_of`.
        """
        return statistics_of(self.count, self._total, self._products.diagonal())

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(C, C)."""
        return np.asarray(self._products / max(self.count, 1) - np.outer(self.mean, self.mean))


@dataclass(slots=True)
class Look:
    """What one image was found to be, and what the comparison with others needs."""

    where: str
    place: str
    scene: Scene
    raster: Raster
    """Closed: for its grid."""
    moments: Moments
    """Of the pixels with data within the recipe's limits."""
    learned: Moments
    """Of those among them to train on, labelled or not."""
    outside: NDArray[np.int64]
    """(C,): those among them that are no plausible reflectance."""
    counts: NDArray[np.int64]
    """(4, K): labelled pixels with data of each part and class, or fourth of a quantity's range."""
    values: list[list[Values]]
    """What the labels with data of each part come to, for each target."""
    purposes: str
    """A digest of what each pixel is for."""
    digest: str = ""
    """Of the pixels, wherever they lie; empty where they are all alike."""

    @property
    def split(self) -> Split:
        """As the recipe says."""
        return self.scene.split

    @property
    def gsd_m(self) -> float | None:
        """Metres a pixel; None unless the CRS is projected."""
        return ground_sample_distance_m(self.raster.crs, self.raster.transform)


def look_at(raster: Raster, recipe: Recipe, scene: Scene, place: str, findings: Findings) -> Look:
    """Read the image and its labels from top to bottom.

    Raises:
        SourceError: the image breaks off.
    """
    where = f"{place} ({scene.image.name})"
    limits: Limits | None = limits_of(recipe)
    try:
        check_units(raster, recipe, place)
    except RangeError as error:
        findings.say("error", "range", where, str(error))
        limits = None  # of other units they tell nothing
    labelled = _label(raster, recipe, scene, place, limits, findings)
    if labelled.outside is not None and labelled.outside.pixels:
        findings.say("warning", "nodata", where, str(labelled.outside))
    codes, part = labelled.codes, labelled.part
    bands = len(recipe.data.bands)
    look = Look(
        where=where,
        place=place,
        scene=scene,
        raster=raster,
        moments=Moments(bands),
        learned=Moments(bands),
        purposes=blake2b(part.data, digest_size=16).hexdigest(),
        outside=np.zeros(bands, np.int64),
        counts=np.array([labelled.counts(number, recipe.groups) for number in range(4)]),
        values=[[Values() for _ in recipe.targets] for _ in range(4)],
    )
    digests = [blake2b(digest_size=16) for _ in range(recipe.planes)]
    zeros = 0
    for window in raster.stripes():
        stripe = raster.read(window)
        pixels, valid = raster.to_units(stripe.stored), stripe.valid
        zeros += int((valid & (stripe.stored == 0).all(axis=0)).sum())
        if labelled.limits is not None:
            valid = valid & labelled.limits.hold(pixels)
        known = join_dates(pixels[:, valid], bands)
        look.moments.add(known)
        area = window.toslices()
        look.learned.add(join_dates(pixels[:, valid & (part[area] == TRAINING)], bands))
        look.outside += ((known < _REFLECTANCE[0]) | (known > _REFLECTANCE[1])).sum(axis=1)
        labels = codes[area] != IGNORED
        if labelled.values is not None:
            for number, sums in enumerate(look.values):
                here = labels & (part[area] == number)
                for target, band in enumerate(labelled.values):
                    sums[target] += Values.of(band[area][here])
        for digest, band in zip(digests, np.where(valid, pixels, np.float32(np.nan)), strict=True):
            digest.update(band.tobytes())
    if look.moments.covariance.diagonal().max() > 0:
        shape = f"{raster.height} {raster.width} "
        look.digest = shape + " ".join(digest.hexdigest() for digest in digests)
    if scene.labels is not None and part.any() and (codes == IGNORED).all():
        findings.say("warning", "labels", where, "no pixel with data has a label.")
    if bands > 1 and zeros > _ODD_SHARE * raster.height * raster.width:
        message = (
            f"{zeros / (raster.height * raster.width):.0%} of the pixels are 0 in all bands: no data?"
        )
        findings.say("warning", "nodata", where, f"{message} Then mark it: gdal_edit.py -a_nodata 0.")
    _judge(look, recipe, findings)
    return look


def _label(
    raster: Raster,
    recipe: Recipe,
    scene: Scene,
    place: str,
    limits: Limits | None,
    findings: Findings,
) -> LabelledScene:
    """The image with its labels; with no label, and for nothing, where they are no good."""
    where, size = f"{place} ({scene.image.name})", (raster.height, raster.width)
    try:
        labels = scene_labels(recipe, scene, raster)
    except GeodeployError as error:
        findings.say("error", "labels", where, str(error))
    else:
        try:
            return divide(recipe, scene, place, raster, *labels, limits=limits)
        except RecipeError as error:
            findings.say("error", "labels", where, str(error))
    return LabelledScene(raster, np.full(size, IGNORED, np.uint8), np.full(size, NEITHER, np.uint8))


def _judge(look: Look, recipe: Recipe, findings: Findings) -> None:
    """Say what is odd about one image."""
    for note in look.raster.band_notes:
        findings.say("warning", "bands", look.where, note.removeprefix(f"{look.raster.name}: "))
    share = look.moments.count / (look.raster.height * look.raster.width)
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
    *_, source = find_sources(
        recipe.data.root / scene.image,
        dates=dates_of(scene),
        most=recipe.model.timesteps,
        with_alpha=scene.bands is not None,
    )
    guessed = common_names(
        [asset.name for asset in source.assets], landsat=landsat_number(*source.hints)
    )
    last = raster.indexes[-len(recipe.data.bands) :]
    named = [asset.common_name or name for asset, name in zip(source.assets, guessed, strict=True)]
    for want, index in zip(recipe.data.bands, last, strict=True):
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
