"""What is written of the probabilities: one array a product, block by block."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from geodeploy.blend import Block, best_class


class Product(Protocol):
    """One raster that a run writes."""

    name: str
    """Names its parts while they wait to be joined."""
    bands: int
    dtype: str
    nodata: int

    def of(self, block: Block) -> NDArray[Any]:
        """What to write of ``block``, (bands, h, w)."""
        ...


class ClassMap:
    """The most probable class of each pixel.

    Args:
        values: The class value of each of the model's outputs.
        nodata: Written where the scene has no data.
    """

    name, bands, dtype = "classes", 1, "uint8"

    def __init__(self, values: Sequence[int], nodata: int) -> None:
        self.nodata = nodata
        self._values = np.array(values, np.uint8)

    def of(self, block: Block) -> NDArray[np.uint8]:
        """Class values (1, h, w)."""
        classes = self._values[best_class(block.probs)]
        return np.where(block.valid, classes, np.uint8(self.nodata))[np.newaxis]
