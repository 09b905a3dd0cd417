"""One raster of a run as a Cloud Optimized GeoTIFF: parts joined, overviews made, all read back."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import rasterio
from affine import Affine
from numpy.typing import NDArray
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.io import MemoryFile
from rasterio.shutil import copy as rasterio_copy
from rasterio.windows import Window

from geodeploy.machine import usable_cores
from geodeploy.products import Product
from geodeploy.spec import NODATA, SegmentationClass
from geodeploy.tally import TALLIES, Tally, add_up

BLOCK = 512
_GDAL_TYPES = {"uint8": "Byte", "float32": "Float32"}
_COLUMNS = 8 * BLOCK
"""Of what is read back at once."""
_SOMEWHERE = Affine.scale(2, -2)
"""Of parts, whose place is told by what joins them. Without any, rasterio warns; and what hides a
warning hides it from all threads."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Size and place of the rasters that a run writes."""

    window: Window
    """Of the scene."""
    crs: CRS | None
    """None for rasters without one."""
    transform: Affine
    """From pixel corner to CRS."""


def encode(pixels: NDArray[Any]) -> bytes:
    """A small GeoTIFF of ``pixels`` (bands, h, w)."""
    bands, height, width = pixels.shape
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", count=bands, height=height, width=width, dtype=pixels.dtype,
            compress="deflate", zlevel=1, tiled=True, blockxsize=BLOCK, blockysize=BLOCK,
            interleave="band", photometric="minisblack", transform=_SOMEWHERE,
        ) as file:  # fmt: skip
            file.write(pixels)
        return bytes(memory.getbuffer())


def join(
    path: Path,
    product: Product,
    frame: Frame,
    files: Mapping[str, Window],
    *,
    first: int,
    tallies: Sequence[Tally],
    tags: Mapping[str, str],
    classes: Sequence[SegmentationClass] = (),
) -> None:
    """Write a VRT of ``files`` beside it: a COG takes tags and colours from what it is made of.

    Args:
        path: The VRT.
        product: What the raster is.
        frame: Where it lies.
        files: By their names, what of the scene each shows.
        first: The number of the product's first band in the files.
        tallies: What the pixels of each band come to.
        tags: Of the whole file.
        classes: Give the colours of a class map.
    """
    root = ElementTree.Element(
        "VRTDataset", rasterXSize=str(frame.window.width), rasterYSize=str(frame.window.height)
    )
    if frame.crs is not None:
        ElementTree.SubElement(root, "SRS").text = frame.crs.to_wkt()
    if frame.transform != Affine.identity():
        ElementTree.SubElement(root, "GeoTransform").text = ", ".join(
            map(repr, map(float, frame.transform.to_gdal()))
        )
    _add_tags(root, tags)
    side = str(BLOCK)  # with GDAL's own blocks of 128 the overviews take half as long again
    for place, name in enumerate(product.bands):
        band = ElementTree.SubElement(
            root,
            "VRTRasterBand",
            dataType=_GDAL_TYPES[product.dtype],
            band=str(place + 1),
            blockXSize=side,
            blockYSize=side,
        )
        _add_tags(band, tallies[place].statistics())
        ElementTree.SubElement(band, "Description").text = _legible(name)
        ElementTree.SubElement(band, "NoDataValue").text = str(product.nodata)
        if product.units:
            ElementTree.SubElement(band, "UnitType").text = _legible(product.units[place])
        if product.scale != 1:
            ElementTree.SubElement(band, "Scale").text = repr(product.scale)
        if classes:
            _add_colours(band, classes)
        for file, window in files.items():
            _add_source(band, file, first + place, window, frame)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


def _legible(text: str) -> str:
    """``text`` as XML can hold it: a model may call itself and its classes anything."""
    return "".join(sign if sign.isprintable() or sign in "\n\t" else "?" for sign in text)


def _add_tags(element: ElementTree.Element, tags: Mapping[str, str]) -> None:
    metadata = ElementTree.SubElement(element, "Metadata")
    for key, value in tags.items():
        ElementTree.SubElement(metadata, "MDI", key=key).text = _legible(value)


def _add_colours(band: ElementTree.Element, classes: Sequence[SegmentationClass]) -> None:
    ElementTree.SubElement(band, "ColorInterp").text = "Palette"
    table = ElementTree.SubElement(band, "ColorTable")
    colours = {item.value: (*item.rgb, 255) for item in classes}
    for number in range(256):
        absent = (0, 0, 0, 0 if number == NODATA else 255)
        cells = map(str, colours.get(number, absent))
        entry = dict(zip(("c1", "c2", "c3", "c4"), cells, strict=True))
        ElementTree.SubElement(table, "Entry", entry)


def _add_source(
    band: ElementTree.Element, file: str, number: int, window: Window, frame: Frame
) -> None:
    height, width = str(window.height), str(window.width)
    row, col = window.row_off - frame.window.row_off, window.col_off - frame.window.col_off
    source = ElementTree.SubElement(band, "SimpleSource")
    ElementTree.SubElement(source, "SourceFilename", relativeToVRT="1").text = file
    ElementTree.SubElement(source, "SourceBand").text = str(number)
    ElementTree.SubElement(source, "SrcRect", xOff="0", yOff="0", xSize=width, ySize=height)
    ElementTree.SubElement(source, "DstRect", xOff=str(col), yOff=str(row), xSize=width, ySize=height)


def make_cog(joined: Path, cog: Path, product: Product, tallies: Sequence[Tally]) -> None:
    """Write what is ``joined`` as a COG, and read all of it.

    Raises:
        OSError: its bands are not what ``tallies`` tell of them.
    """
    with quiet():
        if product.overviews == "mode":
            _add_overviews(joined, NODATA)
        rasterio_copy(
            joined,
            cog,
            driver="COG",
            blocksize=BLOCK,
            compress="deflate",
            predictor="no" if product.dtype == "uint8" else "yes",
            overview_resampling=product.overviews,
            statistics="auto",  # those of the joined raster
            bigtiff="if_safer",
            num_threads=str(usable_cores()),
        )
        # A full disk does not always stop GDAL: what it has written is looked at, all of it.
        kind = TALLIES[product.dtype]
        pieces = zip(*([kind.of(band) for band in blocks] for blocks in _blocks(cog)), strict=True)
        found = [add_up(band) for band in pieces]
        for level in range(_overviews(cog)):
            for _ in _blocks(cog, overview_level=level):
                pass
    if not all(tally.holds(band) for tally, band in zip(tallies, found, strict=True)):
        raise OSError("what was written reads otherwise")


def _add_overviews(joined: Path, nodata: int) -> None:
    """Give the VRT ``joined``, of one band, the overviews that a COG of it is to have.

    GDAL's own way to the most frequent value takes ten times as long. They are left to it where the
    raster is so narrow that one would have no pixel.
    """
    with rasterio.open(joined) as dataset:
        narrow, wide = sorted(dataset.shape)
    levels = 0
    while wide >> levels > BLOCK:
        levels += 1
    if not narrow >> levels:
        return
    tree = ElementTree.parse(joined)
    band = tree.find("VRTRasterBand")
    assert band is not None
    finer = joined
    for number in range(1, levels + 1):
        coarser = joined.with_name(f"{joined.stem}-overview-{number}.tif")
        _halve(finer, coarser, nodata)
        overview = ElementTree.SubElement(band, "Overview")
        ElementTree.SubElement(overview, "SourceFilename", relativeToVRT="1").text = coarser.name
        ElementTree.SubElement(overview, "SourceBand").text = "1"
        finer = coarser
    tree.write(joined, encoding="utf-8")


def _halve(finer: Path, coarser: Path, nodata: int) -> None:
    """Write ``finer`` at half its size, block by block; an odd last row or column is left out."""
    with rasterio.open(finer) as source:
        height, width = source.height // 2, source.width // 2
        with rasterio.open(
            coarser, "w", driver="GTiff", count=1, height=height, width=width, dtype="uint8",
            nodata=nodata, compress="deflate", zlevel=1, tiled=True, blockxsize=BLOCK, blockysize=BLOCK,
            bigtiff="if_safer",
        ) as target:  # fmt: skip
            for row in range(0, height, BLOCK):
                for col in range(0, width, _COLUMNS):
                    rows, cols = min(BLOCK, height - row), min(_COLUMNS, width - col)
                    values = source.read(1, window=Window(2 * col, 2 * row, 2 * cols, 2 * rows))
                    target.write(halve(values, nodata), 1, window=Window(col, row, cols, rows))


def halve(values: NDArray[np.uint8], nodata: int) -> NDArray[np.uint8]:
    """The most frequent of each 2 x 2 of ``values`` (2h, 2w), the first of equals, as GDAL has it.

    Pixels without data do not count, unless all four are.
    """
    a, b, c, d = (np.ascontiguousarray(values[row::2, col::2]) for row in (0, 1) for col in (0, 1))
    found = a.copy()
    for other in (b, c, d):
        _replace(found, other, found == nodata)
    # Of two pairs the one that is whole first counts: the last to be looked at here.
    for last, before in ((d, (a, b, c)), (c, (a, b)), (b, (a,))):
        paired = np.logical_or.reduce([last == value for value in before])
        paired &= last != nodata
        _replace(found, last, paired)
    return found


def _replace(values: NDArray[np.uint8], others: NDArray[np.uint8], where: NDArray[np.bool_]) -> None:
    """Put ``others`` into ``values`` where it is asked for."""
    mask = np.negative(where.view(np.uint8))  # four times faster than numpy's where
    mask &= values ^ others
    values ^= mask


def _overviews(cog: Path) -> int:
    with rasterio.open(cog) as dataset:
        return len(dataset.overviews(1))


def _blocks(cog: Path, **level: int) -> Iterator[NDArray[Any]]:
    """All of a raster, a few of its blocks at a time."""
    with rasterio.open(cog, **level) as dataset:
        for row in range(0, dataset.height, BLOCK):
            for col in range(0, dataset.width, _COLUMNS):
                rows, cols = min(BLOCK, dataset.height - row), min(_COLUMNS, dataset.width - col)
                yield dataset.read(window=Window(col, row, cols, rows))


def aux_path(raster: Path) -> Path:
    """The file beside ``raster`` in which GDAL looks for what the format cannot hold."""
    return raster.with_name(raster.name + ".aux.xml")


def write_names(path: Path, classes: Sequence[SegmentationClass]) -> None:
    """Write an ``.aux.xml`` with the names of ``classes``, which a TIFF cannot carry; QGIS reads it."""
    root = ElementTree.Element("PAMDataset")
    band = ElementTree.SubElement(root, "PAMRasterBand", band="1")
    names = {item.value: item.name for item in classes}
    categories = ElementTree.SubElement(band, "CategoryNames")
    for value in range(max(names) + 1):
        ElementTree.SubElement(categories, "Category").text = _legible(names.get(value, ""))
    table = ElementTree.SubElement(band, "GDALRasterAttributeTable", tableType="thematic")
    # Type 0 integer, 2 string; usage 5 value, 2 name, 6 to 8 red, green, blue (GDAL's gdal_rat.h).
    columns = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
    for place, (title, kind, usage) in enumerate(columns):
        column = ElementTree.SubElement(table, "FieldDefn", index=str(place))
        ElementTree.SubElement(column, "Name").text = title
        ElementTree.SubElement(column, "Type").text = str(kind)
        ElementTree.SubElement(column, "Usage").text = str(usage)
    for place, item in enumerate(classes):
        row = ElementTree.SubElement(table, "Row", index=str(place))
        for cell in (item.value, item.name, *item.rgb):
            ElementTree.SubElement(row, "F").text = _legible(str(cell))
    ElementTree.indent(root)
    ElementTree.ElementTree(root).write(path, encoding="utf-8")


class quiet(warnings.catch_warnings):  # noqa: N801
    """Without rasterio's warning about maps that have no georeference: the scene had none."""

    def __enter__(self) -> None:
        super().__enter__()
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
