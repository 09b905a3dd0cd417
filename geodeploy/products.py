"""What is written of a model's answers: classes or quantities, and how sure of them one may be.

Whatever is a share is stored in bytes: 0 to 250 for 0 to 1, with the scale 0.004 as a tag.
"""

import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geodeploy.blend import Block, best_class
from geodeploy.spec import NODATA, Target

SCALE = 0.004
"""What a stored byte is multiplied with: a short decimal that a tag can say exactly."""


class Product(Protocol):
    """One raster that a run writes."""

    name: str
    """Ends the name of its file, unless it is the map itself."""
    bands: Sequence[str]
    """Their descriptions."""
    units: Sequence[str]
    """Of each band; empty where there are none."""
    dtype: str
    """``uint8`` or ``float32``, the same for all rasters of a run."""
    nodata: float
    scale: float
    """What stored values are multiplied with to give what they mean."""
    overviews: str
    """The resampling that makes them, by GDAL's name."""

    def of(self, block: Block) -> NDArray[Any]:
        """What to write of ``block``, (bands, h, w)."""
        ...


class ClassMap:
    """The most probable class of each pixel.

    Args:
        values: The class value of each of the model's outputs.
    """

    name, scale, overviews = "class", 1.0, "mode"
    dtype = "uint8"
    nodata: float = NODATA
    bands: Sequence[str] = ("class",)
    units: Sequence[str] = ()

    def __init__(self, values: Sequence[int]) -> None:
        self._values = np.array(values, np.uint8)

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Class values (1, h, w)."""
        # Clipping, as it need not, numpy looks up three times faster; and no data has all bits set.
        classes = np.take(self._values, best_class(block.mean), mode="clip")
        classes |= block.valid.view(np.uint8) - np.uint8(1)
        return classes[np.newaxis]


class Confidence:
    """The probability of the most probable class."""

    name, scale, overviews = "confidence", SCALE, "average"
    bands: Sequence[str] = ("confidence",)
    dtype = "uint8"
    nodata: float = NODATA
    units: Sequence[str] = ()

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (1, h, w)."""
        return _stored(block.mean.max(axis=0, keepdims=True), block.valid)


class Probabilities:
    """The probability of every class.

    Args:
        classes: Their names, in the order of the model's outputs.
    """

    name, scale, overviews = "probabilities", SCALE, "average"
    dtype = "uint8"
    nodata: float = NODATA
    units: Sequence[str] = ()

    def __init__(self, classes: Sequence[str]) -> None:
        self.bands = classes

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (K, h, w)."""
        return _stored(block.mean, block.valid)


class Disagreement:
    """How far the tiles that cover a pixel are apart; nodata where one tile alone does."""

    name, scale, overviews = "disagreement", SCALE, "average"
    bands: Sequence[str] = ("disagreement",)
    dtype = "uint8"
    nodata: float = NODATA
    units: Sequence[str] = ()

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (1, h, w)."""
        assert block.disagreement is not None
        compared = np.isfinite(block.disagreement)
        found = np.where(compared, block.disagreement, np.float32(0))
        return _stored(found, block.valid & compared)


class Quantities:
    """The quantities at each pixel, in their units.

    Args:
        targets: What they are, in the order of the model's outputs.
    """

    name, scale, overviews = "quantities", 1.0, "average"
    dtype = "float32"
    nodata: float = math.nan
    """No number that could be one of the quantities; GDAL, QGIS and numpy all know it."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self.bands: Sequence[str] = [target.name for target in targets]
        self.units: Sequence[str] = [target.unit for target in targets]

    def of(self, block: Block) -> NDArray[np.float32]:
        """The numbers (K, h, w), NaN without data."""
        return np.where(block.valid, block.mean, np.float32(np.nan))


class Spread(Quantities):
    """How far the tiles that cover a pixel are apart in each quantity; NaN where one alone does."""

    name = "disagreement"

    def of(self, block: Block) -> NDArray[np.float32]:
        """The distances (K, h, w), in the units."""
        assert block.disagreement is not None
        return np.where(block.valid, block.disagreement, np.float32(np.nan))


def _stored(shares: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``shares`` (bands, h, w) as bytes, NODATA where (h, w) is not ``valid``."""
    # Half-precision graphs miss 0 and 1 by a little.
    steps = np.rint(np.clip(shares, 0, 1) * np.float32(1 / SCALE)).astype(np.uint8)
    return np.where(valid, steps, np.uint8(NODATA))
