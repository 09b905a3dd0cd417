"""What is written of a model's probabilities: the class of each pixel, and how sure of it one may be.

Whatever is a share is stored in bytes: 0 to 250 for 0 to 1, with the scale 0.004 as a tag.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from geodeploy.blend import Block, best_class
from geodeploy.spec import NODATA

SCALE = 0.004
"""What a stored byte is multiplied with: a short decimal that a tag can say exactly."""


class Product(Protocol):
    """One raster of bytes that a run writes."""

    name: str
    """Ends the name of its file, unless it is the map itself."""
    bands: Sequence[str]
    """Their descriptions."""
    nodata: int
    scale: float
    """What stored values are multiplied with to give what they mean."""
    overviews: str
    """The resampling that makes them, by GDAL's name."""

    def of(self, block: Block) -> NDArray[np.uint8]:
        """What to write of ``block``, (bands, h, w)."""
        ...


class ClassMap:
    """The most probable class of each pixel.

    Args:
        values: The class value of each of the model's outputs.
        nodata: Written where the scene has no data.
    """

    name, scale, overviews = "class", 1.0, "mode"
    bands: Sequence[str] = ("class",)

    def __init__(self, values: Sequence[int], nodata: int) -> None:
        self.nodata = nodata
        self._values = np.array(values, np.uint8)

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Class values (1, h, w)."""
        classes = self._values[best_class(block.probs)]
        return np.where(block.valid, classes, np.uint8(self.nodata))[np.newaxis]


class Confidence:
    """The probability of the most probable class."""

    name, scale, overviews = "confidence", SCALE, "average"
    bands: Sequence[str] = ("confidence",)
    nodata: int = NODATA

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (1, h, w)."""
        return _stored(block.probs.max(axis=0, keepdims=True), block.valid)


class Probabilities:
    """The probability of every class.

    Args:
        classes: Their names, in the order of the model's outputs.
    """

    name, scale, overviews = "probabilities", SCALE, "average"
    nodata: int = NODATA

    def __init__(self, classes: Sequence[str]) -> None:
        self.bands = classes

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (K, h, w)."""
        return _stored(block.probs, block.valid)


class Disagreement:
    """How far the tiles that cover a pixel are apart; nodata where one tile alone does."""

    name, scale, overviews = "disagreement", SCALE, "average"
    bands: Sequence[str] = ("disagreement",)
    nodata: int = NODATA

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Stored shares (1, h, w)."""
        assert block.disagreement is not None
        compared = np.isfinite(block.disagreement)
        found = np.where(compared, block.disagreement, np.float32(0))
        return _stored(found[np.newaxis], block.valid & compared)


def _stored(shares: NDArray[np.float32], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """``shares`` (bands, h, w) as bytes, NODATA where (h, w) is not ``valid``."""
    # Half-precision graphs miss 0 and 1 by a little.
    steps = np.rint(np.clip(shares, 0, 1) * np.float32(1 / SCALE)).astype(np.uint8)
    return np.where(valid, steps, np.uint8(NODATA))
