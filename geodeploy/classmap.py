"""A class map that is finished: its pixels in bands of rows, its classes' names and colours."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.windows import Window

from geodeploy.cog import BLOCK, aux_path
from geodeploy.dataset import open_dataset, reading
from geodeploy.errors import SourceError
from geodeploy.spec import NODATA, SegmentationClass, default_color

ROWS = BLOCK
"""Of one band of rows: a block's, so that each block is decoded once."""
_CACHE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class ClassMap:
    """One that is open for reading."""

    path: Path
    dataset: Any
    height: int
    width: int
    crs: CRS | None
    transform: Affine
    nodata: int | None
    named: tuple[SegmentationClass, ...]
    """Those that the file, or the ``.aux.xml`` beside it, has a name for."""

    def bands(self, rows: int = ROWS) -> Iterator[tuple[int, NDArray[np.uint8]]]:
        """The map from the top: the number of a band's first row, and its values (rows, width)."""
        for row in range(0, self.height, rows):
            window = Window(0, row, self.width, min(rows, self.height - row))
            with reading(self.path, window):
                yield row, self.dataset.read(1, window=window)

    @property
    def whole(self) -> Window:
        """All of it."""
        return Window(0, 0, self.width, self.height)

    def item(self, value: int) -> SegmentationClass:
        """The class of ``value``, with a name of its number where the file has none."""
        for item in self.named:
            if item.value == value:
                return item
        return SegmentationClass(value=value, name=f"class {value}", color=default_color(value))


@contextmanager
def open_class_map(path: Path | str) -> Iterator[ClassMap]:
    """Open a raster of one band of bytes, such as `predict` writes.

    Raises:
        SourceError: it is missing, no raster, or has other values than classes.
    """
    path = Path(path)
    with rasterio.Env(GDAL_CACHEMAX=_CACHE_BYTES), open_dataset(path) as dataset:
        if dataset.count != 1 or dataset.dtypes[0] != "uint8":
            raise SourceError(
                f"{path} has {dataset.count} bands, the first of {dataset.dtypes[0]}; "
                "a class map has one of uint8."
            )
        nodata = None if dataset.nodata is None else int(dataset.nodata)
        yield ClassMap(
            path=path,
            dataset=dataset,
            height=dataset.height,
            width=dataset.width,
            crs=dataset.crs,
            transform=dataset.transform,
            nodata=nodata,
            named=tuple(_named(path, dataset, nodata)),
        )


def _named(path: Path, dataset: Any, nodata: int | None) -> Iterator[SegmentationClass]:
    try:
        root = ElementTree.parse(aux_path(path)).getroot()
    except (OSError, ElementTree.ParseError):
        return
    try:
        colours = dataset.colormap(1)
    except ValueError:
        colours = {}
    names = [
        item.text or "" for item in root.findall("PAMRasterBand[@band='1']/CategoryNames/Category")
    ]
    for value, name in enumerate(names[:NODATA]):
        if name and value != nodata:
            red, green, blue, _ = colours.get(value, (*bytes.fromhex(default_color(value)[1:]), 255))
            yield SegmentationClass(value=value, name=name, color=f"#{red:02x}{green:02x}{blue:02x}")
